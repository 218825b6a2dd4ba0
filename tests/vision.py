"""Tiny random vision-language models of every type that is read, built like those of :mod:`tests.tiny`.

A type is one line: the settings of its text model, most of them those of the family in :data:`tests.tiny.FAMILIES`,
and what its vision tower and its own configuration need beyond :data:`TOWER`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny import (
    COMMON,
    DEEPSEEK_MOE,
    FAMILIES,
    GATED,
    GRANITE,
    LINEAR,
    MLA,
    QWEN_MOE,
    VOCAB_SIZE,
    WIDE,
    WIDE_WINDOW,
    randomise,
    tiny_tokenizer,
)

IMAGE, VIDEO, AUDIO, BEGIN, END, OTHER = range(VOCAB_SIZE, VOCAB_SIZE + 6)
"""Ids of the placeholder tokens, behind those that random texts are drawn from."""

PLACEHOLDERS = {
    IMAGE: ("image_token_id", "image_token_index", "image_patch_id"),
    VIDEO: ("video_token_id", "video_token_index"),
    AUDIO: ("audio_token_id", "audio_token_index"),
    BEGIN: ("image_start_token_id", "vision_start_token_id", "boi_token_id", "boi_token_index", "image_start_id"),
    END: ("image_end_token_id", "vision_end_token_id", "eoi_token_id", "eoi_token_index", "image_end_id"),
    OTHER: ("boa_token_id", "eoa_token_id", "eoa_token_index", "video_start_token_id", "video_end_token_id"),
}
NAMES = {name: number for number, names in PLACEHOLDERS.items() for name in names}
VOCABULARY = {"vocab_size": OTHER + 1}

TOWER = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 7,
    "out_hidden_size": 32,
    "mlp_ratio": 2,
    "num_position_embeddings": 16,
}
"""A vision tower of two layers over 4 x 4 patches of 7 pixels; of these settings a type has some."""

ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 2, 2]}}
NARROW_MROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
QWEN2_VL = GATED | NARROW_MROPE
GLM_ROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}}
GLM4V = GATED | GLM_ROPE
QWEN3_VL = WIDE | MROPE
DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
ERNIE_MOE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [24, 12], "moe_num_shared_experts": 1}
MISTRAL4 = MLA | {
    "head_dim": 4,
    "first_k_dense_replace": 1,
    "rope_parameters": ROPE
    | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8, "partial_rotary_factor": 1.0},
}
PINPOINTS = {"image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]]}
MOLMO2_ADAPTER = {k: v for k, v in TOWER.items() if k in ("hidden_size", "intermediate_size", "head_dim")}
MOLMO2_ADAPTER |= {"text_hidden_size": 32, "vision_feature_layer": [1, 0]}
MOLMO2_ADAPTER |= {"num_attention_heads": 2, "num_key_value_heads": 2}
KOSMOS = {"embed_dim": 32, "layers": 3, "attention_heads": 4, "ffn_dim": 48}
PICTURE_WORDS = {"vocabulary_map": {"<image>": IMAGE, "IMGIMGA": BEGIN, "<|visual token 000001|>": BEGIN}}
CODES = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
EMU3_CODES = CODES | {"model_type": "emu3_vqgan", "codebook_size": 16, "latent_channels": 4, "attn_resolutions": []}
JANUS_CODES = CODES | {"model_type": "janus_vqgan", "num_patches": 4, "projection_dim": 16}
JANUS_CODES |= {"image_token_embed_dim": 32, "num_embeddings": 16}
CODES |= {"num_embeddings": 16}
SAM = {"model_type": "sam_vision_model", "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1}
SAM |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "mlp_dim": 16, "window_size": 2}
SAM |= {"global_attn_indexes": [0]}


@dataclass(frozen=True)
class Tiny:
    """text, vision, own: settings beyond COMMON and the family's, beyond TOWER, and of the wrapper itself."""

    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)


