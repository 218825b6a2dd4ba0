"""The untrained parts of the bundled reasoner: its word-level tokenizer and its small Qwen3."""

from typing import TYPE_CHECKING

from flashtrace_plugin.evaluation.tasks import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PAD, EOS, _UNKNOWN = "<pad>", "<eos>", "<unk>"
_MAX_PROMPT = 512

_CHAT_TEMPLATE = """\
{%- set mode = 'direct' if enable_thinking is defined and not enable_thinking else 'think' -%}
{%- for message in messages -%}
{%- if not loop.first %} {% endif -%}
{{ message['content'] }}
{%- if message['role'] == 'user' and (not loop.last or add_generation_prompt) %} {{ mode }}{% endif -%}
{%- if message['role'] == 'assistant' %} <eos>{% endif -%}
{%- endfor -%}"""


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A fast tokenizer with one token per word, whose decoded text is the encoded text.

    It adds no token of its own. ``<think>`` and ``</think>`` are ordinary words, so that they survive
    ``skip_special_tokens=True``; the special tokens are ``<pad>``, ``<eos>`` and ``<unk>``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((PAD, EOS, _UNKNOWN, *vocabulary.words()))}
    backend = Tokenizer(models.WordLevel(ids, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=_UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(tokenizer: "PreTrainedTokenizerFast", seed: int) -> "Qwen3ForCausalLM":
    """A randomly drawn Qwen3 with grouped queries, normed queries and keys, and tied embeddings (0.6 M parameters)."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        use_cache=True,
        dtype="float32",
        bos_token_id=tokenizer.eos_token_id,  # never written; Inseq cannot load a model without one
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=96,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model
