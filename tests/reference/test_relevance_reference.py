"""Checks of the reference: transformers' own logits, conservation, numbers done by hand, and that it is affine."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.reference import relevance as reference
from tests.reference.relevance import Inputs, Rules, linearised, logits_of, recursive, relevance
from tests.tiny import random_ids, tiny

N, PROMPT, REASONING, TARGET = 20, 9, (9, 16), (16, 20)
IDS = random_ids(N)
OBJECTIVES = ["logit", "centered", "log_probability", "contrast"]

# What a family can do and its tiny model does not: every multiplier away from 1, caps that bite, both kinds of layers.
SETTINGS = {
    "gemma2": {"final_logit_softcapping": 4.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        "final_logit_softcapping": 4.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {"logits_scaling": 2.5, "attention_bias": True, "mlp_bias": True},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mixtral": {"sliding_window": 6, "experts_implementation": "eager"},  # the grouped kernel has no float64
    "gpt_oss": {"swiglu_limit": 0.7, "experts_implementation": "eager"},
}
OTHERS = {
    "cohere:no_qk_norm": {"use_qk_norm": False},
    "gemma2:uncapped": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    "gpt_neox:sequential": {"use_parallel_residual": False},
    "phi:qk_norm": {"qk_layernorm": True},
}
CASES = {name: SETTINGS.get(name, {}) for name in reference.FAMILIES} | OTHERS


def case(name: str, **overrides):
    """A tiny float64 model; what follows a colon only names its settings."""
    return tiny(name.split(":")[0], dtype=torch.float64, **{**CASES[name], **overrides})


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return case(request.param)


class DoublePrecision(TorchFunctionMode):
    """transformers computes norms, angles, softmax and routes in float32 whatever the model; here in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wider(value):
            return torch.float64 if value is torch.float32 else value

        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(wider, args), **{key: wider(value) for key, value in (kwargs or {}).items()})


@torch.no_grad()
def transformers_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with DoublePrecision():
        return model(ids[None]).logits[0]


def weights_on(start: int, end: int) -> torch.Tensor:
    """[N] uneven weights on tokens start to end."""
    w = torch.zeros(N, dtype=torch.float64)
    w[start:end] = torch.linspace(0.5, 2, end - start, dtype=torch.float64)
    return w


def foils(objective: str) -> torch.Tensor | None:
    return random_ids(N, seed=1) if objective == "contrast" else None


def explain(model, rule: str, objective: str = "logit", weights: torch.Tensor | None = None) -> reference.Relevance:
    weights = weights_on(*TARGET) if weights is None else weights
    return relevance(model, IDS, weights, rule=rule, objective=objective, foil=foils(objective))


# The rewritten forward


def test_logits_are_those_of_transformers(model):
    found, expected = logits_of(model, IDS), transformers_logits(model, IDS)
    assert expected.dtype == torch.float64 and expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_the_rules_do_not_change_the_forward_pass(model):
    with torch.no_grad():
        scale = torch.ones((), dtype=torch.float64)
        logits = reference.forward(model, reference.inputs_of(model, IDS), Rules("attn", scale))[1]
    torch.testing.assert_close(logits, logits_of(model, IDS), atol=1e-9, rtol=1e-9)


# Conservation


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cp_conserves_relevance(model, objective):
    found = explain(model, "cp", objective)
    assert found.objective == pytest.approx(found.embedding.sum().item() + found.positions + found.biases, abs=1e-9)
    assert found.embedding.abs().max() > 1e-3


def test_shares_of_positions_and_biases_are_zero_only_where_there_are_none(model):
    found, kind = explain(model, "cp"), model.config.model_type
    assert (found.positions != 0) == (kind == "gpt2")
    has_biases = any("bias" in name for name, _ in model.named_parameters())
    assert (found.biases != 0) == has_biases
    assert has_biases == (kind in {"llama", "granite", "qwen2", "gpt2", "gpt_neox", "phi", "gpt_oss"})


@pytest.mark.parametrize("rule", ["cp", "attn"])
def test_the_first_layer_reads_what_was_embedded(model, rule):
    found = explain(model, rule)
    assert found.layers.shape == (3, N)
    assert found.layers[0].sum().item() == pytest.approx(found.embedding.sum().item() + found.positions, abs=1e-9)
    if found.positions == 0:
        torch.testing.assert_close(found.layers[0], found.embedding, atol=1e-12, rtol=0)


