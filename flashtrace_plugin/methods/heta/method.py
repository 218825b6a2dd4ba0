"""HETA, Hessian-Enhanced Token Attribution: attention gate, curvature and information in one score per token.

    Attr_i = M_i (beta S_i + gamma I_i)        Eq. 5

Token j is predicted at position j - 1. A span is explained as one function, its weighted joint log-probability
g = sum_j w_j log P(x_j | x_<j): the gate starts on all predicting positions, the divergences are summed, and one
pass serves the span whatever its length. A single token with w = 1 is the paper's HETA.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashtrace_plugin.core.hessian.windows import Window, windows
from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.errors import InputError, UnsupportedModelError
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.cost import hops_ahead
from flashtrace_plugin.methods.driver import Step
from flashtrace_plugin.methods.heta.cost import HopCost
from flashtrace_plugin.methods.heta.options import PRESETS, HETAOptions
from flashtrace_plugin.methods.heta.terms import Cost, Curvature, Gate, Terms, WeightedTarget, gate, mask_vector
from flashtrace_plugin.methods.options import driven, one_of
from flashtrace_plugin.methods.task import Recorded, Task
from flashtrace_plugin.models.derive.memory import peak_memory


class HETA(Method):
    """Hessian-Enhanced Token Attribution, for a token or a span, also followed through the reasoning.

    Hop k explains the reasoning tokens, each weighted with its share of hop k-1's mass, and spreads as much mass as
    hop 0 did. ``components`` holds ``gate``, ``curvature`` and ``information`` of hop 0, over all before the target.
    """

    name = "heta"
    Options = HETAOptions
    drives = driven(hops=0, recursion="reasoning", ignore=())
    explains_steps = False  # its terms are scaled by the target's, and cost as much for each step as for a target
    cost_of = (
        "a masked text and, with curvature='full', as many products with the Hessian as there are probes for every "
        "token before the target, and all of it again in every hop"
    )
    cheaper = ({"curvature": "low_rank"}, {"curvature": "low_rank", "rank": 16}, {"curvature": "gradient_squared"})
    options: HETAOptions

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        self.model = _differentiable_model(self.source)
        self.mask_token = self._mask_token(self.options.mask_token)

    @classmethod
    def preset(cls, model: Any, tokenizer: Any = None, name: str = "full", **options: Any) -> HETA:
        """One of the paper's variants: "full", "LR", "LS", "WIN", "LR+WIN", "LS+WIN" or "GS".

        A model with fewer than the six layers of "LS" is differentiated by all of them. Further options override the
        preset's.
        """
        chosen = PRESETS[one_of("preset", name, PRESETS)] | options
        heta = cls(model, tokenizer, **chosen)
        layers = heta.model.config.get_text_config().num_hidden_layers
        if "last_layers" in options or (heta.options.last_layers or 0) <= layers:
            return heta
        return cls(model, tokenizer, **chosen | {"last_layers": layers})

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"mask_token": self.mask_token}

    def cost(self, task: Task) -> float:
        """All terms of the target, and of the reasoning in every hop."""
        config = self.model.config.get_text_config()
        depth = (self.options.last_layers or config.num_hidden_layers) / config.num_hidden_layers

        def hop(n: int, last: int) -> float:
            return HopCost(self.options, task, n, last, depth, config.hidden_size).total()

        first = hop(task.target.start, int(task.chosen.nonzero()[-1]))
        hops = hops_ahead(self, task)
        reasoning = int(task.through.nonzero()[-1]) if hops else 0
        return first + hops * hop(reasoning, reasoning)

    def start(self, task: Task) -> Step:
        """One forward pass for the gate; a hop computes all terms of its weighted target."""
        return _Run(self, task).step

    def _mask_token(self, token: int | str | None) -> int | None:
        """The id behind mask="pad" or mask="token"; None for the other masks."""
        mask = self.options.mask
        if mask not in ("pad", "token"):
            return None
        found = self._pad_token() if mask == "pad" else self._token_id(token)
        size = self.model.get_input_embeddings().weight.shape[0]
        if found is None or not 0 <= found < size:
            raise InputError(
                f"mask={mask!r} needs a token of the vocabulary 0..{size - 1}, got {found}; "
                "pass mask='token', mask_token=<id or text>"
            )
        return found

    def _pad_token(self) -> int | None:
        config = self.model.config.get_text_config()
        owners = ((self.tokenizer, "pad"), (config, "pad"), (config, "eos"))
        known = (getattr(owner, f"{name}_token_id", None) for owner, name in owners)
        token = next((i for i in known if i is not None), None)
        return token[0] if isinstance(token, list) else token

    def _token_id(self, token: int | str | None) -> int | None:
        if not isinstance(token, str):
            return token
        ids = self._need_tokenizer()(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(f"mask_token {token!r} is {len(ids)} tokens; give a text that is one, or an id")
        return ids[0]


class _Run:
    """HETA on one sequence: what its hops share."""

    def __init__(self, method: HETA, task: Task) -> None:
        self.method, self.options, self.task = method, method.options, task
        self.runner = task.source.runner(task.input_ids)
        self.model = self.runner.model
        self.began, self.cost = time.perf_counter(), Cost()
        self.mass: Tensor | None = None
        self.recorded: Recorded | None = None
        if self.options.gate in ("flow", "per_head"):
            self.recorded = task.record(torch.arange(int(task.rows[-1])))
            _refuse_gated_values(self.recorded)

    def step(self, weights: Tensor) -> Hop:
        """One hop. weights: [N], on tokens; hop 0 sums log-probabilities, later hops take their weighted mean."""
        task = self.task
        first = self.mass is None
        n = task.target.start if first else int(weights.nonzero()[-1])
        hop = self._pass(weights if first else weights / weights.sum(), n)
        total = hop.alpha.sum()
        if self.mass is None:
            self.mass = total
        return _scaled(hop, self.mass / total if total > 0 else self.mass.new_ones(()))

    def _pass(self, weights: Tensor, n: int) -> Hop:
        """The three terms for target tokens weighted by ``weights`` [N], over the first n positions."""
        task = self.task
        target = WeightedTarget.of(task.input_ids, weights)
        spans = self._windows(n, len(task.target))
        found, closure_error = self._gate(target, n, spans)
        components = {"gate": found.M} | self._terms(target, n, spans)
        return Hop(
            alpha=torch.nn.functional.pad(self._combined(components), (0, task.length - n)),
            head_shares=found.heads if found.heads.numel() else None,
            closure_error=closure_error,
            components=components,
            facts=self._facts(),
        )

    def _facts(self) -> dict[str, Any]:
        """What the run took so far."""
        taken = {"seconds": time.perf_counter() - self.began}
        return vars(self.cost) | taken | {"peak_memory_bytes": peak_memory(self.task.input_ids.device)}

    def _gate(self, target: WeightedTarget, n: int, spans: list[Window]) -> tuple[Gate, float]:
        if self.recorded is None:
            return gate(self.options.gate, [], target.row_weights(), n, spans), 0.0
        weights = target.row_weights().cpu()
        weights = torch.nn.functional.pad(weights, (0, len(self.recorded.rows) - len(weights)))
        return gate(self.options.gate, self.recorded.layers, weights, n, spans), self.recorded.closure(weights)

    def _terms(self, target: WeightedTarget, n: int, spans: list[Window]) -> dict[str, Tensor]:
        options = self.options
        if options.curvature is None and options.mask is None:
            return {}
        terms = Terms(
            self.runner,
            target,
            n,
            last_layers=None if options.curvature is None else options.last_layers,
            budget=options.memory_budget,
            progress=options.progress,
            cost=self.cost,
        )
        components = {}
        if options.curvature is not None:
            self._check_rank(n)
            how = Curvature(options.curvature, options.probes, options.rank, options.seed)
            components["curvature"] = terms.curvature(how, spans)
        if options.mask is not None:
            token, device = self.method.mask_token, target.input_ids.device
            components["information"] = terms.information(mask_vector(self.runner, options.mask, token, device))
        return components

    def _combined(self, components: dict[str, Tensor]) -> Tensor:
        """Attr_i = M_i (beta S_i + gamma I_i), Eq. 5; M_i alone without both terms. result: [n]"""
        weighted = [
            weight * (_by_maximum(components[name]) if self.options.rescale == "max" else components[name])
            for name, weight in (("curvature", self.options.beta), ("information", self.options.gamma))
            if name in components
        ]
        return components["gate"] * torch.stack(weighted).sum(0) if weighted else components["gate"]

    def _windows(self, n: int, target_length: int) -> list[Window]:
        window = self.options.window
        if window is None:
            return [(0, n)]
        if window < target_length:
            raise InputError(
                f"window {window} is smaller than the target of {target_length} tokens; use a window of at least "
                f"{target_length}, or explain a shorter target"
            )
        return windows(n, window, self.options.overlap)

    def _check_rank(self, n: int) -> None:
        dimension = n * self.model.config.get_text_config().hidden_size
        if self.options.curvature == "low_rank" and self.options.rank > dimension:
            raise InputError(
                f"rank {self.options.rank} is above the Hessian's dimension, {n} tokens x width = {dimension}; "
                "use a smaller rank, or curvature='full'"
            )


def _refuse_gated_values(recorded: Recorded) -> None:
    if any(layer.z_gate is not None for layer in recorded.layers):
        raise UnsupportedModelError(
            f"HETA's gate weighs values by |v W_O|, but in {recorded.family} every query gates what its heads "
            "read, so a value has no size of its own; use gate='uniform' or gate=None, or FlashTrace, which is "
            "exact here"
        )


def _scaled(hop: Hop, factor: Tensor) -> Hop:
    """The hop with as much mass as hop 0 had; without mass it stays as it is."""
    return replace(hop, alpha=hop.alpha * factor)


def _by_maximum(term: Tensor) -> Tensor:
    largest = term.max()
    return term / largest if largest > 0 else term


def _differentiable_model(source: Any) -> PreTrainedModel:
    model = source.language_model
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"HETA differentiates a Hugging Face model or a TransformerBridge, got {type(model or source).__name__}"
        )
    return model
