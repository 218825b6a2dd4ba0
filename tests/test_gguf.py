"""GGUF files: the attribution is that of the dequantised weights, and mistakes are told in one line."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import HETA, Attribution, FlashTrace
from flashtrace_plugin.cli.app import app
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.loading import load
from tests.tiny import tiny, tiny_tokenizer

gguf = pytest.importorskip("gguf")

PROMPT = "The key of the red box is in the garden. Where is the key?\n"
GENERATION = "<think>red box</think>In the garden."
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A GGUF file in 8 bits, and a folder with the same weights as safetensors."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer), rms_norm_eps=2**-17)
    write_gguf(folder / "tiny.gguf", model, tokenizer)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    return folder / "tiny.gguf", folder / "dense"


def write_gguf(path, model, tokenizer):
    """Writes the model, and leaves it with the weights that the file holds."""
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, model.config, json.loads(tokenizer.backend_tokenizer.to_str()))
    for name, parameter in model.named_parameters():
        quantise = parameter.dim() == 2 and parameter.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if quantise else gguf.GGMLQuantizationType.F32
        blocks = gguf.quants.quantize(rotary_order(name, parameter.detach(), model.config).numpy(), kind)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind)
        stored = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).view_as(parameter)
        parameter.data.copy_(rotary_order(name, stored, model.config, back=True))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer, config, tokenizer):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def gguf_name(name):
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"blk.{found[1]}.{NAMES[found[2]]}.weight" if found else f"{NAMES[name.removesuffix('.weight')]}.weight"


def rotary_order(name, weight, config, *, back=False):
    """GGUF keeps the two coordinates that rotate together side by side; transformers keeps them in two halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = (heads, -1, 2) if back else (heads, 2, config.head_dim // 2)
    return weight.view(*halves, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def test_the_same_weights_give_the_same_attribution(pair):
    packed, dense = (load(str(path)) for path in pair)
    assert packed[0].dtype == torch.float32 and type(packed[0].lm_head) is torch.nn.Linear
    for name, weight in dense[0].state_dict().items():
        assert torch.equal(packed[0].state_dict()[name], weight), name
    for method in (FlashTrace, HETA):
        found, expected = (method(*loaded).attribute(PROMPT, GENERATION) for loaded in (packed, dense))
        assert found.tokens == expected.tokens and found.target == expected.target
        assert found.settings["model"] == str(pair[0])
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=0)


def test_the_command_line_takes_the_file(pair, tmp_path):
    saved = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, target in zip(pair, saved, strict=True):
        command = ["attribute", "--model", path, "--prompt", PROMPT, "--generation", GENERATION, "--json", target]
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
    found, expected = (Attribution.load(path) for path in saved)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=0)


def test_half_precision_when_asked_for(pair):
    assert load(str(pair[0]), dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kept", [0, 3, 100, 5_000, 60_000])
def test_files_that_cannot_be_read(kept, pair, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(pair[0].read_bytes()[:kept])
    with pytest.raises(InputError, match=r"cannot load the model '.*cut\.gguf': .* a GGUF file"):
        load(str(path))


def test_files_and_packages_that_are_missing(pair, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="there is no such file"):
        load(str(tmp_path / "none.gguf"))
    monkeypatch.setattr("flashtrace_plugin.loading.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need the package gguf; pip install 'flashtrace-plugin\[gguf\]'"):
        load(str(pair[0]))
