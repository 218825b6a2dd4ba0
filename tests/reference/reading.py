"""Reading every family of decoders slowly: eager attention, whole patterns, values from the model's projections.

This is a second reading of every modelling file, made for checking the package's own: it hooks the projections and
takes patterns from eager attention, where the package listens to what goes into the attention kernel.

Shapes: N positions, L layers, H query heads, KV key-value heads, d model width, d_h head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.reference import recurrences

CLOSURE_TOLERANCE = 1e-5


@dataclass
class DenseLayer:
    """Everything one layer did to one sequence, float64.

    resid_pre, resid_mid, resid_post, mlp_out   [N, d]
    pattern                                     [H, N, N]   row i attends to column j; [H, N, N, 1 or d_h] are the
                                                            coefficients of a recurrence, also by channel
    v                                           [H, N, d_h] what head h reads, KV heads repeated
    W_O, b_O                                    [H, d_h, d], [d]
    gain, scale                                 [d], [N]    the norm after W_O; ones if there is none
    gate                                        [H, N, d_h] multiplies what row i has read; None if there is none
    out_scale                                   multiplies the stream at the end: resid_post = (mid + mlp) * out_scale
    beside                                      a second mixer that writes at the same place: its pattern, v, W_O, gate
    """

    resid_pre: Tensor
    resid_mid: Tensor
    resid_post: Tensor
    mlp_out: Tensor
    pattern: Tensor
    v: Tensor
    W_O: Tensor
    b_O: Tensor = None
    gain: Tensor = None
    scale: Tensor = None
    gate: Tensor = None
    out_scale: float = 1.0
    beside: DenseLayer | None = None

    def __post_init__(self):
        positions, width = self.resid_pre.shape
        self.b_O = self.resid_pre.new_zeros(width) if self.b_O is None else self.b_O
        self.gain = self.resid_pre.new_ones(width) if self.gain is None else self.gain
        self.scale = self.resid_pre.new_ones(positions) if self.scale is None else self.scale


# ---------------------------------------------------------------------------------------------------------------------
# Where the values are in the output of a projection: [N, out] -> [N, KV, d_h]
# ---------------------------------------------------------------------------------------------------------------------


def last(projected: Tensor, config: Any, d_h: int) -> Tensor:
    """Separate or concatenated projections: the values are the last KV * d_h outputs."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return projected[:, -kv_heads * d_h :].unflatten(1, (kv_heads, d_h))


def last_head(projected: Tensor, config: Any, d_h: int) -> Tensor:
    """Multi-query attention: one KV head, at the end."""
    return projected[:, None, -d_h:]


def interleaved(projected: Tensor, config: Any, d_h: int) -> Tensor:
    """Each head has its query, key and value side by side."""
    return projected.unflatten(1, (config.num_attention_heads, 3, d_h))[:, :, 2]


def values_alone(projected: Tensor, config: Any, d_h: int) -> Tensor:
    """Nothing but values; layers may differ in their number of KV heads."""
    return projected.unflatten(1, (-1, d_h))


def scaled(projected: Tensor, config: Any, d_h: int) -> Tensor:
    return config.attention_value_scale * values_alone(projected, config, d_h)


def clipped(projected: Tensor, config: Any, d_h: int) -> Tensor:
    bound = config.clip_qkv if hasattr(config, "clip_qkv") else config.attn_config.clip_qkv
    return last(projected.clamp(-bound, bound), config, d_h)


def latent(projected: Tensor, config: Any, d_h: int) -> Tensor:
    """Multi-head latent attention: each head has its unrotated key, then its value."""
    return projected.unflatten(1, (config.num_attention_heads, -1))[..., -d_h:]


def falcon_groups(projected: Tensor, config: Any, d_h: int) -> Tensor:
    """Each group has its queries, one key and one value."""
    return projected.unflatten(1, (config.num_kv_heads, -1, d_h))[:, :, -1]


