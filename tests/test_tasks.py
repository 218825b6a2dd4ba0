"""The synthetic tasks: seeded, within their length, with evidence that points at the gold statements."""

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.tasks import TASKS, Sample, make, needle_retrieval, variable_tracking
from flashtrace_plugin.evaluation.tasks.vocabulary import NEEDLE_KEYS, NUMBERS, VARIABLES, noise_sentence, words

KEYS = {*VARIABLES, *NEEDLE_KEYS}

tracking = st.builds(
    lambda seed, hops, chains, room, values, questions, noise, thinking: variable_tracking(
        random.Random(seed),
        hops=hops,
        chains=chains,
        length=chains * (3 * hops + values) + 5 + room,
        values=values,
        questions=min(questions, chains),
        noise=noise,
        thinking=thinking,
    ),
    seed=st.integers(0, 2**32),
    hops=st.integers(1, 6),
    chains=st.integers(1, 6),
    room=st.integers(0, 200),
    values=st.integers(1, 3),
    questions=st.integers(1, 3),
    noise=st.floats(0, 1),
    thinking=st.booleans(),
)
needles = st.builds(
    lambda seed, keys, values, room, questions, thinking: needle_retrieval(
        random.Random(seed),
        keys=keys,
        values=values,
        length=keys * (values + 2) + 5 + room,
        questions=min(questions, keys),
        thinking=thinking,
    ),
    seed=st.integers(0, 2**32),
    keys=st.integers(1, 20),
    values=st.integers(1, 4),
    room=st.integers(0, 200),
    questions=st.integers(1, 3),
    thinking=st.booleans(),
)
samples = tracking | needles


def statements(prompt: str) -> list[tuple[str, list[str]]]:
    """Every ``key value … ;`` of a prompt, found without the generator: keys that open a statement."""
    found = []
    body = prompt[: prompt.index("?")].split()
    for start, word in enumerate(body):
        if word in KEYS and (start == 0 or body[start - 1] in {";", "."}):
            found.append((word, body[start + 1 : body.index(";", start)]))
    return found


def solve(sample: Sample) -> str:
    """The answer, read from the prompt alone."""
    table = dict(statements(sample.prompt))
    answer = []
    for key in [sample.prompt.split()[i] for i in sample.question]:
        values = table[key]
        while values[0] in table:
            values = table[values[0]]
        answer += values
    return " ".join(answer)


@settings(max_examples=150, deadline=None)
@given(samples)
def test_answer_follows_from_the_prompt(sample):
    assert solve(sample) == sample.answer


@settings(max_examples=150, deadline=None)
@given(samples)
def test_no_key_is_stated_twice_and_no_value_repeats(sample):
    found = statements(sample.prompt)
    values = [value for _, statement in found for value in statement]
    assert len({key for key, _ in found}) == len(found)
    assert len(set(values)) == len(values)


@settings(max_examples=150, deadline=None)
@given(samples)
def test_evidence_and_distractors_are_the_statements(sample):
    prompt = sample.prompt.split()
    marked = {*sample.evidence, *sample.distractors}
    stated = sum(1 + len(values) for _, values in statements(sample.prompt))
    assert not {*sample.evidence} & {*sample.distractors}
    assert len(marked) == stated and all(prompt[i] in KEYS or prompt[i] in NUMBERS for i in marked)
    assert sample.evidence == tuple(sorted({i for step in sample.steps for i in step}))
    if sample.thinking:
        assert sample.reasoning == " ".join(f"{text} ;" for text in sample.evidence_text)


@settings(max_examples=100, deadline=None)
@given(needles)
def test_length_is_kept_and_filled(sample):
    assert 0 <= sample.parameters["length"] - len(sample.prompt.split()) <= 2


@settings(max_examples=100, deadline=None)
@given(tracking)
def test_length_is_an_upper_bound_with_any_noise(sample):
    assert len(sample.prompt.split()) <= sample.parameters["length"]
    assert set(sample.prompt.split()) <= set(words())


def test_a_small_sample_by_hand():
    sample = variable_tracking(random.Random(0), hops=2, chains=1, length=10, noise=0)
    first, second = dict(statements(sample.prompt)), sample.question
    asked = sample.prompt.split()[second[0]]
    middle = first[asked][0]
    end = first[middle][0]
    assert sample.reasoning == f"{asked} {middle} ; {middle} {end} ;"
    assert sample.generation == f"<think> {sample.reasoning} </think> {end}"
    assert sorted(sample.evidence) == [0, 1, 3, 4] and sample.distractors == ()


def test_direct_mode_answers_at_once():
    sample = make("needle_retrieval", 3, keys=4, values=3, length=64, thinking=False)
    assert sample.prompt.endswith(" direct") and not sample.thinking and sample.reasoning == ""
    assert sample.generation == sample.answer and len(sample.answer.split()) == 3


@pytest.mark.parametrize(
    "task, own", [("variable_tracking", {"hops": 3, "chains": 2}), ("needle_retrieval", {"keys": 3, "values": 2})]
)
def test_the_seed_decides(task, own):
    assert make(task, 5, length=64, **own) == make(task, 5, length=64, **own)
    assert make(task, 5, length=64, **own) != make(task, 6, length=64, **own)
    assert TASKS[task](random.Random(5), length=64, **own) == make(task, 5, length=64, **own)


@pytest.mark.parametrize(
    "change, words_of_error",
    [
        ({"hops": 0}, "hops is 0; choose a whole number from 1 to 6"),
        ({"hops": 7}, "hops is 7; choose a whole number from 1 to 6"),
        ({"hops": 2.0}, "hops is 2.0"),
        ({"hops": True}, "hops is True"),
        ({"chains": 26}, "chains is 26; choose a whole number from 1 to 25"),
        ({"questions": 3}, "questions is 3; choose a whole number from 1 to 2"),
        ({"length": 26}, "raise length by at least 1"),
        ({"length": "64"}, "length is '64'"),
        ({"noise": 1.5}, "noise is 1.5"),
        ({"values": 51}, "values is 51; choose a whole number from 1 to 50"),
    ],
)
def test_bad_arguments_name_value_bound_and_remedy(change, words_of_error):
    with pytest.raises(InputError, match=words_of_error):
        make("variable_tracking", 0, **{"hops": 4, "chains": 2, "length": 64} | change)


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(InputError, match="variable_tracking, needle_retrieval"):
        make("sorting", 0)


@given(st.integers(3, 40), st.integers(0, 1000))
def test_noise_fills_its_room(room, seed):
    rng = random.Random(seed)
    while room:
        room -= len(noise_sentence(rng, room))
        assert room == 0 or room >= 3


def test_noise_needs_room():
    with pytest.raises(InputError, match="at least 3"):
        noise_sentence(random.Random(0), 2)


def test_tasks_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import flashtrace_plugin.evaluation.tasks"
    subprocess.run([sys.executable, "-c", code], check=True)