def test_cp_conserves_in_every_layer_of_a_model_without_biases():
    found = explain(case("qwen3"), "cp")
    torch.testing.assert_close(found.layers.sum(1), torch.full((3,), found.objective, dtype=torch.float64))


def test_nothing_lies_behind_the_last_predicting_position(model):
    for rule in ("cp", "attn"):
        found = explain(model, rule, weights=weights_on(12, 15))
        assert (found.embedding[14:] == 0).all() and (found.layers[:, 14:] == 0).all()
        assert found.embedding[13] != 0


def test_a_window_hides_what_no_path_of_windows_reaches():
    one_layer = tiny("mistral", dtype=torch.float64, num_hidden_layers=1)
    found = explain(one_layer, "cp", weights=weights_on(19, 20))
    assert (found.embedding[:11] == 0).all() and (found.embedding[11:19] != 0).all()


# The linearised function


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cp_is_linear_in_embeddings_positions_and_biases(model, objective):
    w, inputs = weights_on(*TARGET), reference.inputs_of(model, IDS)
    found = explain(model, "cp", objective)
    g = linearised(model, IDS, w, rule="cp", objective=objective, foil=foils(objective))
    E, P, zero = inputs.embedding, inputs.positions, torch.zeros_like(inputs.embedding)
    assert g(inputs, 1.0) == pytest.approx(found.objective, abs=1e-9)
    assert g(Inputs(3 * E, zero), 0.0) == pytest.approx(3 * found.embedding.sum().item(), abs=1e-9)
    assert g(Inputs(zero, P), 0.0) == pytest.approx(found.positions, abs=1e-9)
    assert g(Inputs(zero, zero), -2.0) == pytest.approx(-2 * found.biases, abs=1e-9)
    assert g(Inputs(2 * E, -P), 0.5) == pytest.approx(
        2 * found.embedding.sum().item() - found.positions + found.biases / 2, abs=1e-9
    )


@pytest.mark.parametrize("rule", ["cp", "attn"])
def test_the_relevance_of_a_token_is_what_goes_when_it_is_taken_out_of_the_linearised_model(rule):
    """Exact in "cp", where the model is linear; in "attn" the slope at the input, by central differences."""
    model, step = case("gpt2"), 1.0 if rule == "cp" else 1e-4
    found, inputs = explain(model, rule), reference.inputs_of(model, IDS)
    g = linearised(model, IDS, weights_on(*TARGET), rule=rule, objective="logit")
    for i in (0, 5, 18):
        change = torch.zeros_like(inputs.embedding)
        change[i] = step * inputs.embedding[i]
        up, down = (g(Inputs(inputs.embedding + sign * change, inputs.positions), 1.0) for sign in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(found.embedding[i].item(), abs=1e-6)


def test_attn_is_affine_along_the_inputs():
    """With every bracket frozen "attn" is affine too; its constant is what the shares leave unexplained."""
    model = case("gemma2")
    found, inputs = explain(model, "attn"), reference.inputs_of(model, IDS)
    g = linearised(model, IDS, weights_on(*TARGET), rule="attn", objective="logit")
    values = [g(Inputs(t * inputs.embedding, t * inputs.positions), t) for t in (0.0, 1.0, 3.0)]
    assert values[0] == pytest.approx(found.unexplained, abs=1e-9) and abs(values[0]) > 1e-3
    assert values[2] - values[1] == pytest.approx(2 * (values[1] - values[0]), abs=1e-9)


# The rules one by one


def rules(rule: str) -> Rules:
    return Rules(rule, torch.ones((), dtype=torch.float64))


def test_a_product_gives_half_to_each_factor():
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, 3.0))
    product = rules("cp").product(a, b)
    assert product == 6
    assert [gradient.item() for gradient in torch.autograd.grad(product, (a, b))] == [1.5, 1.0]


def test_an_activation_keeps_its_ratio():
    u = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    value = rules("cp").activation(u, torch.relu)
    assert value.tolist() == [0, 0, 2]
    assert torch.autograd.grad(value.sum(), u)[0].tolist() == [0, 0, 1]


