"""Drawing cases: a model writes, and what it got right, with its evidence, becomes cases.

    drawn = reasoner_cases(model, tokenizer, "variables, 4 hops", wanted=25)
    drawn = english_cases(model, tokenizer, "two codes", wanted=10, force=True)
    drawn.cases, drawn.samples

    draw = case_source(model, tokenizer, "two codes", answers="forced")
    draw(7)                                             # the cases of sample 7, none where it is of no use

A sample depends on its task, seed and number only, never on those before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flashtrace_plugin import reasoner
from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.evaluation import tasks
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.tasks.catalogue import TEXT_TASKS
from flashtrace_plugin.evaluation.tasks.english import make_english
from flashtrace_plugin.evaluation.tasks.readers import READERS
from flashtrace_plugin.evaluation.tasks.text_sample import TextSample, Written, positions
from flashtrace_plugin.loading import write
from flashtrace_plugin.spans import Chars, Span, tokens_over
from flashtrace_plugin.text import TokenizedText, tokenize

REASONER_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "variables, 2 hops": ("variable_tracking", {"hops": 2, "chains": 3}),
    "variables, 4 hops": ("variable_tracking", {"hops": 4, "chains": 3}),
    "variables, 2 hops, 2 questions": ("variable_tracking", {"hops": 2, "chains": 3, "questions": 2}),
    "variables, 4 hops, 2 questions": ("variable_tracking", {"hops": 4, "chains": 3, "questions": 2}),
    "needles": ("needle_retrieval", {"keys": 8, "values": 2}),
    "needles, 3 questions": ("needle_retrieval", {"keys": 8, "values": 2, "questions": 3}),
    "direct answer, 1 hop": ("variable_tracking", {"hops": 1, "chains": 3, "thinking": False}),
    "direct answer, 2 hops": ("variable_tracking", {"hops": 2, "chains": 3, "thinking": False}),
}
"""The reasoner's tasks: task and parameters by name; the whole answer is the target."""

ONE_OF_TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "one of 2 answers, 2 hops": REASONER_TASKS["variables, 2 hops, 2 questions"],
    "one of 2 answers, 4 hops": REASONER_TASKS["variables, 4 hops, 2 questions"],
}
"""The same samples with one of the two answers as the target, a case for each: for specificity."""


class _Drawn(NamedTuple):
    """Cases, and how many samples it took to find them."""

    cases: list[Case]
    samples: int


def reasoner_cases(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    wanted: int,
    seed: int = 0,
    length: int = 128,
    tries: int = 4,
    wrong: bool = False,
) -> _Drawn:
    """The cases of the first ``wanted`` samples of a task that the reasoner gets right to the last word.

    task:   of ``REASONER_TASKS`` or ``ONE_OF_TWO``
    length: tokens of a prompt at most
    tries:  samples drawn for each one wanted, before there are fewer
    wrong:  the samples with a wrong generation instead, marked so; their evidence is that of the right answer

    Raises InputError for an unknown task.
    """
    return _draw(_of_reasoner(model, tokenizer, task, seed, length, wrong), wanted, tries)


def _of_reasoner(
    model: Any, tokenizer: Any, task: str, seed: int, length: int, wrong: bool
) -> Callable[[int], list[Case]]:
    known = REASONER_TASKS | ONE_OF_TWO
    _check_task(task, known)
    name, parameters = known[task]

    def one(number: int) -> list[Case]:
        sample = tasks.TASKS[name](random.Random(f"{name}/{parameters}/{seed}/{number}"), length=length, **parameters)
        generation = reasoner.answer(model, tokenizer, sample)
        if (generation == sample.generation) == wrong:
            return []
        found = _by_answer(tokenizer, sample) if task in ONE_OF_TWO else _whole(tokenizer, sample, generation)
        return [replace(case, task=task, seed=seed, number=number, right=not wrong) for case in found]

    if wrong and task in ONE_OF_TWO:
        raise InputError(f"the answers of a wrong generation of {task!r} cannot be told apart; draw right ones")
    return one


ANSWERS = ("right", "forced", "wrong")
"""Which samples are used: those that the model answers right; also the others, with the right text put into its
mouth; or those that it answers wrong."""


