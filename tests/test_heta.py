"""HETA against its dense reference, term by term, and the facts that hold whatever the model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus
from transformers import PersimmonConfig, PersimmonForCausalLM

from flashtrace_plugin import HETA, Attribution, Span, UnsupportedModelError
from flashtrace_plugin.core.batches import Batches
from flashtrace_plugin.core.flow import pattern
from flashtrace_plugin.core.hessian import curvature
from flashtrace_plugin.core.hessian.curvature import (
    block_curvature,
    gradient_squared,
    low_rank_curvature,
    rademacher,
)
from flashtrace_plugin.core.hessian.gate import flow_mass, per_head_mass
from flashtrace_plugin.core.hessian.information import information
from flashtrace_plugin.core.hessian.windows import windows
from flashtrace_plugin.methods.heta import ABLATIONS, PRESETS, terms
from flashtrace_plugin.methods.heta.terms import WeightedTarget, mask_vector
from flashtrace_plugin.models.derive import blockwise
from flashtrace_plugin.models.derive.blockwise import BlockedLayer
from flashtrace_plugin.models.derive.runner import HuggingFace
from flashtrace_plugin.models.derive.tails import Tails, twice_differentiable
from flashtrace_plugin.models.read.capture import capture
from tests.reference import heta as reference
from tests.reference.dense import read_dense
from tests.tiny import random_ids, tiny

SMALL = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 64}
GATED = {"intermediate_size": 12, "num_key_value_heads": 1}
OVERRIDES = {
    "llama": SMALL | GATED,
    "qwen2": SMALL | GATED,
    "qwen3": SMALL | GATED | {"head_dim": 6},
    "gpt2": SMALL | {"n_inner": 12},
    "gptj": SMALL | {"n_inner": 12, "rotary_dim": 2},
    "phi3": SMALL | GATED,
    "gemma2": SMALL | GATED | {"head_dim": 6, "sliding_window": 4},
    "gpt_neox": SMALL | {"intermediate_size": 12},
    "mistral": SMALL | GATED | {"sliding_window": 4},
}
FAMILIES = list(OVERRIDES)
IDS = random_ids(10, vocab_size=64)
ONE, SPAN = (7, 8), (6, 9)
QUIET = {"progress": False}


def small(family: str, **overrides):
    return tiny(family, **{**OVERRIDES[family], **overrides})


def rows(target: tuple[int, int]) -> torch.Tensor:
    """Weights 1 on the tokens of a target."""
    return torch.tensor([float(target[0] <= i < target[1]) for i in range(len(IDS))])


class Problem:
    """A float64 model, a target, and both routes to its Hessian."""

    def __init__(self, family: str, target: tuple[int, int], last_layers: int | None = None) -> None:
        self.model = reference.exact_model(small(family))
        self.target, self.n = WeightedTarget.of(IDS[None], rows(target)), target[0]
        with twice_differentiable(self.model):
            self.tails = Tails(self.model, self.target.input_ids, len(self.target.weights), last_layers=last_layers)
        self.X = self.tails.embeddings if last_layers is None else self.tails.hidden
        objective = (
            reference.embedding_objective(self.model, IDS, target)
            if last_layers is None
            else reference.layer_objective(self.model, IDS, target, last_layers)
        )
        self.H = reference.hessian(*objective)
        self.objective = objective

    def g(self, tail, start):
        run = self.tails.log_probs if self.tails.hidden is None else self.tails.log_probs_from_hidden
        return self.target.log_prob(run(tail[None], start)[0])


@pytest.fixture(scope="module", params=FAMILIES)
def problem(request):
    return Problem(request.param, SPAN)


def close(actual, expected, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


# Gate


@pytest.mark.parametrize("target", [ONE, SPAN])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
def test_gates_against_dense_matrices(family, target, monkeypatch):
    monkeypatch.setattr(pattern, "BLOCK_BYTES", 128)
    model = small(family, num_hidden_layers=3)
    layers = capture(model, IDS[None, : target[1] - 1], torch.arange(target[1] - 1))
    weights = WeightedTarget.of(IDS[None], rows(target)).row_weights()
    dense = read_dense(reference.exact_model(model), IDS)
    close(flow_mass(layers, weights).sum((0, 1)), reference.flow_mass(dense, target)[: len(weights)])
    close(per_head_mass(layers, weights).sum((0, 1)), reference.per_head_mass(dense, target)[: len(weights)])


def test_a_norm_after_attention_scales_the_mass_and_not_the_rollout():
    model = tiny("gemma2")
    layers = capture(model, IDS[None], torch.arange(len(IDS)))
    rho = weights = torch.linspace(0.1, 1, len(IDS)).double()
    expected = torch.zeros_like(rho)
    for layer in reversed(read_dense(model, IDS)):
        norms = torch.einsum("hid,hdm->him", layer.v, layer.W_O * layer.gain).abs().sum(-1)
        expected += (torch.einsum("i,hij->hj", rho * layer.scale, layer.pattern) * norms).sum(0)
        rho = (rho + torch.einsum("i,hij->j", rho, layer.pattern) / len(layer.pattern)) / 2
    close(flow_mass(layers, weights).sum((0, 1)), expected)


@pytest.mark.parametrize("kind", ["flow", "per_head", "uniform", None])
@pytest.mark.parametrize("window", [None, 4])
def test_gate_component(kind, window):
    model = small("llama")
    heta = HETA(model, gate=kind, window=window, curvature=None, mask=None, **QUIET)
    found = heta.attribute_ids(IDS, prompt_length=4, target=Span(*SPAN))
    dense = read_dense(reference.exact_model(model), IDS)
    if window is None or kind in (None, "uniform"):
        expected = reference.gate(dense, SPAN, kind)
    else:
        mass = {"flow": reference.flow_mass, "per_head": reference.per_head_mass}[kind](dense, SPAN)[: SPAN[0]]
        expected = reference.windowed_gate(mass, reference.windows(SPAN[0], window))
    close(found.components["gate"], expected)
    close(found.scores, expected[:4])
    assert found.head_scores.sum().item() == pytest.approx(float(kind in ("flow", "per_head")), abs=1e-6)


# Curvature


def signs(m: int, n: int, width: int = 8) -> torch.Tensor:
    return rademacher(m, n, width, generator=torch.Generator().manual_seed(1))


def test_block_curvature_probe_by_probe(problem):
    probes = signs(40, problem.n)  # two tokens share a graph, and batches of 7 cut across them
    S = block_curvature(problem.g, problem.X, probes, batches=Batches(7))
    close(S, reference.block_curvature(problem.H, probes.double()), rtol=1e-4, atol=1e-6)


def test_low_rank_curvature_vector_by_vector(problem):
    omega = torch.randn(5, problem.n, 8, generator=torch.Generator().manual_seed(2))
    probes = signs(3, problem.n)
    batches = Batches(4)
    S = low_rank_curvature(problem.g, problem.X, omega, probes, batches=batches)
    H = reference.low_rank_hessian(problem.H, omega.double())
    close(S, reference.block_curvature(H, probes.double()), rtol=1e-3, atol=1e-5)
    assert batches.done == 2 * 5


def test_low_rank_at_full_rank_is_full(problem):
    n, probes = problem.n, signs(3, problem.n)
    omega = torch.randn(n * 8, n, 8, generator=torch.Generator().manual_seed(2))
    S = low_rank_curvature(problem.g, problem.X, omega, probes, batches=Batches(64))
    full = block_curvature(problem.g, problem.X, probes, batches=Batches(64))
    close(S, full, rtol=1e-4, atol=1e-5)  # RMS norms compute in float32, so H is symmetric to 1e-6 only


def test_low_rank_in_a_window(problem):
    a, b = 2, problem.n - 1
    omega = torch.randn(4, b - a, 8, generator=torch.Generator().manual_seed(3))
    S = low_rank_curvature(problem.g, problem.X, omega, signs(2, b - a), start=a, batches=Batches(3))
    H = reference.low_rank_hessian(problem.H[a:b, :, a:b, :], omega.double())
    close(S, reference.block_curvature(H, signs(2, b - a).double()), rtol=1e-3, atol=1e-5)


def test_gradient_squared(problem):
    expected = reference.gradient_squared(*problem.objective)
    close(gradient_squared(problem.g, problem.X), expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_curvature_by_the_states_that_enter_the_last_layers(family):
    problem, probes = Problem(family, SPAN, last_layers=1), signs(2, SPAN[0])
    S = block_curvature(problem.g, problem.X, probes, batches=Batches(8))
    close(S, reference.block_curvature(problem.H, probes.double()), rtol=1e-4, atol=1e-6)
    close(gradient_squared(problem.g, problem.X), reference.gradient_squared(*problem.objective), rtol=1e-4)


def test_the_estimate_approaches_its_expectation_as_probes_are_added():
    problem = Problem("llama", ONE)
    expected = reference.expected_block_curvature(problem.H)[: problem.n]

    def error(m: int) -> float:
        S = block_curvature(problem.g, problem.X, signs(m, problem.n), batches=Batches(64))
        return float(((S - expected) / expected).abs().mean())

    errors = {m: error(m) for m in (4, 64, 1024)}
    assert errors[64] < errors[4] / 2 and errors[1024] < errors[64] / 2 and errors[1024] < 0.03


def whole(f, X):
    """A function of all vectors as a function of a tail."""
    return lambda tail, start: f(torch.cat([X[:start], tail]))


@pytest.mark.parametrize("m", [1, 3])
def test_a_diagonal_quadratic_is_exact_for_any_number_of_probes(m):
    X, a = torch.randn(4, 8, dtype=torch.float64), torch.rand(4, 8, dtype=torch.float64)
    S = block_curvature(whole(lambda Y: (a * Y**2).sum() / 2, X), X, signs(m, 4), batches=Batches(2))
    close(S, a.sum(1))


def test_relu_and_softplus_of_the_paper():
    X = torch.zeros(2, 1, dtype=torch.float64)
    p = torch.sigmoid(torch.tensor(-2.0, dtype=torch.float64))
    S = block_curvature(whole(lambda Y: softplus(Y.sum() - 2), X), X, signs(2, 2, 1), batches=Batches(2))
    close(S, (p * (1 - p)).expand(2))
    flat = whole(lambda Y: torch.relu(Y.sum() - 2), X)
    assert block_curvature(flat, X, signs(2, 2, 1), batches=Batches(2)).tolist() == [0, 0]
    assert gradient_squared(flat, X).tolist() == [0, 0]

    def log_probs(tails, start):  # relu(x1 + x2 - 2) is the logit of a coin
        full = torch.cat([Z[:start].expand(len(tails), -1, -1), tails], 1)
        logit = torch.relu(full.sum((1, 2)) - 2)
        return torch.stack([logit, torch.zeros_like(logit)], -1).log_softmax(-1)[:, None]

    Z = torch.tensor([[2.1], [0.0]], dtype=torch.float64)
    values = information(log_probs, Z, torch.zeros(1), torch.ones(1), length=2, batches=Batches(2))
    assert values[0] > 0 and values[1] == 0


def test_a_linear_function_has_no_curvature():
    X = torch.randn(3, 8)
    assert block_curvature(whole(torch.sum, X), X, signs(2, 3), batches=Batches(4)).tolist() == [0, 0, 0]


# Information


@pytest.mark.parametrize("mask", ["zero", "mean", "token"])
def test_information_against_a_plain_loop(problem, mask):
    replacement = mask_vector(HuggingFace(problem.model), mask, 5, IDS.device)
    with torch.no_grad():
        values = information(
            problem.tails.log_probs,
            problem.X,
            replacement,
            problem.target.weights,
            length=problem.n,
            batches=Batches(4),
        )
    close(values, reference.information(problem.model, IDS, SPAN, mask, 5), rtol=1e-5, atol=1e-6)


def test_information_bounds_total_variation(problem):
    X, replacement = problem.X, torch.zeros(8, dtype=torch.float64)
    one = torch.tensor([0.0, 0.0, 1.0])
    with torch.no_grad():
        values = information(problem.tails.log_probs, X, replacement, one, length=3, batches=Batches(2))
        p, *masked = (
            problem.tails.log_probs(Y[None], 0)[0, -1].exp()
            for Y in (X, *(X.index_fill(0, torch.tensor(i), 0.0) for i in range(3)))
        )
    for value, q in zip(values, masked, strict=True):
        assert value >= 0.5 * (p - q).abs().sum() ** 2


# All of it


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", [ONE, SPAN])
def test_scores_and_components(family, target):
    model = small(family)
    heta = HETA(model, beta=0.3, gamma=0.8, curvature="gradient_squared", gate="per_head", mask="mean", **QUIET)
    found = heta.attribute_ids(IDS, prompt_length=4, target=Span(*target))
    expected = reference.heta(
        model, IDS, target, beta=0.3, gamma=0.8, curvature_kind="gradient_squared", gate_kind="per_head", mask="mean"
    )
    if family == "gemma2":  # its gate is tested by itself
        expected["scores"] *= found.components["gate"] / expected["gate"]
        expected["gate"] = found.components["gate"]
    for name in ("gate", "curvature", "information"):
        close(found.components[name], expected[name], rtol=1e-3, atol=1e-5)
    close(found.scores, expected["scores"][:4], rtol=1e-3, atol=1e-5)
    close(found.hop_scores[0], torch.nn.functional.pad(expected["scores"], (0, 10 - target[0])), rtol=1e-3, atol=1e-5)
    assert found.closure_error < 1e-4 and found.method == "heta"


@pytest.mark.parametrize("rescale", [None, "max"])
def test_combination_and_rescaling(rescale):
    found = HETA(small("qwen3"), rescale=rescale, beta=0.25, gamma=0.5, **QUIET).attribute_ids(
        IDS, prompt_length=5, target=Span(6, 7)
    )
    M, S, info = (found.components[name] for name in ("gate", "curvature", "information"))
    expected = reference.combine(M, S, info, 0.25, 0.5, rescale is not None)
    close(found.hop_scores[0, :6], expected)
    assert found.totals.sum() > 0 and (found.scores > 0).all()


def test_score_is_zero_where_the_gate_is():
    model = tiny("mistral", num_hidden_layers=1, sliding_window=3)
    found = HETA(model, curvature="gradient_squared", **QUIET).attribute_ids(IDS, prompt_length=5, target=Span(7, 8))
    assert (found.components["gate"] == 0).tolist() == [True] * 4 + [False] * 3
    assert (found.hop_scores[0, :4] == 0).all() and (found.hop_scores[0, 4:7] > 0).all()


def test_following_the_reasoning():
    """Hop 1 explains the reasoning tokens with hop 0's mass on them as weights, and spreads as much mass as hop 0."""
    model, through = small("llama"), (3, 6)
    heta = HETA(model, hops=1, curvature="gradient_squared", **QUIET)
    found = heta.attribute_ids(IDS, prompt_length=3, target=Span(7, 9), reasoning=Span(*through))
    exact = reference.exact_model(model)
    dense = read_dense(exact, IDS)
    alpha = found.hop_scores[0].double()
    w = {j: float(alpha[j] / alpha[slice(*through)].sum()) for j in range(*through)}

    def summed(term, n=5):
        """A term that adds over tokens, weighted; positions a token cannot see count 0."""
        total = torch.zeros(10, dtype=torch.float64)
        for j, weight in w.items():
            values = term((j, j + 1))
            total[: len(values)] += weight * values
        return total[:n]

    mass = summed(lambda t: reference.flow_mass(dense, t))
    info = summed(lambda t: reference.information(exact, IDS, t))

    def g(X):
        log_probs = reference.next_token_log_probs(exact, X)
        return sum(weight * log_probs[j - 1, IDS[j]] for j, weight in w.items())

    S = reference.gradient_squared(g, reference.embed(exact, IDS[:5]))
    expected = mass / mass.sum() * (S + info) / 2
    expected *= alpha.sum() / expected.sum()
    close(found.hop_scores[1, :5], expected, rtol=1e-3, atol=1e-5)
    rho = alpha[slice(*through)].sum() / alpha.sum()
    close(found.reasoning_mass[0], rho)
    close(found.scores, alpha[:3] + rho * found.hop_scores[1, :3], rtol=1e-4)
    assert found.hop_scores.sum(1).tolist() == pytest.approx([alpha.sum().item()] * 2, rel=1e-5)


