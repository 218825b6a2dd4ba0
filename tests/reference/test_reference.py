"""Checks of the reference itself: numbers that can be done by hand, closure, and properties of the formulas."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.reference import dense
from tests.tiny import FAMILIES, random_ids, tiny, tiny_tokenizer

IDS = random_ids(20)
DIVERSE = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "olmo2", "gpt2", "gptj"]


@pytest.fixture(scope="module")
def llama_layers():
    return dense.read_dense(tiny("llama"), IDS)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def hand_layer() -> dense.DenseLayer:
    """Two positions, one head, W_O = 1: position 1 reads (1, 1) and (2, 2) on top of its residual (1, 1)."""
    x = torch.stack([vector(0.0, 0.0), vector(1.0, 1.0)])
    m = torch.stack([vector(2.0, 2.0), vector(4.0, 4.0)])
    return dense.DenseLayer(
        resid_pre=x,
        resid_mid=m,
        resid_post=m + 4,
        mlp_out=torch.full((2, 2), 4.0, dtype=torch.float64),
        pattern=torch.tensor([[[1.0, 0.0], [0.5, 0.5]]], dtype=torch.float64),
        v=torch.stack([vector(2.0, 2.0), vector(4.0, 4.0)])[None],
        W_O=torch.eye(2, dtype=torch.float64)[None],
    )


def test_proximity_by_hand():
    t = vector(4, 4)
    parts = torch.stack([vector(1, 1), vector(2, 2), vector(-1, -1), vector(9, 9), vector(4, -4)])
    # |t| = 8;  |t - c| = 6, 4, 10, 10, 8
    assert dense.proximity(parts, t).tolist() == [2, 4, 0, 0, 0]


def test_one_hop_by_hand():
    layer = hand_layer()
    assert dense.closure_error(layer) == 0
    hop = dense.one_hop([layer, layer], vector(0, 1))
    # prox of (1, 1), (2, 2) and the residual (1, 1) in (4, 4): 2, 4, 2; of the MLP (4, 4) in (8, 8) and (4, 4): 8, 8
    assert hop.token_shares.tolist() == [[0.25, 0.5]] * 2
    assert hop.head_shares.tolist() == [[0.75]] * 2
    assert hop.residual_shares.tolist() == [0.25] * 2
    assert hop.mlp_shares.tolist() == [0.5] * 2
    assert hop.alpha.tolist() == [0.5, 1.0]


def test_gain_and_scale_enter_once():
    layer = hand_layer()
    layer.gain, layer.scale = vector(2, 2), vector(1, 0.5)
    # weights 0.5 on row 1 halve the flow, the gain doubles the vectors: as before
    assert dense.one_hop([layer], vector(0, 1)).token_shares.tolist() == [[0.25, 0.5]]


def test_recursion_by_hand(monkeypatch):
    """Input 0, reasoning 1, target 2; the hops are given, Eq. 12 is 0.2 + 0.6 * 0.5 + 0.6 * 0.5 * 1."""
    alphas = iter([vector(0.2, 0.6, 0.2), vector(0.5, 0.5, 0), vector(1, 0, 0)])
    weights = []

    def hop(layers, w):
        weights.append(w.tolist())
        return dense.OneHop(None, None, None, None, next(alphas))

    monkeypatch.setattr(dense, "one_hop", hop)
    layer = dense.DenseLayer(*[torch.zeros(3, 2)] * 4, pattern=None, v=None, W_O=None)
    result = dense.flashtrace([layer], 1, (2, 3), (1, 2), hops=2)
    assert weights == [[0, 0, 1], [0, 0.6, 0], [0, 0.5, 0]]
    assert result["reasoning_mass"].tolist() == pytest.approx([0.6, 0.5, 0])
    assert result["scores"].tolist() == pytest.approx([0.2 + 0.3 + 0.3])


@pytest.mark.parametrize("family", DIVERSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closure_and_parameters_away_from_their_defaults(family, dtype):
    model = tiny(family, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    layers = dense.read_dense(model, IDS)  # asserts closure to 1e-5
    assert all(layer.pattern.shape == (4, 20, 20) for layer in layers)
    if dtype == torch.float64 and layers[0].scale.eq(1).all():
        assert max(map(dense.closure_error, layers)) < 1e-13
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert not model._forward_hooks and model.dtype == dtype
    for parameter in model.parameters():
        assert parameter.std() > 0.1 and (parameter - 1).abs().mean() > 0.1 and parameter.abs().mean() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_stream_is_continuous(family):
    layers = dense.read_dense(tiny(family), IDS)
    for layer, following in pairwise(layers):
        torch.testing.assert_close(layer.resid_post, following.resid_pre, atol=0, rtol=0)
        added = layer.resid_mid + layer.mlp_out
        torch.testing.assert_close(layer.out_scale * added, layer.resid_post, atol=1e-4, rtol=1e-5)


def test_sliding_window_is_read():
    pattern = dense.read_dense(tiny("mistral"), IDS)[0].pattern
    assert (pattern[:, 19, :12] == 0).all() and (pattern[:, 19, 12:] > 0).all()


def test_tiny_attention_is_far_from_uniform(llama_layers):
    last_rows = torch.stack([layer.pattern[:, -1] for layer in llama_layers])
    entropy = -(last_rows * last_rows.clamp(min=1e-30).log()).sum(-1)
    assert entropy.mean() < 0.75 * torch.tensor(20.0).log()


def test_tiny_is_reproducible_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = tiny("llama", seed=3), tiny("llama", seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.lm_head.weight, tiny("llama", seed=4).lm_head.weight)


@pytest.mark.parametrize(
    "text",
    ["", " ", "The key is in the garden.", "<think>\nIt is  red.\n</think> \\boxed{7}", "naïve Zürich 日本 🙂\t"],
)
def test_tokenizer_round_trip(text):
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) <= 512
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<pad>", "</s>", "<s>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (1, 2, 3)


def test_shares_are_a_distribution(llama_layers):
    w = torch.zeros(20)
    w[[9, 14]] = torch.tensor([0.3, 2.0])
    hop = dense.one_hop(llama_layers, w)
    torch.testing.assert_close(hop.token_shares.sum(1) + hop.residual_shares, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(hop.head_shares.sum(1), hop.token_shares.sum(1))
    assert (hop.alpha[15:] == 0).all() and (hop.alpha[:15] >= 0).all() and (hop.alpha[:15] > 0).any()


def test_one_hop_is_homogeneous_in_the_weights(llama_layers):
    w = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dense.one_hop(llama_layers, 37 * w).alpha, dense.one_hop(llama_layers, w).alpha)


def test_zero_weights_give_zero_shares(llama_layers):
    hop = dense.one_hop(llama_layers, torch.zeros(20))
    assert hop.alpha.abs().sum() == 0 and hop.mlp_shares.abs().sum() == 0


@pytest.mark.parametrize("positions", ["token", "predicting"])
def test_recursion_without_reasoning_is_one_hop(llama_layers, positions):
    none = dense.flashtrace(llama_layers, 10, (16, 20), None, hops=2, positions=positions)
    some = dense.flashtrace(llama_layers, 10, (16, 20), (10, 16), hops=2, positions=positions)
    assert torch.equal(none["scores"], none["hop_scores"][0, :10])
    assert none["hop_scores"][1:].abs().sum() == 0 and none["reasoning_mass"].tolist() == [0, 0, 0]
    assert torch.equal(none["hop_scores"][0], some["hop_scores"][0])
    assert (some["scores"] > none["scores"]).any() and (some["hop_scores"][1, 16:] == 0).all()


def test_predicting_positions_do_not_see_the_last_token(llama_layers):
    result = dense.flashtrace(llama_layers, 10, (16, 20), (10, 16), hops=1, positions="predicting")
    assert result["hop_scores"][0, 19] == 0 and (result["hop_scores"][1, 15:] == 0).all()


def test_generation_recursion_counts_the_target_too(llama_layers):
    result = dense.flashtrace(llama_layers, 10, (16, 20), (10, 16), hops=1, recursion="generation")
    alpha = result["hop_scores"][0]
    assert result["reasoning_mass"][0].item() == pytest.approx((alpha[10:].sum() / alpha.sum()).item())
    assert result["hop_scores"][1, 16:].sum() > 0


def test_exhaustive_rollout_is_a_product_of_transition_matrices(llama_layers):
    result = dense.exhaustive(llama_layers, 10, (16, 20), (10, 16), hops=3)
    B = torch.stack([dense.one_hop(llama_layers, torch.eye(20)[j]).alpha for j in range(20)])
    B = B / B.sum(1, keepdim=True)
    p, total = B[16:].mean(0), 0
    for _ in range(4):
        total = total + p[:10]
        p = p[10:16] @ B[10:16]
    torch.testing.assert_close(result["scores"], total)
    torch.testing.assert_close(result["hop_scores"].sum(1), torch.ones(4, dtype=torch.float64))


def test_tokenwise_ifr_of_one_token_is_one_hop(llama_layers):
    result = dense.ifr_tokenwise(llama_layers, 10, (19, 20))
    alpha = dense.one_hop(llama_layers, torch.eye(20)[19]).alpha[:10]
    torch.testing.assert_close(result["columns"][0], alpha)
    torch.testing.assert_close(result["scores"], alpha / alpha.sum())