def codegen(projected: Tensor, config: Any, d_h: int) -> Tensor:
    """Four slices, as for four devices, each with queries, values and keys."""
    return projected.unflatten(1, (4, 3, -1, d_h))[:, :, 1].flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Families
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Where a family of Hugging Face decoders keeps what `DenseLayer` needs; paths are relative to a block.

    `mid` is the module whose *input* is the residual stream after attention; None in parallel blocks, where
    resid_mid := resid_pre + attention branch. `mlp_out` are the modules whose *outputs* are added to the stream, times
    `scale` where the block multiplies its branches.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    values: str = "self_attn.v_proj"
    split: Callable[[Tensor, Any, int], Tensor] = last
    output: str = "self_attn.o_proj"
    mid: str | None = "post_attention_layernorm"
    mlp_out: tuple[str, ...] = ("mlp",)
    post_norm: str | None = None
    unit_offset: bool = False  # the post-norm multiplies by 1 + weight
    scale: str | None = None  # field of the configuration that multiplies both branches
    gate: bool = False  # every head of q_proj has its query, then the logits of its gate
    hidden_sinks: bool = False  # eager attention gives its patterns before the sinks take their part
    out_scale: str | None = None  # buffer of the block that multiplies the stream at the end
    values_of: Callable[[Any, int], int] = lambda config, layer: layer  # the layer whose values a layer reads
    head_gate: str | None = None  # a projection to one gate per head
    mixer: str | None = None  # a mixer without softmax, in blocks that have one; read by `recurrences`
    mixer_output: str = "out_proj"
    scales: tuple[str, str] | None = None  # fields of the configuration that multiply attention and that mixer
    alone: bool = False  # a block is a mixer or an MLP at the same place, and nothing else


LLAMA = Family()
FUSED = Family(values="self_attn.qkv_proj")
PARALLEL = Family(mid=None)
LATENT = Family(values="self_attn.kv_b_proj", split=latent)
NORMED = {"post_norm": "post_attention_layernorm", "mlp_out": ("post_feedforward_layernorm",)}
SANDWICH = Family(mid="pre_feedforward_layernorm", unit_offset=True, **NORMED)
POST_NORM = Family(mid="mlp", **NORMED)
GATED = Family(gate=True)
QWEN_NEXT = Family(gate=True, mixer="linear_attn")
KIMI = Family(values="self_attn.kv_b_proj", split=latent, mixer="self_attn", mixer_output="o_proj")
FEED_FORWARD = {"mid": "pre_ff_layernorm", "mlp_out": ("feed_forward",), "mixer": "mamba"}
LFM2 = Family(output="self_attn.out_proj", mid="ffn_norm", mlp_out=("feed_forward",), mixer="conv")
NEMOTRON_H = Family(
    attention="mixer",
    values="mixer.v_proj",
    output="mixer.o_proj",
    mid=None,
    mlp_out=("mixer",),
    mixer="mixer",
    alone=True,
)
MAMBA = replace(NEMOTRON_H, blocks="backbone.layers")
GRANITE = Family(scale="residual_multiplier")
GRANITE_SWA = replace(GRANITE, hidden_sinks=True)
GLM4 = Family(post_norm="post_self_attn_layernorm", mlp_out=("post_mlp_layernorm",))
PERSIMMON = Family(values="self_attn.query_key_value", split=interleaved, output="self_attn.dense")
INNER = "model.language_model.layers"
BESIDE = dict.fromkeys(("emu3", "granite_docling", "idefics2", "idefics3", "smolvlm"), "model.text_model.layers")
BESIDE |= {"llama4": "language_model.model.layers", "kosmos-2.5": "text_model.model.layers"}
"""Where vision-language models keep the blocks of their text model, if not at INNER."""
GPT = {"blocks": "transformer.h", "attention": "attn"}
GPT2 = Family(values="attn.c_attn", output="attn.c_proj", mid="ln_2", **GPT)
GPTJ = Family(values="attn.v_proj", output="attn.out_proj", mid=None, **GPT)
NEOX = Family(
    blocks="gpt_neox.layers",
    attention="attention",
    values="attention.query_key_value",
    split=interleaved,
    output="attention.dense",
)
BLOOM = Family(
    blocks="transformer.h",
    attention="self_attention",
    values="self_attention.query_key_value",
    split=interleaved,
    output="self_attention.dense",
    mlp_out=("mlp.dense_4h_to_h",),
)
FALCON = replace(BLOOM, mlp_out=("mlp",))

