"""Long written reasoning: a chain of steps of any length, which a small model is given to have written."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial

from flashtrace_plugin.evaluation.tasks.english_words import FILLER, draw_codes, draw_things, shuffled
from flashtrace_plugin.evaluation.tasks.text_sample import TextSample, join_labelled


def _long_steps(rng: random.Random, task: str, *, steps: int, hops: int = 4) -> TextSample:
    """``hops`` things each hold the next, the last a code; the steps that follow them are spread over ``steps``.

    The other steps are remarks that decide nothing, so that the way from the answer to the prompt is long.
    """
    things, (code,) = draw_things(rng, hops + 3), draw_codes(rng, 1, 4)
    chain = [f"The {a} is inside the {b}." for a, b in zip(things[1:hops], things[:hops])]
    facts = [(things[0], f"The code of the {things[0]} is {code}."), *zip(things[1:hops], chain)]
    others = [
        (thing, f"The code of the {thing} is {wrong}.") for thing, wrong in zip(things[hops:], draw_codes(rng, 3, 4))
    ]
    text, places = join_labelled(shuffled(rng, [*facts, *others], 6))
    begin = len(text) + 1
    text += f"\nQuestion: What is the code of the outermost thing that holds the {things[hops - 1]}?\nSteps:"
    said = [fact for _, fact in reversed(facts)]
    written = _spread(rng, said, max(steps, hops))
    return TextSample(
        task=task,
        prompt=text,
        expected=f" {written}\nAnswer: {code}",
        pattern=rf"(?s)\s*(?P<reasoning>{_all_of(said)})\s+Answer:\s*(?P<answer0>{code})\b",
        evidence=(tuple(sorted(places[thing] for thing in things[:hops])),),
        question=(begin, len(text)),
        parameters={"steps": steps, "hops": hops},
    )


def _spread(rng: random.Random, said: list[str], steps: int) -> str:
    """The facts in their order at random places among remarks, the last of them at the end."""
    places = sorted(rng.sample(range(steps - 1), len(said) - 1))
    at = dict(zip([*places, steps - 1], said, strict=True))
    return " ".join(at.get(step) or rng.choice(FILLER) for step in range(steps))


def _all_of(said: list[str]) -> str:
    return ".*?".join(re.escape(fact) for fact in ["", *said])


LONG_STEPS: dict[str, Callable[[random.Random], TextSample]] = {
    f"{steps} steps": partial(_long_steps, task=f"{steps} steps", steps=steps) for steps in (5, 20, 50, 100)
}
"""The tasks by name; a step has 11 tokens, so that 100 are about 1,100."""
