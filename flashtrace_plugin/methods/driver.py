"""Drives a method: hop after hop from the target through the reasoning, with every answer of the method checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from flashtrace_plugin.core.recursion import Hop, Recursion, Rows, conducted, recursing, solve
from flashtrace_plugin.errors import InputError, MethodError, ReasoningWarning
from flashtrace_plugin.methods.options import Hops
from flashtrace_plugin.methods.task import Task

Step = Callable[[Tensor], Hop]
"""One hop of a method: weights [N] of positions -> :class:`~flashtrace_plugin.core.recursion.Hop`."""


@dataclass(frozen=True)
class Found:
    """What a run of a method found, as fields of an Attribution."""

    scores: Tensor
    hop_scores: Tensor
    reasoning_mass: Tensor
    head_scores: Tensor
    residual_shares: Tensor
    mlp_shares: Tensor
    components: dict[str, Tensor]
    closure_error: float
    settings: dict[str, Any]


def drive(
    name: str, begun: Step | Rows, task: Task, hops: Hops, *, asked: bool = True, renormalise: bool = False
) -> Found:
    """Runs the hops and puts together what they found.

    name:        of the method, for errors
    begun:       the method's step, or its matrix of rows
    hops:        how many to make
    asked:       whether the caller asked for them, and is told when there is no reasoning to follow
    renormalise: whether the prompt's scores are brought to sum 1 (Eq. 31)

    Raises MethodError for a hop that no attribution can be made of.
    """
    asking = driving(name, begun, task, hops, asked=asked, renormalise=renormalise)
    return conducted(asking, step_of(begun, task))


def driving(
    name: str, begun: Step | Rows, task: Task, hops: Hops, *, asked: bool, renormalise: bool
) -> Generator[Tensor, Hop, Found]:
    """:func:`drive` for who makes hops of several texts at once: asks for the hop of weights [N], one by one."""
    task, sinks = yield from _without_sinks(name, task)
    done: list[Hop] = []

    def alpha(hop: Hop, weights: Tensor) -> Tensor:
        done.append(_closed(checked(name, hop, task, done), weights, task))
        return done[-1].alpha * task.kept

    follow = bool(task.through.any())
    if asked and hops and hops != "auto" and not follow:
        _warn_without_reasoning(name, hops)
    if hops == inf and follow:
        _check_rows(name, begun)
        alpha((yield task.initial), task.initial)  # also run as a step, for what else it tells
        found = _all_at_once(begun, task)
    else:
        most = 0 if not follow else hops if isinstance(hops, int) else None
        found = yield from _each(recursing(task.initial, task.through, most, task.shift), alpha)
    length = hops if isinstance(hops, int) else len(found.hop_scores) - 1
    followed = "all" if hops == inf and follow else len(done) - 1
    facts: dict[str, Any] = {"hops_followed": followed, "mass_left": found.left}
    put_together = _assembled(found, done, task, length, renormalise, facts)
    if sinks is None:
        return put_together
    return replace(
        put_together,
        components=put_together.components | {"sinks": sinks.float()},
        settings=put_together.settings | sink_facts(sinks, done[0], task),
    )


def _each(
    recursion: Generator[Tensor, Tensor, Recursion], alpha: Callable[[Hop, Tensor], Tensor]
) -> Generator[Tensor, Hop, Recursion]:
    """A recursion that is sent hops, of which ``alpha`` takes the importance."""
    importance: Any = None
    while True:
        try:
            weights = recursion.send(importance)
        except StopIteration as end:
            return end.value
        importance = alpha((yield weights), weights)


def step_of(begun: Step | Rows, task: Task) -> Step:
    """A method's step."""
    return replace(begun, alpha=begun.alpha * task.kept).step if isinstance(begun, Rows) else begun