FAMILIES = {
    "apertus": replace(LLAMA, mid="feedforward_layernorm"),
    "bailing_hybrid": replace(KIMI, head_gate="self_attn.g_proj"),
    "bamba": Family(**FEED_FORWARD),
    "bloom": BLOOM,
    "codegen": replace(GPTJ, values="attn.qkv_proj", split=codegen),
    "cohere": PARALLEL,
    "cohere2": PARALLEL,
    "cohere2_moe": PARALLEL,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "exaone4": POST_NORM,
    "falcon_h1": Family(**FEED_FORWARD, scales=("attention_out_multiplier", "ssm_out_multiplier")),
    "falcon_mamba": MAMBA,
    "flex_olmo": POST_NORM,
    "gemma2": SANDWICH,
    "gemma3_text": SANDWICH,
    "glm4": GLM4,
    "glm4v_text": GLM4,
    "glm_ocr_text": GLM4,
    "glm4_moe_lite": LATENT,
    "gpt2": GPT2,
    "gpt_neo": replace(
        GPTJ, attention="attn.attention", values="attn.attention.v_proj", output="attn.attention.out_proj", mid="ln_2"
    ),
    "gptj": GPTJ,
    "granite": GRANITE,
    "granite_docling_text": GRANITE,
    "granite_swa": GRANITE_SWA,
    "granitemoe": replace(GRANITE, mlp_out=("block_sparse_moe",)),
    "granitemoeshared": replace(GRANITE, mlp_out=("block_sparse_moe", "shared_mlp")),
    "hyperclovax": GRANITE,
    "jamba": Family(**FEED_FORWARD),
    "kimi_linear": KIMI,
    "kolibri1": GLM4,
    "lfm2": LFM2,
    "lfm2_moe": LFM2,
    "llama4_text": replace(LLAMA, mlp_out=("feed_forward",)),
    "kosmos_2_5_text_model": Family(output="self_attn.out_proj", mid="final_layer_norm", mlp_out=("ffn",)),
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "mimo_v2_flash": replace(LLAMA, split=scaled),
    "mistral4": LATENT,
    "moshi": replace(LLAMA, output="self_attn.o_proj.linear"),
    "mpt": Family(
        blocks="transformer.blocks",
        attention="attn",
        values="attn.Wqkv",
        split=clipped,
        output="attn.out_proj",
        mid="norm_2",
        mlp_out=("ffn.down_proj",),
    ),
    "nemotron_h": NEMOTRON_H,
    "olmo": replace(LLAMA, split=clipped),
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "opt": Family(
        blocks="model.decoder.layers", output="self_attn.out_proj", mid="final_layer_norm", mlp_out=("fc2",)
    ),
    "persimmon": PERSIMMON,
    "phi": replace(PARALLEL, output="self_attn.dense"),
    "phi3": FUSED,
    "phi4_multimodal": FUSED,
    "qwen3_5_moe_text": QWEN_NEXT,
    "qwen3_5_text": QWEN_NEXT,
    "qwen3_next": QWEN_NEXT,
    "vaultgemma": replace(LLAMA, mid="pre_feedforward_layernorm"),
}


def family_of(config: Any) -> Family:
    """The family of a configuration; most are read like Llama. That of a multimodal model is its text model's."""
    text = config.get_text_config()
    if text is not config:
        return replace(family_of(text), blocks=BESIDE.get(config.model_type, INNER))
    return _by_options(config) or FAMILIES.get(config.model_type, LLAMA)


def _by_options(config: Any) -> Family | None:
    """That of types whose blocks depend on more of the configuration than the type."""
    chosen = CHOICES.get(config.model_type)
    return None if chosen is None else chosen(config)


def _granitemoe_swa(config: Any) -> Family:
    shared = ["shared_mlp"] if config.shared_intermediate_size else []
    return replace(GRANITE_SWA, mlp_out=("block_sparse_moe", *shared))


def _granitemoehybrid(config: Any) -> Family:
    experts = ["block_sparse_moe"] if config.num_local_experts else []
    return replace(GRANITE, mlp_out=(*experts, "shared_mlp"), mixer="mamba")


def _lfm3(config: Any) -> Family:
    norms = {"post_norm": "post_operator_norm", "mlp_out": ("post_ffn_norm",)} if config.use_sandwich_norm else {}
    gate = "self_attn.g_proj" if config.use_attention_gate else None
    return replace(LFM2, output="self_attn.o_proj", head_gate=gate, **norms)


def _hyperclovax(config: Any) -> Family:
    return replace(GRANITE, post_norm="post_norm1", mlp_out=("post_norm2",)) if config.use_post_norm else GRANITE