def test_hops_without_reasoning_stay_zero():
    found = HETA(small("llama"), hops=2, curvature=None, **QUIET).attribute_ids(
        IDS, prompt_length=5, target=Span(7, 8)
    )
    assert found.hops == 2 and (found.hop_scores[1:] == 0).all()
    assert found.head_scores.shape == (3, 2, 2)


# Variants and what they cost


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    heta = HETA.preset(small("gpt2"), None, name, rank=4, probes=2, **QUIET)
    found = heta.attribute_ids(IDS, prompt_length=5, target=Span(7, 8))
    n, k = 7, 4 + 8
    expected = {"LR": 2 * k, "LR+WIN": 2 * k, "GS": 0}.get(name, n * 2)
    assert found.settings["hvps"] == expected
    assert (found.scores > 0).all() and found.settings["last_layers"] == (2 if "LS" in name else None)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_of_table_5(name):
    found = HETA(small("gpt2"), **ABLATIONS[name], probes=2, **QUIET).attribute_ids(
        IDS, prompt_length=5, target=Span(7, 8)
    )
    parts = {"gate"}
    parts |= {"curvature"} if name not in ("transition only", "KL only") else set()
    parts |= {"information"} if name not in ("transition only", "Hessian only") else set()
    assert set(found.components) == parts and (found.scores > 0).all()


