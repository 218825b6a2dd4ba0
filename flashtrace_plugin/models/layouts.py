"""Where each model family keeps the parts of its block. A family is one line of this table.

To add one, find five names in the printed model: the list of blocks, and inside a block the attention, its
output projection, and the module that first reads the residual stream after attention. Then check that it
closes: ``FlashTrace(model).attribute_ids(...)`` measures that on every call and refuses a block that does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashtrace_plugin.errors import UnsupportedModelError


@dataclass(frozen=True)
class Layout:
    """Module paths of one family; those after ``blocks`` are relative to a block.

    blocks: the list of transformer blocks, from the model with its language-model head
    attn:   the attention module; its queries, keys and values arrive through transformers' attention interface
    W_O:    its output projection
    mid:    the module whose input is ``resid_mid``
    """

    blocks: str = "model.layers"
    attn: str = "self_attn"
    W_O: str = "self_attn.o_proj"
    mid: str = "post_attention_layernorm"


_LLAMA = Layout()
_LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Layout(blocks="transformer.h", attn="attn", W_O="attn.c_proj", mid="ln_2"),
}


def supported_families() -> list[str]:
    """Names of the model types that can be attributed, as in ``config.model_type``."""
    return sorted(_LAYOUTS)


def register_layout(model_type: str, layout: Layout) -> None:
    """Adds or replaces a family for this process. ``model_type`` is the model's ``config.model_type``."""
    _LAYOUTS[model_type] = layout


def layout_for(model_type: str) -> Layout:
    """The family's layout. Raises UnsupportedModelError for a family that is not in the table."""
    if model_type not in _LAYOUTS:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; supported are {', '.join(supported_families())}. "
            "If its block is built like one of these, add it with "
            "flashtrace_plugin.models.layouts.register_layout(model_type, Layout(...)); "
            "every call then checks that the block closes."
        )
    return _LAYOUTS[model_type]
