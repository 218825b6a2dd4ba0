"""The Inseq adapter: names, numbers, layout, files, options, and what it leaves behind."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

inseq = pytest.importorskip("inseq")

from inseq.data import Aggregator  # noqa: E402
from inseq.utils.id_utils import INSEQ_ID_MAP  # noqa: E402

import flashtrace_inseq  # noqa: E402
from flashtrace_inseq.aggregators import HopAggregator, PartAggregator  # noqa: E402
from flashtrace_inseq.registration import CLASSES, warn_if_taken  # noqa: E402
from flashtrace_plugin import IFR, Attribution, FlashTrace, Method, RecursiveAttribution, Span  # noqa: E402
from flashtrace_plugin.core.recursion import Hop  # noqa: E402
from flashtrace_plugin.errors import InputError, ReasoningWarning, SpanError, UnsupportedModelError  # noqa: E402
from flashtrace_plugin.methods import METHODS as REGISTRY  # noqa: E402
from flashtrace_plugin.methods import driven, register_method  # noqa: E402
from flashtrace_plugin.methods.base import options_of  # noqa: E402
from tests.tiny import BOS, EOS, tiny, tiny_tokenizer  # noqa: E402

PROMPT = "The key of the red box is in the garden. Question: where is the key?"
GENERATION = "<think>\nThe box is red.\n</think>\nIt is in the garden."
TEXT = PROMPT + GENERATION
METHODS = ("flashtrace", "ifr", "recursive")


@pytest.fixture(scope="module")
def hf():
    return tiny("qwen3")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(hf, tokenizer):
    return inseq.load_model(hf, "flashtrace", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hf, tokenizer):
    path = tmp_path_factory.mktemp("tiny")
    hf.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def out(model):
    return model.attribute(PROMPT, TEXT, hops=2)


def ids_of(tokenizer, text):
    return tokenizer(text)["input_ids"]


def core(hf, tokenizer, method=FlashTrace, prompt=PROMPT, generation=GENERATION, **options):
    return method(hf, tokenizer, **options).attribute(prompt, generation)


def numbers(out):
    return [item.target_attributions for item in out.sequence_attributions]


def html(found, **options):
    """What is shown, without the names that are drawn for every call."""
    return re.sub(r"\b[a-z]{20}_", "", found.show(display=False, return_html=True, **options))


def assert_same(a, b):
    for x, y in zip(numbers(a), numbers(b), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-5, atol=1e-6)


# Names


def test_methods_are_registered_and_explained(capsys):
    assert set(METHODS) <= set(inseq.list_feature_attribution_methods())
    assert {"hops", "parts"} <= set(inseq.list_aggregators())
    for name in (*METHODS, "hops", "parts"):
        inseq.explain(name)
        assert len(capsys.readouterr().out) > 200


def test_exported_classes_are_those_that_inseq_finds():
    methods, aggregators = (kind.available_classes() for kind in (inseq.attr.FeatureAttribution, Aggregator))
    exported = {
        "flashtrace": flashtrace_inseq.FlashTraceAttribution,
        "ifr": flashtrace_inseq.IFRAttribution,
        "recursive": flashtrace_inseq.RecursiveTokenAttribution,
        "heta": flashtrace_inseq.HETAAttribution,
    }
    assert {name: methods[name] for name in exported} == exported
    assert {name: cls.core for name, cls in exported.items()} == {name: REGISTRY[name] for name in exported}
    assert aggregators["hops"] is HopAggregator and issubclass(HopAggregator, PartAggregator)


@pytest.mark.parametrize("name", METHODS)
def test_explanation_names_every_option(name, capsys):
    inseq.explain(name)
    text = capsys.readouterr().out
    method = inseq.attr.FeatureAttribution.available_classes()[name]
    assert {"target", "reasoning", "positions", "ignore", "format"} <= method.options()
    assert all(f"\n    {option}: " in text for option in method.options())
    assert all(one.help[:60] in text.replace("\n       ", "") for one in options_of(method.core))


def test_import_is_silent_when_the_names_are_free_and_warns_when_not(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_taken()
    known = inseq.attr.FeatureAttribution.available_classes() | {"ifr": torch.nn.Linear}
    monkeypatch.setattr(inseq.attr.FeatureAttribution, "available_classes", classmethod(lambda cls: known))
    with pytest.warns(UserWarning, match=r"method 'ifr' is already registered in Inseq by torch\.nn"):
        warn_if_taken()


def test_missing_inseq_names_the_extra():
    code = "import sys; sys.modules['inseq'] = None\nimport flashtrace_inseq"
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (
        "ImportError: flashtrace_inseq needs Inseq; install it with: pip install 'flashtrace-plugin[inseq]'"
        in run.stderr
    )


# Methods that are registered after the import


class Late(Method):
    """A method of another package: more importance for what is nearer."""

    name = "late"
    drives = driven(hops=0, recursion="reasoning", positions="token", ignore=())

    def start(self, task):
        def step(weights):
            alpha = torch.arange(task.length) * (torch.arange(task.length) < weights.nonzero().min())
            return Hop(alpha / alpha.sum(), components={"layers": torch.ones(3, 2)})

        return step


class LateByToken(Late):
    """The same with a row for every target token."""

    name = "late_by_token"

    def start(self, task):
        step = super().start(task)
        rows = torch.arange(len(task.target) * task.length).reshape(-1, task.length).float()
        return lambda weights: replace(step(weights), components={"per_token": rows})


@pytest.fixture
def registered():
    """Two methods that are registered for one test."""
    yield [register_method(Late), register_method(LateByToken)]
    for name in (Late.name, LateByToken.name):
        for known in (REGISTRY._registered, CLASSES, INSEQ_ID_MAP):
            known.pop(name, None)
    gc.collect()


def test_a_method_registered_later_is_there_by_name_with_the_numbers_of_python(
    hf, tokenizer, model, registered, capsys, tmp_path
):
    assert {"late", "late_by_token"} <= set(inseq.list_feature_attribution_methods())
    inseq.explain("late")
    explained = capsys.readouterr().out
    assert "A method of another package" in explained and "\n    hops: " in explained and "default: 0" in explained
    found = model.attribute(PROMPT, TEXT, method="late", hops=2)
    expected = core(hf, tokenizer, Late, hops=2)
    assert flashtrace_inseq.attributions(found) == [expected]
    assert expected.hop_scores[1].any()
    assert found[0]._parts == ["total", "hop 0", "hop 1", "hop 2", "everywhere"], (
        "a component that is not over tokens is no part"
    )
    assert_same(inseq.load_model(hf, "late", tokenizer=tokenizer).attribute(PROMPT, TEXT, hops=2), found)
    found.save(tmp_path / "out.json")
    assert inseq.FeatureAttributionOutput.load(tmp_path / "out.json") == found
    with pytest.raises(InputError, match="'late' has no option speed; it takes format, hops"):
        model.attribute(PROMPT, TEXT, method="late", attribution_args={"speed": 1})


def test_a_result_with_rows_for_target_tokens_has_their_columns_whatever_its_name(model, registered):
    item = model.attribute(PROMPT, TEXT, method="late_by_token")[0]
    (a,) = item._attributions
    assert item.target_attributions.shape == (a.target.stop, len(a.target))
    for column, position in enumerate(a.target):
        rows = a.components["per_token"][column]
        torch.testing.assert_close(item.target_attributions[:position, column], rows[:position])
        assert item.target_attributions[position:, column].isnan().all()


def test_a_method_that_is_registered_again_takes_its_own_place(registered):
    made = CLASSES["late"]
    again = type("Late", (Late,), {"__doc__": "Rewritten.", "__module__": __name__})
    register_method(again)
    assert CLASSES["late"] is made and made.core is again and INSEQ_ID_MAP["late"].__doc__.startswith("Rewritten.")
    names = [c.method_name for c in inseq.attr.FeatureAttribution.subclasses() if c.__name__ == "LateAttribution"]
    assert names == ["late"]


def test_a_later_clash_with_a_method_of_inseq_warns(monkeypatch, request):
    known = inseq.attr.FeatureAttribution.available_classes
    monkeypatch.setattr(
        inseq.attr.FeatureAttribution, "available_classes", lambda: known() | {"late": torch.nn.Linear}
    )
    with pytest.warns(UserWarning, match=r"method 'late' is already registered in Inseq by torch\.nn"):
        request.getfixturevalue("registered")


# Numbers


def test_flashtrace_is_the_core_method(hf, tokenizer, out):
    expected = core(hf, tokenizer, hops=2)
    scores = out[0].target_attributions
    n, start = len(expected.scores), expected.target.start
    torch.testing.assert_close(scores[:n, 0, 0], expected.scores)
    followed = torch.zeros(start, dtype=torch.bool)
    followed[expected.reasoning.slice] = True
    torch.testing.assert_close(scores[:start, 0, -1], expected.totals[:start] * ~followed)
    assert not scores[n:start, 0, 0].any() and (scores[n:start, 0, -1] > 0).any()
    torch.testing.assert_close(scores[:start, 0, 1:-1].T, expected.hop_scores[:, :start])
    assert scores[start].isnan().all()
    assert flashtrace_inseq.attributions(out) == [expected]


def test_reasoning_that_is_not_followed_keeps_its_mass(hf, tokenizer, model):
    found = model.attribute(PROMPT, TEXT, hops=0)
    total, direct = found[0].target_attributions[:-1, 0].T
    torch.testing.assert_close(total, direct)
    torch.testing.assert_close(direct, core(hf, tokenizer, hops=0).hop_scores[0, : len(direct)])


def test_recursive_is_the_core_method(hf, tokenizer, model):
    found = model.attribute(PROMPT, TEXT, method="recursive", hops=2)
    assert flashtrace_inseq.attributions(found) == [core(hf, tokenizer, RecursiveAttribution, hops=2)]
    assert found[0].target_attributions.shape[1:] == (1, 5)


def test_ifr_has_a_column_for_each_target_token(hf, tokenizer, model):
    found = model.attribute(PROMPT, TEXT, method="ifr")[0]
    expected = core(hf, tokenizer, IFR)
    target = expected.target
    assert found.target_attributions.shape == (target.stop, len(target))
    assert (found.attr_pos_start, found.attr_pos_end) == (target.start, target.stop)
    for column, position in enumerate(target):
        scores = found.target_attributions[:, column]
        torch.testing.assert_close(scores[:position], expected.components["per_token"][column, :position])
        assert scores[position:].isnan().all()
    mean = found.target_attributions[: len(expected.scores)].mean(1)
    torch.testing.assert_close(mean / mean.sum(), expected.scores)


def test_a_column_of_ifr_does_not_depend_on_the_others(model):
    together = model.attribute(PROMPT, TEXT, method="ifr")[0]
    alone = model.attribute(PROMPT, TEXT, method="ifr", attr_pos_start=36, attr_pos_end=37)[0]
    column = together.target_attributions[:37, 36 - together.attr_pos_start]
    torch.testing.assert_close(alone.target_attributions[:, 0], column, equal_nan=True)


@pytest.mark.parametrize(
    "options", [{"positions": "predicting"}, {"recursion": "generation"}, {"ignore": [".", 7]}, {"hops": 0}]
)
def test_options_reach_the_method(hf, tokenizer, model, options):
    found = model.attribute(PROMPT, TEXT, **options)
    assert flashtrace_inseq.attributions(found) == [core(hf, tokenizer, **options)]
    assert found.info["attribution_args"] == options


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ifr", {"positions": "predicting"}),
        ("ifr", {"ignore": ["garden", "."]}),
        ("recursive", {"recursion": "prompt", "ignore": [7]}),
        ("recursive", {"format": "think", "positions": "predicting"}),
        ("flashtrace", {"format": ["It", "the"]}),
    ],
)
def test_options_of_the_driver_reach_all_methods(hf, tokenizer, model, name, options, tmp_path):
    found = model.attribute(PROMPT, TEXT, method=name, **options)
    expected = core(hf, tokenizer, REGISTRY[name], **options)
    assert flashtrace_inseq.attributions(found) == [expected]
    assert expected != core(hf, tokenizer, REGISTRY[name])
    found.save(tmp_path / "out.json")
    assert inseq.FeatureAttributionOutput.load(tmp_path / "out.json").info == found.info


def test_ignored_tokens_may_come_from_an_iterator(hf, tokenizer, model):
    found = model.attribute(PROMPT, TEXT, ignore=iter([".", 7]))
    assert flashtrace_inseq.attributions(found) == [core(hf, tokenizer, ignore=[".", 7])]
    assert found.info["attribution_args"] == {"ignore": [".", 7]}


def test_hops_without_reasoning_are_said_out_loud(model):
    with pytest.warns(ReasoningWarning, match="flashtrace: 2 hops were asked for, but no reasoning was found"):
        model.attribute(PROMPT, PROMPT + " In the garden.", hops=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.attribute(PROMPT, TEXT, hops=2)


@pytest.mark.parametrize("name", METHODS)
def test_by_name_and_as_object_give_the_same(model, folder, name):
    by_name = inseq.load_model(folder, name)
    assert by_name.model.config._attn_implementation == "eager"
    assert model.model.config._attn_implementation == "sdpa"
    assert_same(by_name.attribute(PROMPT, TEXT), model.attribute(PROMPT, TEXT, method=name))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_families(family, tokenizer):
    hf = tiny(family)
    found = inseq.load_model(hf, "flashtrace", tokenizer=tokenizer).attribute(PROMPT, TEXT)
    assert flashtrace_inseq.attributions(found) == [core(hf, tokenizer)]


@pytest.mark.parametrize("name", METHODS)
def test_several_inputs_are_explained_one_by_one(model, name):
    prompts = [PROMPT, "Alice has 12 apples", PROMPT[:20]]
    texts = [TEXT, "Alice has 12 apples and gives 5 apples to Bob.", PROMPT[:20] + "<think>\nNo.\n</think>\nYes."]
    together = model.attribute(prompts, texts, method=name, batch_size=2, show_progress=False)
    alone = [model.attribute(p, t, method=name) for p, t in zip(prompts, texts, strict=True)]
    for found, single in zip(together, alone, strict=True):
        assert found == single[0]
    summed = alone[0] + alone[1] + alone[2]
    assert flashtrace_inseq.attributions(together) == flashtrace_inseq.attributions(summed)


# Layout


def test_a_span_is_one_merged_column(tokenizer, out):
    item = out[0]
    labels = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, TEXT))
    start = item.attr_pos_start
    assert [t.token for t in item.source] == labels[:start]
    assert item.target[-1].token == "".join(labels[start:]) and item.target[-1].id == -1
    assert (item.attr_pos_end, len(item.target)) == (start + 1, start + 1)
    assert item.target_attributions.shape == (start + 1, 1, 5)


def test_a_span_of_one_token_keeps_its_id(tokenizer, model):
    item = model.attribute(PROMPT, TEXT, target=[37, 38])[0]
    assert (item.target[-1].token, item.target[-1].id) == ("Ġgarden", tokenizer.convert_tokens_to_ids("Ġgarden"))


def test_hops_are_chosen_by_number_and_the_total_is_the_default(out):
    raw = out[0].target_attributions
    for chosen, part in ((None, 0), (0, 1), (1, 2), (2, 3)):
        for found in (out.aggregate(hop=chosen), out.aggregate("hops", hop=chosen)):
            torch.testing.assert_close(found[0].target_attributions, raw[..., part], equal_nan=True)
    assert out.aggregate("parts", part="hop 1")[0] == out.aggregate(hop=1)[0]
    assert out.aggregate("hops", select_idx=2)[0] == out.aggregate(hop=1)[0]
    with pytest.raises(InputError, match="no part 'hop 3'; there are total, hop 0, hop 1, hop 2"):
        out.show(hop=3)
    with pytest.raises(InputError, match="no parts to choose 'hop 1' from"):
        out.aggregate().aggregate("hops", hop=1)


def test_an_aggregated_result_can_be_shown_and_aggregated_again(out):
    once = out.aggregate(hop=1)
    assert once.aggregate()[0] == once[0]
    assert html(once) == html(out, hop=1)


def test_merging_tokens_sums_mass(out):
    words = out.aggregate(["subwords", "hops"], special_chars=("Ġ", "Ċ"))
    assert len(words[0].target) < len(out[0].target)
    total = out[0].target_attributions[:-1, 0, 0].sum()
    torch.testing.assert_close(words[0].target_attributions.nansum(), total)
    halves = out.aggregate(["spans", "hops"], target_spans=[(0, 9), (9, 19)], hop=1)
    hop = out[0].target_attributions[:, 0, 2]
    torch.testing.assert_close(halves[0].target_attributions[:2, 0], torch.stack([hop[:9].sum(), hop[9:19].sum()]))


@pytest.mark.parametrize("name", METHODS)
def test_every_aggregator_of_inseq_works(model, name):
    found = model.attribute(PROMPT, TEXT, method=name)
    for options in (
        {"aggregator": "subwords", "special_chars": "Ġ"},
        {"aggregator": "split", "split_pattern": r"\."},
        {"aggregator": "spans", "target_spans": (2, 5)},
        {"aggregator": "slices", "target_spans": (2, 5)},
    ):
        changed = found.aggregate(do_post_aggregation_checks=False, **options)
        assert changed[0].target_attributions.ndim == found[0].target_attributions.ndim
        assert changed.show(display=False, return_html=True)
    difference = found[0] - found[0]
    assert difference.target_attributions.nansum() == 0


@pytest.mark.parametrize("name", METHODS)
def test_everything_that_shows_shows(model, name, capsys):
    found = model.attribute(PROMPT, TEXT, method=name)
    found.show()
    assert "garden" in capsys.readouterr().out
    for page in (
        found.show(display=False, return_html=True),
        found.show_granular(display=False, return_html=True),
        found.show_tokens(display=False, return_html=True),
    ):
        assert "garden" in page
    assert "FlashTraceSequenceOutput" in str(found) and len(str(found)) < 4000
    scores = found.get_scores_dicts()[0]["target_attributions"]
    column = scores[(found[0].attr_pos_start, found[0].target[found[0].attr_pos_start].token)]
    assert column[(3, found[0].target[3].token)] == float(found.aggregate()[0].target_attributions[3, 0])
    assert {"source", "target", "target_attributions"} <= found[0].to_dict().keys()


def test_notebooks_show_the_table_and_draw_the_object(out, monkeypatch):
    import IPython.display
    import treescope

    displayed = []
    monkeypatch.setattr(flashtrace_inseq.outputs, "isnotebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", displayed.append)
    assert out.show(hop=1) is None
    returned = out[0].show(return_html=True, hop=1)
    assert len(displayed) == 2 and displayed[1].data == returned and "garden" in displayed[0].data
    assert out.show(display=False) is None and len(displayed) == 2
    assert "background:rgba(178.0, 24.0" in returned and "np.float64" not in returned
    assert "FlashTraceSequenceOutput" in treescope.render_to_text(out[0])


def test_tokens_are_decoded_in_place_also_the_merged_one(tokenizer, model):
    found = model.attribute(PROMPT, TEXT).decode_tokens(tokenizer)
    assert found[0].target[-1].token == "It is in the garden."
    assert "".join(t.token for t in found[0].source) + found[0].target[-1].token == TEXT
    cleaned = model.attribute(PROMPT, TEXT, clean_special_chars=True)
    assert "Ġ" not in "".join(t.token for t in cleaned[0].target)


# Files


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{}, {"compress": True}, {"ndarray_compact": False}])
def test_files_load_equal(model, tmp_path, name, options):
    found = model.attribute([PROMPT, PROMPT], [TEXT, TEXT + " Yes."], method=name)
    path = tmp_path / "out.json"
    for result in (found, found.aggregate()):
        result.save(path, overwrite=True, **options)
        loaded = inseq.FeatureAttributionOutput.load(path, decompress="compress" in options)
        assert loaded == result and result == loaded
        assert flashtrace_inseq.attributions(loaded) == flashtrace_inseq.attributions(result)
        assert html(loaded) == html(result)


def test_files_with_other_formats(out, tmp_path):
    path = tmp_path / "out.json"
    out.save(path, scores_precision="float16")
    loaded = inseq.FeatureAttributionOutput.load(path)
    torch.testing.assert_close(numbers(loaded)[0], numbers(out)[0], equal_nan=True, rtol=1e-3, atol=1e-3)
    assert flashtrace_inseq.attributions(loaded) == flashtrace_inseq.attributions(out)
    out.save(path, overwrite=True, use_primitives=True)
    out.save(path, overwrite=True, split_sequences=True)
    assert inseq.FeatureAttributionOutput.load(tmp_path / "out_0.json")[0] == out[0]


def test_files_load_in_a_process_that_imports_only_inseq(out, tmp_path):
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    out.save(ours)
    flashtrace_inseq.portable(out, hop=1).save(theirs)
    code = f"""