@pytest.mark.parametrize("ids", [10, 40])
def test_low_rank_takes_as_many_products_whatever_the_length(ids):
    text = random_ids(ids, vocab_size=64)
    heta = HETA(small("llama"), curvature="low_rank", rank=5, mask=None, **QUIET)
    found = heta.attribute_ids(text, prompt_length=4, target=Span(ids - 2, ids))
    assert found.settings["hvps"] == 2 * (5 + 8)
    assert {"forwards", "seconds", "peak_memory_bytes", "halved"} <= set(found.settings)


def test_windows_are_those_of_the_reference():
    for n in range(1, 20):
        for size in range(1, 8):
            for overlap in (0, 0.3, 0.5, 0.9):
                assert windows(n, size, overlap) == reference.windows(n, size, overlap)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_formed_again_by_blocks_give_the_same_curvature(family, rows, monkeypatch):
    """With hardly any memory attention runs by blocks of queries, and vectors go one by one.

    Every token has a graph of its own, so all but the first reuse a prefix.
    """
    layers = by_blocks(monkeypatch, rows)
    model = small(family)

    def S(budget: int, kind: str) -> torch.Tensor:
        heta = HETA(model, curvature=kind, rank=4, probes=2, gate=None, mask=None, memory_budget=budget, **QUIET)
        return heta.attribute_ids(IDS, prompt_length=4, target=Span(*SPAN)).components["curvature"]

    for kind in ("full", "low_rank", "gradient_squared"):
        close(S(1, kind), S(2 << 30, kind), rtol=1e-3, atol=1e-5)
    assert any(layer.length > layer.blocks[-1].rows.stop for layer in layers)


