"""The sources that methods read: a running bridge, or activations that a bridge has cached."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashtrace_lens.blocks import BridgeBlock, blocks_of
from flashtrace_lens.boot import is_verified, plain_model, verify
from flashtrace_lens.capture import capture_bridge, evaluating_bridge
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import StoredPattern
from flashtrace_plugin.errors import InputError, UnsupportedModelError
from flashtrace_plugin.models.guard import check_ids


class _BridgeSource:
    """Layers from the hook points of a ``TransformerBridge``, one forward pass per sequence."""

    name = "hook points"

    def __init__(self, bridge: Any) -> None:
        self.bridge = checked_bridge(bridge)
        self.tokenizer = bridge.tokenizer

    @cached_property
    def model(self) -> PreTrainedModel | None:
        """The plain Hugging Face model with the bridge's weights, for methods that differentiate (HETA).

        Hooks on the bridge do not reach it. None where the weights are not plain tensors (quantised, LoRA).
        """
        return plain_model(self.bridge)

    def check_ids(self, input_ids: Tensor) -> Tensor:
        return check_ids(self.bridge.original_model, input_ids)

    def layers(self, input_ids: Tensor, rows: Tensor) -> list[Layer]:
        checked_bridge(self.bridge)
        verify(self.bridge, input_ids)
        return capture_bridge(self.bridge, input_ids, rows)

    def describe(self) -> dict[str, Any]:
        """``logits_checked`` is False where the bridge could not be compared with its Hugging Face model yet."""
        return {
            "model": self.bridge.cfg.model_name,
            "family": self.bridge.original_model.config.get_text_config().model_type,
            "dtype": str(self.bridge.original_model.dtype).removeprefix("torch."),
            "source": self.name,
            "logits_checked": is_verified(self.bridge),
        }

    def runner(self, input_ids: Tensor) -> Any:
        """The bridge itself, hooks included, once its logits are known to be its Hugging Face model's."""
        from flashtrace_lens.relevance import BridgeRunner

        checked_bridge(self.bridge)
        verify(self.bridge, input_ids)
        return BridgeRunner(self.bridge)

    def configs(self) -> list[Any]:
        wrapped = self.bridge.original_model
        return [wrapped.config.get_text_config(), getattr(wrapped, "generation_config", None)]

    def guarded(self) -> AbstractContextManager[None]:
        return evaluating_bridge(self.bridge)


class _CacheSource(_BridgeSource):
    """Layers from an ``ActivationCache`` of one sequence, without running the model again."""

    name = "activation cache"

    def __init__(self, cache: Any) -> None:
        super().__init__(cache.model)
        self.cache = cache
        self.blocks = blocks_of(self.bridge)
        for block in self.blocks:
            for hook in block.hooks.values():
                self._cached(hook)
        if self._activation(self.blocks[0], "resid_pre").shape[0] != 1:
            raise InputError("the cache holds several sequences; run_with_cache on one sequence at a time")

    def check_ids(self, input_ids: Tensor) -> Tensor:
        ids = super().check_ids(input_ids)
        lengths = {self._activation(b, part).shape[1] for b in self.blocks for part in ("resid_pre", "resid_post")}
        if lengths != {ids.shape[1]}:
            raise InputError(
                f"the cache holds {sorted(lengths)} positions, the sequence has {ids.shape[1]}; cache the same tokens "
                "that are attributed (a text gets its beginning-of-sequence token in both), without pos_slice"
            )
        return ids

    def layers(self, input_ids: Tensor, rows: Tensor) -> list[Layer]:
        verify(self.bridge, input_ids)
        return [self._layer(block, rows) for block in self.blocks]

    def runner(self, input_ids: Tensor) -> Any:
        raise UnsupportedModelError(
            "an ActivationCache holds what the model computed and cannot be differentiated; pass the bridge itself"
        )

    def _layer(self, block: BridgeBlock, rows: Tensor) -> Layer:
        parts = {part: block.pick(part, self._activation(block, part), rows) for part in block.hooks}
        A = parts.pop("pattern")
        return block.layer(parts, StoredPattern(rows.to(A.device), A))

    def _activation(self, block: BridgeBlock, part: str) -> Tensor:
        activation = self._cached(block.hooks[part])
        return activation if self.cache.has_batch_dim else activation[None]

    def _cached(self, hook: str) -> Tensor:
        if hook not in self.cache.cache_dict:
            raise InputError(
                f"the cache lacks {hook}; fill it with "
                "bridge.run_with_cache(tokens, names_filter=flashtrace_lens.names_filter)"
            )
        return self.cache.cache_dict[hook]


def source(model: Any) -> _BridgeSource:
    """The source for an object of TransformerLens: a ``TransformerBridge`` or an ``ActivationCache``."""
    from transformer_lens import ActivationCache

    return _CacheSource(model) if isinstance(model, ActivationCache) else _BridgeSource(model)


def checked_bridge(bridge: Any) -> Any:
    """The bridge itself. Raises UnsupportedModelError for anything else, and for processed weights."""
    from transformer_lens.model_bridge import TransformerBridge

    if not isinstance(bridge, TransformerBridge):
        raise UnsupportedModelError(
            f"expected a TransformerBridge or an ActivationCache of one, got {type(bridge).__name__}; "
            "boot one with TransformerBridge.boot_transformers(name), or flashtrace_lens.bridge_for(hf_model)"
        )
    # TransformerLens' own tools read this flag: compatibility mode without processing renames hooks and no more.
    if getattr(bridge, "_weights_processed", False):
        raise UnsupportedModelError(
            "the bridge's weights have been processed (compatibility mode: folded norms, centred weights); its logits "
            "stay, but the sizes that proximity measures do not, so scores would not be the model's. Use a freshly "
            "booted bridge, or enable_compatibility_mode(no_processing=True)"
        )
    return bridge


def as_ids(bridge: Any, tokens: Any) -> Tensor:
    """Token ids of a text as the bridge tokenizes it, or the ids themselves."""
    if not isinstance(tokens, str):
        return torch.as_tensor(tokens)
    if bridge.tokenizer is None:
        raise InputError("this bridge has no tokenizer; pass token ids instead of a text")
    return bridge.to_tokens(tokens)
