"""Where each model family keeps the parts of its block. A family is one line of this table.

To add one, print a block of the model and find the names below. Nothing has to be taken on trust: every call
checks that the parts add up to the residual stream, and refuses a model whose block is not what its layout says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.models.read import own_attention, recurrence

Reader = Callable[[nn.Module, Callable[[nn.Module, Any], Any]], AbstractContextManager[None]]
"""While its context is open, tells ``note`` what an attention module computes its pattern from."""


@dataclass(frozen=True, repr=False)
class Layout:
    """Module paths of one family; those after ``blocks`` are relative to a block.

    blocks:     the list of transformer blocks, from the model with its language-model head
    attn:       the attention module, or another token mixer; None in a block that is an MLP alone
    W_O:        its output projection; anything that acts like a linear map
    mid:        the module whose input is ``resid_mid``; None in a parallel block, where attention and MLP read the
                same input, and ``resid_mid := resid_pre + attention branch``
    mlp:        the module whose output is the MLP branch, before a multiplier; or several, whose outputs are added
    post_norm:  an RMS norm between the output projection and the residual stream; its gain is measured, not named
    multiplier: attribute of a block by which its two branches are multiplied
    out_scale:  attribute of a block by which the whole stream is multiplied at the block's end
    gate:       a module whose output, per head, is a query and then a gate: heads are multiplied by its sigmoid; or
                one number per head, whose sigmoid multiplies all that the head has read
    reader:     for attention that does not go through transformers' attention interface, and for what is no attention
    written:    attribute of a block by which what this mixer writes is multiplied
    beside:     a second mixer that reads and writes the same stream; of its layout, what is the mixer's counts
    others:     layouts of blocks that have no such ``attn`` and ``W_O``; the first that fits is taken
    """

    blocks: str = "model.layers"
    attn: str | None = "self_attn"
    W_O: str | None = "self_attn.o_proj"
    mid: str | None = "post_attention_layernorm"
    mlp: str | tuple[str, ...] = "mlp"
    post_norm: str | None = None
    multiplier: str | None = None
    out_scale: str | None = None
    gate: str | None = None
    reader: Reader | None = None
    written: str | None = None
    beside: Layout | None = None
    others: tuple[Layout, ...] = ()

    def __repr__(self) -> str:
        """What is not as in Llama, as it is written."""
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        told = [f"{name}={value!r}" for (name, value), field in zip(given, fields(self)) if value != field.default]
        return f"Layout({', '.join(told)})"

    def of(self, block: nn.Module) -> Layout:
        """The layout of one block; this one, for an error to tell what is missing, if none fits."""
        return next((one for one in (self, *self.others) if one._has_mixer(block)), self)

    def _has_mixer(self, block: nn.Module) -> bool:
        if self.attn is None:
            return True
        modules = dict(block.named_modules())
        if not {self.attn, self.W_O} <= modules.keys():
            return False
        return not isinstance(self.reader, recurrence.RecurrenceReader) or self.reader.is_of(modules[self.attn])

    @property
    def mixers(self) -> tuple[Layout, ...]:
        """Layouts of the block's token mixers."""
        if self.attn is None:
            return ()
        return (self,) if self.beside is None else (self, self.beside)


_Choice = Callable[[Any], Layout]
"""A family whose blocks come in several layouts chooses by its configuration."""

_LLAMA = Layout()
_PARALLEL = Layout(mid=None)
_SANDWICH = Layout(
    post_norm="post_attention_layernorm", mid="pre_feedforward_layernorm", mlp="post_feedforward_layernorm"
)
_POST_NORM = Layout(post_norm="post_attention_layernorm", mid="mlp", mlp="post_feedforward_layernorm")
_GLM4 = Layout(post_norm="post_self_attn_layernorm", mlp="post_mlp_layernorm")
_SCALED = Layout(multiplier="residual_multiplier")
_GATED = Layout(gate="self_attn.q_proj")
_GPT2 = Layout(blocks="transformer.h", attn="attn", W_O="attn.c_proj", mid="ln_2")
_GPTJ = replace(_GPT2, W_O="attn.out_proj", mid=None, reader=own_attention.inner_attn)
_NEOX = Layout(blocks="gpt_neox.layers", attn="attention", W_O="attention.dense")
_BLOOM = Layout(
    "transformer.h", "self_attention", "self_attention.dense", mlp="mlp.dense_4h_to_h", reader=own_attention.bloom
)
_FALCON = replace(_BLOOM, mlp="mlp", reader=own_attention.falcon)
_PERSIMMON = Layout(W_O="self_attn.dense")


