"""Verification: log P by hand, equal lengths, what is never replaced, the verdict, the model, and the reasoner."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import (
    IFR,
    Attribution,
    FlashTrace,
    InputError,
    Recommended,
    Recursive,
    Span,
    explain,
    reasoner,
)
from flashtrace_plugin.cli.app import app
from flashtrace_plugin.errors import ModelWarning, UnsupportedModelError
from flashtrace_plugin.evaluation import tasks
from flashtrace_plugin.graph.result import Graph
from flashtrace_plugin.units.shares import unit_tokens
from flashtrace_plugin.verify import Verification, run
from flashtrace_plugin.verify.run import verify_units
from tests.tiny import BOS, EOS, PAD, random_ids, tiny, tiny_tokenizer

PROMPT, LENGTH, NEW = 20, 32, 9
UNITS = [Span(0, 5), Span(5, 8), Span(8, 14), Span(14, 16), Span(16, 20)]
TARGET, REASONING = Span(28, 31), Span(21, 26)
CHAT = "{% for m in messages %}<s>{{ m.role }}:\n{{ m.content }}</s>{% endfor %}"


@cache
def sequence() -> tuple[torch.nn.Module, torch.Tensor]:
    return tiny("qwen3", seed=3), random_ids(LENGTH, seed=4)


def attributed(**options) -> Attribution:
    model, ids = sequence()
    where = {"target": TARGET, "reasoning": REASONING}
    return FlashTrace(model, **({"hops": 2} | options)).attribute_ids(ids, prompt_length=PROMPT, **where)


def with_units(scores: list[float]) -> Attribution:
    """The attribution with these numbers on the first token of each unit."""
    found = torch.zeros(PROMPT)
    found[[span.start for span in UNITS]] = torch.tensor(scores).float()
    return dataclasses.replace(attributed(), scores=found)


def log_p(replaced: list[int], watched: Span, token: int = NEW) -> float:
    """By a plain loop, one full forward pass."""
    model, ids = sequence()
    row = ids.clone()
    row[replaced] = token
    with torch.no_grad():
        logits = model(row[None], attention_mask=torch.ones(1, LENGTH)).logits[0].double()
    return sum(float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in watched)


@pytest.fixture
def rows(monkeypatch):
    """The rows that were run."""
    seen: list[torch.Tensor] = []
    plain = run.token_log_likelihood
    monkeypatch.setattr(run, "token_log_likelihood", lambda m, ids, **k: (seen.append(ids), plain(m, ids, **k))[1])
    return seen


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("through", "watched"), [("target", TARGET), ("reasoning", Span(PROMPT, TARGET.stop)), (None, Span(PROMPT, 31))]
)
def test_log_p_by_hand(through, watched):
    found = with_units([0.1, 0.5, 0.2, 0.3, 0.0]).verify(
        sequence()[0], unit=UNITS, through=through, fractions=(0.4, 0.2), draws=3, replacement=NEW, batch_size=4
    )
    everything, first, two = list(range(20)), [5, 6, 7], [5, 6, 7, 14, 15]
    assert found.fractions == (0.2, 0.4) and found.named == ((1,), (1, 3)) and found.replacement == NEW
    assert found.log_p == pytest.approx(log_p([], watched), abs=1e-4)
    assert found.target_log_p == pytest.approx(log_p([], TARGET), abs=1e-4)
    assert found.replaced_log_p == pytest.approx(log_p(everything, watched), abs=1e-4)
    assert found.removed.tolist() == pytest.approx([log_p(first, watched), log_p(two, watched)], abs=1e-4)
    others = [[i for i in everything if i not in named] for named in (first, two)]
    assert found.kept.tolist() == pytest.approx([log_p(o, watched) for o in others], abs=1e-4)
    assert sorted(found.alone) == [0, 1, 2, 3, 4]
    alone = [log_p(list(UNITS[i]), watched) for i in found.alone]
    assert found.alone_removed.tolist() == pytest.approx(alone, abs=1e-4)
    assert found.effect == pytest.approx(found.log_p - found.replaced_log_p)
    assert found.random_removed.shape == found.random_kept.shape == (3, 2)


def test_random_choices_have_as_many_tokens_and_none_of_the_named(rows):
    model, ids = sequence()
    units = [list(range(a, b)) for a, b in ((0, 4), (4, 11), (11, 13), (15, 20))]
    found = verify_units(
        model,
        ids,
        units=units,
        scores=torch.tensor([0.4, 0.1, 0.2, 0.1]),
        texts=["a", "b", "c", "d"],
        watched=TARGET,
        fractions=(0.2, 0.5),
        draws=6,
        replacement=NEW,
        seed=5,
    )
    inside = set(range(20)) - {13, 14}
    changed = [set((row != ids).nonzero()[:, 0].tolist()) for row in rows[0]]
    assert set().union(*changed) <= inside
    for named, removed, kept in zip(found.named, found.random_removed.T, found.random_kept.T, strict=True):
        top = {i for u in named for i in units[u]}
        drawn = [sorted(c) for c in changed if len(c) == len(top) and not c & top]
        assert_among(removed, [log_p(positions, TARGET) for positions in drawn])
        assert_among(kept, [log_p(sorted(inside - set(positions)), TARGET) for positions in drawn])


def assert_among(found: torch.Tensor, known: list[float]) -> None:
    assert float((found[:, None] - torch.tensor(known).double()).abs().min(1).values.max()) < 1e-4


def test_the_seed_decides_the_random_choices():
    found = [with_units([5, 4, 3, 2, 1]).verify(sequence()[0], unit=UNITS, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(found[0].random_removed, found[1].random_removed)
    assert not torch.equal(found[0].random_removed, found[2].random_removed)


def test_at_most_sixteen_units_are_replaced_alone():
    model, ids = sequence()
    units = [[i] for i in range(20)]
    found = verify_units(model, ids, units=units, scores=torch.arange(20.0), texts=["x"] * 20, watched=TARGET)
    assert found.alone[:8] == tuple(range(19, 11, -1)) and len(set(found.alone)) == 16


# What is replaced ---------------------------------------------------------------------------------------------------


def test_template_and_special_tokens_always_stay(rows):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    messages = [{"role": "system", "content": "The box is red."}, {"role": "user", "content": "Where is it? It is."}]
    model = tiny("qwen3", eos_token_id=EOS, pad_token_id=PAD, bos_token_id=BOS)
    found = IFR(model, tokenizer).attribute(messages, "In the garden.")
    told = found.verify(unit="sentence", replacement=NEW, draws=2)
    assert told.units == ("The box is red.", "Where is it?", "It is.")
    assert told.watched == "the answer"
    ids = torch.tensor(found.token_ids)
    changed = {i for row in rows[0] for i in (row != ids).nonzero()[:, 0].tolist()}
    text = "".join(found.tokens[i] if i in changed else "|" for i in range(found.prompt.stop))
    assert re.split(r"\|+", text.strip("|")) == ["The box is red.", "Where is it? It is."]


def test_a_special_token_inside_a_unit_stays(rows):
    model, ids = tiny("qwen3", seed=3), random_ids(LENGTH, seed=4)
    ids[[6, 9]] = EOS
    found = IFR(model).attribute_ids(ids, prompt_length=PROMPT, target=TARGET)
    told = dataclasses.replace(found, contents=()).verify(model, unit=UNITS, replacement=NEW)
    assert told.tokens == (5, 2, 5, 2, 4)
    assert bool((rows[0][:, [6, 9]] == EOS).all())


def test_a_character_of_several_tokens_is_replaced_whole():
    tokens = ["The ", "☁", "", "", " is", " red", "."]
    units = [[(0, 4)], [(4, 5)], [(5, 8)], [(8, 13)]]
    assert unit_tokens(tokens, units, [True] * 4) == [[0], [1, 2, 3], [4], [5, 6]]


def test_a_token_that_two_units_share_is_the_larger_parts_and_no_ones_where_the_template_has_a_part():
    tokens, units = ["ab", "cde", "fg"], [[(0, 3)], [(3, 6)], [(6, 7)]]
    assert unit_tokens(tokens, units, [True, True, True]) == [[0], [1, 2], []]
    assert unit_tokens(tokens, units, [True, True, False]) == [[0], [1], []]


# The verdict --------------------------------------------------------------------------------------------------------


def told(removed, random, **changed) -> Verification:
    """A hand-made one of ten sentences; log P is -1 and -21 with everything replaced."""
    count = len(removed)
    made = Verification(
        unit="sentence",
        units=tuple("abcdefghij"),
        scores=torch.arange(10.0).double(),
        tokens=(3,) * 10,
        watched="the answer",
        log_p=-1.0,
        target_log_p=-1.0,
        replaced_log_p=-21.0,
        fractions=(0.1, 0.3)[:count],
        named=((9,), (9, 8, 7))[:count],
        removed=torch.tensor(removed).double(),
        kept=torch.zeros(count).double(),
        random_removed=torch.tensor(random).double(),
        random_kept=torch.zeros(len(random), count).double(),
        alone=(9, 8, 0),
        alone_removed=torch.tensor([-9.0, -5.0, -1.0]).double(),
        replacement=0,
    )
    return dataclasses.replace(made, **changed)


def test_an_explanation_holds_where_the_named_units_do_more_than_any_random_choice():
    found = told([-6.0, -15.2], [[-1.2, -1.2], [-2.0, -2.9]])
    assert found.holds and found.share.tolist() == pytest.approx([0.25, 0.71]) and found.correlation == 1.0
    assert str(found) == found.sentence
    assert found.sentence == (
        "Removing the three sentences named first lowers log P of the answer (-1.0) by 14.2 nats; random sentences "
        "of equal length lower it by 1.1 [0.2, 1.9]."
    )


def test_it_does_not_hold_where_one_random_choice_does_as_much():
    found = told([-6.0, -4.0], [[-1.2, -1.2], [-2.0, -4.0]])
    assert not found.holds and found.sentence == (
        "This explanation does not hold: removing the three sentences named first lowers log P of the answer (-1.0) "
        "by 3.0 nats; random sentences of equal length lower it by 1.6 [0.2, 3.0]; replacing all ten sentences lowers "
        "it by 20.0 nats."
    )


def test_the_largest_fraction_decides():
    assert told([-2.0, -10.0], [[-11.0, -3.0], [-1.0, -1.0]]).holds
    assert not told([-20.0, -10.0], [[-1.0, -10.5], [-1.0, -1.0]]).holds


def test_it_does_not_hold_with_less_than_a_tenth_of_the_effect():
    assert told([-3.0], [[-1.1], [-1.2]]).holds
    found = told([-2.9], [[-1.1], [-1.2]])
    assert not found.holds and "by 1.9 nats" in found.sentence and "lowers it by 20.0 nats" in found.sentence


def test_an_explanation_that_names_none_first_does_not_hold():
    found = told([-6.0, -15.2], [[-1.2, -1.2], [-2.0, -2.9]], scores=torch.full((10,), 0.1).double())
    assert not found.holds
    assert found.sentence == "This explanation does not hold: it gives all ten sentences the same score."


@pytest.mark.parametrize(("end", "words"), [(-1.06, "lowers"), (0.5, "raises"), (-1.01, "changes")])
def test_nothing_is_explained_where_replacing_everything_does_nothing(end, words):
    found = told([-9.0], [[-1.1], [-1.2]], replaced_log_p=end, target_log_p=-0.5)
    assert not found.holds and bool(found.share.isnan().all())
    assert found.sentence.startswith(
        f"This explanation does not hold: replacing all ten sentences {words} log P of the answer (-1.0, the answer's "
        "part -0.5) by"
    )


def test_json_and_table_have_all_numbers(tmp_path):
    found = told([-6.0, -15.2], [[-1.2, -1.2], [-2.0, -2.9]])
    found.save(tmp_path / "v.json")
    loaded = Verification.load(tmp_path / "v.json")
    assert loaded.to_dict() == found.to_dict() == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert loaded.holds and loaded.named == found.named and torch.equal(loaded.random_removed, found.random_removed)
    frame = found.to_frame()
    assert frame["units"].tolist() == [1, 3] and frame["tokens"].tolist() == [3, 9]
    assert frame["drop"].tolist() == pytest.approx([5.0, 14.2])
    assert frame["random_drop_high"].tolist() == pytest.approx([1.0, 1.9])
    flat = dataclasses.replace(found, scores=torch.zeros(10).double())
    assert flat.correlation != flat.correlation and flat.to_dict()["correlation"] is None


@pytest.mark.parametrize("content", ["no json", "[1]", "{}", '{"format": "flashtrace-verification/1"}'])
def test_foreign_files_are_refused(content, tmp_path):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(InputError, match=r"not a verification|is not JSON|holds a list|lacks unit, units"):
        Verification.load(tmp_path / "v.json")


# The model ----------------------------------------------------------------------------------------------------------


def test_an_attribution_knows_its_model_and_copies_and_files_do_not(tmp_path):
    found = attributed()
    assert found.model is sequence()[0]
    assert found.verify(unit=UNITS, draws=2).log_p == pytest.approx(log_p([], Span(PROMPT, 31)), abs=1e-4)
    found.save(tmp_path / "a.json")
    for other in (
        Attribution.load(tmp_path / "a.json"),
        pickle.loads(pickle.dumps(found)),
        copy.copy(found),
        copy.deepcopy(found),
        dataclasses.replace(found),
    ):
        assert other == found and other.model is None and "_model" not in other.to_dict()
        with pytest.raises(InputError, match=r"the model is not known.*verify\(model=\.\.\.\)"):
            other.verify(unit=UNITS)
        assert other.verify(found.model, unit=UNITS, draws=2).log_p == found.verify(unit=UNITS, draws=2).log_p


def test_an_attribution_does_not_keep_its_model_alive():
    model = tiny("gpt2")
    found = IFR(model).attribute_ids(random_ids(12), prompt_length=6, target=Span(8, 9))
    del model
    gc.collect()
    assert found.model is None
    with pytest.raises(InputError, match="its model is gone"):
        found.verify(unit=[Span(0, 3), Span(3, 6)])


def test_a_matrix_has_no_model():
    matrix = torch.rand(12, 12).tril()
    found = Recursive(matrix).attribute_ids(random_ids(12), prompt_length=6, target=Span(8, 9))
    with pytest.raises(InputError, match="made of a matrix"):
        found.verify(unit=[Span(0, 3), Span(3, 6)])


def test_another_model_is_refused_or_named():
    found = attributed()
    with pytest.raises(InputError, match="family 'qwen3' was explained, and this one is 'gpt2'"):
        found.verify(tiny("gpt2"), unit=UNITS)
    with pytest.raises(InputError, match=r"outside the vocabulary 0\.\.99"):
        found.verify(tiny("qwen3", vocab_size=100), unit=UNITS)
    renamed = tiny("qwen3")
    renamed.config.name_or_path = "other/name"
    with pytest.warns(ModelWarning, match="'Qwen3ForCausalLM' was explained, and 'other/name' is run"):
        found.verify(renamed, unit=UNITS)
    with pytest.raises(UnsupportedModelError):
        found.verify(torch.nn.Linear(2, 2), unit=UNITS)


def test_an_adapter_of_peft_is_verified_with_its_weights():
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    wrapped = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    ids = random_ids(LENGTH, seed=4)
    found = IFR(wrapped).attribute_ids(ids, prompt_length=PROMPT, target=TARGET)
    by_itself, given = found.verify(unit=UNITS, draws=2), found.verify(wrapped, unit=UNITS, draws=2)
    with torch.no_grad():
        logits = wrapped(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    expected = sum(float(logits[t - 1, ids[t]]) for t in TARGET)
    assert by_itself.log_p == given.log_p == pytest.approx(expected, abs=1e-4)


def test_a_bridge_gives_the_numbers_of_its_model():
    pytest.importorskip("transformer_lens")
    from flashtrace_lens import bridge_for, names_filter

    model, ids = sequence()
    bridge = bridge_for(model)
    where = {"prompt_length": PROMPT, "target": TARGET, "reasoning": REASONING}
    _, cache = bridge.run_with_cache(ids[None], names_filter=names_filter)
    expected = attributed().verify(unit=UNITS, draws=2)
    for host in (bridge, cache):
        found = FlashTrace(host, hops=2).attribute_ids(ids, **where)
        torch.testing.assert_close(found.verify(unit=UNITS, draws=2).removed, expected.removed, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.verify(bridge, unit=UNITS, draws=2).kept, expected.kept, atol=1e-4, rtol=0)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": [Span(0, 20)]}, "there is one span that could be replaced"),
        ({"fractions": (0.0,)}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fractions": (0.2, 1.5)}, "got 1.5"),
        ({"fractions": ()}, "fractions is empty"),
        ({"fractions": "0.1"}, "fractions must be numbers"),
        ({"seed": "x"}, "seed a whole number"),
        ({"fractions": (1.0,)}, "the five spans named first have 20 tokens and all others 0"),
        ({"fractions": (0.6,)}, "three spans named first have 15 tokens and all others 5: nothing of equal length"),
        ({"draws": 1}, "draws must be a whole number of at least 2"),
        ({"draws": 2.5}, "got 2.5"),
        ({"replacement": 10**6}, "outside the vocabulary"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"through": "answer"}, "through must be 'reasoning' or 'target'"),
        ({"unit": "chapter"}, "units must be one of"),
    ],
)
def test_what_cannot_be_verified_is_refused(options, message):
    found = with_units([0.5, 0.1, 0.4, 0.1, 0.2])
    with pytest.raises(InputError, match=re.escape(message)):
        found.verify(sequence()[0], **({"unit": UNITS} | options))


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="must be finite"):
        with_units([0.5, float("nan"), 0.4, 0.1, 0.2]).verify(sequence()[0], unit=UNITS)


def test_without_reasoning_there_is_none_to_watch():
    model, ids = sequence()
    found = IFR(model).attribute_ids(ids, prompt_length=PROMPT, target=TARGET)
    with pytest.raises(InputError, match="there is no reasoning to watch"):
        found.verify(unit=UNITS, through="reasoning")
    assert found.verify(unit=UNITS).watched == "the answer"
    assert attributed(hops=0).verify(unit=UNITS).watched == "the answer"


@pytest.mark.parametrize(
    ("units", "scores"), [([[1], [1, 2]], 2), ([[1], []], 2), ([[1], [TARGET.start]], 2), ([[1], [2]], 3)]
)
def test_positions_that_are_no_units_are_refused(units, scores):
    model, ids = sequence()
    with pytest.raises(InputError, match=r"units must be lists of token positions|give one for each"):
        verify_units(model, ids, units=units, scores=torch.ones(scores), texts=["a", "b"], watched=TARGET)


# The reasoner -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solved():
    """A question in four steps, right answered, and its explanation."""
    model, tokenizer = reasoner.load()
    sample = tasks.make("variable_tracking", 101, hops=4, chains=3, length=128)
    generation = reasoner.answer(model, tokenizer, sample)
    assert reasoner.final_answer(generation) == sample.answer
    return model, tokenizer, sample.prompt, generation, explain(model, tokenizer, sample.prompt, generation)


@pytest.mark.parametrize("unit", ["step", "sentence"])
def test_the_explanation_of_a_right_answer_holds(solved, unit):
    found = solved[-1].verify(unit=unit)
    assert found.holds and found.watched == "the reasoning and the answer" and float(found.drop[-1]) > 100
    assert float(found.random_drop[:, -1].max()) < 30 and found.sentence.startswith("Removing the ")
    assert float(found.kept[-1]) > float(found.random_kept[:, -1].max())


@pytest.mark.parametrize("kind", ["permuted", "random"])
def test_other_scores_do_not_hold(solved, kind):
    """Scores shuffled among the tokens name a step of the chain by luck now and then: one of four may hold."""
    explained, held = solved[-1], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(explained.scores), generator=generator)
        random = torch.rand(len(order), generator=generator)
        other = dataclasses.replace(explained, scores=explained.scores[order] if kind == "permuted" else random)
        found = other.verify(explained.model, unit="step", seed=seed, fractions=(0.2,))
        held.append(found.holds)
        assert found.holds != found.sentence.startswith("This explanation does not hold: ")
    assert sum(held) <= (kind == "permuted")


def test_a_copied_answer_does_not_fall_while_its_reasoning_is_kept(solved):
    found = solved[-1].verify(unit="step", through="target")
    assert not found.holds and "so nothing in them explains it" in found.sentence


def test_the_log_p_of_an_answer_that_the_model_did_not_write_is_told(solved):
    model, tokenizer, prompt, generation, _ = solved
    wrong = generation.rpartition(" ")[0] + " 35"
    found = explain(model, tokenizer, prompt, wrong).verify(unit="step")
    assert found.target_log_p < -10 and f"the answer's part {found.target_log_p:.1f}" in found.sentence


def test_a_step_of_a_graph_falls_without_what_it_rests_on(solved, tmp_path):
    model, tokenizer, prompt, generation, _ = solved
    graph = Recommended(model, tokenizer).graph(prompt, generation, unit="step")
    for step in (0, 3, None):
        found = graph.verify(step)
        assert found.holds and float(found.drop[-1]) > 5 and found.target_log_p == found.log_p
        assert found.watched == ("the answer" if step is None else f"step {step}")
        assert len(found.units) == 32 + (len(graph.steps) if step is None else step)
    graph.save(tmp_path / "g.json")
    loaded = Graph.load(tmp_path / "g.json")
    with pytest.raises(InputError, match="the model is not known"):
        loaded.verify(1)
    assert loaded.verify(1, model, draws=2).log_p == graph.verify(1, draws=2).log_p
    with pytest.raises(InputError, match="there is no step 9"):
        graph.verify(9)


def test_the_command_prints_the_sentence():
    prompt = "v12 v7 ; the grass is green . v3 41 ; apple v9 ; v7 84 ; ? v12 think"
    called = CliRunner().invoke(app, ["attribute", "--prompt", prompt, "--verify-unit", "step"])
    assert called.exit_code == 0, called.output
    assert called.output.splitlines()[-1].startswith(
        "Removing the two steps named first lowers log P of the reasoning"
    )
    refused = CliRunner().invoke(app, ["attribute", "--prompt", "v12 v7 ; v7 84 ; ? v12 think", "--verify"])
    assert refused.exit_code == 2 and "one sentence that could be replaced" in refused.stderr


def test_the_page_runs_as_it_stands():
    page = (Path(__file__).parent.parent / "docs" / "verify.md").read_text(encoding="utf-8")
    printed: list[str] = []
    names: dict = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelWarning)
        for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
            exec(compile(block, "docs/verify.md", "exec"), names)
    text = " ".join(re.sub(r"^> ", "", page, flags=re.MULTILINE).split())
    assert len(printed) == 4 and all(line in text for line in printed), printed