def _gemma4(config: Any) -> Family:
    per_layer = ["post_per_layer_input_norm"] if getattr(config, "hidden_size_per_layer_input", 0) else []
    return replace(
        SANDWICH,
        values="self_attn.v_norm",
        split=values_alone,
        unit_offset=False,
        mlp_out=("post_feedforward_layernorm", *per_layer),
        out_scale="layer_scalar",
        values_of=_last_of_its_kind,
    )


def _last_of_its_kind(config: Any, layer: int) -> int:
    """The last layers of Gemma 4 have no values: they read those of the last layer before that has the same mask."""
    own, kinds = config.num_hidden_layers - config.num_kv_shared_layers, config.layer_types
    return layer if layer < own else max(i for i in range(own) if kinds[i] == kinds[layer])


def _falcon(config: Any) -> Family:
    if config.new_decoder_architecture:
        return replace(FALCON, split=falcon_groups, mid=None)
    split = last_head if config.multi_query else interleaved
    return replace(FALCON, split=split, mid=None if config.parallel_attn else FALCON.mid)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_dense(model, input_ids: Tensor, **inputs: Tensor) -> list[DenseLayer]:
    """Run a copy of `model` with eager attention on `input_ids` ([N] or [1, N]) and record every layer.

    inputs: what else it is given, such as pixel values

    Raises AssertionError if a block does not close:
        resid_mid_i = resid_pre_i + scale_i gain * (b_O + sum_h sum_j pattern^h_ij v^h_j W_O^h)       (Eq. 14)
    """
    family = family_of(model.config)
    model = eager_copy(model)
    config = model.config.get_text_config()
    sources = [family.values_of(config, i) for i in range(config.num_hidden_layers)]
    blocks = model.get_submodule(family.blocks)
    records = [_Record(block, family, blocks[source]) for block, source in zip(blocks, sources, strict=True)]
    with torch.no_grad():
        model(input_ids=input_ids.reshape(1, -1), use_cache=False, **inputs)
    layers = [_dense_layer(record, config) for record in records]
    for index, layer in enumerate(layers):
        error = closure_error(layer)
        assert error < CLOSURE_TOLERANCE, f"{model.config.model_type}, layer {index}: closes only to {error:.1e}"
    return layers


