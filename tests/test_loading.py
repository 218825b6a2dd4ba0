"""A checkpoint that is not whole is refused with the name of what is wrong, before anything can be attributed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flashtrace_plugin import FlashTrace, FlashTraceError, InputError, Span, UnsupportedModelError
from flashtrace_plugin.cli.app import app
from flashtrace_plugin.loading import load
from tests.tiny import random_ids, tiny, tiny_tokenizer

TEXTS = ["--prompt", "Where is the key?\n", "--generation", "<think>red box</think>In the garden."]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    tiny("qwen3").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "model")


def change_weights(folder, change, file=WEIGHTS):
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


def change_config(folder, file="config.json", **values):
    config = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(config))


def refused(folder):
    """The message of the command line for this model, which must be one of ours."""
    with pytest.raises(InputError) as told:
        load(str(folder))
    result = CliRunner().invoke(app, ["attribute", "--model", str(folder), *TEXTS])
    assert result.exit_code == 2 and not result.stdout
    assert " ".join(str(told.value).split()) in result.stderr and "Traceback" not in result.stderr
    return str(told.value)


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.o_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_weight_is_named(folder, lost):
    change_weights(folder, lambda weights: weights.pop(lost))
    assert f"lacks 1 of the model's weights ({lost})" in refused(folder)


def test_many_missing_weights_are_counted(folder):
    change_weights(folder, lambda weights: [weights.pop(name) for name in list(weights) if ".layers.2." in name])
    message = refused(folder)
    assert "lacks 11 of" in message and "model.layers.2.input_layernorm.weight" in message and "8 more" in message


def test_weights_under_other_names_are_missing(folder):
    change_weights(folder, lambda weights: weights.update({f"base.{name}": weights.pop(name) for name in [*weights]}))
    assert "lacks 36 of the model's weights" in refused(folder)


def test_a_model_without_its_head_is_refused(whole, tmp_path):
    load(str(whole))[0].model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "(lm_head.weight)" in refused(tmp_path)


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_an_adapter_is_whole_too(whole, tmp_path, lost):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(load(str(whole))[0], config).eval()
    adapted.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = random_ids(9)[None]
    torch.testing.assert_close(load(str(tmp_path))[0](ids).logits, adapted(ids).logits)
    file = "adapter_model.safetensors"
    change_weights(tmp_path, lambda w: w.pop(next(name for name in w if f".1.self_attn.o_proj.{lost}" in name)), file)
    assert f"model.layers.1.self_attn.o_proj.{lost}" in refused(tmp_path)


@pytest.mark.parametrize(
    ("base", "message"),
    [("/none/base", "adapter of '/none/base', which is not there"), (None, "adapter that names no base model")],
)
def test_an_adapter_without_its_base(tmp_path, base, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    tiny_tokenizer().save_pretrained(tmp_path)
    assert message in refused(tmp_path)


def test_weights_of_another_shape(folder):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    message = refused(folder)
    assert "model.norm.weight [7] in the files, [32] in the model" in message and "config.json" in message


@pytest.mark.parametrize(
    "extra", ["model.layers.0.mlp.down_proj.bias", "model.layers.3.mlp.down_proj.weight", "model.norm.bias"]
)
def test_weights_that_the_model_would_leave_out_of_its_own_parts(folder, extra):
    change_weights(folder, lambda weights: weights.update({extra: torch.ones(32)}))
    assert f"has no place for ({extra})" in refused(folder)


@pytest.mark.parametrize("extra", ["model.visual.proj.weight", "mtp.norm.weight", "model.layers.0.self_attn.bias"])
def test_parts_that_the_model_has_not_are_left_out(folder, whole, extra):
    change_weights(folder, lambda weights: weights.update({extra: torch.ones(32)}))
    found, expected = load(str(folder))[0], load(str(whole))[0]
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "apertus", "deepseek_v3", "gpt_neo", "mpt"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_and_buffers_may_be_absent(tmp_path, family, tied):
    model = tiny(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = random_ids(9)[None]
    torch.testing.assert_close(load(str(tmp_path))[0](ids).logits, model(ids).logits)


@pytest.mark.parametrize("kept", [0, 3, 400, 30_000, -1])
def test_cut_weights_are_named(folder, kept):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{file} is damaged" in refused(folder)


@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", f"{WEIGHTS}.index.json"],
)
@pytest.mark.parametrize("text", ["{", "[]", b"\xff\xfe", ""])
def test_damaged_descriptions_are_named(folder, file, text):
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"{folder / file} is damaged" in refused(folder)


def test_a_shard_that_is_not_there(folder):
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    parts = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    assert "model-00002-of-00002.safetensors" in refused(folder)


def test_a_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    assert "no file named model.safetensors" in refused(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 2},
        {"model_type": "nonesuch"},
        {"rope_parameters": "fast"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ],
)
def test_configurations_that_describe_no_model(folder, values):
    change_config(folder, **values)
    assert "cannot load the model" in refused(folder)


def test_pickled_weights_that_are_cut(folder):
    (folder / WEIGHTS).unlink()
    torch.save(tiny("qwen3").state_dict(), folder / "pytorch_model.bin")
    assert load(str(folder), allow_pickle=True)
    whole = (folder / "pytorch_model.bin").read_bytes()
    for kept in (0, 5, 1000):
        (folder / "pytorch_model.bin").write_bytes(whole[:kept])
        with pytest.raises(InputError, match="cannot load the model"):
            load(str(folder), allow_pickle=True)


def test_a_tokenizer_with_more_tokens_than_the_model(folder):
    tiny("qwen3", vocab_size=64).save_pretrained(folder)
    assert "the tokenizer knows " in (message := refused(folder)) and "the model has 64" in message


def test_added_tokens_that_nothing_uses_may_lie_outside(whole, tmp_path):
    tokenizer = tiny_tokenizer()
    tiny("qwen3", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.add_tokens(["<unused>"])
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load(str(tmp_path))
    with pytest.raises(InputError, match="is outside the vocabulary"):
        FlashTrace(model, tokenizer).attribute("Where <unused>?", "<think>a</think>b")


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "llama", "gemma2"])
def test_a_folder_without_a_tokenizer(tmp_path, family):
    tiny(family).save_pretrained(tmp_path)
    assert "tokenizer" in refused(tmp_path).partition(" (")[0]


def test_weights_that_were_never_loaded():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny("llama").config)
    with pytest.raises(UnsupportedModelError, match=r"no memory: model\.embed_tokens\.weight .*on the meta device"):
        FlashTrace(model)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(name, value):
    from flashtrace_plugin.methods.registry import METHODS

    model = tiny("llama")
    model.get_parameter(name).data.view(-1)[:] = value
    for method in METHODS.values():
        with pytest.raises(FlashTraceError, match="not finite"):
            method(model).attribute_ids(random_ids(16), prompt_length=8, target=Span(13, 15), reasoning=Span(9, 12))
