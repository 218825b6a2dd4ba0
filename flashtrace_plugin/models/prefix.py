"""Keys and values of an unchanged prefix, so that only what comes after it is run again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from flashtrace_plugin.errors import UnsupportedModelError

States = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [b, KV heads, n, d_h] each."""


class _Prefix(DynamicLayer):
    """Keys and values that precede those of every call and are never changed by it."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _after(self.keys, key_states), _after(self.values, value_states)


def _after(prefix: Tensor, states: Tensor) -> Tensor:
    return torch.cat([prefix.expand(len(states), -1, -1, -1), states], -2)


def prefix_cache(states: States) -> Cache:
    """A cache with these states before every call, for as many rows as they have, or for any if they have one."""
    return Cache(layers=[_Prefix(keys, values) for keys, values in states])


def cached_states(cache: Cache, stop: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the first positions of a cache; none where its layers keep other things."""
    layers: list[Any] = cache.layers
    if not all(isinstance(layer, DynamicLayer) and layer.keys is not None for layer in layers):
        return []
    return [(layer.keys[..., :stop, :], layer.values[..., :stop, :]) for layer in layers]


def kept_states(model: Any, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a text, one run of the model. input_ids: [b, n]

    Raises UnsupportedModelError for a model that keeps none, such as one with recurrent layers.
    """
    cache = DynamicCache()
    kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, **kept)
    states = cached_states(cache)
    if not states or states[0][0].shape[-2] != input_ids.shape[1]:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep the keys and values of a text in a cache; attention layers would"
        )
    return states
