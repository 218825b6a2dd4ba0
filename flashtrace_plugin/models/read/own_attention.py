"""Families that compute attention themselves instead of calling transformers' attention interface.

A reader opens a context for one attention module. While it is open, methods of that one instance are wrapped or
hooks placed, so that ``note`` sees queries, keys and values after rotary embedding, and what is added to the scores.
On leaving, also after an error, the instance is as before. The computation itself is never replaced.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flashtrace_plugin.models.read.attention import AttentionCall, Note

_Bound = Callable[..., Any]


@contextmanager
def shadowed(
    module: nn.Module, method: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While active, ``change(method)`` stands for one method of this one module."""
    bound, before = getattr(module, method), vars(module).get(method)
    object.__setattr__(module, method, change(bound))
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(module, method)
        else:
            object.__setattr__(module, method, before)


def _seeing(module: nn.Module, method: str, see: Callable[..., None]) -> AbstractContextManager[None]:
    """Calls ``see(result, *args)`` after every call of one method of this one module."""

    def change(bound: _Bound) -> _Bound:
        def seen(*args: Any, **kwargs: Any) -> Any:
            result = bound(*args, **kwargs)
            see(result, *args)
            return result

        return seen

    return shadowed(module, method, change)


@contextmanager
def _keywords(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The keyword arguments of the module's current call, in a dict that is filled when it is called."""
    latest: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latest.update(kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield latest
    finally:
        handle.remove()
        latest.clear()


@contextmanager
def inner_attn(module: Any, note: Note) -> Iterator[None]:
    """GPT-J, CodeGen, GPT-Neo: ``_attn(query, key, value, mask)``. GPT-Neo does not scale, and has local layers."""
    scaling = 1.0 / float(getattr(module, "scale_attn", 1.0))

    def see(result: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        own = getattr(module, "bias", None)  # GPT-Neo's causal or local mask
        length = q.shape[-2]
        seen = mask if own is None else own[:, :, :length, :length]
        note(module, AttentionCall("eager", q, k, v, seen, {"scaling": scaling}))

    with _seeing(module, "_attn", see):
        yield


@contextmanager
def bloom(module: Any, note: Note) -> Iterator[None]:
    """BLOOM: ``_reshape`` splits the fused projection; ALiBi comes as [H, 1, N]."""
    with _keywords(module) as given:

        def see(qkv: tuple[Tensor, Tensor, Tensor], fused: Tensor) -> None:
            alibi = given["alibi"].unflatten(0, (-1, module.num_heads))
            options = {"scaling": module.inv_norm_factor, "position_bias": alibi}
            note(module, AttentionCall("eager", *qkv, given["attention_mask"], options))

        with _seeing(module, "_reshape", see):
            yield


@contextmanager
def mpt(module: Any, note: Note) -> Iterator[None]:
    """MPT: q, k and v are thirds of the fused projection, clipped; ALiBi comes as [H, 1, max N], right-aligned."""
    with _keywords(module) as given, ExitStack() as stack:

        def see(projection: nn.Module, args: Any, fused: Tensor) -> None:
            clip, length = module.clip_qkv, fused.shape[1]
            fused = fused.clamp(-clip, clip) if clip else fused
            q, k, v = (part.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for part in fused.chunk(3, dim=2))
            bias = given["position_bias"]
            options = {
                "scaling": module.softmax_scale,
                "position_bias": None if bias is None else bias[None, ..., -length:],
            }
            note(module, AttentionCall("eager", q, k, v, _allowed(given["attention_mask"]), options))

        stack.callback(module.get_submodule("Wqkv").register_forward_hook(see).remove)
        yield


def _allowed(masked: Tensor | None) -> Tensor | None:
    """MPT's mask is True where a key is hidden."""
    return None if masked is None else ~masked


@contextmanager
def falcon(module: Any, note: Note) -> Iterator[None]:
    """Falcon: ``_split_heads`` splits the fused projection, then q and k are rotated unless ALiBi is used.

    Its mask already holds ALiBi, divided by sqrt(d_h); its eager attention adds ALiBi a second time, so the two
    kernels compute different patterns. What is noted is what the chosen kernel does.
    """
    rotate = inspect.getmodule(type(module)).apply_rotary_pos_emb  # type: ignore[union-attr]
    with _keywords(module) as given:

        def see(qkv: tuple[Tensor, Tensor, Tensor], fused: Tensor) -> None:
            q, k, v = (part.transpose(1, 2) for part in qkv)
            kernel, options = module.config._attn_implementation, {"scaling": module.inv_norm_factor}
            if given["alibi"] is None:
                q, k = rotate(q, k, *given["position_embeddings"])
            else:
                options["position_bias"] = _falcon_bias(given["alibi"], module, kernel)
            note(module, AttentionCall(kernel, q, k, v, _causal(given["attention_mask"]), options))

        with _seeing(module, "_split_heads", see):
            yield


def _falcon_bias(alibi: Tensor, module: Any, kernel: str) -> Tensor:
    """What is added to the scores [1, H, 1, N], with the model's own rounding of what its mask holds."""
    in_mask = alibi / math.sqrt(module.head_dim)
    bias = in_mask if kernel == "sdpa" else in_mask.float() + alibi.float() * module.inv_norm_factor
    return bias.reshape(-1, module.num_heads, 1, bias.shape[-1])


def _causal(mask: Tensor | None) -> Tensor | None:
    """Falcon's mask as True where a key may be seen, without the ALiBi that is in it."""
    if mask is None or not mask.is_floating_point():
        return mask
    return mask[:, :1] > torch.finfo(mask.dtype).min / 2
