"""English tasks with known evidence: needles in the form of RULER, and questions that take two steps.

RULER (Hsieh et al., 2024, arXiv:2404.06654) hides ``One of the special magic numbers for … is: …`` in essays; here a
needle is ``The code of the red box is 4829.`` among short sentences of our own, and every prompt ends in the beginning
of the answer, which is what a model of 135 million parameters answers right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.tasks.english_words import (
    ROOMS,
    THINGS_AT_MOST,
    draw_codes,
    draw_things,
    shuffled,
)
from flashtrace_plugin.evaluation.tasks.text_sample import TextSample, join_labelled

_Labelled = tuple[str, str]
"""A label, empty for what is no evidence, and a piece of text."""


def needle(rng: random.Random, *, keys: int = 1, filler: int = 12, digits: int = 4, chat: bool = False) -> TextSample:
    """One code among ``filler`` sentences, or the asked one of several ``keys`` (1 to 10).

    ``chat`` asks in a chat message and leaves the beginning of the answer to the model.
    """
    given = _checked(keys=keys, filler=filler, digits=digits) | {"chat": chat}
    things, codes = draw_things(rng, keys), draw_codes(rng, keys, digits)
    body = shuffled(rng, [(thing, _code_of(thing, code)) for thing, code in zip(things, codes, strict=True)], filler)
    thing, code = things[0], codes[0]
    pattern = rf"(?P<answer0>{code})\b"
    return _sample(
        "needle" if keys == 1 else "needle, several keys",
        body,
        question=f"What is the code of the {thing}?",
        lead=f"The code of the {thing} is",
        expected=code,
        pattern=pattern,
        evidence=[[thing]],
        given=given,
    )


def needle_values(rng: random.Random, *, filler: int = 10, digits: int = 4, chat: bool = False) -> TextSample:
    """Two codes of one thing in two sentences, both asked for; the answer is both, in either order."""
    given = _checked(filler=filler, digits=digits) | {"chat": chat}
    (thing,), (first, second) = draw_things(rng, 1), draw_codes(rng, 2, digits)
    needles = [
        ("first", f"One code of the {thing} is {first}."),
        ("second", f"Another code of the {thing} is {second}."),
    ]
    either = "|".join(rf"{a}\D{{1,20}}{b}" for a, b in ((first, second), (second, first)))
    return _sample(
        "needle, several values",
        shuffled(rng, needles, filler),
        question=f"What are the two codes of the {thing}?",
        lead=f"The codes of the {thing} are",
        expected=f"{first} and {second}",
        pattern=rf"(?P<answer0>{either})\b",
        evidence=[["first", "second"]],
        given=given,
    )


def two_codes(
    rng: random.Random, *, keys: int = 2, filler: int = 11, digits: int = 4, chat: bool = False
) -> TextSample:
    """Two of ``keys`` codes (2 to 10) asked for in one generation: two answers, each with evidence of its own."""
    given = _checked(keys=keys, filler=filler, digits=digits) | {"chat": chat}
    if keys < 2:
        raise InputError(
            f"keys is {keys}; two codes are asked for, so choose a whole number from 2 to {THINGS_AT_MOST}"
        )
    things, codes = draw_things(rng, keys), draw_codes(rng, keys, digits)
    body = shuffled(rng, [(thing, _code_of(thing, code)) for thing, code in zip(things, codes, strict=True)], filler)
    return _sample(
        "two codes",
        body,
        question=f"What is the code of the {things[0]}, and what is the code of the {things[1]}?",
        lead=f"The code of the {things[0]} is",
        expected=f"{codes[0]}. The code of the {things[1]} is {codes[1]}",
        pattern=rf"(?P<answer0>{codes[0]})\b\D*{things[1]}\D*(?P<answer1>{codes[1]})\b",
        evidence=[[things[0]], [things[1]]],
        given=given,
    )


def two_steps(rng: random.Random, *, rooms: int = 2, filler: int = 7, digits: int = 4) -> TextSample:
    """A thing is in a room, the room has a code: two written steps, the first one begun, and then the answer.

    Of the ``rooms`` (2 to 8), each with its thing and its code, one is asked for and another is the worked example.
    """
    given = _checked(rooms=rooms, filler=filler, digits=digits)
    things, places, codes = draw_things(rng, rooms), rng.sample(ROOMS, rooms), draw_codes(rng, rooms, digits)
    steps = [f"The {thing} is in the {place}." for thing, place in zip(things, places, strict=True)]
    lookups = [_code_of(place, code) for place, code in zip(places, codes, strict=True)]
    sentences = [*zip(things, steps, strict=True), *zip(places, lookups, strict=True)]
    begun = f"The {things[0]} is in the"
    rest = steps[0].removeprefix(f"{begun} ")
    written = rf"{re.escape(rest)}\s+Step 2: {re.escape(lookups[0])}"
    worked = f"Step 1: {steps[1]}\nStep 2: {lookups[1]}\nAnswer: {codes[1]}"
    return _sample(
        "two steps",
        shuffled(rng, sentences, filler),
        question=_ROOM_OF.format(things[0]),
        lead=f"Step 1: {begun}",
        expected=f"{rest}\nStep 2: {lookups[0]}\nAnswer: {codes[0]}",
        pattern=rf"(?P<reasoning>{written})\s+Answer:\s*(?P<answer0>{codes[0]})\b",
        evidence=[[things[0], places[0]]],
        given=given,
        example=f"Question: {_ROOM_OF.format(things[1])}\n{worked}",
    )


_ROOM_OF = "What is the code of the room with the {}?"


ENGLISH: dict[str, Callable[[random.Random], TextSample]] = {
    "needle": needle,
    "needle, several keys": lambda rng: needle(rng, keys=3),
    "needle, several values": needle_values,
    "two codes": two_codes,
    "two steps": two_steps,
}
"""The tasks as they are measured, by name; all in 150 to 200 tokens."""


def make_english(task: str, seed: int, number: int) -> TextSample:
    """The sample of a task by name, seed and number: the same arguments give the same sample."""
    if task not in ENGLISH:
        raise InputError(f"task is {task!r}; known tasks are {'; '.join(ENGLISH)}")
    return ENGLISH[task](random.Random(f"{task}/{seed}/{number}"))


def _code_of(name: str, code: str) -> str:
    return f"The code of the {name} is {code}."


def _sample(
    task: str,
    body: Sequence[_Labelled],
    *,
    question: str,
    lead: str,
    expected: str,
    pattern: str,
    evidence: Sequence[Sequence[str]],
    given: dict[str, Any],
    example: str = "",
) -> TextSample:
    """Lays out the prompt. A chat message ends in the question, a text in ``lead``, the beginning of the answer."""
    chat = given.get("chat", False)
    text, places = join_labelled(body)
    text += f"\n{example}" if example else ""
    begin = len(text) + 1
    text += f"\n{question}" if chat else f"\nQuestion: {question}\n" + (lead if example else f"Answer: {lead}")
    return TextSample(
        task=task,
        prompt=({"role": "user", "content": text},) if chat else text,
        expected=f"{lead} {expected}" if chat else f" {expected}",
        pattern=rf"\s*(?:{re.escape(lead)}\s*)?{pattern}" if chat else rf"\s*{pattern}",
        evidence=tuple(tuple(sorted(places[label] for label in labels)) for labels in evidence),
        question=(begin, len(text)),
        parameters=given,
    )


_BOUNDS = {"keys": (1, THINGS_AT_MOST), "rooms": (2, len(ROOMS)), "filler": (0, 10_000), "digits": (2, 9)}


def _checked(**given: int) -> dict[str, Any]:
    """The arguments. Raises InputError, with the bound, for one out of range."""
    for name, value in given.items():
        low, high = _BOUNDS[name]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{name} is {value!r}; choose a whole number from {low} to {high}")
    return dict(given)