def stepping(name: str, begun: Step | Rows, task: Task) -> tuple[Step, Task, Tensor | None]:
    """A method's step, the task without what is left out as a sink, and where sinks are if they were asked for."""
    step = step_of(begun, task)
    return step, *conducted(_without_sinks(name, task), step)


def _without_sinks(name: str, task: Task) -> Generator[Tensor, Hop, tuple[Task, Tensor | None]]:
    if task.sinks == "keep":
        return task, None
    # A prompt of one token has nothing to be measured by.
    measured = bool(task.neutral.any())
    sinks = _sinks(checked(name, (yield task.neutral_weights), task), task) if measured else task.neutral
    if task.sinks == "drop":
        task = replace(task, kept=task.kept & ~sinks, through=task.through & ~sinks)
    return task, sinks


def one_step(name: str, step: Step, weights: Tensor, task: Task, before: Sequence[Hop] = ()) -> Hop:
    """One hop, checked and with its closure error, beside those that were made before. weights: [N]"""
    return _closed(checked(name, step(weights), task, before), weights, task)


SINK = 10.0
"""A position is a sink if it draws this many times its even share of the mass, for a spread of the prompt's tokens."""


def _sinks(neutral: Hop, task: Task) -> Tensor:
    """Positions of the prompt that draw mass whatever the target, here for a spread of its own tokens. [N] bool

    A word can be what many tokens rest on, so only special tokens are taken for sinks, and the first token if it draws
    more than all others together. Special tokens are compared with all but the tokens of the spread and those before
    them, which predict them: what these draw can be nearly all, and is for the one token alone.
    """
    prompt = torch.arange(task.length) < task.prompt_length
    mass = _shares(neutral.alpha * prompt)
    first = (torch.arange(task.length) == 0) & (mass > 0.5)
    asked = task.neutral | task.neutral.roll(-1)
    others = _shares(neutral.alpha * (prompt & (task.special | ~asked)))
    return (task.special & (others > SINK / task.prompt_length)) | (first & (mass > SINK / task.prompt_length))


def _shares(mass: Tensor) -> Tensor:
    return mass / mass.sum() if mass.sum() > 0 else mass


def sink_facts(sinks: Tensor, first: Hop, task: Task) -> dict[str, Any]:
    """Where the sinks are, and the share of hop 0's mass on the prompt that they drew."""
    prompt = first.alpha[: task.prompt_length]
    share = float(prompt[sinks[: task.prompt_length]].sum() / prompt.sum()) if prompt.sum() > 0 else 0.0
    return {"sink_share": share, "sink_positions": sinks.nonzero()[:, 0].tolist()}


def _all_at_once(begun: Any, task: Task) -> Recursion:
    """Every hop by one triangular solve."""
    return solve(replace(begun, alpha=begun.alpha * task.kept), task.initial, task.through, task.shift)


def _check_rows(name: str, begun: Step | Rows) -> None:
    if not isinstance(begun, Rows):
        raise InputError(
            f"hops=inf needs a row of importance for every token, which {name!r} has not; use hops='auto', or "
            "RecursiveAttribution"
        )


def _warn_without_reasoning(name: str, hops: Hops) -> None:
    warnings.warn(
        f"{name}: {'1 hop was' if hops == 1 else f'{hops} hops were'} asked for, but no reasoning was found before "
        "the target, so the target is explained directly. Pass reasoning=... (a piece of the text or positions), "
        "format=... for markers that are not in the table, or hops=0 if there is none",
        ReasoningWarning,
        stacklevel=8,
    )


def _closed(hop: Hop, weights: Tensor, task: Task) -> Hop:
    """The hop with its closure error; layers that a method has read but not checked are checked here."""
    if hop.closure_error is not None:
        return hop
    return replace(hop, closure_error=max((read.closure(weights) for read in task.recorded), default=0.0))


