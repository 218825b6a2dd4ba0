"""Tasks in plain text: RULER's forms, long steps, reasoning-gym, and data sets by their columns."""

from __future__ import annotations

import csv
import json
import random
import re

import pytest

from flashtrace_plugin import InputError
from flashtrace_plugin.evaluation.drawing import case_source, text_cases
from flashtrace_plugin.evaluation.tasks.gym import GYM
from flashtrace_plugin.evaluation.tasks.readers import READERS
from flashtrace_plugin.evaluation.tasks.ruler import RULER
from flashtrace_plugin.evaluation.tasks.steps import LONG_STEPS
from flashtrace_plugin.evaluation.tasks.text_sample import positions
from tests.tiny import tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def pair():
    tokenizer = tiny_tokenizer()
    return tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=4096), tokenizer


@pytest.mark.parametrize("task", RULER)
def test_ruler_s_forms(task):
    for seed in range(5):
        sample = RULER[task](random.Random(seed))
        assert sample.task == task and sample == RULER[task](random.Random(seed))
        found = sample.read(sample.expected)
        assert found is not None and sample.read(" none") is None
        answers = sample.answers[0].split(", ")
        evidence = " ".join(sample.evidence_text[0])
        assert all(answer in evidence for answer in answers)
        backwards = ", ".join(reversed(answers))
        assert sample.read(f" {backwards}") is not None, "in any order"
        assert len(answers) == 1 or sample.read(f" {', '.join(answers[:-1])}") is None, "all of them"
        assert len(answers) == 1 or sample.read(f" {', '.join([answers[0]] * len(answers))}") is None


def test_what_ruler_s_names_mean():
    counts = {
        name: len(RULER[f"{name}, 256 tokens"](random.Random(1)).evidence[0])
        for name in ("needle single", "mq q4", "mv v8", "vt h6 c1", "vt h2 c3")
    }
    assert counts == {"needle single": 1, "mq q4": 4, "mv v8": 8, "vt h6 c1": 6, "vt h2 c3": 2}
    long, short = (len(RULER[f"mq q2, {n} tokens"](random.Random(1)).text.split()) for n in (1024, 256))
    assert 3 < long / short < 6


@pytest.mark.parametrize("task", LONG_STEPS)
def test_long_steps_are_reasoning_of_their_length(task, pair):
    sample = LONG_STEPS[task](random.Random(2))
    read = sample.read(sample.expected)
    assert read is not None and read.reasoning is not None
    steps = sample.expected[slice(*read.reasoning)]
    assert steps.count(".") == sample.parameters["steps"] and steps.endswith("is " + sample.answers[0] + ".")
    last = next(fact for fact in sample.evidence_text[0] if "code" in fact)
    assert steps.index(last) == max(steps.index(fact) for fact in sample.evidence_text[0]), "the code comes last"
    assert positions(pair[1], sample, sample.evidence[0])


def test_forced_steps_are_a_case_whose_reasoning_is_followed(pair):
    (case,) = text_cases(*pair, LONG_STEPS["5 steps"](random.Random(2)), force=True)
    assert case.forced and not case.right and case.reasoning is not None and case.reasoning.stop <= case.target.start


def test_the_evidence_of_gym_tasks():
    pytest.importorskip("reasoning_gym", reason="pip install 'flashtrace-plugin[tasks]'")
    for task, make in GYM.items():
        for seed in range(8):
            sample = make(random.Random(seed))
            assert sample.read(sample.expected) is not None and sample.evidence[0], (task, sample.text)
            for begin, stop in sample.evidence[0]:
                assert 0 <= begin < stop <= len(sample.text) and sample.text[begin:stop].strip()
    needle = GYM["haystack"](random.Random(3))
    (said,) = needle.evidence_text[0]
    assert said.split()[0] == needle.answers[0], "the statement begins with the name that is asked for"
    family = GYM["family relations"](random.Random(3))
    named = " ".join(family.evidence_text[0])
    told, _, asked = family.text.removesuffix("\nAnswer:").rpartition("\n")
    people = [word for word in re.findall(r"[A-Z]\w+", asked) if word in told]
    assert len(people) >= 2 and all(person in named for person in people)
    problem = GYM["word problems"](random.Random(3))
    assert all(text[0].isdigit() for text in problem.evidence_text[0])