def test_the_expanded_softmax_has_the_gradient_of_softmax():
    scores = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask, upstream = torch.ones(5, 5).tril().bool(), torch.rand(2, 5, 5, dtype=torch.float64)
    plain = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expanded = rules("attn").softmax(scores, mask)
    torch.testing.assert_close(expanded, plain)
    expected, found = (torch.autograd.grad((upstream * A).sum(), scores)[0] for A in (plain, expanded))
    torch.testing.assert_close(found, expected)


# By hand


def hand_model():
    """One layer, one head, width 2, no rotation, every number below by hand; norms divide by the root mean square.

    position 0: E = (2, 2), normed (1, 1), v = (8, 0)       position 1: E = (1, -1), normed (1, -1), v = (4, 0)
    k = (1, 0) at both, q_1 = (4 sqrt 2, 0): both scores of position 1 are 4, A = (1/2, 1/2)
    m_1 = (1, -1) + (6, 0) = (7, -1), normed with s = 1/5;  gate = relu(-5 * -1/5) = 1, up = 5 * 7/5 = 7
    resid_post_1 = (7, -1) + 7 * (0, 8/7) = (7, 7), normed with s = 1/7; logit of token 2 = 1 + 1 = 2
    """
    shape = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    shape |= {"vocab_size": 4, "intermediate_size": 1}
    model = tiny("llama", dtype=torch.float64, hidden_act="relu", rms_norm_eps=0.0, **shape)
    layer = model.model.layers[0]
    matrices = {
        model.model.embed_tokens: [[2, 2], [1, -1], [0.5, 0.3], [0, 1]],
        layer.self_attn.q_proj: [[4 * 2**0.5, 0], [0, 0]],
        layer.self_attn.k_proj: [[1, 0], [0, 0]],
        layer.self_attn.v_proj: [[6, 2], [0, 0]],
        layer.self_attn.o_proj: [[1, 0], [0, 1]],
        layer.mlp.gate_proj: [[0, -5]],
        layer.mlp.up_proj: [[5, 0]],
        layer.mlp.down_proj: [[0], [8 / 7]],
        model.lm_head: [[0, 0], [1, 0], [1, 1], [-1, 0]],
    }
    with torch.no_grad():
        for module, matrix in matrices.items():
            module.weight.copy_(torch.tensor(matrix, dtype=torch.float64))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(1)
        model.model.rotary_emb.inv_freq.zero_()
    return model


def by_hand(rule: str, objective: str = "logit", foil: int | None = None) -> reference.Relevance:
    weights = torch.tensor([0.0, 0.0, 1.0])
    return relevance(hand_model(), torch.tensor([0, 1, 2]), weights, rule=rule, objective=objective, foil=foil)


def test_cp_by_hand():
    """m_1 has relevance (7 + 4) / 7 and (-1 + 4) / 7: half of the MLP's 8 comes back through up, half through gate.

    Of m_1's first channel, 4 of 7 are read from token 0, 2 + 1 are token 1; its second is token 1 alone.
    """
    found = by_hand("cp")
    assert found.objective == pytest.approx(2)
    assert found.embedding.tolist() == pytest.approx([11 / 49 * 4, 11 / 49 * 3 + 3 / 7, 0])


def test_attn_by_hand():
    """Values keep half: 22/49 and 11/49. dg/dA = (44/49, 22/49), so dg/ds = (11/98, -11/98).

    Scores are 4; k gets half of 4 * 11/98 = 22/49/2 with either sign, and q gets nothing, for the keys are equal.
    """
    found = by_hand("attn")
    assert found.embedding.tolist() == pytest.approx([22 / 49 + 11 / 49, 11 / 49 + 11 / 49 - 11 / 49 + 21 / 49, 0])


def test_objectives_by_hand():
    """The logits of position 1 are (0, 1, 2, -1)."""
    assert by_hand("cp", "centered").objective == pytest.approx(2 - 2 / 4)
    assert by_hand("cp", "contrast", foil=1).objective == pytest.approx(1)
    assert by_hand("cp", "contrast", foil=3).objective == pytest.approx(3)
    p = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64).softmax(0)
    expected = 2 - (p * torch.tensor([0, 1, 2, -1])).sum().item()
    assert by_hand("cp", "log_probability").objective == pytest.approx(expected)