TYPES = {
    "aria": Tiny(),
    "aya_vision": Tiny(),
    "chameleon": Tiny(GATED, own=PICTURE_WORDS | {"vq_config": CODES | {"resolution": 28}}),
    "cohere2_vision": Tiny(own={"alignment_intermediate_size": 32}),
    "cosmos3_edge": Tiny(QWEN3_VL),
    "cosmos3_omni": Tiny(QWEN3_VL, DEEPSTACK),
    "deepseek_vl": Tiny(),
    "deepseek_vl_hybrid": Tiny(own={"high_res_vision_config": SAM}),
    "emu3": Tiny(GATED, own=PICTURE_WORDS | {"vq_config": EMU3_CODES}),
    "ernie4_5_vl_moe": Tiny(GATED | NARROW_MROPE | ERNIE_MOE),
    "exaone4_5": Tiny(),
    "fuyu": Tiny(),
    "gemma3": Tiny(own={"mm_tokens_per_image": 4}),
    "gemma4": Tiny(),
    "gemma4_unified": Tiny(vision={"mm_embed_dim": 16, "mm_posemb_size": 8}),
    "glm46v": Tiny(GLM4V),
    "glm4v": Tiny(GLM4V),
    "glm4v_moe": Tiny(GLM4V | DEEPSEEK_MOE),
    "glm_ocr": Tiny(GLM4V),
    "glmga": Tiny(GLM4V),
    "got_ocr2": Tiny(),
    "granite_docling": Tiny(GRANITE),
    "hunyuan_vl": Tiny(WIDE | {"rope_parameters": ROPE | {"mrope_section": [2, 2, 1, 1]}}),
    "hyperclovax_vision_v2": Tiny(GRANITE),
    "idefics2": Tiny(),
    "idefics3": Tiny(),
    "internvl": Tiny(),
    "janus": Tiny(vision={"projection_dim": 16, "num_image_tokens": 16}, own={"vq_config": JANUS_CODES}),
    "kimi_k25": Tiny(),
    "kosmos-2.5": Tiny(KOSMOS),
    "lighton_ocr": Tiny(),
    "llama4": Tiny(vision={"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}),
    "llava": Tiny(),
    "llava_next": Tiny(own=PINPOINTS),
    "llava_next_video": Tiny(own=PINPOINTS),
    "llava_onevision": Tiny(own=PINPOINTS | {"vision_aspect_ratio": "anyres_max_9"}),
    "minicpm_ocr": Tiny(),
    "minicpmv4_6": Tiny(),
    "minicpmv4_7": Tiny(),
    "minimax_m3_vl": Tiny(),
    "mistral3": Tiny(),
    "mistral4": Tiny(MISTRAL4),
    "molmo2": Tiny(WIDE, {"image_size": [28, 28]}, {"adapter_config": MOLMO2_ADAPTER}),
    "ovis2": Tiny(vision={"vocab_size": 64}, own={"visual_indicator_token_ids": [OTHER] * 5}),
    "paddleocr_vl": Tiny(QWEN3_VL),
    "paligemma": Tiny(vision={"projection_dim": 32}, own={"projection_dim": 32}),
    "pp_chart2table": Tiny(),
    "qianfan_ocr": Tiny(vision={"image_size": [28, 28], "patch_size": [7, 7]}),
    "qwen2_5_omni_thinker": Tiny(QWEN2_VL),
    "qwen2_5_vl": Tiny(QWEN2_VL),
    "qwen2_vl": Tiny(QWEN2_VL, {"hidden_size": 32}),
    "qwen3_5": Tiny(WIDE | LINEAR),
    "qwen3_5_moe": Tiny(),
    "qwen3_omni_moe_thinker": Tiny(QWEN3_VL | QWEN_MOE),
    "qwen3_vl": Tiny(QWEN3_VL, DEEPSTACK),
    "qwen3_vl_moe": Tiny(QWEN3_VL | QWEN_MOE, DEEPSTACK),
    "shieldgemma2": Tiny(own={"mm_tokens_per_image": 4}),
    "smolvlm": Tiny(),
    "video_llama_3": Tiny(),
    "video_llava": Tiny(),
    "vipllava": Tiny(own={"vision_feature_layer": [-1, -2]}),
}


def _squares(*shape: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _noise(*shape, 3, 28, 28)}


def _patches(channels: int, *more: int) -> dict[str, torch.Tensor]:
    """Two pictures of 8 x 4 and 4 x 4 patches, which are merged by twos."""
    grid = torch.tensor([[1, 8, 4], [1, 4, 4]])
    return {"pixel_values": _noise(48, channels, *more), "image_grid_thw": grid}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Pictures:
    """Images for a tiny model: how many tokens each takes, their grids, what the model is given for them."""

    counts: tuple[int, ...]
    grids: tuple[tuple[int, ...], ...]
    inputs: dict[str, torch.Tensor]


SQUARE = Pictures((16, 16), ((4, 4), (4, 4)), _squares(2))
SHUFFLED = Pictures((4, 4), ((2, 2), (2, 2)), _squares(2))
TILES = Pictures((4, 4), ((2, 2), (2, 2)), _squares(1, 2))
SIZED = Pictures((4, 4), ((2, 2), (2, 2)), _squares(2) | {"image_sizes": torch.tensor([[28, 28], [28, 28]])})
ANYRES = Pictures((52,), ((),), _squares(1, 3) | {"image_sizes": torch.tensor([[28, 56]])})
MERGED = Pictures((8, 4), ((4, 2), (2, 2)), _patches(3 * 2 * 49))
FLAT = Pictures((8, 4), ((4, 2), (2, 2)), _patches(3 * 49))
MERGE_SIZES = {"image_merge_sizes": torch.tensor([2, 2])}

IMAGES = {
    "aya_vision": SHUFFLED,
    "cohere2_vision": SHUFFLED,
    "cosmos3_edge": FLAT,
    "cosmos3_omni": MERGED,
    "deepseek_vl": SQUARE,
    "ernie4_5_vl_moe": FLAT,
    "exaone4_5": MERGED,
    "gemma3": SHUFFLED,
    "glm46v": MERGED,
    "glm4v": MERGED,
    "glm4v_moe": MERGED,
    "glm_ocr": MERGED,
    "glmga": MERGED,
    "got_ocr2": Pictures((1, 1), ((1, 1), (1, 1)), _squares(2)),
    "hunyuan_vl": Pictures((14, 8), ((), ()), FLAT.inputs),
    "hyperclovax_vision_v2": MERGED,
    "idefics2": Pictures((64,), ((),), _squares(1, 1)),
    "idefics3": TILES,
    "internvl": SHUFFLED,
    "lighton_ocr": SIZED,
    "llava": SQUARE,
    "llava_next": ANYRES,
    "llava_next_video": ANYRES,
    "llava_onevision": ANYRES,
    "minimax_m3_vl": MERGED,
    "mistral3": SIZED,
    "paddleocr_vl": Pictures(FLAT.counts, FLAT.grids, _patches(3, 7, 7)),
    "paligemma": SQUARE,
    "pp_chart2table": Pictures((1, 1), ((1, 1), (1, 1)), _squares(2)),
    "qianfan_ocr": SHUFFLED,
    "qwen2_5_omni_thinker": MERGED,
    "qwen2_5_vl": MERGED,
    "qwen2_vl": MERGED,
    "qwen3_5": MERGED,
    "qwen3_5_moe": MERGED,
    "qwen3_omni_moe_thinker": MERGED,
    "qwen3_vl": MERGED,
    "qwen3_vl_moe": MERGED,
    "shieldgemma2": SHUFFLED,
    "smolvlm": TILES,
    "video_llama_3": Pictures(FLAT.counts, FLAT.grids, FLAT.inputs | MERGE_SIZES),
    "video_llava": Pictures((16, 16), ((), ()), _squares(2)),
    "vipllava": SQUARE,
}
"""Types that are tested with two images, or one cut into tiles."""

UNREAD = {
    **dict.fromkeys(
        ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"),
        "an encoder-decoder",
    ),
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo", "pi0"), "it cannot be run on tokens alone; its text model can"
    ),
    "blip": "its decoder reads the image by cross-attention, and it has no language-model head of its own",
    "diffusion_gemma": "it writes blocks of text by diffusion, not a token from the text before it",
    "kosmos-2": "it cannot be run without an image, and a norm stands between its heads and their output projection",
    **dict.fromkeys(
        ("fast_vlm", "perception_lm"), "not tested: it needs timm; its text model's layout is found by the same rule"
    ),
    **dict.fromkeys(("lfm2_vl", "lfm3_vl", "nemotron_h_omni"), "not tested; its text model is read"),
    **dict.fromkeys(("cohere_compass", "deepseek_ocr2", "granite4_vision"), "its text model is in no table yet"),
}
"""Types of transformers' mapping that are refused or not tested; the table of layouts tells why others are."""

LARGE = ("got_ocr2", "pp_chart2table")
"""Types whose random vision tower makes features so large that all else drowns in their rounding."""

PREFIX = ("paligemma",)
"""Types that read the prompt in both directions, where they are told what the prompt is."""


def with_images(kind: str, model: Any, text: torch.Tensor) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
    """A text that has images after its second token and before its tenth, where its prompt ends.

    result: ids [N], length of the prompt, inputs
    """
    pictures, parts, at = IMAGES[kind], [text[:2]], 2
    for count in pictures.counts:
        image = torch.tensor([BEGIN, *[IMAGE] * count, END])
        parts += [image, text[at : at + 3]]
        at += 3
    prompt = sum(map(len, parts)) + 10 - at
    ids = torch.cat([*parts, text[at:]])
    known = inspect.signature(model.forward).parameters
    types = (torch.arange(len(ids)) >= prompt if kind in PREFIX else ids == IMAGE).long()[None]
    needed = [name for name in ("token_type_ids", "mm_token_type_ids") if name in known]
    return ids, prompt, pictures.inputs | dict.fromkeys(needed, types)


def tiny_vision(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **text: Any):
    """A random vision-language model of a type, in eval mode; ``text`` are fields of its text configuration."""
    config = config_of(kind, **text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, CLASSES[kind])(config)
    randomise(model, seed)
    return model.to(dtype).eval()


def config_of(kind: str, **text: Any):
    """The configuration of a tiny model; ``text`` are fields of its text configuration."""
    chosen, default = TYPES[kind], getattr(transformers, CLASSES[kind]).config_class()
    inner, own = default.get_text_config().model_type, default.to_dict()
    _, settings = FAMILIES.get(inner, (None, WIDE_WINDOW))
    settings = {k: v for k, v in (chosen.text or settings).items() if k != "attn_implementation"}
    given: dict[str, Any] = {name: number for name, number in NAMES.items() if name in own}
    given |= _towers(own, chosen.vision)
    written = COMMON | VOCABULARY | settings | text
    given |= {"text_config": written | {"model_type": inner}} if "text_config" in own else written
    return type(default)(**given | chosen.own)


def _towers(own: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """The vision tower's configuration, and an audio tower's as small."""
    towers = {}
    for name in ("vision_config", "audio_config"):
        default = own.get(name)
        if isinstance(default, dict):
            small = {k: v for k, v in (TOWER | AUDIO_TOWER).items() if k in default}
            towers[name] = small | (vision if name == "vision_config" else {}) | _kind(default)
    return towers


def _kind(default: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": default["model_type"]} if "model_type" in default else {}


AUDIO_TOWER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "output_dim": 32,
    "downsample_hidden_size": 8,
    "max_source_positions": 16,
}


IMAGE_MARKS = {"llava": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<boi>"}
"""Types that have a processor here, and what their chat template writes for an image."""


def tiny_processor(kind: str, model: Any):
    """The type's own processor over a tiny tokenizer, whose image token the model is told of."""
    tokenizer = tiny_tokenizer()
    names = {"llava": "<image>", "qwen2_5_vl": "<|image_pad|>", "gemma3": "<soft>"}
    marks = [names[kind], "<boi>", "<eoi>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    for name, mark in (("image", names[kind]), ("boi", "<boi>"), ("eoi", "<eoi>")):
        setattr(tokenizer, f"{name}_token", mark)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(mark))
    model.config.image_token_id = tokenizer.image_token_id
    template = TEMPLATE.replace("IMAGE", IMAGE_MARKS[kind])
    if kind == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        options = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaProcessor(images, tokenizer, chat_template=template, **options)
    if kind == "gemma3":
        images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
        return transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    images = Qwen2VLImageProcessorPil(patch_size=7, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 28)
    return _WithoutVideos(images, tokenizer, None, chat_template=template)


class _WithoutVideos(transformers.Qwen2_5_VLProcessor):
    """Its video processor needs torchvision, which is not installed for tests."""

    def check_argument_for_proper_class(self, *args: Any) -> None:
        pass


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}"
    "{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def drawing(width: int = 28, height: int = 56, at: tuple[int, int] = (14, 0)):
    """A grey picture with a red square of 14 pixels."""
    picture = Image.new("RGB", (width, height), (90, 90, 90))
    ImageDraw.Draw(picture).rectangle([*at, at[0] + 13, at[1] + 13], fill=(220, 30, 30))
    return picture