def _mixer(path: str, reader: Reader, W_O: str = "out_proj", **others: Any) -> Layout:
    """Blocks that mix tokens by a recurrence."""
    return Layout(attn=path, W_O=f"{path}.{W_O}", reader=reader, **others)


_QWEN_NEXT = replace(_GATED, others=(_mixer("linear_attn", recurrence.DELTA_RULE),))
_KIMI = _mixer("self_attn", recurrence.DELTA_RULE, "o_proj", others=(_LLAMA,))
_BAILING = replace(_KIMI, others=(Layout(gate="self_attn.g_proj"),))
_FEED_FORWARD: dict[str, Any] = {"mid": "pre_ff_layernorm", "mlp": "feed_forward"}
_BAMBA = Layout(**_FEED_FORWARD, others=(_mixer("mamba", recurrence.MAMBA2, **_FEED_FORWARD),))
_JAMBA = Layout(**_FEED_FORWARD, others=(_mixer("mamba", recurrence.MAMBA, **_FEED_FORWARD),))
_FALCON_H1 = Layout(
    **_FEED_FORWARD,
    written="attn_out_multiplier",
    beside=_mixer("mamba", recurrence.MAMBA2, written="ssm_out_multiplier"),
)
_LFM2_PARTS: dict[str, Any] = {"mid": "ffn_norm", "mlp": "feed_forward"}
_LFM2 = Layout(
    W_O="self_attn.out_proj", **_LFM2_PARTS, others=(_mixer("conv", recurrence.CONVOLUTION, **_LFM2_PARTS),)
)
_OLMO_HYBRID = replace(_POST_NORM, others=(_mixer("linear_attn", recurrence.DELTA_RULE, "o_proj"),))
_ALONE: dict[str, Any] = {"blocks": "model.layers", "mid": None, "mlp": ()}
"""Blocks of one part: what mixes tokens is all that they add to the stream."""
_NEMOTRON_H = _mixer(
    "mixer",
    recurrence.MAMBA2,
    **_ALONE,
    others=(Layout(attn="mixer", W_O="mixer.o_proj", **_ALONE), Layout(attn=None, W_O=None, mid="norm", mlp="mixer")),
)
_MAMBA = _mixer("mixer", recurrence.MAMBA, **_ALONE | {"blocks": "backbone.layers"})


def _gemma4(config: Any) -> Layout:
    per_layer = ("post_per_layer_input_norm",) if getattr(config, "hidden_size_per_layer_input", 0) else ()
    return replace(
        _SANDWICH,
        mlp=("post_feedforward_layernorm", *per_layer),
        out_scale="layer_scalar",
    )


def _granitemoehybrid(config: Any) -> Layout:
    experts = ("block_sparse_moe",) if config.num_local_experts else ()
    parts: dict[str, Any] = {"mlp": (*experts, "shared_mlp"), "multiplier": "residual_multiplier"}
    return Layout(**parts, others=(_mixer("mamba", recurrence.MAMBA2, **parts),))


def _granitemoe_swa(config: Any) -> Layout:
    shared = ("shared_mlp",) if config.shared_intermediate_size else ()
    return replace(_SCALED, mlp=("block_sparse_moe", *shared))


def _lfm3(config: Any) -> Layout:
    parts: dict[str, Any] = {"mid": "ffn_norm", "mlp": "feed_forward"}
    if config.use_sandwich_norm:
        parts |= {"post_norm": "post_operator_norm", "mlp": "post_ffn_norm"}
    gate = "self_attn.g_proj" if config.use_attention_gate else None
    return Layout(**parts, gate=gate, others=(_mixer("conv", recurrence.CONVOLUTION, **parts),))


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


