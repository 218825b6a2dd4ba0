"""Tiny random decoders and a tiny tokenizer, built in memory.

Every parameter is drawn away from its default: norm gains away from 1, biases and attention sinks away from 0. A
decomposition that forgets a gain or a bias then misses by a lot instead of by nothing. The projections are wide enough
for attention to be far from uniform, so that a wrong head or a wrong mask shows as well.
"""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers.pytorch_utils import Conv1D

UNK, PAD, EOS, BOS = range(4)
SPECIAL_TOKENS = ["<unk>", "<pad>", "</s>", "<s>"]
VOCAB_SIZE = 512
TOKENIZER_SIZE = 400

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = NO_DROPOUT | {"n_inner": 48}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
WINDOW = GATED | {"sliding_window": 8}
WIDE = GATED | {"head_dim": 12}
WIDE_WINDOW = WIDE | WINDOW
TWO_OF_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED_EXPERT = {"shared_expert_intermediate_size": 24}
DEEPSEEK_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
MLA = DEEPSEEK_MOE | {
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
}
LLAMA4 = WIDE | {
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "attention_chunk_size": 8,
    "no_rope_layer_interval": 2,
    "interleave_moe_layer_step": 2,
}
EAGER = {"attn_implementation": "eager"}  # Falcon cannot change it later, and only eager attention shows its patterns
FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_kv_heads": 4}
GRANITE = GATED | {"residual_multiplier": 0.3, "attention_multiplier": 0.4, "embedding_multiplier": 3.0}
FULL = {"layer_types": ["full_attention"] * 3}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
KINDS = {"layer_types": LINEAR["layer_types"]}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_chunk_size": 16,
    "time_step_limit": (0.3, 1.5),
}
MAMBA = {"state_size": 8, "conv_kernel": 3, "use_associative_scan": False, "time_step_rank": 4}
FALCON_H1 = {
    "attention_out_multiplier": 0.6,
    "ssm_out_multiplier": 1.4,
    "ssm_multipliers": [0.7, 1.3, 0.8, 1.2, 0.9],
    "mamba_n_heads": 6,
    "mamba_d_head": 10,
    "mamba_d_ssm": 60,
    "mlp_multipliers": [0.8, 4.0],
    "ssm_in_multiplier": 0.7,
    "attention_in_multiplier": 1.2,
    "key_multiplier": 0.8,
}
JAMBA = {"mamba_d_state": 8, "mamba_d_conv": 3, "mamba_dt_rank": 4, "attn_layer_period": 3, "attn_layer_offset": 1}
LFM3 = {"layer_types": ["conv", "full_attention", "sliding_attention"], "conv_L_cache": 3}
CONV = {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
    "ssm_state_size": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "n_groups": 2,
    "conv_kernel": 3,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_hidden_layers": 5,
}
KIMI = {"linear_num_heads": 3, "linear_head_dim": 10, "linear_conv_kernel_dim": 3}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
GRANITE_SWA = GRANITE | ALTERNATING | {"sliding_window": 8, "layer_rope_theta": [1e4, 0, 1e3]}
GEMMA4 = WIDE_WINDOW | {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}
LAST_SHARES = {"num_kv_shared_layers": 1}
GEMMA4_TOKENS = {f"{name}_token_id": VOCAB_SIZE + i for i, name in enumerate(("image", "video", "audio"))}
WITH_TOKENS = COMMON | {"vocab_size": VOCAB_SIZE + len(GEMMA4_TOKENS)}
PER_LAYER = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": VOCAB_SIZE}
GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
MIMO = WIDE_WINDOW | ALTERNATING | {"num_key_value_heads": 1, "v_head_dim": 10, "attention_value_scale": 0.6}
MINIMAX_M3 = {"dense_intermediate_size": 48, "shared_intermediate_size": 24, "rotary_dim": 6}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
PHI4 = {
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "vision_config": SMALL | {"num_hidden_layers": 1, "image_size": 28, "crop_size": 28},
    "audio_config": SMALL | {"num_blocks": 1, "nemo_conv_channels": 8, "ext_pw_out_channel": 16},
}
LOCAL = {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8, "num_layers": 3, "num_heads": 4}

DRAWN_BUFFERS = {"e_score_correction_bias": 0.0, "layer_scalar": 1.0}
"""Buffers that are learned like parameters, and the values that leave the model as it is."""

