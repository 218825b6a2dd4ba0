"""The sources that methods read: a running bridge, or activations that a bridge has cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashtrace_lens.blocks import BridgeBlock, blocks_of
from flashtrace_lens.boot import is_verified, verify
from flashtrace_lens.capture import capture_bridge
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import StoredPattern
from flashtrace_plugin.errors import InputError, UnsupportedModelError
from flashtrace_plugin.images import ImageTokens
from flashtrace_plugin.models.guard import check_ids
from flashtrace_plugin.models.read.source import Source
from flashtrace_plugin.models.user_hooks import hooked, whole_text
from flashtrace_plugin.models.view import view_of

_SAME_TEXT = 1e-3
"""Largest relative difference between two runs of the embeddings, which are looked up and added."""


class _BridgeSource:
    """Layers from the hook points of a ``TransformerBridge``, one forward pass per sequence."""

    name = "hook points"

    def __init__(self, bridge: Any) -> None:
        self.bridge = checked_bridge(bridge)
        self.tokenizer = bridge.tokenizer

    @property
    def language_model(self) -> PreTrainedModel:
        """The bridge's own, with its hook points: it computes what the bridge does."""
        return self.bridge.original_model

    def check_ids(self, input_ids: Tensor) -> Tensor:
        return check_ids(self.bridge.original_model, input_ids)

    def layers(self, input_ids: Tensor, rows: Tensor) -> list[Layer]:
        checked_bridge(self.bridge)
        verify(self.bridge, input_ids)
        return capture_bridge(self.bridge, input_ids, rows)

    def layers_together(self, texts: Sequence[Tensor], rows: Sequence[Tensor]) -> list[list[Layer]]:
        return [self.layers(ids[None], own) for ids, own in zip(texts, rows, strict=True)]

    def given(self, input_ids: Tensor, prompt_length: int, inputs: Mapping[str, Any]) -> Source:
        raise UnsupportedModelError(
            "a TransformerBridge is read on text alone; pass the Hugging Face model with images"
        )

    def images(self, input_ids: Tensor) -> tuple[ImageTokens, ...]:
        return ()

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

    def whole_text(self) -> bool:
        return hooked(self.bridge) or whole_text(self.bridge.original_model)


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
                "that are attributed (a text gets its beginning-of-sequence token in both), without pos_slice and "
                "without padding"
            )
        self._check_text(ids)
        return ids

    def _check_text(self, ids: Tensor) -> None:
        """Raises InputError unless what the cache says entered the first layer is what these ids make of it."""
        with torch.no_grad():
            expected = view_of(self.bridge)(ids, stop_at_layer=0)[0].float()
        found = self._activation(self.blocks[0], "resid_pre")[0].to(expected)
        differs = (found - expected).abs().sum(-1) > _SAME_TEXT * expected.abs().sum(-1)
        if bool(differs.any()):
            at = int(differs.nonzero()[0])
            raise InputError(
                f"the cache is of another text: from position {at} on, what entered layer 0 is not what token "
                f"{int(ids[0, at])} makes of it now (bound {_SAME_TEXT:.0e}); cache the tokens that are attributed. A "
                "cache that was filled under a hook at the embeddings is read under the same hook only"
            )

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
    """Token ids of a text as the bridge tokenizes it, or the ids themselves. Raises InputError for several texts."""
    if isinstance(tokens, str):
        if bridge.tokenizer is None:
            raise InputError("this bridge has no tokenizer; pass token ids instead of a text")
        return bridge.to_tokens(tokens)
    rows = tokens if isinstance(tokens, (list, tuple)) else ()
    texts = any(isinstance(row, str) for row in rows)
    if texts or (len(rows) > 1 and any(isinstance(row, (list, tuple)) or getattr(row, "ndim", 0) for row in rows)):
        raise _several(len(rows))
    ids = torch.as_tensor(tokens)
    if ids.dim() == 2 and len(ids) > 1:
        raise _several(len(ids))
    return ids


def _several(count: int) -> InputError:
    return InputError(
        f"tokens holds {count} texts; pass one text at a time: [flashtrace(bridge, one, ...) for one in tokens]"
    )


def padding(bridge: Any, ids: Tensor) -> int:
    """How many ids [N] at the beginning are padding beyond doubt.

    Where the padding id also begins texts, the last of several is taken for the beginning; where it also ends them,
    one alone may be meant.
    """
    owner = bridge.tokenizer or bridge.original_model.config.get_text_config()
    if owner.pad_token_id is None:
        return 0
    leading = int((ids != owner.pad_token_id).cumsum(0).eq(0).sum())
    if owner.pad_token_id == owner.bos_token_id:
        return max(0, leading - 1)
    return 0 if owner.pad_token_id == owner.eos_token_id and leading == 1 else leading
