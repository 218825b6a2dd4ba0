"""The two tasks, in the form of RULER: variable tracking and needle retrieval.

RULER (Hsieh et al., 2024, arXiv:2404.06654) writes its statements as sentences and its chains in order. Here a
statement is ``key value … ;``, statements stand in random order, and the several values of a needle stand behind one
key instead of in several statements, because a model of under a million parameters can learn that.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.tasks.body import Statement, scatter
from flashtrace_plugin.evaluation.tasks.sample import Sample, ask
from flashtrace_plugin.evaluation.tasks.vocabulary import NEEDLE_KEYS, NUMBERS, VARIABLES

MAX_HOPS = 6


def variable_tracking(
    rng: random.Random,
    *,
    hops: int,
    chains: int,
    length: int,
    questions: int = 1,
    values: int = 1,
    noise: float = 1.0,
    thinking: bool = True,
) -> Sample:
    """Follow a variable to its value, ``v12 v7 ; … v7 84 ; … ? v12 think``, in a prompt of at most ``length`` tokens.

    Each of the ``chains`` has ``hops`` statements (1 to 6) and ends in ``values`` numbers; ``questions`` chains are
    asked for and the others distract. ``noise`` is the share of the free room that noise sentences fill.
    Raises InputError, with the bound and the remedy, for arguments out of range or that do not fit in ``length``.
    """
    given = {k: v for k, v in locals().items() if k != "rng"}
    _check("length", length)
    _check("hops", hops, MAX_HOPS)
    _check("chains", chains, len(VARIABLES) // hops)
    _check("values", values, len(NUMBERS) // chains)
    _check("questions", questions, chains)
    drawn = draw_chains(rng, [hops] * chains, values)
    return _sample(rng, "variable_tracking", drawn, given)


def needle_retrieval(
    rng: random.Random,
    *,
    keys: int,
    values: int,
    length: int,
    questions: int = 1,
    noise: float = 1.0,
    thinking: bool = True,
) -> Sample:
    """Find the values of a key, ``apple 42 17 ; … ? apple think``, in a prompt of at most ``length`` tokens.

    Of the ``keys`` needles with ``values`` numbers each, ``questions`` are asked for and the others distract.
    ``noise`` is the share of the free room that noise sentences fill.
    Raises InputError, with the bound and the remedy, for arguments out of range or that do not fit in ``length``.
    """
    given = {k: v for k, v in locals().items() if k != "rng"}
    _check("length", length)
    _check("keys", keys, len(NEEDLE_KEYS))
    _check("values", values, len(NUMBERS) // keys)
    _check("questions", questions, keys)
    drawn = [[needle] for needle in draw_needles(rng, keys, values)]
    return _sample(rng, "needle_retrieval", drawn, given)


TASKS: dict[str, Callable[..., Sample]] = {f.__name__: f for f in (variable_tracking, needle_retrieval)}


def make(task: str, seed: int, **parameters: Any) -> Sample:
    """The sample of a task by name and seed: the same arguments give the same sample."""
    if task not in TASKS:
        raise InputError(f"task is {task!r}; known tasks are {', '.join(TASKS)}")
    return TASKS[task](random.Random(seed), **parameters)


def draw_chains(rng: random.Random, hops: Sequence[int], values: int) -> list[list[Statement]]:
    """Chains of variables, ``hops[i]`` statements in chain ``i``; no variable and no number occurs in two of them."""
    variables = iter(rng.sample(VARIABLES, sum(hops)))
    numbers = iter(rng.sample(NUMBERS, len(hops) * values))
    return [_chain([next(variables) for _ in range(n)], [next(numbers) for _ in range(values)]) for n in hops]


def draw_needles(rng: random.Random, keys: int, values: int) -> list[Statement]:
    """Needles with different keys and different numbers."""
    numbers = iter(rng.sample(NUMBERS, keys * values))
    return [Statement(key, tuple(next(numbers) for _ in range(values))) for key in rng.sample(NEEDLE_KEYS, keys)]


def _chain(names: Sequence[str], end: Sequence[str]) -> list[Statement]:
    return [Statement(a, (b,)) for a, b in pairwise(names)] + [Statement(names[-1], tuple(end))]


def _sample(rng: random.Random, task: str, chains: Sequence[Sequence[Statement]], given: Mapping) -> Sample:
    """Scatter the chains and ask for the first ``questions`` of them; the draw was random, so the choice is too."""
    asked = [chain[0].key for chain in chains[: given["questions"]]]
    room = given["length"] - len(asked) - 2  # the question mark and the mode
    body = scatter(rng, [s for chain in chains for s in chain], room, given["noise"])
    return ask(body, asked, thinking=given["thinking"], task=task, parameters=given)


def _check(name: str, value: int, upper: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (upper is not None and value > upper):
        most = "up" if upper is None else f"to {upper}"
        raise InputError(f"{name} is {value!r}; choose a whole number from 1 {most}")