def _hyperclovax(config: Any) -> Layout:
    return replace(_SCALED, post_norm="post_norm1", mlp="post_norm2") if config.use_post_norm else _SCALED


def _molmo2(config: Any) -> Layout:
    after = replace(_POST_NORM, post_norm="input_layernorm", mlp="post_attention_layernorm")
    return after if config.norm_after else _LLAMA


_LAYOUTS: dict[str, Layout | _Choice] = {
    "apertus": replace(_LLAMA, mid="feedforward_layernorm"),
    "arcee": _LLAMA,
    "aria_text": _LLAMA,
    "bailing_hybrid": _BAILING,
    "bamba": _BAMBA,
    "bloom": _BLOOM,
    "chameleon": _LLAMA,
    "codegen": _GPTJ,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "cohere2_moe": _PARALLEL,
    "cosmos3_edge_text": _LLAMA,
    "cwm": _LLAMA,
    "deepseek_v2": _LLAMA,
    "deepseek_v3": _LLAMA,
    "dots1": _LLAMA,
    "emu3_text_model": _LLAMA,
    "ernie4_5": _LLAMA,
    "ernie4_5_moe": _LLAMA,
    "ernie4_5_vl_moe_text": _LLAMA,
    "exaone4": _POST_NORM,
    "exaone_moe": _LLAMA,
    "falcon": _falcon,
    "falcon_h1": _FALCON_H1,
    "falcon_mamba": _MAMBA,
    "flex_olmo": _POST_NORM,
    "flint": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "gemma4_text": _gemma4,
    "gemma4_unified_text": _gemma4,
    "glm": _LLAMA,
    "glm4": _GLM4,
    "glm4_moe": _LLAMA,
    "glm4_moe_lite": _LLAMA,
    "glm4v_moe_text": _LLAMA,
    "glm4v_text": _GLM4,
    "glm_ocr_text": _GLM4,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, attn="attn.attention", W_O="attn.attention.out_proj", reader=own_attention.inner_attn),
    "gpt_neox": _neox,
    "gpt_oss": _LLAMA,
    "gptj": _GPTJ,
    "granite": _SCALED,
    "granite_docling_text": _SCALED,
    "granite_swa": _SCALED,
    "granitemoe": replace(_SCALED, mlp="block_sparse_moe"),
    "granitemoe_swa": _granitemoe_swa,
    "granitemoehybrid": _granitemoehybrid,
    "granitemoeshared": replace(_SCALED, mlp=("block_sparse_moe", "shared_mlp")),
    "helium": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "hunyuan_v1_moe": _LLAMA,
    "hunyuan_vl_text": _LLAMA,
    "hy_v3": _LLAMA,
    "hyperclovax": _hyperclovax,
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "jais2": _LLAMA,
    "jamba": _JAMBA,
    "kimi_linear": _KIMI,
    "kolibri1": _GLM4,
    "kosmos_2_5_text_model": Layout(W_O="self_attn.out_proj", mid="final_layer_norm", mlp="ffn"),
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "lfm3": _lfm3,
    "llama": _LLAMA,
    "llama4_text": replace(_LLAMA, mlp="feed_forward"),
    "mamba": _MAMBA,
    "mamba2": replace(_MAMBA, reader=recurrence.MAMBA2),
    "mellum": _LLAMA,
    "mimo_v2_flash": _LLAMA,
    "minimax_m2": _LLAMA,
    "minimax_m3_vl_text": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mistral4": _LLAMA,
    "mixtral": _LLAMA,
    "molmo2_text": _molmo2,
    "moshi": _LLAMA,
    "mpt": Layout(
        "transformer.blocks", "attn", "attn.out_proj", mid="norm_2", mlp="ffn.down_proj", reader=own_attention.mpt
    ),
    "nanochat": _LLAMA,
    "nemotron": _LLAMA,
    "nemotron_h": _NEMOTRON_H,
    "olmo": _LLAMA,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "olmo_hybrid": _OLMO_HYBRID,
    "olmoe": _LLAMA,
    "opt": _opt,
    "paddleocr_vl_text": _LLAMA,
    "persimmon": _PERSIMMON,
    "phi": replace(_PARALLEL, W_O="self_attn.dense"),
    "phi3": _LLAMA,
    "phi4_multimodal": _LLAMA,
    "phimoe": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_5_omni_text": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen2_vl_text": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_5_moe_text": _QWEN_NEXT,
    "qwen3_5_text": _QWEN_NEXT,
    "qwen3_moe": _LLAMA,
    "qwen3_next": _QWEN_NEXT,
    "qwen3_omni_moe_text": _LLAMA,
    "qwen3_vl_moe_text": _LLAMA,
    "qwen3_vl_text": _LLAMA,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "solar_open": _LLAMA,
    "stablelm": _stablelm,
    "starcoder2": _LLAMA,
    "vaultgemma": replace(_LLAMA, mid="pre_feedforward_layernorm"),
}