def test_without_the_package_of_the_tasks(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"flashtrace-plugin\[tasks\]"):
        GYM["haystack"](random.Random(0))


# Data sets; the rows are our own


ROWS = {
    "math": {"problem": "What is 3 + 4?", "solution": r"Three and four are seven, so it is $\boxed{7}$."},
    "morehopqa": {
        "question": "How many letters has the name of the town where Ada lives?",
        "answer": "5",
        "context": [["Ada", ["Ada lives in Brigg."]], ["Max", ["Max lives in Thorne."]]],
        "question_decomposition": [{"sub_id": "1", "question": "…", "paragraph_support_title": "Ada"}],
    },
    "hotpotqa": {
        "question": "Which river flows through the town of the mill?",
        "answer": "the Ouse",
        "context": {
            "title": ["Mill", "Town"],
            "sentences": [["It is old.", "It is in Selby."], ["Selby lies on the Ouse."]],
        },
        "supporting_facts": {"title": ["Mill", "Town"], "sent_id": [1, 0]},
    },
    "longra": {
        "text": "I flew to Japan and slept. (The bus was late.) I was in the capital,",
        "evidence": "Japan",
        "target": "Tokyo",
    },
    "tellmewhy": {
        "narrative": "Ben was cold. He lit a fire. Then he read.",
        "question": "Why did he light a fire?",
        "answer": "Because he was cold.",
        "helpful_sentences": [0],
    },
    "wikibio": {
        "input_text": {"table": {"column_header": ["name", "born"], "content": ["Ida Roe", "1901"]}, "context": "ida"},
        "target_text": "Ida Roe , born 1901 , was a painter . She lived in York .",
    },
    "aider": {
        "instructions": "Add two numbers.",
        "stub": "def add(a, b):\n    pass",
        "solution": "def add(a, b):\n    return a + b",
    },
}
EVIDENCE = {
    "morehopqa": ("Ada: Ada lives in Brigg.",),
    "hotpotqa": ("It is in Selby.", "Selby lies on the Ouse."),
    "longra": ("Japan",),
    "tellmewhy": ("Ben was cold.",),
}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ROWS)
def test_data_sets_become_samples(name, tmp_path, pair):
    (sample,) = READERS[name](written(tmp_path / "rows.jsonl", [ROWS[name]]))
    assert sample.task == name and sample.read(sample.expected) is not None
    assert sample.evidence_text[0] == EVIDENCE.get(name, ())
    (case,) = text_cases(*pair, sample, force=True)
    assert case.forced and bool(case.evidence) == (name in EVIDENCE)
    assert (case.reasoning is not None) == (name == "math")
    assert pair[1].decode(case.input_ids[case.target.slice]).strip() == sample.answers[0].strip()


def test_files_of_other_kinds(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, ["problem", "solution"])
        out.writeheader()
        out.writerow(ROWS["math"])
    assert READERS["math"](tmp_path / "rows.csv")[0].answers == ("7",)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no file"),
        (
            '{"problem": "?"}\n',
            "row 0 of .* lacks solution; math has the columns problem, solution, this file problem",
        ),
        ('{"problem": "?", "solution": "no box"}\n', "holds no usable row of math"),
        ("{\n", "cannot be read as json"),
    ],
)
def test_files_that_are_no_such_data_set(content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        READERS["math"](path)


def test_cases_of_a_file_end_with_it(tmp_path, pair):
    path = written(tmp_path / "rows.jsonl", [ROWS["tellmewhy"], ROWS["tellmewhy"] | {"answer": "It was winter."}])
    draw = case_source(*pair, "tellmewhy", answers="forced", data={"tellmewhy": path})
    assert [len(draw(0)), len(draw(1)), draw(2)] == [1, 1, None] and draw(0)[0].name != draw(1)[0].name
    wrong = case_source(*pair, "tellmewhy", answers="wrong", data={"tellmewhy": path})(0)
    assert [case.right for case in wrong] == [False] and wrong[0].target.start == wrong[0].prompt_length
