"""The result: labels, exact round trip, refusal of foreign files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from flashtrace_plugin import IFR, Attribution, FlashTrace, InputError, Span
from tests.tiny import random_ids, tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def result() -> Attribution:
    method = FlashTrace(tiny("qwen3"), tiny_tokenizer(), hops=2, ignore=[3, "a"])
    return method.attribute("The <b>sky</b> is blue.\n", "<think> sky ☁ </think> blue")


def test_save_and_load_give_an_equal_object(result, tmp_path):
    result.save(tmp_path / "a.json")
    loaded = Attribution.load(tmp_path / "a.json")
    assert loaded == result and loaded.tokens == result.tokens and loaded.target == result.target
    for name in ("scores", "hop_scores", "reasoning_mass", "head_scores", "residual_shares", "mlp_shares"):
        assert torch.equal(getattr(loaded, name), getattr(result, name))


def test_components_survive_the_round_trip(tmp_path):
    ids = random_ids(12)
    ours = IFR(tiny("llama")).attribute_ids(ids, prompt_length=5, target=Span(8, 11), reasoning=Span(6, 7))
    ours.save(tmp_path / "a.json")
    assert torch.equal(Attribution.load(tmp_path / "a.json").components["per_token"], ours.components["per_token"])
    assert ours.hops == 0 and ours.method == "ifr"


def test_results_are_float32_on_the_cpu_and_detached(result):
    for tensor in (result.scores, result.hop_scores, result.head_scores, result.mlp_shares):
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not tensor.requires_grad
    assert result.scores.shape == (result.prompt.stop,)
    assert result.hop_scores.shape == (3, len(result.tokens)) and result.head_scores.shape == (3, 3, 4)


def test_top_is_sorted_and_breaks_ties_by_position(result):
    best = result.top(4)
    assert [b.score for b in best] == sorted((b.score for b in best), reverse=True)
    assert best[0].token == result.tokens[best[0].position]
    flat = Attribution.from_dict(result.to_dict() | {"scores": [1.0] * len(result.scores)})
    assert [t.position for t in flat.top(3)] == [0, 1, 2]


def test_a_result_is_frozen_and_says_what_it_is(result):
    with pytest.raises(AttributeError):
        result.method = "x"
    assert repr(result).startswith("Attribution(flashtrace, target ") and result != 3


def test_settings_name_method_options_and_model(result):
    assert result.settings == {
        "hops": 2,
        "recursion": "reasoning",
        "positions": "token",
        "ignore": [3, "a"],
        "sinks": "keep",
        "format": None,
        "model": "Qwen3ForCausalLM",
        "family": "qwen3",
        "dtype": "float32",
        "source": "streaming",
        "target_rule": "what follows <think>…</think>",
        "reasoning_rule": "<think>…</think>",
        "hops_followed": 2,
        "mass_left": result.settings["mass_left"],
    }


@pytest.mark.parametrize("content", ["not json", "[1]", "{}", json.dumps({"format": "other/1"})])
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"expected|not an attribution"):
        Attribution.load(path)


def test_empty_tensors_and_nan_survive_the_round_trip(result, tmp_path):
    odd = dataclasses.replace(result, components={"none": torch.zeros(2, 0, 5), "nan": torch.tensor([1.0, torch.nan])})
    odd.save(tmp_path / "a.json")
    loaded = Attribution.load(tmp_path / "a.json")
    assert loaded == odd and loaded.components["none"].shape == (2, 0, 5)
    assert loaded != result


def test_files_of_other_encodings_and_edited_files_are_refused(result, tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not JSON"):
        Attribution.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(result.to_dict() | {"prompt": 3}))
    with pytest.raises(InputError, match="was it edited"):
        Attribution.load(tmp_path / "a.json")


def test_a_file_that_was_cut_off_is_refused(result, tmp_path):
    data = result.to_dict()
    del data["tokens"]
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="lacks tokens"):
        Attribution.load(tmp_path / "a.json")


@pytest.mark.parametrize("word", ["\n", " box", "box"])
def test_tokens_are_ignored_by_their_text(word):
    """With the space around it or without."""
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    prompt, generation = "The key\nof the red box", " is in the garden."
    (chosen,) = {i for i in tokenizer(prompt)["input_ids"] if tokenizer.decode(i).strip() == word.strip()}
    by_text = FlashTrace(model, tokenizer, ignore=[word]).attribute(prompt, generation)
    by_id = FlashTrace(model, tokenizer, ignore=[chosen]).attribute(prompt, generation)
    assert torch.equal(by_text.scores, by_id.scores)
    assert (by_text.scores == 0).any()