def eager_copy(model):
    """A deep copy in eval mode with eager attention; the given model is left untouched."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    return model


def closure_error(layer: DenseLayer) -> float:
    """Largest gap between resid_mid and its rebuilt value, relative to the largest entry of the attention branch."""
    branch = layer.b_O + sum(_written(one) for one in (layer, layer.beside) if one is not None)
    rebuilt = layer.resid_pre + layer.scale[:, None] * layer.gain * branch
    return ((rebuilt - layer.resid_mid).abs().max() / _size(layer)).item()


def _written(layer: DenseLayer) -> Tensor:
    pattern = layer.pattern if layer.pattern.dim() == 4 else layer.pattern[..., None]
    z = recurrences.read(pattern, layer.v)
    z = z if layer.gate is None else z * layer.gate
    return torch.einsum("hid,hdm->im", z, layer.W_O)


def _size(layer: DenseLayer) -> Tensor:
    """Of what attention writes, or in a block that is an MLP alone of the stream."""
    size = (layer.resid_mid - layer.resid_pre).abs().max()
    return size if size > 0 else layer.resid_mid.abs().max()


@dataclass
class _Record:
    """Clones of what passes through one block, by name; clones, because some families write in place."""

    block: nn.Module
    family: Family
    source: nn.Module  # the block whose values it reads
    seen: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        family = self.family = self._own_family()
        self._keep_input("resid_pre", "")
        self._keep_output("resid_post", "")
        if self.attends:
            self._keep_output("attention", family.attention)
            self._keep_output("values", family.values, self.source)
            self._keep_pattern()
        if self.mixes:
            self._keep_input("mixer_in", family.mixer)
            self._keep_output("mixer_out", family.mixer)
        for path in family.mlp_out:
            self._keep_output(path, path)
        if family.mid is not None:
            self._keep_input("resid_mid", family.mid)
        if family.post_norm is not None:
            self._keep_input("post_norm_in", family.post_norm)
        if family.gate and self.attends:
            self._keep_output("gate", "self_attn.q_proj")
        if family.head_gate and self.attends:
            self._keep_output("gate", family.head_gate)
        if family.hidden_sinks:
            self._keep_output("q", "self_attn.q_proj")
            self._keep_output("k", "self_attn.k_proj")

    @property
    def mixes(self) -> bool:
        """Whether the block has a mixer without softmax."""
        module = None if self.family.mixer is None else dict(self.block.named_modules()).get(self.family.mixer)
        return module is not None and recurrences.known(module)

    @property
    def attends(self) -> bool:
        at_its_place = self.mixes and self.family.mixer == self.family.attention
        return not at_its_place and self.family.output in dict(self.block.named_modules())

    def _own_family(self) -> Family:
        """Less what only other blocks of the family have."""
        family = self.family
        if family.alone and (self.mixes or self.attends):
            return replace(family, mlp_out=())
        if self.mixes and family.mixer == "linear_attn" and family.post_norm is not None:  # OLMo Hybrid
            return replace(family, post_norm=None, mid="post_attention_layernorm", mlp_out=("mlp",))
        return family

    def _keep_input(self, name: str, path: str) -> None:
        def hook(module, args, kwargs):
            self.seen[name] = _rows(args[0] if args else kwargs["hidden_states"])

        self.block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

    def _keep_output(self, name: str, path: str, block: nn.Module | None = None) -> None:
        def hook(module, args, output):
            self.seen[name] = _rows(output[0] if isinstance(output, tuple) else output)

        (block or self.block).get_submodule(path).register_forward_hook(hook)

    def _keep_pattern(self) -> None:
        def hook(module, args, output):
            self.seen["pattern"] = output[1][0].detach().clone().double()

        self.block.get_submodule(self.family.attention).register_forward_hook(hook)


CHOICES = {
    "falcon": _falcon,
    "gpt_neox": lambda config: replace(NEOX, mid=None) if config.use_parallel_residual else NEOX,
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _gemma4),
    "granitemoe_swa": _granitemoe_swa,
    "granitemoehybrid": _granitemoehybrid,
    "lfm3": _lfm3,
    "olmo_hybrid": lambda config: replace(POST_NORM, mixer="linear_attn", mixer_output="o_proj"),
    "gpt_bigcode": lambda config: replace(GPT2, split=last_head if config.multi_query else interleaved),
    "hyperclovax": _hyperclovax,
    "stablelm": lambda config: PARALLEL if config.use_parallel_residual else LLAMA,
}


def _rows(activation: Tensor) -> Tensor:
    """[1, N, width], [N, width], [1, 1, N, width] or, cut into heads, [1, N, H, d_h] -> [N, width] in float64."""
    by_head = activation.dim() == 4 and activation.shape[1] > 1
    whole = activation.flatten(2) if by_head else activation
    return whole.detach().clone().double().reshape(-1, whole.shape[-1])


def _dense_layer(record: _Record, config) -> DenseLayer:
    seen, family = record.seen, record.family
    width = seen["resid_pre"].shape[1]
    scales = (1.0, 1.0) if family.scales is None else [getattr(config, name) for name in family.scales]
    heads = [_attention(record, config, scales[0])] if record.attends else []
    heads += [_mixer(record, scales[1])] if record.mixes else []
    gain, scale = _post_norm(record, family)
    times = 1.0 if family.scale is None else getattr(config, family.scale)
    stream = {
        "resid_pre": seen["resid_pre"],
        "resid_mid": seen["resid_mid"] if family.mid is not None else _mid(record),
        "resid_post": seen["resid_post"],
        "mlp_out": times * sum((seen[path] for path in family.mlp_out), torch.zeros_like(seen["resid_pre"])),
    }
    first, *others = heads or [_nothing(len(seen["resid_pre"]), width)]
    beside = DenseLayer(**stream, **others[0]) if others else None
    first["b_O"] = sum(one["b_O"] for one in (first, *others) if one["b_O"] is not None) if heads else None
    return DenseLayer(
        **stream,
        **first | {"b_O": first["b_O"] if isinstance(first["b_O"], Tensor) else None},
        gain=gain
        if family.scale is None
        else times * (torch.ones(width, dtype=torch.float64) if gain is None else gain),
        scale=scale,
        out_scale=1.0 if family.out_scale is None else getattr(record.block, family.out_scale).item(),
        beside=beside,
    )


def _mid(record: _Record) -> Tensor:
    seen = record.seen
    return seen["resid_pre"] + sum(seen[name] for name in ("attention", "mixer_out") if name in seen)


def _attention(record: _Record, config: Any, times: float) -> dict[str, Any]:
    seen, family, heads = record.seen, record.family, config.num_attention_heads
    W_O, b_O = _output_projection(record.block.get_submodule(family.output), heads)
    values = family.split(seen["values"], config, W_O.shape[1])
    return {
        "pattern": _after_sinks(record, config) if family.hidden_sinks else seen["pattern"],
        "v": _repeated(values, heads),
        "W_O": times * W_O,
        "b_O": None if b_O is None else times * b_O,
        "gate": _gate(seen["gate"], heads, W_O.shape[1]) if "gate" in seen else None,
    }


def _mixer(record: _Record, times: float) -> dict[str, Any]:
    module = record.block.get_submodule(record.family.mixer)
    mixed = recurrences.read_mixer(module, record.seen["mixer_in"])
    W_O, b_O = _output_projection(module.get_submodule(record.family.mixer_output), len(mixed.v))
    b_O = None if b_O is None else times * b_O
    return {"pattern": mixed.coefficients, "v": mixed.v, "W_O": times * W_O, "b_O": b_O, "gate": mixed.gate}


def _nothing(length: int, width: int) -> dict[str, Any]:
    """A block that is an MLP alone: one head that reads nothing."""
    zeros = [
        torch.zeros(*shape, dtype=torch.float64) for shape in ((1, length, length), (1, length, 1), (1, 1, width))
    ]
    return dict(zip(("pattern", "v", "W_O"), zeros, strict=True)) | {"b_O": None, "gate": None}


def _repeated(values: Tensor, heads: int) -> Tensor:
    """[N, KV, d_h] -> [H, N, d_h]: query head h reads KV head h // (H / KV)."""
    group = heads // values.shape[1]
    return torch.stack([values[:, head // group] for head in range(heads)])


def _after_sinks(record: _Record, config: Any) -> Tensor:
    """[H, N, N]: the pattern times exp(lse) / (exp(lse) + exp(sink)), what a sink leaves of a softmax.

    The score of a token with itself is known without its position, and gives lse by A_ii = exp(score_ii - lse).
    """
    pattern, heads = record.seen["pattern"], config.num_attention_heads
    q = record.seen["q"].unflatten(1, (heads, -1)).transpose(0, 1)
    k = _repeated(record.seen["k"].unflatten(1, (-1, q.shape[-1])), heads)
    own = config.attention_multiplier * (q * k).sum(-1)
    lse = own - pattern.diagonal(dim1=1, dim2=2).log()
    sinks = record.block.self_attn.sinks.detach().double()
    return pattern * torch.sigmoid(lse - sinks[:, None])[:, :, None]


def _gate(projected: Tensor, heads: int, width: int) -> Tensor:
    """[N, H * 2 d_h] -> [H, N, d_h]; of one gate per head [N, H]"""
    if projected.shape[1] == heads:
        return torch.sigmoid(projected).T[:, :, None].expand(-1, -1, width)
    return torch.sigmoid(projected.unflatten(1, (heads, 2, -1))[:, :, 1]).transpose(0, 1)


def _output_projection(module: nn.Module, heads: int) -> tuple[Tensor, Tensor | None]:
    """W_O [H, d_h, d] and b_O [d]; nn.Linear keeps [out, in], GPT-2's Conv1D keeps [in, out]."""
    weight = module.weight if isinstance(module, Conv1D) else module.weight.T
    bias = None if module.bias is None else module.bias.detach().double()
    return weight.detach().double().reshape(heads, -1, weight.shape[1]), bias


def _post_norm(record: _Record, family: Family) -> tuple[Tensor | None, Tensor | None]:
    """Gain [d] and scale [N] = 1 / rms of an RMS norm between W_O and the residual stream (Eq. 13)."""
    if family.post_norm is None:
        return None, None
    norm = record.block.get_submodule(family.post_norm)
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    weight = norm.weight.detach().double()
    mean_square = record.seen["post_norm_in"].pow(2).mean(-1)
    return weight + 1 if family.unit_offset else weight, (mean_square + epsilon).rsqrt()