_CROSS = "its cross-attention layers read what stands beside the text and has no position in it"
_CONVOLVED = "short convolutions mix positions between attention and the stream"
_GATED_APART = "its heads are gated by a module of their own, of which no layout says where it is"
_CHOSEN = "an indexer chooses the keys that are read, which is not recorded"
_THROUGH = (
    "its attention writes not to the residual stream but, through an MLP, to what its Mamba layers read, so which "
    "token was read cannot be told from the stream"
)

REASONS = {
    "dots3_note_text": _CHOSEN,
    "evolla": _CROSS,
    "gemma3n_text": "several streams run side by side and are mixed in every layer",
    "git": "it reads images in both directions as a prefix, and computes attention by itself",
    "glm5_next_text": "several streams run side by side and are mixed in every layer",
    "idefics": _CROSS,
    "inkling2_text": _CONVOLVED,
    "inkling_text": _CONVOLVED,
    "kosmos_2_text_model": "a norm stands between what its heads read and its output projection",
    "minimax": "its blocks normalise the residual stream itself, so no part of the stream is attention's alone",
    "mistral_large4_text": _CHOSEN,
    "mllama": _CROSS,
    "muse_glimmer_text": _GATED_APART,
    "muse_spark_text": _GATED_APART,
    "qwen4_exp_text": _CHOSEN,
    "step3p5": _GATED_APART,
    "unlimited_ocr_text": "its window keeps the prompt in sight, so positions read more than one interval of keys",
    "zamba": _THROUGH,
    "zamba2": _THROUGH,
}
"""Why families of which it is known are not in the table, by the type of the model or of its text model."""


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
    layout = _known(config)
    if layout is None and _reason(config) is not None:
        raise UnsupportedModelError(_unknown(config))
    if layout is None:
        raise UnsupportedModelError(
            f"{_unknown(config)}. If its block is built like one of these, add it with "
            "flashtrace_plugin.models.read.layouts.register_layout(model_type, Layout(...)); "
            "every call then checks that the block closes"
        )
    return layout


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of the model's family. The error for an unknown one tells which layouts of others would fit."""
    layout = _known(model.config)
    if layout is None and _reason(model.config) is None and (tries := _look_alikes(model)):
        raise UnsupportedModelError(
            f"{_unknown(model.config)}. Its blocks have the parts of "
            f"{', '.join(f'{family}: {layout}' for family, layout in tries.items())}. Try the first that closes, with "
            f"flashtrace_plugin.models.read.layouts.register_layout({model.config.model_type!r}, Layout(...)); every "
            "call then checks that the block closes"
        )
    return layout or layout_for(model.config)


def _known(config: PretrainedConfig) -> Layout | None:
    for own in _configs(config):
        layout = _LAYOUTS.get(own.model_type)
        if layout is not None:
            return layout if isinstance(layout, Layout) else _checked(own.model_type, layout(own))
    return None


def _reason(config: PretrainedConfig) -> str | None:
    """Why the family is not in the table, where that is known."""
    return next((REASONS[one.model_type] for one in _configs(config) if one.model_type in REASONS), None)