def case_source(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    seed: int = 0,
    length: int = 128,
    answers: str = "right",
    data: Mapping[str, str | Path] | None = None,
) -> Callable[[int], list[Case] | None]:
    """Draws the cases of a sample by its number: none where the model answers otherwise than ``answers`` wants.

    task:    of the reasoner's, of ``TEXT_TASKS`` for any tokenizer, or of ``READERS``, whose samples stand in the file
             that ``data`` names for it
    length:  tokens of the reasoner's prompts at most
    answers: of ``ANSWERS``
    result:  gives None for a number beyond the samples of a file

    Raises InputError for an unknown task, an unknown kind of answers and a task without its file.
    """
    if answers not in ANSWERS:
        raise InputError(f"answers is {answers!r}; choose of {', '.join(ANSWERS)}")
    if task in REASONER_TASKS | ONE_OF_TWO:
        if answers == "forced":
            raise InputError(f"{task!r} is a task of the reasoner, which needs no forcing; answers is right or wrong")
        return _of_reasoner(model, tokenizer, task, seed, length, answers == "wrong")
    sample_of = _samples(task, seed, data or {})

    def one(number: int) -> list[Case] | None:
        sample = sample_of(number)
        if sample is None:
            return None
        found = text_cases(model, tokenizer, sample, force=answers == "forced", wrong=answers == "wrong")
        return [replace(case, task=task, seed=seed, number=number) for case in found]

    return one


def _samples(task: str, seed: int, data: Mapping[str, str | Path]) -> Callable[[int], TextSample | None]:
    """Samples by number, those of a file in an order drawn by the seed."""
    if task in READERS:
        if task not in data:
            raise InputError(f"the task {task!r} is read from a file; name it with data={{{task!r}: path}}")
        read = READERS[task](data[task])
        order = random.Random(f"{task}/{seed}").sample(range(len(read)), len(read))
        return lambda number: read[order[number]] if number < len(order) else None
    _check_task(task, {**REASONER_TASKS, **ONE_OF_TWO, **TEXT_TASKS, **READERS})
    return lambda number: TEXT_TASKS[task](random.Random(f"{task}/{seed}/{number}"))


def english_cases(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    wanted: int,
    seed: int = 0,
    tries: int = 4,
    force: bool = False,
) -> _Drawn:
    """The cases of the first ``wanted`` samples of an English task that the model answers right.

    task:  of ``tasks.english.ENGLISH``
    force: a model that answers something else is given the expected text to have written; such a case is marked

    Raises InputError for an unknown task.
    """

    def one(number: int) -> list[Case]:
        found = text_cases(model, tokenizer, make_english(task, seed, number), force=force)
        return [replace(case, seed=seed, number=number) for case in found]

    return _draw(one, wanted, tries)


def paragraph_cases(
    model: Any, tokenizer: Any, samples: Sequence[TextSample], *, wanted: int, seed: int = 0, force: bool = False
) -> _Drawn:
    """The same for samples that were read from a file, in an order drawn by the seed; each is tried once."""
    order = random.Random(f"paragraphs/{seed}").sample(range(len(samples)), len(samples))
    cases: list[Case] = []
    for tried, number in enumerate(order):
        if len(cases) >= wanted:
            return _Drawn(cases, tried)
        found = text_cases(model, tokenizer, samples[number], force=force)
        cases += [replace(case, seed=seed, number=number) for case in found]
    return _Drawn(cases, len(order))


def text_cases(
    model: Any, tokenizer: Any, sample: TextSample, *, force: bool = False, wrong: bool = False
) -> list[Case]:
    """One case for each answer of a sample in plain text; none where the model is wrong and not forced.

    wrong: only what the model answers wrong, all of it as one target; the evidence is that of the right answer
    """
    text = _written(model, tokenizer, sample)
    read = sample.read(text.generation) if text else None
    if wrong:
        return [] if text is None or read is not None else [_wrong_case(text, tokenizer, sample)]
    forced = read is None
    if forced and force:
        text = tokenize(tokenizer, sample.for_model(tokenizer), sample.expected)
        read = sample.read(sample.expected)
    if text is None or read is None:
        return []
    where = [positions(tokenizer, sample, ranges) for ranges in sample.evidence]
    given = {"task": sample.task, "right": not forced, "forced": forced}
    given["question"] = positions(tokenizer, sample, [sample.question])
    return [_text_case(text, read, where, number, given) for number in range(len(read.answers))]