def _assembled(
    found: Recursion, hops: Sequence[Hop], task: Task, asked: int, renormalise: bool, facts: dict[str, Any]
) -> Found:
    """Fields of an Attribution; hops that had no mass to follow stay zero."""

    def padded(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(asked + 1 - len(values), *values.shape[1:])])

    def shares(field: str, rank: int) -> Tensor:
        each = [getattr(hop, field) for hop in hops]
        none = torch.zeros(len(each), *[0] * rank, dtype=torch.float32)
        return padded(none if each[0] is None else torch.stack(each).float())

    edits = {} if hops[0].edit_shares is None else {"edit_shares": shares("edit_shares", 1)}
    scores = found.scores[: task.prompt_length].clone()
    total = scores.sum()
    return Found(
        scores=scores / total if renormalise and total > 0 else scores,
        hop_scores=padded(found.hop_scores),
        reasoning_mass=padded(found.reasoning_mass),
        head_scores=shares("head_shares", 2),
        residual_shares=shares("residual_shares", 1),
        mlp_shares=shares("mlp_shares", 1),
        components={name: value.float().cpu() for name, value in hops[0].components.items()} | edits,
        closure_error=max(float(hop.closure_error or 0.0) for hop in hops),
        settings=facts | {k: v for hop in hops for k, v in hop.facts.items()},
    )


def checked(name: str, hop: Any, task: Task, before: Sequence[Hop] = ()) -> Hop:
    """The hop on the CPU in float32. Raises MethodError for one that no attribution can be made of."""
    if not isinstance(hop, Hop):
        raise MethodError(f"the method {name!r} returned {type(hop).__name__} from a step; it must return a Hop")
    alpha = hop.alpha.detach().float().cpu() if isinstance(hop.alpha, Tensor) else hop.alpha
    _check_alpha(name, alpha, task)
    for part in ("head_shares", "residual_shares", "mlp_shares", "edit_shares"):
        first = getattr(before[0], part) if before else getattr(hop, part)
        _check_shares(name, part, getattr(hop, part), first)
    return replace(hop, alpha=alpha)


def _check_alpha(name: str, alpha: Any, task: Task) -> None:
    if not isinstance(alpha, Tensor) or alpha.shape != (task.length,):
        shape = list(alpha.shape) if isinstance(alpha, Tensor) else type(alpha).__name__
        raise MethodError(
            f"the method {name!r} returned importance {shape} for {task.length} tokens; a hop's alpha must be a "
            "tensor with one number for every position, prompt and generation"
        )
    bad = (~alpha.isfinite() | (alpha < 0)).nonzero()[:, 0]
    if len(bad):
        raise MethodError(
            f"the method {name!r} returned {len(bad)} of {task.length} numbers that are negative or not finite, the "
            f"first {float(alpha[bad[0]]):.3g} at position {int(bad[0])}; importance is mass: return magnitudes or "
            "positive parts and keep signs in components. Half precision may overflow: use bfloat16 or float32"
        )
    late = alpha[task.target.stop :].nonzero()[:, 0]
    if len(late):
        raise MethodError(
            f"the method {name!r} put mass on position {task.target.stop + int(late[0])}, after the target "
            f"{task.target}; what comes later cannot have caused it. Was a matrix transposed?"
        )


def _check_shares(name: str, part: str, value: Tensor | None, first: Tensor | None) -> None:
    rank = 2 if part == "head_shares" else 1
    same = (value is None) == (first is None) and (value is None or value.shape == first.shape)  # type: ignore[union-attr]
    if not same or (value is not None and value.dim() != rank):
        seen = None if value is None else list(value.shape)
        wanted = None if first is None else list(first.shape)
        raise MethodError(
            f"the method {name!r} returned {part} {seen} after {wanted} in the first hop; every hop must have them "
            f"alike, with {'[L, H]' if rank == 2 else '[L]'} numbers, or none"
        )
    if value is not None and not bool(value.isfinite().all()):
        raise MethodError(f"the method {name!r} returned {part} that are not finite; use bfloat16 or float32")
