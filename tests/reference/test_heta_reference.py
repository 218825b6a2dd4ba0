"""Checks of the HETA reference: numbers by hand, and identities that tie its variants to each other."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from tests.reference import heta
from tests.reference.dense import DenseLayer, read_dense
from tests.tiny import random_ids, tiny

SMALL = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 64}
GATED = {"intermediate_size": 12, "num_key_value_heads": 1}
OVERRIDES = {"llama": SMALL | GATED, "qwen3": SMALL | GATED, "gpt2": SMALL | {"n_inner": 12}}
IDS = random_ids(7, vocab_size=64)
ONE, SPAN = (5, 6), (4, 7)


@pytest.fixture(scope="module", params=OVERRIDES)
def model(request):
    return heta.exact_model(tiny(request.param, **OVERRIDES[request.param]))


@pytest.fixture(scope="module")
def H(model):
    return heta.hessian(*heta.embedding_objective(model, IDS, ONE))


def signs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


def gate_layer(pattern, norms) -> DenseLayer:
    """One head of width 1 and W_O = 1, so that |v W_O|_1 is `norms`."""
    x = torch.zeros(len(norms), 1, dtype=torch.float64)
    v = torch.tensor(norms, dtype=torch.float64)[None, :, None]
    return DenseLayer(x, x, x, x, torch.tensor([pattern]).double(), v, torch.ones(1, 1, 1, dtype=torch.float64))


LOWER = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0]], [1, 2, 4]
UPPER = [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]], [2, 1, 2]


def test_flow_gate_by_hand():
    # top: rho = (0,0,1), flow = (.5,0,.5), mass (1,0,1); then rho = (.25,0,.75), flow = (.25,.75,0), mass (.25,1.5,0)
    layers = [gate_layer(*LOWER), gate_layer(*UPPER)]
    assert heta.flow_mass(layers, (3, 4)).tolist() == [1.25, 1.5, 1]
    assert heta.gate(layers, (3, 4)).sum().item() == pytest.approx(1)


def test_per_head_gate_by_hand():
    # R_1 rows: (1,0,0), (.25,.75,0), (0,.5,.5); row 2 of R_2 = .25 R_1[0] + .75 R_1[2] = (.25,.375,.375)
    layers = [gate_layer(*LOWER), gate_layer(*UPPER)]
    assert heta.per_head_mass(layers, (3, 4)).tolist() == [0 + 0.5, 1 + 0.375, 2 + 0.75]


@pytest.mark.parametrize("kind", ["flow", "per_head"])
@pytest.mark.parametrize("target", [ONE, SPAN])
def test_gate_is_a_distribution_before_the_target(model, kind, target):
    layers = read_dense(model, IDS)
    M = heta.gate(layers, target, kind)
    assert M.shape == (target[0],) and (M > 0).all() and M.sum().item() == pytest.approx(1)
    mass = {"flow": heta.flow_mass, "per_head": heta.per_head_mass}[kind]
    assert (mass(layers, target)[target[1] - 1 :] == 0).all()
    parts = sum(mass(layers, (j, j + 1)) for j in range(*target))
    torch.testing.assert_close(mass(layers, target), parts)


def test_diagonal_quadratic_is_exact_for_any_probe():
    a = torch.rand(3, 4, dtype=torch.float64)
    H = heta.hessian(lambda X: (0.5 * a * X**2).sum(), torch.zeros(3, 4, dtype=torch.float64))
    for m in (1, 5):
        torch.testing.assert_close(heta.block_curvature(H, signs(m, 3, 4)), a.sum(1))
    torch.testing.assert_close(heta.expected_block_curvature(H), a.sum(1))


def test_cross_terms_by_hand():
    # block [[1, 2], [2, 1]]: r = (1, 1) gives 6, r = (1, -1) gives 2
    H = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    assert heta.expected_block_curvature(H).tolist() == [4]
    probes = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]], [[-1.0, -1.0]]], dtype=torch.float64)
    assert heta.block_curvature(H, probes).item() == pytest.approx((6 + 2 + 6) / 3)


def test_softplus_of_the_paper_keeps_curvature_where_relu_has_none():
    def g(X):
        return softplus(X.sum() - 2)

    X = torch.zeros(2, 1, dtype=torch.float64)
    p = torch.sigmoid(torch.tensor(-2.0, dtype=torch.float64))
    torch.testing.assert_close(heta.expected_block_curvature(heta.hessian(g, X)), (p * (1 - p)).expand(2))
    relu = heta.hessian(lambda X: torch.relu(X.sum() - 2), X)
    assert heta.expected_block_curvature(relu).tolist() == [0, 0]


def test_estimator_over_all_probes_is_the_expectation(H):
    width = H.shape[1]
    probes = heta.all_signs(width).double()[:, None].expand(-1, ONE[0], -1)
    torch.testing.assert_close(heta.block_curvature(H, probes), heta.expected_block_curvature(H))


def test_hessian_against_finite_differences():
    model = heta.exact_model(tiny("gpt2", **OVERRIDES["gpt2"]))  # the one family without float32 islands
    g, X = heta.embedding_objective(model, IDS, SPAN)
    H, step = heta.hessian(g, X), 1e-4
    for (i, a), (j, b) in [((0, 1), (0, 1)), ((2, 3), (2, 5)), ((1, 0), (4, 7))]:
        total = 0.0
        for s in (1, -1):
            for t in (1, -1):
                Y = X.clone()
                Y[i, a] += s * step
                Y[j, b] += t * step
                total += s * t * g(Y).item()
        assert H[i, a, j, b].item() == pytest.approx(total / (4 * step**2), rel=1e-3, abs=1e-5)


def test_hessian_is_symmetric_and_adds_over_the_span(model):
    H = heta.hessian(*heta.embedding_objective(model, IDS, SPAN))
    torch.testing.assert_close(H, H.permute(2, 3, 0, 1), rtol=1e-4, atol=1e-5 * H.abs().max().item())
    total = torch.zeros_like(H)
    for j in range(*SPAN):
        part = heta.hessian(*heta.embedding_objective(model, IDS, (j, j + 1)))
        total[:j, :, :j, :] += part
    torch.testing.assert_close(total, H, rtol=1e-4, atol=1e-5 * H.abs().max().item())


def test_low_rank_with_enough_probes_is_full(H):
    n, width = H.shape[:2]
    omega = torch.randn(n * width, n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    symmetric = (H + H.permute(2, 3, 0, 1)) / 2
    torch.testing.assert_close(heta.low_rank_hessian(symmetric, omega), symmetric, rtol=1e-5, atol=1e-7)


def test_low_rank_by_hand():
    # H = diag(3, 1) and Omega = e_1: only the first direction is left
    H = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)).reshape(2, 1, 2, 1)
    omega = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
    assert heta.expected_block_curvature(heta.low_rank_hessian(H, omega)).tolist() == pytest.approx([3, 0])


def test_all_layers_sampled_is_full(model):
    full = heta.curvature(model, IDS, ONE)
    torch.testing.assert_close(heta.curvature(model, IDS, ONE, last_layers=2), full, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(heta.curvature(model, IDS, ONE, last_layers=1), full, rtol=0.01)


def test_last_layers_see_the_same_value(model):
    expected = heta.embedding_objective(model, IDS, SPAN)
    swapped = heta.layer_objective(model, IDS, SPAN, 1)
    torch.testing.assert_close(swapped[0](swapped[1]), expected[0](expected[1]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gradient_squared_by_hand():
    X = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert heta.gradient_squared(lambda X: (X**2).sum(), X).tolist() == [4 + 16, 36 + 64]


def test_information_of_a_token_masked_by_itself_is_zero(model):
    token = int(IDS[2])
    info = heta.information(model, IDS, SPAN, "token", token)
    assert info[2].item() == pytest.approx(0, abs=1e-12) and (info[[0, 1, 3]] > 1e-6).all()


@pytest.mark.parametrize("mask", ["zero", "mean"])
def test_information_adds_over_the_span_and_bounds_total_variation(model, mask):
    info = heta.information(model, IDS, SPAN, mask)
    parts = [heta.information(model, IDS, (j, j + 1), mask)[: SPAN[0]] for j in range(*SPAN)]
    torch.testing.assert_close(info, sum(parts), rtol=1e-4, atol=1e-7)
    X = heta.embed(model, IDS[:4])
    masked = X.clone()
    masked[1] = heta.mask_vector(model, mask)
    with torch.no_grad():
        p, q = (heta.next_token_log_probs(model, Y)[3].exp() for Y in (X, masked))
    assert parts[0][1] >= 0.5 * (p - q).abs().sum() ** 2


def test_combination():
    M, S, info = torch.tensor([[0.0, 0.25, 0.75], [9.0, 2.0, 4.0], [9.0, 0.5, 0.1]])
    assert heta.combine(M, S, info).tolist() == pytest.approx([0, 0.3125, 1.5375])
    assert heta.combine(M, S, info, beta=1, gamma=0).tolist() == pytest.approx([0, 0.5, 3])
    expected = [0, 0.125 * (2 / 9 + 0.5 / 9), 0.375 * (4 / 9 + 0.1 / 9)]
    assert heta.combine(M, S, info, rescale=True).tolist() == pytest.approx(expected)


def test_heta_returns_its_parts():
    model = tiny("llama", **OVERRIDES["llama"])
    result = heta.heta(model, IDS, SPAN, probes=signs(3, 6, 8))
    assert all(value.shape == (4,) and (value > 0).all() for value in result.values())
    torch.testing.assert_close(
        result["scores"], result["gate"] * (result["curvature"] + result["information"]) / 2, rtol=1e-12, atol=0
    )
    assert model.dtype == torch.float32


def test_windows_by_hand():
    assert heta.windows(10, 4) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert heta.windows(9, 4) == [(0, 4), (2, 6), (4, 8), (6, 9)]
    assert heta.windows(3, 4) == [(0, 3)]
    mass = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    # windows (0, 2) and (1, 3): halves, then 1/3 and 2/3
    assert heta.windowed_gate(mass, heta.windows(3, 2)).tolist() == pytest.approx([1 / 2, (1 / 2 + 1 / 3) / 2, 2 / 3])


def test_one_window_is_no_window(H):
    omega = torch.randn(5, *H.shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = heta.expected_block_curvature(heta.low_rank_hessian(H, omega))
    torch.testing.assert_close(heta.windowed_low_rank(H, omega, [(0, H.shape[0])]), whole)