def by_blocks(monkeypatch, rows: int) -> list[BlockedLayer]:
    """The layers that will be cut into blocks of that many queries; two products have a graph of their own."""
    layers = []
    monkeypatch.setattr(curvature, "PRODUCTS_PER_GRAPH", 2)
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", 1)
    monkeypatch.setattr(blockwise, "MIN_BLOCK_ROWS", rows)
    monkeypatch.setattr(blockwise, "BlockedLayer", lambda *args: layers.append(BlockedLayer(*args)) or layers[-1])
    return layers


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt_neo", "codegen"])
def test_long_texts_are_differentiated_by_blocks_on_a_cpu(family, monkeypatch):
    """Also where attention is a method of the module; GPT-Neo has layers that see a few tokens only."""
    model, layers = tiny(family), by_blocks(monkeypatch, 3)
    kept = estimate(model)
    assert not layers
    monkeypatch.setattr(terms, "KEPT_PATTERNS", {"cpu": SPAN[1] - 2})
    close(estimate(model), kept, rtol=1e-3, atol=1e-5)
    assert any(layer.length > layer.blocks[-1].rows.stop for layer in layers)
    assert not [m for m in model.modules() if "_attn" in vars(m)]


def estimate(model) -> torch.Tensor:
    """S by two probes per token."""
    heta = HETA(model, probes=2, gate=None, mask=None, **QUIET)
    return heta.attribute_ids(IDS, prompt_length=4, target=Span(*SPAN)).components["curvature"]