# Weights, foils, refusals


@pytest.mark.parametrize("rule", ["cp", "attn"])
def test_relevance_is_linear_in_the_weights(rule):
    model, w, other = case("llama"), weights_on(4, 8), weights_on(10, 20)
    found, *parts = (explain(model, rule, "contrast", weights) for weights in (2 * w + other, w, other))
    for name in ("embedding", "layers", "objective", "biases"):
        expected = 2 * getattr(parts[0], name) + getattr(parts[1], name)
        torch.testing.assert_close(torch.as_tensor(getattr(found, name)), torch.as_tensor(expected))


def test_one_foil_for_all_tokens_or_one_each():
    model, w = case("llama"), weights_on(*TARGET)
    one = relevance(model, IDS, w, rule="cp", objective="contrast", foil=7)
    each = relevance(model, IDS, w, rule="cp", objective="contrast", foil=torch.full((N,), 7))
    assert torch.equal(one.embedding, each.embedding)


def test_the_model_is_left_alone():
    model = case("gpt2")
    explain(model, "attn")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_explained_is_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match="first token"):
        explain(model, "cp", weights=weights_on(0, 3))
    with pytest.raises(ValueError, match="rule"):
        explain(model, "epsilon")
    with pytest.raises(ValueError, match="objective"):
        explain(model, "cp", "loss")
    with pytest.raises(ValueError, match="there is one for cohere"):
        logits_of(tiny("opt"), IDS)


# Recursion


SMALL = {"num_hidden_layers": 2}


def recurse(hops: int, *, reasoning=REASONING, mass="absolute", **options):
    options = {"rule": "cp", "objective": "logit", **options}
    return recursive(case("qwen3", **SMALL), IDS, PROMPT, TARGET, reasoning, hops, mass=mass, **options)


@pytest.mark.parametrize("mass", ["absolute", "positive"])
@pytest.mark.parametrize("rule", ["cp", "attn"])
def test_hop_zero_is_the_normalised_relevance_of_the_target(rule, mass):
    found = recurse(0, rule=rule, mass=mass)
    w = torch.zeros(N).index_fill(0, torch.arange(*TARGET), 1)
    R = relevance(case("qwen3", **SMALL), IDS, w, rule=rule, objective="logit").embedding
    R = R.abs() if mass == "absolute" else R.relu()
    torch.testing.assert_close(found["hop_scores"][0], R / R.sum())
    torch.testing.assert_close(found["scores"], (R / R.sum())[:PROMPT])


def test_hops_follow_the_reasoning():
    found = recurse(2)
    alphas, rhos = found["hop_scores"], found["reasoning_mass"]
    w = torch.zeros(N, dtype=torch.float64)
    w[slice(*REASONING)] = alphas[0][slice(*REASONING)]
    R = relevance(case("qwen3", **SMALL), IDS, w, rule="cp", objective="logit").embedding.abs()
    torch.testing.assert_close(alphas[1], R / R.sum())
    torch.testing.assert_close(rhos, alphas[:, slice(*REASONING)].sum(1))
    expected = alphas[0] + rhos[0] * alphas[1] + rhos[0] * rhos[1] * alphas[2]
    torch.testing.assert_close(found["scores"], expected[:PROMPT])


def test_without_reasoning_the_result_is_hop_zero():
    found = recurse(2, reasoning=None)
    torch.testing.assert_close(found["scores"], found["hop_scores"][0, :PROMPT])
    assert (found["hop_scores"][1:] == 0).all() and (found["reasoning_mass"] == 0).all()


def test_the_reading_of_every_layer_sums_positive_parts():
    found = recurse(0, reading="layers")
    w = torch.zeros(N).index_fill(0, torch.arange(*TARGET), 1)
    layers = relevance(case("qwen3", **SMALL), IDS, w, rule="cp", objective="logit").layers
    total = layers[0].relu() + layers[1].relu()
    torch.testing.assert_close(found["hop_scores"][0], total / total.sum())
