"""Which hook points of a bridge's block hold the parts of a layer, and how they become a record.

Nothing here goes by the name of a family: what a block adds to or leaves out of the plain form is read from the
bridge itself (a norm after attention, a residual multiplier, a parallel MLP, clipped values, gated heads).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.flow.pattern import Pattern
from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.models.read.projection import by_head

_HOOK_POINTS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "attn_out": "hook_attn_out",
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "post_scale": "ln1_post.hook_scale",
    "gate": "attn.hook_q_gate",
}
"""Parts of a layer and their hook points, relative to ``blocks.{layer}``."""

_OPTIONAL = {"resid_mid", "attn_out", "post_scale", "gate"}
"""Parts that not every block has."""


def names_filter(name: str) -> bool:
    """Whether attribution needs this hook point: ``bridge.run_with_cache(tokens, names_filter=names_filter)``.

    These are ``hook_resid_pre``, ``hook_resid_mid`` (``hook_attn_out`` in parallel blocks), ``hook_mlp_out``,
    ``hook_resid_post``, ``attn.hook_v`` and ``attn.hook_pattern`` of every block, ``ln1_post.hook_scale`` where a norm
    follows attention, ``attn.hook_q_gate`` where heads are gated.
    """
    return name.startswith("blocks.") and name.split(".", 2)[-1] in _HOOK_POINTS.values()


class _HeadRows(Pattern, Protocol):
    """A pattern with (some of) its rows, ``A`` [H, ..., N]."""

    @property
    def A(self) -> Tensor: ...


@dataclass(frozen=True)
class BridgeBlock:
    """One block of a bridge. ``hooks`` maps the parts that this block has to the full names of their hook points."""

    index: int
    module: Any
    hooks: Mapping[str, str]
    clip: float | None

    def pick(self, part: str, activation: Tensor, rows: Tensor) -> Tensor:
        """What a record keeps of a hooked activation [1, ...], cloned because some models go on to write in place.

        v: [H_kv, N, d_h];  pattern: [H, rows, N];  post_scale: [rows];  gate: [rows, H d_h];  others: [rows, d]
        """
        x = activation.detach()[0]
        if part == "v":
            return self._values(x)
        rows = rows.to(x.device)
        if part == "pattern":
            return x[:, rows]
        return 1 / x[rows, 0] if part == "post_scale" else x[rows]

    def _values(self, v: Tensor) -> Tensor:
        # Latent attention (MLA) hooks values by head already; OLMo and MPT clip them after the hook.
        v = v.clone() if self._latent else v.transpose(0, 1).contiguous().clone()
        return v if self.clip is None else v.clamp(-self.clip, self.clip)

    @property
    def _latent(self) -> bool:
        return any(cls.__name__ == "MLAAttentionBridge" for cls in type(self.module.attn).__mro__)

    def layer(self, parts: Mapping[str, Tensor], pattern: _HeadRows) -> Layer:
        """The record, from the parts that :meth:`pick` returned."""
        W_O, b_O = by_head(self.module.attn.o.original_component, pattern.A.shape[0])
        pre = parts["resid_pre"]
        return Layer(
            pattern=pattern,
            v=parts["v"],
            W_O=W_O,
            b_O=b_O,
            resid_pre=pre,
            resid_mid=parts["resid_mid"] if "resid_mid" in parts else pre + parts["attn_out"],
            resid_post=parts["resid_post"],
            mlp_out=parts["mlp_out"],
            post_gain=self._post_gain(W_O.shape[-1], pre),
            post_scale=parts.get("post_scale"),
            z_gate=parts["gate"].sigmoid().unflatten(-1, W_O.shape[:2]).transpose(0, 1) if "gate" in parts else None,
        )

    def _post_gain(self, width: int, like: Tensor) -> Tensor | None:
        if "post_scale" in self.hooks:
            norm = self.module.ln1_post
            return norm.weight.detach() + 1 if norm.uses_weight_offset else norm.weight.detach()
        multiplier = getattr(self.module, "residual_contribution_scale", 1.0)
        return None if multiplier == 1 else torch.full((width,), multiplier, dtype=torch.float32, device=like.device)


def blocks_of(bridge: Any) -> list[BridgeBlock]:
    """The blocks of a bridge. Raises UnsupportedModelError for one that attention's heads alone do not explain."""
    blocks = getattr(bridge, "blocks", None)
    if blocks is None or getattr(bridge.original_model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{_class(bridge)} has no single stack of decoder blocks (no `bridge.blocks`); "
            "only decoder-only language models can be attributed"
        )
    known = bridge.hook_dict
    return [_bridge_block(bridge, known, i, module) for i, module in enumerate(blocks)]


def _bridge_block(bridge: Any, known: Mapping[str, Any], index: int, module: Any) -> BridgeBlock:
    _refuse(bridge, index, module)
    names = {part: f"blocks.{index}.{hook}" for part, hook in _HOOK_POINTS.items()}
    hooks = {part: name for part, name in names.items() if name in known}
    hooks.pop("attn_out" if "resid_mid" in hooks else "resid_mid", None)
    missing = [n for part, n in names.items() if part not in {*hooks, *_OPTIONAL}]
    if missing:
        raise UnsupportedModelError(f"{_class(bridge)} has no hook point {missing[0]}, which attribution needs")
    return BridgeBlock(index, module, hooks, _clip(module.attn.original_component))


def _clip(attention: Any) -> float | None:
    """The bound of clipped values: OLMo keeps it in its configuration, MPT in the module."""
    return getattr(attention, "clip_qkv", None) or getattr(getattr(attention, "config", None), "clip_qkv", None)


def _refuse(bridge: Any, index: int, module: Any) -> None:
    if "attn" not in module._modules:
        kinds = ", ".join(sorted(getattr(module, "submodules", {}))) or type(module).__name__
        raise UnsupportedModelError(
            f"layer {index} of {_class(bridge)} has no softmax attention ({kinds}), so there is no pattern to follow; "
            "models with linear-attention or state-space layers cannot be attributed through hook points; attribute "
            "the Hugging Face model itself"
        )
    if "mamba" in module._modules:
        raise UnsupportedModelError(
            f"layer {index} of {_class(bridge)} mixes tokens by something else beside its attention, which has no "
            "hook points that would tell what it reads; attribute the Hugging Face model itself"
        )


def _class(bridge: Any) -> str:
    return type(bridge.original_model).__name__