import sys, inseq
loaded = inseq.FeatureAttributionOutput.load({str(ours)!r})
shown = loaded.aggregate(hop=1)[0].target_attributions[:-1]
for name in [n for n in sys.modules if n.startswith("flashtrace")] + ["flashtrace_inseq"]:
    sys.modules[name] = None
stock = inseq.FeatureAttributionOutput.load({str(theirs)!r})
same = (stock[0].target_attributions[:-1] == shown).all()
print(type(stock[0]).__name__, [dict(s) for s in stock.info["spans"]], bool(same))
"""
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    start = out[0].attr_pos_start
    spans = {"prompt": [0, 19], "reasoning": [23, 28], "target": [start, start + 6]}
    assert run.stdout.strip() == f"CoarseFeatureAttributionSequenceOutput [{spans}] True", run.stderr


def test_portable_keeps_the_chosen_scores(out):
    for select in ({}, {"hop": 1}):
        stock = flashtrace_inseq.portable(out, **select)
        torch.testing.assert_close(numbers(stock)[0], numbers(out.aggregate(**select))[0], equal_nan=True)
    with pytest.raises(InputError, match="holds no attributions"):
        flashtrace_inseq.attributions(stock)


# Spans


def test_the_answer_and_the_thinking_are_found(tokenizer, out):
    (a,) = flashtrace_inseq.attributions(out)
    assert (a.text(a.target), a.text(a.reasoning)) == ("It is in the garden.", "The box is red.")
    assert a.prompt == Span(0, len(ids_of(tokenizer, PROMPT)))


@pytest.mark.parametrize("where", ["garden.", [37, 39], (37, 39), Span(37, 39)])
def test_target_as_text_list_or_span(hf, tokenizer, model, where):
    found = model.attribute(PROMPT, TEXT, target=where, reasoning="red.")
    (a,) = flashtrace_inseq.attributions(found)
    assert (a.target, a.text(a.reasoning).strip()) == (Span(37, 39), "red.")
    assert found.info["attribution_args"] == {
        "target": "garden." if where == "garden." else [37, 39],
        "reasoning": "red.",
    }


@pytest.mark.parametrize(
    ("where", "span", "noted"),
    [
        (37, Span(37, 38), 37),
        (-1, Span(38, 39), -1),
        ([-2, 39], Span(37, 39), [-2, 39]),
        ((37, -1), Span(37, 38), [37, -1]),
        (slice(37, 39), Span(37, 39), [37, 39]),
        (slice(-4, None), Span(35, 39), [-4, None]),
        (torch.tensor(37), Span(37, 38), 37),
    ],
)
def test_positions_are_read_as_in_python(hf, tokenizer, model, where, span, noted, tmp_path):
    found = model.attribute(PROMPT, TEXT, target=where, reasoning=slice(-16, -11))
    (a,) = flashtrace_inseq.attributions(found)
    assert (a.target, a.reasoning) == (span, Span(23, 28))
    assert a == FlashTrace(hf, tokenizer).attribute(PROMPT, GENERATION, target=where, reasoning=slice(-16, -11))
    assert found.info["attribution_args"] == {"target": noted, "reasoning": [-16, -11]}
    found.save(tmp_path / "out.json")
    assert inseq.FeatureAttributionOutput.load(tmp_path / "out.json") == found
    both = model.attribute([PROMPT] * 2, [TEXT] * 2, target=[where, "garden."], reasoning=[slice(-16, -11), None])
    assert [b.target for b in flashtrace_inseq.attributions(both)] == [span, Span(37, 39)]


def test_two_numbers_are_one_span_for_all_and_more_are_one_for_each(model):
    pair = model.attribute([PROMPT] * 2, [TEXT] * 2, target=[36, 38])
    assert [a.target for a in flashtrace_inseq.attributions(pair)] == [Span(36, 38)] * 2
    three = model.attribute([PROMPT] * 3, [TEXT] * 3, target=[36, -1, 37])
    assert [a.target.start for a in flashtrace_inseq.attributions(three)] == [36, 38, 37]


def test_one_target_for_each_input(model):
    found = model.attribute([PROMPT, PROMPT], [TEXT, TEXT], target=["garden.", [36, 38]], reasoning=[None, "red."])
    first, second = flashtrace_inseq.attributions(found)
    assert (first.target, second.target) == (Span(37, 39), Span(36, 38))
    assert (first.text(first.reasoning).strip(), second.text(second.reasoning).strip()) == ("The box is red.", "red.")
    with pytest.raises(InputError, match="target has 1 entries for 2 inputs"):
        model.attribute([PROMPT, PROMPT], [TEXT, TEXT], target=["garden."])


@pytest.mark.parametrize(
    ("positions", "target"),
    [((36, 38), Span(36, 38)), ((36, None), Span(36, 39)), ((None, 25), Span(19, 25)), ((-2, -1), Span(37, 38)),
     ((3, 25), Span(19, 25))],
)  # fmt: skip
def test_positions_of_inseq_choose_the_target(model, positions, target):
    start, stop = positions
    for name in METHODS:
        found = model.attribute(PROMPT, TEXT, method=name, attr_pos_start=start, attr_pos_end=stop)
        assert flashtrace_inseq.attributions(found)[0].target == target
        assert found[0].attr_pos_start == target.start


def test_end_tokens_are_no_part_of_the_answer(model):
    found = model.attribute(PROMPT, TEXT + "</s>")
    (a,) = flashtrace_inseq.attributions(found)
    assert a.text(a.target) == "It is in the garden." and a.token_ids[-1] == EOS
    asked = model.attribute(PROMPT, TEXT + "</s>", attr_pos_start=37, attr_pos_end=40)
    assert flashtrace_inseq.attributions(asked)[0].target == Span(37, 40)


@pytest.mark.parametrize("name", METHODS)
def test_turn_ends_are_no_part_of_the_answer_though_they_are_not_the_end_token(hf, name):
    chat = tiny_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<answer>"]})
    model = inseq.load_model(hf, name, tokenizer=chat)
    for end in ("<|im_end|>", "<|im_end|></s>", "<|im_end|><pad><pad>"):
        (a,) = flashtrace_inseq.attributions(model.attribute(PROMPT, TEXT + end))
        assert a.text(a.target) == "It is in the garden." and a.target.stop < len(a.tokens)
        assert a == REGISTRY[name](hf, chat).attribute(PROMPT, GENERATION + end)
        asked = model.attribute(PROMPT, TEXT + end, attr_pos_start=37)
        assert flashtrace_inseq.attributions(asked)[0].target == Span(37, 39)
    tagged = TEXT.removesuffix("garden.") + "<answer>garden</answer><|im_end|>"
    (a,) = flashtrace_inseq.attributions(model.attribute(PROMPT, tagged))
    assert a.text(a.target) == "garden" and a == REGISTRY[name](hf, chat).attribute(PROMPT, tagged[len(PROMPT) :])


def test_the_prompt_keeps_the_tokens_it_had(tokenizer, model):
    prompt, text = "The key is in the gar", "The key is in the garden. The box is red."
    (a,) = flashtrace_inseq.attributions(model.attribute(prompt, text))
    expected = ids_of(tokenizer, prompt)
    assert expected != ids_of(tokenizer, text)[: len(expected)]
    assert list(a.token_ids[: a.prompt.stop]) == expected and "".join(a.tokens) == text


def test_a_second_beginning_token_is_dropped_as_inseq_does(hf, tokenizer):
    doubled = tiny_tokenizer()
    doubled.add_bos_token = True
    doubled._tokenizer.post_processor = __import__("tokenizers").processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    model = inseq.load_model(hf, "flashtrace", tokenizer=doubled)
    plain = flashtrace_inseq.attributions(model.attribute(PROMPT, TEXT))
    assert plain[0].token_ids[:1] == (BOS,)
    assert flashtrace_inseq.attributions(model.attribute("<s>" + PROMPT, "<s>" + TEXT)) == plain
    without = flashtrace_inseq.attributions(model.attribute(PROMPT, TEXT, skip_special_tokens=True))
    assert without[0].token_ids == plain[0].token_ids[1:]


def test_generated_mode(hf, tokenizer, model):
    found = model.attribute(PROMPT, generation_args={"max_new_tokens": 6, "do_sample": False})
    text = found.info["generated_texts"][0]
    assert text.startswith(PROMPT)
    again = model.attribute(PROMPT, text)
    assert_same(found, again)


# What is left behind


def saliency(model):
    return numbers(model.attribute(PROMPT, TEXT, method="saliency", attr_pos_start=37, show_progress=False))[0]


def test_other_methods_and_ours_do_not_change_each_other(model, hf):
    before, ours = saliency(model), model.attribute(PROMPT, TEXT, hops=2)
    shown = html(ours, hop=1)
    stock = model.attribute(PROMPT, TEXT, method="saliency", attr_pos_start=37, show_progress=False)
    stock.show(display=False)
    assert html(model.attribute(PROMPT, TEXT, hops=2), hop=1) == shown
    assert ours.show_granular(display=False, return_html=True)
    torch.testing.assert_close(saliency(model), before, equal_nan=True)
    occlusion = model.attribute(PROMPT, TEXT, method="occlusion", attr_pos_start=38, show_progress=False)
    occlusion.show(display=False)
    assert model.is_hooked in (True, False) and not any(m._forward_hooks for m in hf.modules())
    assert all(p.grad is None for p in hf.parameters())


def test_our_results_leave_the_tables_of_inseq_alone(model):
    from inseq.data.aggregation_functions import DEFAULT_ATTRIBUTION_AGGREGATE_DICT as functions
    from inseq.data.attribution import DEFAULT_ATTRIBUTION_DIM_NAMES as names

    before = repr(functions), repr(names)
    for name in METHODS:
        model.attribute(PROMPT, TEXT, method=name).show(display=False)
    assert (repr(functions), repr(names)) == before


# Errors


@pytest.mark.parametrize("name", METHODS)
def test_step_scores_are_refused(model, name):
    with pytest.raises(ValueError, match="Step scores are not supported"):
        model.attribute(PROMPT, TEXT, method=name, step_scores=["probability"])
    with pytest.raises(InputError, match="no steps for step_scores or output_step_attributions; leave them out"):
        model.attribute(PROMPT, TEXT, method=name, output_step_attributions=True)


def test_encoder_decoders_are_refused_at_load(tokenizer):
    config = transformers.T5Config(
        vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=1
    )
    t5 = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder; only decoder-only models"):
        inseq.load_model(t5, "flashtrace", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hops": -1}, InputError, "hops must be a whole number >= 0.* got -1"),
        ({"positions": "last"}, InputError, "positions must be one of 'token', 'predicting', got 'last'"),
        ({"target": "not there"}, SpanError, "occurs 0 times"),
        ({"target": [37, 90]}, SpanError, "37:90 ends after the last of 39 tokens, outside the generation"),
        ({"target": [3, 25]}, SpanError, "3:25 is outside the generation 19:39"),
        ({"target": [38, 37]}, SpanError, "reversed"),
        ({"target": 3.7}, SpanError, r"target must be a Span\(start, stop\) of token positions, one position"),
        ({"target": -40}, SpanError, "empty, reversed or negative"),
        ({"reasoning": slice(23, 28, 2)}, SpanError, "reasoning must be .* a slice without step"),
        ({"format": ("<a>", "<a>")}, InputError, "never closes"),
        ({"format": "thoughts"}, InputError, "format must be one of 'think'"),
        ({"target": [37, 39], "reasoning": [36, 38]}, SpanError, "overlap"),
        ({"target": "garden.", "attr_pos_start": 37}, InputError, "two ways to choose the target; use one"),
        ({"attr_pos_start": 37, "attr_pos_end": 37}, ValueError, "cannot be the same"),
        (
            {"attribution_args": {"hop": 1}},
            InputError,
            "'flashtrace' has no option hop; it takes format, hops, ignore",
        ),
    ],
)
def test_bad_options(model, options, error, message):
    with pytest.raises(error, match=message):
        model.attribute(PROMPT, TEXT, **options)


def test_bad_texts(model):
    with pytest.raises(ValueError, match="nothing follows the prompt"):
        model.attribute(PROMPT, PROMPT)
    with pytest.raises(SpanError, match="no </think>"):
        model.attribute(PROMPT, PROMPT + "<think>\nThe box")
    with pytest.raises(InputError, match="the model has 128 positions"):
        model.attribute(PROMPT, TEXT + " Yes. No." * 40)


def test_options_belong_to_attribute(hf, tokenizer):
    with pytest.raises(InputError, match=r"hops: pass options to attribute\(\)"):
        inseq.load_model(hf, "flashtrace", tokenizer=tokenizer, hops=2)


def test_command_line_of_inseq_knows_the_methods(folder, tmp_path, monkeypatch):
    from flashtrace_inseq.cli import main

    saved, shown = tmp_path / "out.json", tmp_path / "out.html"
    words = [
        "inseq", "attribute", "--model_name_or_path", folder, "--attribution_method", "flashtrace",
        "--input_texts", PROMPT, "--generated_texts", TEXT, "--attribution_kwargs", '{"hops": 2}',
        "--save_path", str(saved), "--viz_path", str(shown), "--hide_attributions",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    main()
    (a,) = flashtrace_inseq.attributions(inseq.FeatureAttributionOutput.load(saved))
    assert isinstance(a, Attribution) and a.hops == 2
    assert "garden" in Path(shown).read_text()