@pytest.mark.parametrize("family", ["persimmon", "bloom"])
def test_long_texts_of_families_without_a_layout_or_without_blocks(family, monkeypatch):
    """The first runs by blocks all the same; the second keeps its patterns, and its batches."""
    torch.manual_seed(0)
    shape = SMALL | {"intermediate_size": 12}
    model = PersimmonForCausalLM(PersimmonConfig(**shape)).eval() if family == "persimmon" else tiny(family)
    layers, sizes = by_blocks(monkeypatch, 3), []
    monkeypatch.setattr(terms, "Batches", lambda size, *rest: sizes.append(size) or Batches(size, *rest))
    kept = estimate(model)
    monkeypatch.setattr(terms, "KEPT_PATTERNS", {"cpu": 3})
    close(estimate(model), kept, rtol=1e-3, atol=1e-5)
    assert bool(layers) == (family == "persimmon")
    assert (sizes[0] == sizes[1]) == (family == "bloom")


def test_blocks_of_half_precision_are_summed_in_float32(monkeypatch):
    """The gradients of 512 blocks of one query are as near to float32 as those of one block."""
    q, k, v, g = torch.randn(4, 1, 2, 512, 8, generator=torch.Generator().manual_seed(0))

    def attend(q, k, v, mask):
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)

    def gradients(dtype, rows):
        by_blocks(monkeypatch, rows)
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        output = blockwise._Attention.apply(BlockedLayer(attend, *leaves[:2], None), *leaves)
        return torch.autograd.grad(output, leaves, (1 + g).transpose(1, 2).to(dtype))

    exact = gradients(torch.float32, 512)
    for a, whole, parts in zip(exact, gradients(torch.bfloat16, 512), gradients(torch.bfloat16, 1), strict=True):
        assert (parts - a).norm() < 1.5 * (whole - a).norm()


