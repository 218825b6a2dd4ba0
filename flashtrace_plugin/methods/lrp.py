"""Span-wise relevance propagation: what every token adds to the target's logits, followed through the reasoning.

    g_w = sum_j w_j s_j        s_j: logit of token j at position j - 1, w = 1 on the target in hop 0
    R_i = < dg_w/dE_i , E_i >  on the model linearised at its own forward pass, one backward pass for a whole span

Hop k weighs the reasoning tokens by their share of hop k-1's mass, as in FlashTrace (Eq. 11/12, 22-24). Rules: Ali et
al. 2022 ("cp": attention patterns are frozen), Achtibat et al. 2024, AttnLRP ("attn": relevance goes through queries
and keys as well).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.driver import Step
from flashtrace_plugin.methods.options import Options, at_least, driven, option
from flashtrace_plugin.methods.task import Task
from flashtrace_plugin.models.derive.relevance import MEMORY_BUDGET, Linearised, Relevance


@dataclass(frozen=True)
class LRPOptions(Options):
    """What LRP can be told; docs/lrp.md says what the choices do."""

    rule: str = option(
        "cp",
        "attention: its pattern frozen, which conserves relevance; or through queries and keys as well (AttnLRP)",
        choices=("cp", "attn"),
    )
    objective: str = option(
        "logit",
        "what is explained of the target: its logits, these less the mean logit, its log-probability, or its logit "
        "less that of `against`; then hops explain the logits of the reasoning",
        choices=("logit", "centered", "log_probability", "contrast"),
    )
    against: int | str | None = option(
        None,
        "what the target is contrasted with, a token's id or a text: why this and not that? A text counts where it "
        "first differs from the target",
    )
    mass: str = option(
        "absolute", "importance is the magnitude of relevance, or its positive part", choices=("absolute", "positive")
    )
    reading: str = option(
        "embeddings",
        "relevance at the token embeddings; summed over the residual stream that enters every layer; or the product "
        "of the first and, layer by layer, the mean of the second's magnitude and positive part",
        choices=("embeddings", "layers", "product"),
    )
    context: str = option(
        "target",
        "what importance is that for: the target alone, or times that for the whole generation up to its end, which "
        "costs one more backward pass where the two differ",
        choices=("target", "generation"),
    )
    memory_budget: int = option(
        MEMORY_BUDGET,
        "bytes that the linearisation may keep; what does not fit is computed again in every hop",
        check=at_least(0),
        noted=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.objective == "contrast") != (self.against is not None):
            raise InputError(
                "objective='contrast' and against=... go together: against is the token or text that the target is "
                f"contrasted with, got objective={self.objective!r}, against={self.against!r}"
            )


class LRP(Method):
    """Span-wise layer-wise relevance propagation, recursed through the reasoning (rules of Ali et al. and AttnLRP).

    One forward pass, and one backward pass per hop, however long the target is. ``components["relevance"]`` [N] keeps
    the signs of hop 0: positive supports the target, negative speaks against it. Every call proves itself: the
    linearised model gives the model's logits, and under rule "cp" relevance and the share of biases add up to the
    objective.
    """

    name = "lrp"
    reads_images = True
    Options = LRPOptions
    drives = driven(hops="auto", recursion="reasoning", ignore=(), sinks="keep")
    hop_cost = 1.3  # a backward pass: .9 under rule "cp", 1.2 under "attn", 1.8 where the pass is run again for it
    options: LRPOptions

    def cost(self, task: Task) -> float:
        """As for every method, and a backward pass for the generation where it is the context."""
        return super().cost(task) + self.hop_cost * (self.options.context == "generation")

    @property
    def conserves(self) -> bool:
        """Whether relevance and the shares of biases and positions add up to the objective: under rule "cp"."""
        return self.options.rule == "cp"

    def conservation_delta(self, found: Attribution) -> float:
        """Signed relevance, bias share and position share of hop 0, less its objective."""
        told = found.settings
        relevance = float(found.components["relevance"].double().sum())
        return relevance + told["bias_share"] + told["position_share"] - told["objective_value"]

    def start(self, task: Task) -> Step:
        """One forward pass, linearised; a hop is one backward pass."""
        foils = self._foils(task)
        weighted = (task.rows, _generation(task)) if self.options.context == "generation" else (task.rows,)
        rows, rule = torch.cat(weighted).unique() - 1, cast(Any, self.options.rule)
        opened = task.passes.linearised(task.source, task.input_ids, rows, rule, self.options.memory_budget)
        return _Run(self.options, task, task.contexts.enter_context(opened), foils).step

    def _foils(self, task: Task) -> Tensor | None:
        """Ids [N] to contrast the target with, -1 where it is not; None for other objectives. Raises InputError."""
        against = self.options.against
        if against is None:
            return None
        if isinstance(against, int) and against < 0:
            raise InputError(f"against={against} is outside the vocabulary; pass a token's id >= 0, or a text")
        own = task.input_ids[0, task.target.slice].tolist()
        other = [against] if isinstance(against, int) else self._like_target(against, own)
        first = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), None)
        if first is None:
            raise InputError(
                f"against={against!r} is the target itself or how it begins, so there is nothing to contrast; pass "
                "another token or text"
            )
        at = torch.tensor([task.target.start + first])
        return torch.full((task.length,), -1, dtype=torch.long).index_fill(0, at, other[first])

    def _like_target(self, text: str, own: list[int]) -> list[int]:
        """Tokens of a text in the target's place, with space before it where the target has it."""
        tokenizer = self._need_tokenizer()
        before = " " if tokenizer.decode(own).startswith(" ") and not text.startswith(" ") else ""
        return tokenizer(before + text, add_special_tokens=False)["input_ids"]


