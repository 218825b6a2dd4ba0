"""A model as a function of what stands in a tail of the sequence, with the unchanged prefix reused.

Masking a token or moving its embedding changes nothing before that token, so the keys and values of what precedes
it are computed once and every later run covers the tail only. The numbers are those of the whole sequence. Where hooks
may look at positions, or layers hand on a state instead of keys and values, every run is the whole text instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from flashtrace_plugin.errors import InputError, UnsupportedModelError
from flashtrace_plugin.models.derive.blockwise import blockwise_methods, register_blockwise
from flashtrace_plugin.models.modes import check_differentiable, check_layer_by_layer
from flashtrace_plugin.models.prefix import cached_states, prefix_cache
from flashtrace_plugin.models.read.layouts import transformer_blocks

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference of a log-probability with and without reuse; 0.5 for half precision."""


class Tails:
    """log P(· | x_<=p) at the predicting positions, as a function of the vectors from some position on.

    model:       a decoder of transformers
    input_ids:   [1, N]  the sequence up to the last predicting position
    rows:        number of predicting positions; they are the last of the N
    last_layers: also note the hidden states that enter the last so many layers
    after:       [1, M]  what follows in the text, where every run must be the whole of it; None: only tails are run

    embeddings:  [N, d]  what the embedding module gives; factors and position embeddings come later, in the model
    hidden:      [N, d]  the hidden states that enter layer L - last_layers, or None
    forwards:    sequences run so far
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        rows: int,
        *,
        last_layers: int | None = None,
        after: Tensor | None = None,
    ) -> None:
        self.model, self.rows, self.forwards = model, rows, 0
        self.reuses = after is None
        _check_embeddings(model)
        if last_layers is not None:
            check_layer_by_layer(model, "last_layers would leave that out")
        self.block = None if last_layers is None else _block(model, last_layers)
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.hidden: Tensor | None = None
        self.cache = DynamicCache()
        with torch.no_grad():
            text = input_ids if after is None else torch.cat([input_ids, after], 1)
            embeddings = model.get_input_embeddings()(text)[0].detach()
            self.embeddings, self.after = embeddings[: input_ids.shape[1]], embeddings[input_ids.shape[1] :]
            self._fill()
            self._check_reuse()

    def log_probs(self, tails: Tensor, start: int) -> Tensor:
        """From embeddings. tails: [B, N - start, d]; result: [B, r, V] for the rows that are not before ``start``"""
        return self._run(tails, start, use_cache=False, past_key_values=self._prefix(start) if self.reuses else None)

    def log_probs_from_hidden(self, tails: Tensor, start: int) -> Tensor:
        """The same from the hidden states that enter layer L - last_layers. tails: [B, N - start, d]"""
        embeddings = self.embeddings[start:].expand(len(tails), -1, -1)
        begin = 0 if self.reuses else start
        end = begin + tails.shape[1]
        with _entering(self._chosen_block(), lambda x: torch.cat([x[:, :begin], tails, x[:, end:]], 1)):
            return self.log_probs(embeddings, start)

    def _run(self, tails: Tensor, start: int, **options: Any) -> Tensor:
        rows, late = min(self.rows, tails.shape[1]), len(self.after)
        if self.keeps_logits:
            options["logits_to_keep"] = rows + late
        inputs = tails if self.reuses else self._whole(tails, start)
        logits = self.model(inputs_embeds=inputs, **options).logits
        logits = logits[:, -rows - late : logits.shape[1] - late]
        self.forwards += len(tails)
        # Half precision ends here: log-probabilities and all that is summed over them are float32.
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    def _whole(self, tails: Tensor, start: int) -> Tensor:
        """The text with these vectors in it. tails: [B, N - start, d]; result: [B, N + M, d]"""
        parts = self.embeddings[:start], self.after
        before, after = (part.expand(len(tails), -1, -1) for part in parts)
        return torch.cat([before, tails, after], 1)

    def _fill(self) -> None:
        """Keys and values of the whole sequence, and the hidden states that enter the chosen layer."""

        def note(hidden: Tensor) -> Tensor:
            self.hidden = hidden.detach()[0, : len(self.embeddings)].clone()
            return hidden

        caching = {"use_cache": self.reuses, "past_key_values": self.cache if self.reuses else None}

        with _entering(self.block, note) if self.block is not None else nullcontext():
            log_probs = self._run(self.embeddings[None], 0, **caching)
        if not bool(torch.isfinite(log_probs).all()):
            raise InputError(
                f"the model's log-probabilities are not finite in {self.model.dtype}; log-softmax and sums are "
                "float32, but weights and activations keep the model's own type: load it in bfloat16 or float32"
            )
        self.whole = log_probs[0]

    def _prefix(self, stop: int) -> Cache | None:
        return prefix_cache(cached_states(self.cache, stop)) if stop else None

    @property
    def _layers(self) -> list[Any]:
        return self.cache.layers

    def _check_reuse(self) -> None:
        """Raises UnsupportedModelError if running a tail gives other numbers than running the whole."""
        if self.reuses and not (self._layers and all(isinstance(layer, DynamicLayer) for layer in self._layers)):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not keep keys and values in a cache; HETA needs attention layers"
            )
        gap = self.gap()
        if not gap <= self.tolerance:
            again = "when its cache is reused" if self.reuses else "in a second run under the hooks that are on it"
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives other log-probabilities {again} (largest difference {gap:.1e}, "
                f"bound {self.tolerance:.0e}), so HETA's terms would be wrong"
            )

    @property
    def tolerance(self) -> float:
        """Largest difference of a log-probability that rounding explains; large logits are rounded more."""
        dtype = self.model.dtype
        return max(_TOLERANCE.get(dtype, 0.5), 4 * torch.finfo(dtype).eps * float(self.whole.abs().max()))

    def gap(self) -> float:
        """Largest difference between the log-probabilities of the second half as they come now and those of the whole.

        The run is not counted in ``forwards``.
        """
        start, before = len(self.embeddings) // 2, self.forwards
        with torch.no_grad():
            tail = self.log_probs(self.embeddings[None, start:], start)[0]
        self.forwards = before
        return float((tail - self.whole[-len(tail) :]).abs().max())

    def _chosen_block(self) -> nn.Module:
        if self.block is None:
            raise ValueError("hidden states need last_layers")
        return self.block


def _check_embeddings(model: PreTrainedModel) -> None:
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise UnsupportedModelError(
            f"{type(model).__name__} reads the token ids again in every layer (hidden_size_per_layer_input), so it is "
            "no function of its embeddings, whose curvature HETA takes; use another method"
        )


def _block(model: PreTrainedModel, last_layers: int) -> nn.Module:
    """The first of the last so many blocks."""
    blocks = transformer_blocks(model)
    if not 1 <= last_layers <= len(blocks):
        raise InputError(f"last_layers must be between 1 and the model's {len(blocks)} layers, got {last_layers}")
    return blocks[len(blocks) - last_layers]


@contextmanager
def _entering(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active, the hidden states that enter ``block`` pass through ``change``."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def twice_differentiable(model: PreTrainedModel, *, blockwise: bool = False) -> Iterator[None]:
    """Switches to eager attention, which has second derivatives as fused kernels have not, and to constant parameters.

    model:     a view; the parameters that it gets share the memory of the user's, whose flags stay
    blockwise: attention by blocks of queries, whose patterns are formed again when needed instead of kept

    Attention and parameters are put back on leaving, also after an error.
    """
    check_differentiable(model, type(model).__name__)
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    places = [(m._parameters, name, p) for m in model.modules() for name, p in m._parameters.items()]
    trainable = [(own, name, p) for own, name, p in places if p is not None and p.requires_grad]
    try:
        for config in configs.values():
            config._attn_implementation = register_blockwise() if blockwise else "eager"
        for own, name, parameter in trainable:
            own[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        with blockwise_methods(model) if blockwise else nullcontext():
            yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for own, name, parameter in trainable:
            own[name] = parameter
