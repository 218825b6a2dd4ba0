"""Where each model family keeps the parts of its block. A family is one line of this table.

To add one, print a block of the model and find the names below. Nothing has to be taken on trust: every call
checks that the parts add up to the residual stream, and refuses a model whose block is not what its layout says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.models.read import own_attention
from flashtrace_plugin.models.read.attention import Note

Reader = Callable[[nn.Module, Note], AbstractContextManager[None]]
"""While its context is open, tells ``note`` what an attention module computes its pattern from."""


@dataclass(frozen=True)
class Layout:
    """Module paths of one family; those after ``blocks`` are relative to a block.

    blocks:     the list of transformer blocks, from the model with its language-model head
    attn:       the attention module
    W_O:        its output projection; anything that acts like a linear map
    mid:        the module whose input is ``resid_mid``; None in a parallel block, where attention and MLP read the
                same input, and ``resid_mid := resid_pre + attention branch``
    mlp:        the module whose output is the MLP branch, before a multiplier; or several, whose outputs are added
    post_norm:  an RMS norm between the output projection and the residual stream; its gain is measured, not named
    multiplier: attribute of a block by which its two branches are multiplied
    gate:       a module whose output, per head, is a query and then a gate: heads are multiplied by its sigmoid
    reader:     for attention that does not go through transformers' attention interface
    """

    blocks: str = "model.layers"
    attn: str = "self_attn"
    W_O: str = "self_attn.o_proj"
    mid: str | None = "post_attention_layernorm"
    mlp: str | tuple[str, ...] = "mlp"
    post_norm: str | None = None
    multiplier: str | None = None
    gate: str | None = None
    reader: Reader | None = None


_Choice = Callable[[Any], Layout]
"""A family whose blocks come in several layouts chooses by its configuration."""

_LLAMA = Layout()
_PARALLEL = Layout(mid=None)
_SANDWICH = Layout(
    post_norm="post_attention_layernorm", mid="pre_feedforward_layernorm", mlp="post_feedforward_layernorm"
)
_POST_NORM = Layout(post_norm="post_attention_layernorm", mid="mlp", mlp="post_feedforward_layernorm")
_SCALED = Layout(multiplier="residual_multiplier")
_GATED = Layout(gate="self_attn.q_proj")
_GPT2 = Layout(blocks="transformer.h", attn="attn", W_O="attn.c_proj", mid="ln_2")
_GPTJ = replace(_GPT2, W_O="attn.out_proj", mid=None, reader=own_attention.inner_attn)
_NEOX = Layout(blocks="gpt_neox.layers", attn="attention", W_O="attention.dense")
_BLOOM = Layout(
    "transformer.h", "self_attention", "self_attention.dense", mlp="mlp.dense_4h_to_h", reader=own_attention.bloom
)
_FALCON = replace(_BLOOM, mlp="mlp", reader=own_attention.falcon)


def _neox(config: Any) -> Layout:
    return replace(_NEOX, mid=None) if config.use_parallel_residual else _NEOX


def _falcon(config: Any) -> Layout:
    return replace(_FALCON, mid=None) if config.new_decoder_architecture or config.parallel_attn else _FALCON


def _stablelm(config: Any) -> Layout:
    return _PARALLEL if config.use_parallel_residual else _LLAMA


def _opt(config: Any) -> Layout:
    if not config.do_layer_norm_before:
        raise UnsupportedModelError(
            "this OPT model has do_layer_norm_before=False (opt-350m): it normalises the residual stream itself after "
            "attention, so no part of the stream is attention's alone; choose one of the other OPT sizes"
        )
    return Layout("model.decoder.layers", W_O="self_attn.out_proj", mid="final_layer_norm", mlp="fc2")


_LAYOUTS: dict[str, Layout | _Choice] = {
    "apertus": replace(_LLAMA, mid="feedforward_layernorm"),
    "arcee": _LLAMA,
    "bloom": _BLOOM,
    "codegen": _GPTJ,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "deepseek_v2": _LLAMA,
    "deepseek_v3": _LLAMA,
    "dots1": _LLAMA,
    "ernie4_5": _LLAMA,
    "ernie4_5_moe": _LLAMA,
    "exaone4": _POST_NORM,
    "falcon": _falcon,
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3": replace(_SANDWICH, blocks="model.language_model.layers"),
    "gemma3_text": _SANDWICH,
    "glm": _LLAMA,
    "glm4": replace(_LLAMA, post_norm="post_self_attn_layernorm", mlp="post_mlp_layernorm"),
    "glm4_moe": _LLAMA,
    "glm4_moe_lite": _LLAMA,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, attn="attn.attention", W_O="attn.attention.out_proj", reader=own_attention.inner_attn),
    "gpt_neox": _neox,
    "gpt_oss": _LLAMA,
    "gptj": _GPTJ,
    "granite": _SCALED,
    "granitemoe": replace(_SCALED, mlp="block_sparse_moe"),
    "granitemoeshared": replace(_SCALED, mlp=("block_sparse_moe", "shared_mlp")),
    "helium": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "hunyuan_v1_moe": _LLAMA,
    "llama": _LLAMA,
    "llama4_text": replace(_LLAMA, mlp="feed_forward"),
    "minimax_m2": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "mpt": Layout(
        "transformer.blocks", "attn", "attn.out_proj", mid="norm_2", mlp="ffn.down_proj", reader=own_attention.mpt
    ),
    "nemotron": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "olmoe": _LLAMA,
    "opt": _opt,
    "phi": replace(_PARALLEL, W_O="self_attn.dense"),
    "phi3": _LLAMA,
    "phimoe": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_5_moe_text": _GATED,
    "qwen3_5_text": _GATED,
    "qwen3_moe": _LLAMA,
    "qwen3_next": _GATED,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _stablelm,
    "starcoder2": _LLAMA,
}


def supported_families() -> list[str]:
    """Names of the model types that can be attributed, as in ``config.model_type``."""
    return sorted(_LAYOUTS)


def register_layout(model_type: str, layout: Layout | _Choice) -> None:
    """Adds or replaces a family for this process.

    model_type: the model's ``config.model_type``
    layout:     its :class:`Layout`, or a function that chooses one by the configuration

    Raises UnsupportedModelError for what is neither. Whether a layout fits is found out when a model is run.
    """
    _LAYOUTS[model_type] = layout if callable(layout) else _checked(model_type, layout)


def _checked(model_type: str, layout: object) -> Layout:
    if not isinstance(layout, Layout):
        raise UnsupportedModelError(
            f"the layout of {model_type!r} must be a Layout(...) or a function of the configuration that gives one, "
            f"got {layout!r}"
        )
    return layout


def layout_for(config: PretrainedConfig) -> Layout:
    """The family's layout. Raises UnsupportedModelError for a family that is not in the table."""
    for own in _configs(config):
        layout = _LAYOUTS.get(own.model_type)
        if layout is not None:
            return layout if isinstance(layout, Layout) else _checked(own.model_type, layout(own))
    raise UnsupportedModelError(
        f"model type {config.model_type!r} is not supported; supported are {', '.join(supported_families())}. "
        "If its block is built like one of these, add it with "
        "flashtrace_plugin.models.read.layouts.register_layout(model_type, Layout(...)); "
        "every call then checks that the block closes"
    )


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The model's own; of a multimodal model, which may have a layout of its own, then that of its text model."""
    yield config
    try:
        yield config.get_text_config()
    except ValueError:
        return  # it has several text models


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's blocks, where its layout says they are. Raises UnsupportedModelError if they are not there."""
    path, kind = layout_for(model.config).blocks, model.config.get_text_config().model_type
    owner: nn.Module = model
    for part in path.split(".") if path else ():
        if not isinstance(getattr(owner, part, None), nn.Module):
            parts = ", ".join(name for name, _ in owner.named_children())
            raise UnsupportedModelError(
                f"{type(model).__name__} has no {path!r}, where family {kind!r} keeps its blocks; its "
                f"{type(owner).__name__} has {parts}. If it is a multimodal model, "
                "register_layout(model.config.model_type, Layout(blocks=...)) says where its text blocks are"
            )
        owner = getattr(owner, part)
    if not isinstance(owner, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) or not len(owner):
        raise UnsupportedModelError(
            f"{path!r} of {type(model).__name__} is a {type(owner).__name__}, not a list of blocks, which the layout "
            f"of family {kind!r} says is there"
        )
    return list(owner.children())