def _unknown(config: PretrainedConfig) -> str:
    kinds = list(dict.fromkeys(one.model_type for one in _configs(config)))
    reason = _reason(config)
    text = f" with the text model {kinds[-1]!r}" if len(kinds) > 1 else ""
    if hasattr(config, "text_config") and len(kinds) == 1:
        text = ", which has no configuration of a text model that would say what its blocks are,"
    known = f"; supported are {', '.join(supported_families())}"
    return f"model type {config.model_type!r}{text} is not supported{known if reason is None else f': {reason}'}"


def _look_alikes(model: PreTrainedModel) -> dict[str, str]:
    """Families all of whose parts are in all of the model's blocks, and their layouts, with the model's path to them.

    Those come first that name most, since a block may have parts that a layout does not name. Families that compute
    attention themselves are left out: names say nothing about that.
    """
    count = getattr(list(_configs(model.config))[-1], "num_hidden_layers", None)
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    found: dict[Layout, str] = {}
    for family, layout in {"llama": _LLAMA, "gemma2": _SANDWICH, **_LAYOUTS}.items():
        for path, blocks in lists:
            if isinstance(layout, Layout) and _is_offered(layout) and all(_fits(layout, block) for block in blocks):
                used = {id(layout.of(block)) for block in blocks}
                others = tuple(one for one in layout.others if id(one) in used)
                found.setdefault(replace(layout, blocks=path, others=others), family)
    ranked = sorted(found, key=lambda layout: -len(_parts(layout)))
    return {found[layout]: repr(layout) for layout in ranked[:3]}


def _is_offered(layout: Layout) -> bool:
    return all(isinstance(one.reader, (type(None), recurrence.RecurrenceReader)) for one in (layout, *layout.others))


def _fits(layout: Layout, block: nn.Module) -> bool:
    layout = layout.of(block)
    modules = {name for name, _ in block.named_modules()}
    if not all(name in modules or isinstance(getattr(block, name, None), (int, float)) for name in _parts(layout)):
        return False
    gate, W_O = (None if path is None else block.get_submodule(path) for path in (layout.gate, layout.W_O))
    return gate is None or getattr(gate, "out_features", 0) == 2 * getattr(W_O, "in_features", 0) != 0


def _parts(layout: Layout) -> list[str]:
    """What a layout names in a block."""
    mlp = (layout.mlp,) if isinstance(layout.mlp, str) else layout.mlp
    others = (layout.mid, layout.post_norm, layout.multiplier, layout.out_scale)
    mixers = [path for mixer in layout.mixers for path in (mixer.attn, mixer.W_O, mixer.gate, mixer.written)]
    return [*mlp, *filter(None, (*mixers, *others))]


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The model's own; of a multimodal model, which may have a layout of its own, then that of its text model."""
    yield config
    try:
        yield config.get_text_config()
    except ValueError:
        return  # it has several text models


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's blocks, where its layout says they are. Raises UnsupportedModelError if they are not there.

    A multimodal model that has no layout of its own has its blocks where its text model keeps them.
    """
    path, kind = layout_of(model).blocks, model.config.get_text_config().model_type
    owner = _blocks_of_text_model(model, path) or _submodule(model, path, kind)
    if not isinstance(owner, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) or not len(owner):
        raise UnsupportedModelError(
            f"{path!r} of {type(model).__name__} is a {type(owner).__name__}, not a list of blocks, which the layout "
            f"of family {kind!r} says is there"
        )
    return list(owner.values() if isinstance(owner, nn.ModuleDict) else owner)


def _blocks_of_text_model(model: PreTrainedModel, path: str) -> nn.Module | None:
    """What a path leads to from the text model inside a multimodal one, which may have a head of its own or none."""
    text = model.get_decoder() if model.config.get_text_config() is not model.config else None
    places = [path, path.partition(".")[2]] if isinstance(text, nn.Module) else []
    for inside in filter(None, places):
        with suppress(AttributeError):
            return text.get_submodule(inside)  # type: ignore[union-attr]
    return None


def _submodule(model: PreTrainedModel, path: str, kind: str) -> nn.Module:
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
    return owner