def _wrong_case(text: TokenizedText, tokenizer: Any, sample: TextSample) -> Case:
    where = positions(tokenizer, sample, [chars for ranges in sample.evidence for chars in ranges])
    return Case(
        text.input_ids,
        text.prompt_length,
        Span(text.prompt_length, len(text.input_ids)),
        None,
        evidence=where,
        question=positions(tokenizer, sample, [sample.question]),
        task=sample.task,
        right=False,
    )


def _written(model: Any, tokenizer: Any, sample: TextSample) -> TokenizedText | None:
    """What the model writes, a little longer than what is expected; None where it ends the text at once."""
    length = len(tokenizer(sample.expected, add_special_tokens=False)["input_ids"]) + _MORE
    try:
        return write(model, tokenizer, sample.for_model(tokenizer), length)
    except InputError:
        return None


_MORE = 4
"""Tokens written beyond the expected ones, for an answer that is introduced in other words."""


def _text_case(
    text: TokenizedText, read: Written, where: Sequence[tuple[int, ...]], answer: int, given: dict[str, Any]
) -> Case:
    """The case of one answer. Positions shared by the evidence of two answers are evidence of the target alone."""

    def over(chars: Chars, name: str) -> Span:
        first, stop = tokens_over(text.offsets, chars, name)
        return Span(text.prompt_length + first, text.prompt_length + stop)

    others = {i for number, found in enumerate(where) for i in found if number != answer}
    stop = over(max(read.answers), "answer").stop
    return Case(
        text.input_ids[:stop],
        text.prompt_length,
        over(read.answers[answer], "answer"),
        over(read.reasoning, "reasoning") if read.reasoning else None,
        evidence=where[answer],
        other_evidence=tuple(sorted(others - set(where[answer]))),
        answer=answer,
        **given,
    )


def _whole(tokenizer: Any, sample: tasks.Sample, generation: str) -> list[Case]:
    """The answer as a whole; no case where a wrong generation has no answer."""
    text = tokenize(tokenizer, sample.prompt, f" {generation}") if generation.strip() else None
    try:
        target, reasoning = text.locate(None, None) if text else (None, None)
    except SpanError:
        return []
    if text is None or target is None:
        return []
    return [
        Case(
            text.input_ids,
            text.prompt_length,
            target,
            reasoning,
            evidence=sample.evidence,
            distractors=sample.distractors,
            question=sample.question,
        )
    ]


def _by_answer(tokenizer: Any, sample: tasks.Sample) -> list[Case]:
    """A case for each question of a right generation, whose last words are the answers, a token each."""
    (whole,) = _whole(tokenizer, sample, sample.generation)
    questions = len(sample.question)
    hops, values = len(sample.steps) // questions, len(sample.answer.split()) // questions
    own = [{i for step in sample.steps[n * hops : (n + 1) * hops] for i in step} for n in range(questions)]
    begin = len(whole.input_ids) - questions * values
    return [
        replace(
            whole,
            target=Span(begin + n * values, begin + (n + 1) * values),
            evidence=tuple(sorted(own[n])),
            other_evidence=tuple(sorted(set().union(*own) - own[n])),
            answer=n,
        )
        for n in range(questions)
    ]


def _draw(one: Callable[[int], list[Case]], wanted: int, tries: int) -> _Drawn:
    if wanted < 1 or tries < 1:
        raise InputError(f"wanted and tries must be at least 1, got {wanted} and {tries}")
    cases: list[Case] = []
    usable = samples = 0
    while usable < wanted and samples < tries * wanted:
        found = one(samples)
        cases, usable, samples = cases + found, usable + bool(found), samples + 1
    return _Drawn(cases, samples)


def _check_task(task: str, known: dict[str, Any]) -> None:
    if task not in known:
        raise InputError(f"task is {task!r}; known tasks are {'; '.join(known)}")
