"""Needles and variable tracking in the form of RULER (Hsieh et al., 2024, arXiv:2404.06654), for any tokenizer.

The haystack is sentences of our own instead of essays; a needle is ``The magic number of the red box is 48291.`` The
names of the tasks are those of FlashTrace's Table 1: ``mq q4`` asks for four keys, ``mv v2`` for two values of one
key, ``vt h4 c1`` follows one chain of four bindings. The whole answer is the target, all needles asked for are
evidence.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence
from functools import partial

from flashtrace_plugin.evaluation.tasks.english_words import draw_codes, draw_things, shuffled
from flashtrace_plugin.evaluation.tasks.text_sample import TextSample, join_labelled

_SENTENCE = 11
"""Tokens of a sentence of filler, about."""


def _needles(
    rng: random.Random, task: str, *, queries: int = 1, values: int = 1, others: int = 2, length: int
) -> TextSample:
    """``queries`` keys with ``values`` numbers each are asked for, among ``others`` keys that are not."""
    things = draw_things(rng, queries + others)
    codes = draw_codes(rng, len(things) * values, 5)
    owned = {thing: codes[i * values : (i + 1) * values] for i, thing in enumerate(things)}
    needles = [
        (f"{thing}/{code}", f"One magic number of the {thing} is {code}." if values > 1 else _magic(thing, code))
        for thing, found in owned.items()
        for code in found
    ]
    asked = things[:queries]
    answers = [code for thing in asked for code in owned[thing]]
    names = " and ".join(f"the {thing}" for thing in asked)
    what, verb = ("magic numbers", "are") if len(answers) > 1 else ("magic number", "is")
    evidence = [f"{thing}/{code}" for thing in asked for code in owned[thing]]
    lead = f"The {what} of {names} {verb}"
    return _sample(rng, task, needles, f"What {verb} the {what} of {names}?", lead, answers, evidence, length)


def _magic(thing: str, code: str) -> str:
    return f"The magic number of the {thing} is {code}."


def _tracking(rng: random.Random, task: str, *, hops: int, chains: int, length: int) -> TextSample:
    """The variables that come to hold a number over ``hops`` bindings; the other chains hold other numbers."""
    names = ["".join(letters) for letters in _letters(rng, hops * chains)]
    codes = draw_codes(rng, chains, 5)
    bindings, evidence = [], []
    for chain, code in enumerate(codes):
        own = names[chain * hops : (chain + 1) * hops]
        for before, name in zip([code, *own], own):
            bindings.append((name, f"VAR {name} = {before if before == code else f'VAR {before}'}."))
        evidence += own if chain == 0 else []
    lead = f"The variables that hold {codes[0]} are"
    question = f"Which variables hold the value {codes[0]}?"
    return _sample(rng, task, bindings, question, lead, names[:hops], evidence, length)


def _letters(rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.sample(string.ascii_uppercase, 3))] = None
    return list(found)


def _sample(
    rng: random.Random,
    task: str,
    needles: Sequence[tuple[str, str]],
    question: str,
    lead: str,
    answers: Sequence[str],
    evidence: Sequence[str],
    length: int,
) -> TextSample:
    filler = max(0, (length - 14 * len(needles) - 40) // _SENTENCE)
    text, places = join_labelled(shuffled(rng, needles, filler))
    begin = len(text) + 1
    text += f"\nQuestion: {question}\nAnswer: {lead}"
    return TextSample(
        task=task,
        prompt=text,
        expected=f" {', '.join(answers)}",
        pattern=rf"\s*(?P<answer0>{_in_any_order(answers)})\b",
        evidence=(tuple(sorted(places[label] for label in evidence)),),
        question=(begin, len(text)),
        parameters={"length": length},
    )


def _in_any_order(answers: Sequence[str]) -> str:
    """As many words as there are answers, with a comma or an "and" between them, each answer among them."""
    one = "|".join(re.escape(answer) for answer in answers)
    among = "".join(rf"(?=(?:\w+\W+){{0,{2 * len(answers) - 2}}}{re.escape(answer)}\b)" for answer in answers)
    return rf"{among}(?:{one})(?:\W{{1,3}}(?:and )?(?:{one})){{{len(answers) - 1}}}"


_MADE: dict[str, Callable[..., TextSample]] = {
    "needle single": _needles,
    "needle multi-key": partial(_needles, others=6),
    **{f"mq q{n}": partial(_needles, queries=n) for n in (2, 4, 8)},
    **{f"mv v{n}": partial(_needles, values=n) for n in (2, 4, 8)},
    **{f"vt h{h} c{c}": partial(_tracking, hops=h, chains=c) for h, c in ((2, 3), (4, 1), (6, 1), (10, 1))},
}

_LENGTHS = (256, 1024)
"""Tokens of a prompt, about; FlashTrace's Table 1 takes 1024."""

RULER: dict[str, Callable[[random.Random], TextSample]] = {
    f"{name}, {length} tokens": partial(make, task=f"{name}, {length} tokens", length=length)
    for name, make in _MADE.items()
    for length in _LENGTHS
}
"""The tasks by name, such as ``mq q4, 1024 tokens``."""