def test_a_kernel_that_computes_something_else_is_refused():
    """Falcon's eager attention adds ALiBi twice, its sdpa attention once."""
    model = tiny("falcon:alibi", attn_implementation="sdpa")
    with pytest.raises(UnsupportedModelError, match=r"other log-probabilities with eager attention.*attn_impl"):
        estimate(model)
    assert model.config._attn_implementation == "sdpa"
    assert estimate(tiny("falcon:alibi", attn_implementation="eager")).any()


def test_blocks_read_no_keys_beyond_their_mask(monkeypatch):
    """Queries 4 and 5 of a window of three read keys 2 to 5."""
    by_blocks(monkeypatch, 2)
    i, j = torch.arange(6)[:, None], torch.arange(6)
    allowed = (j <= i) & (j > i - 3)
    q = torch.zeros(1, 2, 6, 4)
    for mask in (allowed[None, None], torch.zeros(1, 1, 6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)):
        blocks = BlockedLayer(lambda *args: q, q, q, mask).blocks
        assert [b.keys for b in blocks] == [slice(0, 2), slice(0, 4), slice(2, 6)]
    free = BlockedLayer(lambda *args: q, q, q, None).blocks
    assert [b.keys for b in free] == [slice(0, 6)] * 3


def test_memory_budget_and_seed():
    model = small("llama")

    def run(**options):
        return HETA(model, probes=2, **options, **QUIET).attribute_ids(IDS, prompt_length=4, target=Span(*SPAN))

    state = torch.random.get_rng_state()
    first = run()
    assert torch.equal(torch.random.get_rng_state(), state)
    close(run(memory_budget=1).hop_scores, first.hop_scores, rtol=1e-4)
    assert torch.equal(run().hop_scores, first.hop_scores)
    other = run(seed=1).components
    assert torch.equal(other["information"], first.components["information"])
    assert not torch.allclose(other["curvature"], first.components["curvature"], rtol=1e-3)


def test_a_result_survives_a_file(tmp_path):
    found = HETA(small("llama"), window=4, curvature="low_rank", rank=2, hops=1, **QUIET).attribute_ids(
        IDS, prompt_length=4, target=Span(7, 9), reasoning=Span(4, 6)
    )
    found.save(tmp_path / "heta.json")
    assert Attribution.load(tmp_path / "heta.json") == found
