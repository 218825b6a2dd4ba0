"""HETA, Hessian-Enhanced Token Attribution: attention gate, curvature and information in one score per token.

    Attr_i = M_i (beta S_i + gamma I_i)        Eq. 5

Token j is predicted at position j - 1. A span is explained as one function, its weighted joint log-probability
g = sum_j w_j log P(x_j | x_<j): the gate starts on all predicting positions, the divergences are summed, and one
pass serves the span whatever its length. A single token with w = 1 is the paper's HETA.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashtrace_plugin.core.hessian.windows import Window, windows
from flashtrace_plugin.core.recursion import recurse
from flashtrace_plugin.errors import InputError, UnsupportedModelError
from flashtrace_plugin.methods.base import LayerMethod, Task, checked_hops, one_of
from flashtrace_plugin.methods.heta.options import (
    CURVATURES,
    GATES,
    MASKS,
    PRESETS,
    RESCALES,
    at_least,
    checked_choice,
    checked_overlap,
    checked_weight,
)
from flashtrace_plugin.methods.heta.terms import Cost, Curvature, Gate, Terms, WeightedTarget, gate, mask_vector
from flashtrace_plugin.models.derive.memory import peak_memory
from flashtrace_plugin.models.guard import evaluating


class HETA(LayerMethod):
    """Hessian-Enhanced Token Attribution, for a token or a span, also followed through the reasoning.

    beta, gamma:   weights of curvature and information; the paper sweeps beta + gamma = 1
    curvature:     "full", one product per token and probe (Eq. 3); "low_rank", a randomised Hessian of the given rank,
                   whose cost does not grow with the text; "gradient_squared"; None leaves the term out
    probes:        random sign vectors per token
    rank:          of the low-rank Hessian
    last_layers:   differentiate by the hidden states that enter the last so many layers instead of the embeddings
    window:        tokens per window (Algorithm 1); None: the whole text is one window
    overlap:       share of a window that the next one repeats
    gate:          "flow", the attention flow of FlashTrace weighted by value norms; "per_head", one rollout per head
                   index; "uniform", 1/n; None, 1
    mask:          what a masked token becomes: the "zero" vector, the "mean" of the vocabulary, the "pad" token's
                   embedding, or that of "token"; None leaves the information term out. Without both terms the score
                   is the gate alone
    mask_token:    the token of mask="token", as an id or as a text that is one token
    rescale:       None, the terms as they are; "max", each divided by its maximum first, as their scales can differ
                   by orders of magnitude
    hops:          times importance is followed through the reasoning. Hop k explains the reasoning tokens, each
                   weighted with its share of hop k-1's mass, and spreads as much mass as hop 0 did
    seed:          of the random vectors, the same on every device
    memory_budget: bytes of working memory to aim for when vectors and masked texts are batched
    progress:      a bar for runs that take longer than a few seconds
    """

    name = "heta"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        beta: float = 0.5,
        gamma: float = 0.5,
        curvature: str | None = "full",
        probes: int = 8,
        rank: int = 64,
        last_layers: int | None = None,
        window: int | None = None,
        overlap: float = 0.5,
        gate: str | None = "flow",
        mask: str | None = "zero",
        mask_token: int | str | None = None,
        rescale: str | None = None,
        hops: int = 0,
        seed: int = 0,
        memory_budget: int = 2 << 30,
        progress: bool = True,
    ) -> None:
        super().__init__(model, tokenizer)
        self.model = _differentiable_model(self.source)
        self.beta, self.gamma = checked_weight("beta", beta), checked_weight("gamma", gamma)
        if beta == gamma == 0:
            raise InputError(
                "beta and gamma are both 0, so every score is 0; for the gate alone use curvature=None, mask=None"
            )
        self.curvature = checked_choice("curvature", curvature, CURVATURES)
        self.probes, self.rank = at_least("probes", probes, 1), at_least("rank", rank, 1)
        self.last_layers = None if last_layers is None else at_least("last_layers", last_layers, 1)
        self.window = None if window is None else at_least("window", window, 1)
        self.overlap = checked_overlap(overlap)
        self.gate, self.mask = checked_choice("gate", gate, GATES), checked_choice("mask", mask, MASKS)
        self.mask_token = self._mask_token(mask_token)
        self.rescale = checked_choice("rescale", rescale, RESCALES)
        self.hops, self.seed = checked_hops(hops), at_least("seed", seed, 0)
        self.memory_budget, self.progress = at_least("memory_budget", memory_budget, 1), progress

    @classmethod
    def preset(cls, model: Any, tokenizer: Any = None, name: str = "full", **options: Any) -> HETA:
        """One of the paper's variants: "full", "LR", "LS", "WIN", "LR+WIN", "LS+WIN" or "GS".

        A model with fewer than the six layers of "LS" is differentiated by all of them. Further options override the
        preset's.
        """
        chosen = PRESETS[one_of("preset", name, PRESETS)] | options
        heta = cls(model, tokenizer, **chosen)
        if "last_layers" not in options and heta.last_layers is not None:
            heta.last_layers = min(heta.last_layers, heta.model.config.get_text_config().num_hidden_layers)
        return heta

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

    def _run(self, task: Task) -> dict[str, Any]:
        began, cost = time.perf_counter(), Cost()
        passes: list[_Pass] = []

        def step(weights: Tensor) -> Tensor:
            if not passes:
                passes.append(self._pass(task, weights, task.target.start, cost))
                return passes[0].padded(task.length)
            passes.append(self._pass(task, weights / weights.sum(), int(weights.nonzero()[-1]), cost))
            alpha = passes[-1].padded(task.length)
            return alpha * (passes[0].scores.sum() / alpha.sum()) if alpha.sum() > 0 else alpha

        # Tensors made in inference mode cannot be differentiated, whatever the caller's mode is.
        with torch.inference_mode(False), evaluating(self.model):
            task = replace(task, input_ids=task.input_ids.clone())
            initial, through = task.mask(task.target).float(), task.mask(task.reasoning)
            found = recurse(step, initial, through, self.hops if task.reasoning else 0)
        missing = self.hops + 1 - len(found.hop_scores)
        return {
            "scores": found.scores[: task.prompt_length].clone(),
            "hop_scores": torch.nn.functional.pad(found.hop_scores, (0, 0, 0, missing)),
            "reasoning_mass": torch.nn.functional.pad(found.reasoning_mass, (0, missing)),
            **self._shares(passes),
            "components": passes[0].components,
            "closure_error": max(p.closure_error for p in passes),
            "settings": vars(cost)
            | {"seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory(task.input_ids.device)},
        }

    def _pass(self, task: Task, weights: Tensor, n: int, cost: Cost) -> _Pass:
        """The three terms for target tokens weighted by ``weights`` [N], over the first n positions."""
        target = WeightedTarget.of(task.input_ids, weights)
        spans = self._windows(n, len(task.target))
        found, closure_error = self._gate(task, target, n, spans)
        components = {"gate": found.M} | self._terms(target, n, spans, cost)
        return _Pass(self._combined(components), components, found.heads, closure_error)

    def _gate(self, task: Task, target: WeightedTarget, n: int, spans: list[Window]) -> tuple[Gate, float]:
        if self.gate in (None, "uniform"):
            return gate(self.gate, [], target, n, spans), 0.0
        recorded = self._record(task, torch.arange(target.length))
        if any(layer.z_gate is not None for layer in recorded.layers):
            raise UnsupportedModelError(
                f"HETA's gate weighs values by |v W_O|, but in {recorded.family} every query gates what its heads "
                "read, so a value has no size of its own; use gate='uniform' or gate=None, or FlashTrace, which is "
                "exact here"
            )
        weights = target.row_weights().cpu()
        return gate(self.gate, recorded.layers, target, n, spans), recorded.hop(weights).closure_error

    def _terms(self, target: WeightedTarget, n: int, spans: list[Window], cost: Cost) -> dict[str, Tensor]:
        if self.curvature is None and self.mask is None:
            return {}
        last_layers = None if self.curvature is None else self.last_layers
        terms = Terms(
            self.model,
            target,
            n,
            last_layers=last_layers,
            budget=self.memory_budget,
            progress=self.progress,
            cost=cost,
        )
        components = {}
        if self.curvature is not None:
            self._check_rank(n)
            how = Curvature(self.curvature, self.probes, self.rank, self.seed)
            components["curvature"] = terms.curvature(how, spans)
        if self.mask is not None:
            replacement = mask_vector(self.model, self.mask, self.mask_token, target.input_ids.device)
            components["information"] = terms.information(replacement)
        return components

    def _combined(self, components: dict[str, Tensor]) -> Tensor:
        """Attr_i = M_i (beta S_i + gamma I_i), Eq. 5; M_i alone without both terms. result: [n]"""
        weighted = [
            weight * (_by_maximum(components[name]) if self.rescale == "max" else components[name])
            for name, weight in (("curvature", self.beta), ("information", self.gamma))
            if name in components
        ]
        return components["gate"] * torch.stack(weighted).sum(0) if weighted else components["gate"]

    def _windows(self, n: int, target_length: int) -> list[Window]:
        if self.window is None:
            return [(0, n)]
        if self.window < target_length:
            raise InputError(
                f"window {self.window} is smaller than the target of {target_length} tokens; use a window of at least "
                f"{target_length}, or explain a shorter target"
            )
        return windows(n, self.window, self.overlap)

    def _check_rank(self, n: int) -> None:
        dimension = n * self.model.config.get_text_config().hidden_size
        if self.curvature == "low_rank" and self.rank > dimension:
            raise InputError(
                f"rank {self.rank} is above the Hessian's dimension, {n} tokens x width = {dimension}; "
                "use a smaller rank, or curvature='full'"
            )

    def _mask_token(self, token: int | str | None) -> int | None:
        """The id behind mask="pad" or mask="token"; None for the other masks."""
        if self.mask not in ("pad", "token"):
            return None
        found = self._pad_token() if self.mask == "pad" else self._token_id(token)
        size = self.model.get_input_embeddings().weight.shape[0]
        if found is None or not 0 <= found < size:
            raise InputError(
                f"mask={self.mask!r} needs a token of the vocabulary 0..{size - 1}, got {found}; "
                "pass mask='token', mask_token=<id or text>"
            )
        return found

    def _pad_token(self) -> int | None:
        config = self.model.config.get_text_config()
        known = (getattr(self.tokenizer, "pad_token_id", None), config.pad_token_id, config.eos_token_id)
        token = next((i for i in known if i is not None), None)
        return token[0] if isinstance(token, list) else token

    def _token_id(self, token: int | str | None) -> int | None:
        if not isinstance(token, str):
            return token
        ids = self._need_tokenizer()(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(f"mask_token {token!r} is {len(ids)} tokens; give a text that is one, or an id")
        return ids[0]

    def _shares(self, passes: list[_Pass]) -> dict[str, Tensor]:
        """The gate's share of each head, and zeros for the shares that HETA does not define."""
        config = self.model.config.get_text_config()
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        shares = torch.zeros(self.hops + 1, layers, heads)
        for k, done in enumerate(passes):
            if done.heads.numel():
                shares[k] = done.heads
        return {
            "head_scores": shares,
            "residual_shares": torch.zeros(self.hops + 1, layers),
            "mlp_shares": torch.zeros(self.hops + 1, layers),
        }


_OPTIONS = (
    "beta",
    "gamma",
    "curvature",
    "probes",
    "rank",
    "last_layers",
    "window",
    "overlap",
    "gate",
    "mask",
    "mask_token",
    "rescale",
    "hops",
    "seed",
    "memory_budget",
)


@dataclass(frozen=True)
class _Pass:
    """One hop: scores [n], the terms they come from [n] each, the gate's heads and how well its layers closed."""

    scores: Tensor
    components: dict[str, Tensor]
    heads: Tensor
    closure_error: float

    def padded(self, length: int) -> Tensor:
        return torch.nn.functional.pad(self.scores, (0, length - len(self.scores)))


def _by_maximum(term: Tensor) -> Tensor:
    largest = term.max()
    return term / largest if largest > 0 else term


def _differentiable_model(source: Any) -> PreTrainedModel:
    model = getattr(source, "model", None)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"HETA differentiates a Hugging Face model, got {type(model or source).__name__}; pass the model that a "
            "TransformerBridge was booted from"
        )
    return model
