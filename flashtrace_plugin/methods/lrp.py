"""Span-wise relevance propagation: what every token adds to the target's logits, followed through the reasoning.

    g_w = sum_j w_j s_j        s_j: logit of token j at position j - 1, w = 1 on the target in hop 0
    R_i = < dg_w/dE_i , E_i >  on the model linearised at its own forward pass, one backward pass for a whole span

Hop k weighs the reasoning tokens by their share of hop k-1's mass, as in FlashTrace (Eq. 11/12, 22-24). Rules: Ali et
al. 2022 ("cp": attention patterns are frozen), Achtibat et al. 2024, AttnLRP ("attn": relevance goes through queries
and keys as well).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.driver import Step
from flashtrace_plugin.methods.options import Options, at_least, driven, option
from flashtrace_plugin.methods.task import Task
from flashtrace_plugin.models.derive.relevance import MEMORY_BUDGET, Linearised, Relevance, linearised


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
        "of the first and the second's positive part: what matters at the start and all the way",
        choices=("embeddings", "layers", "product"),
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
    Options = LRPOptions
    drives = driven(hops="auto", recursion="reasoning", ignore=())
    options: LRPOptions

    def start(self, task: Task) -> Step:
        """One forward pass, linearised; a hop is one backward pass."""
        foils = self._foils(task)
        opened = linearised(
            self.source.runner(),
            task.input_ids,
            task.rows - 1,
            rule=cast(Any, self.options.rule),
            memory_budget=self.options.memory_budget,
        )
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
        return torch.full((task.length,), -1).index_fill(0, torch.tensor([task.target.start + first]), other[first])

    def _like_target(self, text: str, own: list[int]) -> list[int]:
        """Tokens of a text in the target's place, with space before it where the target has it."""
        tokenizer = self._need_tokenizer()
        before = " " if tokenizer.decode(own).startswith(" ") and not text.startswith(" ") else ""
        return tokenizer(before + text, add_special_tokens=False)["input_ids"]


class _Run:
    """LRP on one sequence: its linearised model, and the objective of each hop."""

    def __init__(self, options: LRPOptions, task: Task, model: Linearised, foils: Tensor | None) -> None:
        self.options, self.task, self.model, self.foils = options, task, model, foils
        self.begun = False

    def step(self, weights: Tensor) -> Hop:
        """One hop. weights: [N], on tokens; reasoning is contrasted with nothing, so hops explain its logits."""
        first, self.begun = not self.begun, True
        layers = self.options.reading != "embeddings"
        contrast = first and self.foils is not None
        chosen = weights * (self.foils >= 0) if contrast and self.foils is not None else weights
        objective = "logit" if self.foils is not None and not first else self.options.objective
        foils = self.foils if contrast else None
        found = self.model.relevance(chosen, objective=cast(Any, objective), foils=foils, layers=layers)
        return replace(self._hop(found), facts=_facts(found) if first else {})

    def _hop(self, found: Relevance) -> Hop:
        mass = self._read(found).float().cpu()
        total = mass.sum()
        return Hop(
            alpha=mass / total if total > 0 else mass,
            closure_error=max(self.model.logit_gap, found.gap),
            components={"relevance": found.tokens}
            | ({} if found.layers is None else {"layer_relevance": found.layers.sum(0)}),
        )

    def _read(self, found: Relevance) -> Tensor:
        """Importance by reading and mass, up to its scale. result: [N]"""

        def part(relevance: Tensor) -> Tensor:
            return relevance.abs() if self.options.mass == "absolute" else relevance.clamp(min=0)

        if found.layers is None:
            return part(found.tokens)
        if self.options.reading == "layers":
            return part(found.layers).sum(0)
        return part(found.tokens) * found.layers.clamp(min=0).sum(0)


def _facts(found: Relevance) -> dict[str, float]:
    """What the objective was, and how much of it is no token's, in its own unit."""
    return {
        "objective_value": found.objective,
        "bias_share": found.biases,
        "position_share": found.positions,
        "conservation_gap": found.gap,
    }
