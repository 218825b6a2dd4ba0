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
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# family -> (configuration class, what to set beyond COMMON). One line adds a family.
FAMILIES = {
    "llama": ("LlamaConfig", GATED),
    "mistral": ("MistralConfig", GATED | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", GATED),
    "qwen3": ("Qwen3Config", GATED | {"head_dim": 12}),
    "gpt2": ("GPT2Config", NO_DROPOUT | {"n_inner": 48}),
    "gemma2": ("Gemma2Config", GATED | {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}),
    "olmo2": ("Olmo2Config", GATED),
    "phi3": ("Phi3Config", GATED | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gptj": ("GPTJConfig", NO_DROPOUT | {"n_inner": 48, "rotary_dim": 4}),
}


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random decoder of `family` in eval mode; `overrides` are fields of its configuration.

    The same arguments give the same weights, whatever the state of the global random generator, which is left alone.
    """
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**COMMON, **settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Redraw every parameter once, in the order of `modules`; tied parameters stay tied."""
    generator = torch.Generator().manual_seed(seed)
    done = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_centre(module, name) + _spread(module, name, parameter) * noise)


def _centre(module: nn.Module, name: str) -> float:
    """1 where a norm multiplies by its weight; 0 for matrices, biases, sinks and for norms that add 1 themselves."""
    is_norm_gain = name == "weight" and getattr(module, name).dim() == 1
    return 1.0 if is_norm_gain and not type(module).__name__.startswith("Gemma") else 0.0


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