class _Run:
    """LRP on one sequence: its linearised model, and the objective of each hop."""

    def __init__(self, options: LRPOptions, task: Task, model: Linearised, foils: Tensor | None) -> None:
        self.options, self.task, self.model, self.foils = options, task, model, foils
        self.layers = options.reading != "embeddings"

    def step(self, weights: Tensor) -> Hop:
        """One hop. weights: [N], on tokens; reasoning is contrasted with nothing, so hops explain its logits."""
        first = torch.equal(weights, self.task.initial)
        found = self._target() if first else self._relevance(weights)
        mass = self._importance(found) if self.options.context == "target" else self._importance(found) * self._context
        total = mass.sum()
        return Hop(
            alpha=mass / total if total > 0 else mass,
            closure_error=max(self.model.logit_gap, found.gap),
            components={"relevance": found.tokens}
            | ({} if found.layers is None else {"layer_relevance": found.layers.sum(0)}),
            facts=_facts(found) if first else {},
        )

    def _target(self) -> Relevance:
        """Relevance for the target, of which a contrast explains the token where the two differ."""
        if self.foils is None:
            return self._relevance(self.task.initial)
        contrasted = self.task.initial * (self.foils >= 0)
        return self.model.relevance(contrasted, objective="contrast", foils=self.foils, layers=self.layers)

    def _relevance(self, weights: Tensor) -> Relevance:
        objective = cast(Any, "logit" if self.foils is not None else self.options.objective)
        return self.model.relevance(weights, objective=objective, layers=self.layers)

    @cached_property
    def _context(self) -> Tensor:
        """Importance for the whole generation up to the target's end, sum 1. result: [N]"""
        weights = torch.zeros_like(self.task.initial).index_fill(0, _generation(self.task), 1.0)
        mass = self._importance(self._relevance(weights * self.task.kept))
        return mass / mass.sum()

    def _importance(self, found: Relevance) -> Tensor:
        """Importance by reading and mass, up to its scale, float32 on the CPU. result: [N]"""
        tokens = _mass(found.tokens, self.options.mass)
        if found.layers is None:
            return tokens
        if self.options.reading == "layers":
            return _mass(found.layers, self.options.mass).sum(0)
        return tokens * (_mass(found.layers, "absolute") + _mass(found.layers, "positive")).sum(0)


def _generation(task: Task) -> Tensor:
    """Positions of what was written up to the target's end."""
    return torch.arange(task.prompt_length, task.target.stop)


def _mass(relevance: Tensor, mass: str) -> Tensor:
    return (relevance.abs() if mass == "absolute" else relevance.clamp(min=0)).float().cpu()


def _facts(found: Relevance) -> dict[str, float]:
    """What the objective was, and how much of it is no token's, in its own unit."""
    return {
        "objective_value": found.objective,
        "bias_share": found.biases,
        "position_share": found.positions,
        "conservation_gap": found.gap,
    }