# family -> (configuration class, what to set beyond COMMON). One line adds a family. What follows a colon names a
# layout of the family other than its first; all else is the family's `model_type`.
FAMILIES = {
    "apertus": ("ApertusConfig", GATED),
    "arcee": ("ArceeConfig", GATED),
    "aria_text": ("AriaTextConfig", GATED | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "bailing_hybrid": (
        "BailingHybridConfig",
        MLA | KINDS | {"linear_num_heads": 4, "head_dim": 10, "short_conv_kernel_size": 3, "num_local_experts": 4},
    ),
    "bamba": ("BambaConfig", GATED | MAMBA2 | {"attn_layer_indices": [1]}),
    "bloom": ("BloomConfig", {}),
    "codegen": ("CodeGenConfig", GPT2 | {"rotary_dim": 4}),
    "cohere": ("CohereConfig", GATED | {"use_qk_norm": True}),
    "cohere2": ("Cohere2Config", WINDOW),
    "cohere2_moe": (
        "Cohere2MoeConfig",
        WIDE_WINDOW
        | EXPERTS
        | {"num_shared_experts": 1, "sliding_window_pattern": 2}
        | {"first_k_dense_replace": 1, "prefix_dense_intermediate_size": 40},
    ),
    "cwm": ("CwmConfig", WIDE_WINDOW | ALTERNATING),
    "deepseek_v2": ("DeepseekV2Config", MLA),
    "deepseek_v3": ("DeepseekV3Config", MLA),
    "dots1": ("Dots1Config", GATED | DEEPSEEK_MOE),
    "ernie4_5": ("Ernie4_5Config", WIDE),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        GATED | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
    ),
    "exaone4": ("Exaone4Config", WINDOW | {"sliding_window_pattern": 2}),
    "exaone_moe": (
        "ExaoneMoeConfig",
        WIDE_WINDOW | QWEN_MOE | {"sliding_window_pattern": 2, "n_group": 2, "topk_group": 1},
    ),
    "falcon": ("FalconConfig", EAGER),
    "falcon:40b": ("FalconConfig", EAGER | FALCON_40B),
    "falcon:alibi": ("FalconConfig", EAGER | FALCON_RW),
    "falcon_h1": ("FalconH1Config", GATED | MAMBA2 | FALCON_H1),
    "falcon_h1:norm": ("FalconH1Config", GATED | MAMBA2 | FALCON_H1 | {"mamba_rms_norm": True}),
    "falcon_mamba": ("FalconMambaConfig", MAMBA),
    "flex_olmo": ("FlexOlmoConfig", GATED | EXPERTS),
    "flint": ("FlintConfig", WIDE_WINDOW | ALTERNATING | QWEN_MOE | SHARED_EXPERT | {"mlp_only_layers": [1]}),
    "fuyu": ("FuyuConfig", {"text_config": COMMON | {"model_type": "persimmon", "intermediate_size": 48}}),
    "gemma": ("GemmaConfig", WIDE),
    "gemma2": ("Gemma2Config", WIDE_WINDOW | {"query_pre_attn_scalar": 12}),
    "gemma3_text": ("Gemma3TextConfig", WIDE_WINDOW | {"query_pre_attn_scalar": 12}),
    "gemma4": (
        "Gemma4Config",
        GEMMA4_TOKENS | {"text_config": WITH_TOKENS | GEMMA4 | GEMMA4_MOE | {"hidden_size_per_layer_input": 0}},
    ),
    "gemma4_text": ("Gemma4TextConfig", GEMMA4 | PER_LAYER),
    "gemma4_text:shared": ("Gemma4TextConfig", GEMMA4 | PER_LAYER | LAST_SHARES),
    "gemma4_unified": ("Gemma4UnifiedConfig", GEMMA4_TOKENS | {"text_config": WITH_TOKENS | GEMMA4}),
    "gemma4_unified_text": ("Gemma4UnifiedTextConfig", GEMMA4),
    "glm": ("GlmConfig", WIDE),
    "glm4": ("Glm4Config", WIDE),
    "glm4_moe": ("Glm4MoeConfig", WIDE | DEEPSEEK_MOE),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", MLA),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2),
    "gpt_bigcode:multi_head": ("GPTBigCodeConfig", GPT2 | {"multi_query": False}),
    "gpt_neo": ("GPTNeoConfig", LOCAL | {"intermediate_size": 48}),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 48}),
    "gpt_neox:sequential": ("GPTNeoXConfig", {"intermediate_size": 48, "use_parallel_residual": False}),
    "gpt_oss": ("GptOssConfig", WIDE_WINDOW | TWO_OF_FOUR),
    "gptj": ("GPTJConfig", GPT2 | {"rotary_dim": 4}),
    "granite": ("GraniteConfig", GRANITE),
    "granite_swa": ("GraniteSWAConfig", GRANITE_SWA),
    "granitemoe": ("GraniteMoeConfig", GRANITE | TWO_OF_FOUR),
    "granitemoe_swa": ("GraniteMoeSWAConfig", GRANITE_SWA | TWO_OF_FOUR | {"shared_intermediate_size": 24}),
    "granitemoe_swa:routed": ("GraniteMoeSWAConfig", GRANITE_SWA | TWO_OF_FOUR),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        GRANITE | MAMBA2 | KINDS | TWO_OF_FOUR | {"shared_intermediate_size": 24},
    ),
    "granitemoehybrid:dense": (
        "GraniteMoeHybridConfig",
        GRANITE | MAMBA2 | KINDS | {"num_local_experts": 0, "shared_intermediate_size": 24},
    ),
    "granitemoeshared": ("GraniteMoeSharedConfig", GRANITE | TWO_OF_FOUR | {"shared_intermediate_size": 24}),
    "helium": ("HeliumConfig", GATED | {"head_dim": 8}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", WIDE),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", WIDE | {"num_experts": 4, "moe_topk": 2}),
    "hy_v3": ("HYV3Config", WIDE | QWEN_MOE),
    "internlm3": ("InternLM3Config", WIDE),
    "iquestcoder": ("IQuestCoderConfig", WIDE),
    "jais2": ("Jais2Config", WIDE),
    "jamba": ("JambaConfig", GATED | JAMBA | TWO_OF_FOUR),
    "kimi_linear": ("KimiLinearConfig", KIMI | KINDS | MLA | {"num_local_experts": 4, "q_lora_rank": None}),
    "kolibri1": ("Kolibri1Config", WIDE_WINDOW | ALTERNATING | QWEN_MOE | SHARED_EXPERT),
    "lfm2": ("Lfm2Config", GATED | CONV),
    "lfm3": ("Lfm3Config", WIDE_WINDOW | LFM3),
    "lfm3:plain": ("Lfm3Config", WIDE_WINDOW | LFM3 | {"use_sandwich_norm": False, "use_attention_gate": False}),
    "lfm2_moe": ("Lfm2MoeConfig", GATED | CONV | QWEN_MOE | {"num_dense_layers": 1}),
    "llama": ("LlamaConfig", GATED),
    "llama4_text": ("Llama4TextConfig", LLAMA4),
    "mamba": ("MambaConfig", MAMBA),
    "mamba2": ("Mamba2Config", MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16}),
    "mellum": (
        "MellumConfig",
        WIDE_WINDOW | ALTERNATING | QWEN_MOE | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "mimo_v2_flash": ("MiMoV2FlashConfig", MIMO | DEEPSEEK_MOE),
    "minimax_m2": ("MiniMaxM2Config", WIDE | TWO_OF_FOUR),
    "minimax_m3_vl_text": (
        "MiniMaxM3VLTextConfig",
        WIDE | TWO_OF_FOUR | MINIMAX_M3 | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    "ministral": ("MinistralConfig", WIDE_WINDOW),
    "ministral3": ("Ministral3Config", WIDE),
    "mistral": ("MistralConfig", WINDOW),
    "mixtral": ("MixtralConfig", GATED | TWO_OF_FOUR),
    "moshi": ("MoshiConfig", WINDOW | {"ffn_dim": 48, "head_dim": 12, "audio_encoder_config": {"model_type": "mimi"}}),
    "mpt": ("MptConfig", {"attn_config": {"clip_qkv": 0.5}}),
    "nanochat": ("NanoChatConfig", GATED),
    "nemotron": ("NemotronConfig", WIDE),
    "nemotron_h": ("NemotronHConfig", WIDE | NEMOTRON_H),
    "olmo": ("OlmoConfig", GATED | {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2Config", GATED),
    "olmo3": ("Olmo3Config", WINDOW),
    "olmo_hybrid": ("OlmoHybridConfig", GATED | LINEAR),
    "olmoe": ("OlmoeConfig", GATED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "persimmon": ("PersimmonConfig", {"intermediate_size": 48}),
    "phi": ("PhiConfig", GATED | NO_DROPOUT),
    "phi3": ("Phi3Config", GATED | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi4_multimodal": ("Phi4MultimodalConfig", WINDOW | PHI4),
    "phimoe": ("PhimoeConfig", GATED | TWO_OF_FOUR),
    "qwen2": ("Qwen2Config", GATED),
    "qwen2_moe": ("Qwen2MoeConfig", GATED | QWEN_MOE | SHARED_EXPERT),
    "qwen3": ("Qwen3Config", WIDE),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", WIDE | FULL | QWEN_MOE | SHARED_EXPERT),
    "qwen3_5_moe_text:hybrid": ("Qwen3_5MoeTextConfig", WIDE | LINEAR | QWEN_MOE | SHARED_EXPERT),
    "qwen3_5_text": ("Qwen3_5TextConfig", WIDE | FULL),
    "qwen3_5_text:hybrid": ("Qwen3_5TextConfig", WIDE | LINEAR),
    "qwen3_moe": ("Qwen3MoeConfig", WIDE | QWEN_MOE),
    "qwen3_next": ("Qwen3NextConfig", WIDE | FULL | QWEN_MOE | SHARED_EXPERT),
    "qwen3_next:hybrid": ("Qwen3NextConfig", WIDE | LINEAR | QWEN_MOE | SHARED_EXPERT),
    "seed_oss": ("SeedOssConfig", WIDE | {"residual_dropout": 0.0}),
    "smollm3": ("SmolLM3Config", GATED | {"no_rope_layer_interval": 2}),
    "solar_open": ("SolarOpenConfig", WIDE | DEEPSEEK_MOE),
    "stablelm": ("StableLmConfig", GATED | {"use_qkv_bias": True}),
    "stablelm:parallel": ("StableLmConfig", GATED | {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2Config", GATED | {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "vaultgemma": ("VaultGemmaConfig", WIDE_WINDOW | {"query_pre_attn_scalar": 12}),
}


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random decoder of `family` in eval mode; `overrides` are fields of its configuration.

    The same arguments give the same weights, whatever the state of the global random generator, which is left alone.
    """
    config = config_of(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return model.to(dtype).eval()


def config_of(family: str, **overrides):
    """The configuration of a tiny model; `overrides` are its fields."""
    name, settings = FAMILIES[family]
    return getattr(transformers, name)(**{**COMMON, **settings, **overrides})


def plain_llama(width: int, layers: int):
    """A llama as transformers draws it, with heads of 64 channels: the shape that the speed benchmark times."""
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Redraw every learned tensor once, in the order of `modules`; tied parameters stay tied."""
    generator = torch.Generator().manual_seed(seed)
    done = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_centre(module, name) + _spread(module, name, parameter) * noise)
        for name, buffer in module.named_buffers(recurse=False):
            if name in DRAWN_BUFFERS:
                buffer.copy_(DRAWN_BUFFERS[name] + 0.3 * torch.randn(buffer.shape, generator=generator))


def _centre(module: nn.Module, name: str) -> float:
    """1 where a norm multiplies by its weight; 0 for matrices, biases, sinks and for norms that add 1 themselves."""
    is_norm_gain = name == "weight" and getattr(module, name).dim() == 1
    adds_one = type(module).__name__.startswith(("GemmaRMS", "Gemma2RMS", "Gemma3RMS"))
    return 1.0 if is_norm_gain and not adds_one else 0.0


def _spread(module: nn.Module, name: str, parameter: torch.Tensor) -> float:
    """Standard deviation: 1.5 / sqrt(fan in) for projections, 0.5 for embeddings, 0.3 for gains and biases."""
    if parameter.dim() == 1:
        return 0.3
    if isinstance(module, nn.Embedding):
        return 0.5
    fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
    return 1.5 / fan_in**0.5


def random_ids(length: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """[length] token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), vocab_size, (length,), generator=generator)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 400 tokens; decoding an encoded text gives the text back.

    It adds no special token by itself, knows all 256 bytes, and has some merges, so tokens and characters differ.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        clean_up_tokenization_spaces=False,
    )


CORPUS = [
    "The key of the red box is in the garden. The key of the blue box is in the kitchen.",
    "Question: where is the key? Answer: the key is in the garden, because the box is red.",
    "<think>\nFirst look at the box. The box is red, so the key is in the garden.\n</think>\nIt is in the garden.",
    "Alice has 12 apples and gives 5 apples to Bob. How many apples are left? 12 - 5 = 7. \\boxed{7}",
    "def add(first, second):\n    return first + second\n",
]
