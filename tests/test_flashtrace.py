"""The fast path against the dense reference and against the authors' package."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrace_plugin import IFR, ClosureError, FlashTrace, RecursiveAttribution, Span
from flashtrace_plugin.core.flow import pattern as pattern_module
from flashtrace_plugin.core.flow import proximity as proximity_module
from flashtrace_plugin.core.flow.pattern import QKPattern, StoredPattern, pattern_rows, weighted_flow
from flashtrace_plugin.core.flow.proximity import proximity, source_proximity
from flashtrace_plugin.core.recursion import recurse
from flashtrace_plugin.evaluation.authors import authors_flashtrace
from tests.reference import dense
from tests.tiny import plain_llama, random_ids, tiny

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]
PROMPT, REASONING, TARGET = 14, Span(17, 29), Span(31, 36)
LENGTH = 40


def close(ours: torch.Tensor, reference: torch.Tensor, rtol: float = 1e-5) -> None:
    scale = float(reference.abs().max())
    torch.testing.assert_close(ours.double(), reference.double(), rtol=rtol, atol=rtol * scale)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    model = tiny(request.param, seed=3)
    ids = random_ids(LENGTH, seed=4)
    return model, ids, dense.read_dense(model, ids)


@pytest.mark.parametrize(
    ("hops", "positions", "recursion"),
    [(0, "token", "reasoning"), (3, "token", "reasoning"), (2, "predicting", "reasoning"), (2, "token", "generation")],
)
def test_flashtrace_agrees_with_the_dense_reference(case, hops, positions, recursion):
    model, ids, layers = case
    method = FlashTrace(model, hops=hops, positions=positions, recursion=recursion)
    ours = method.attribute_ids(ids, prompt_length=PROMPT, target=TARGET, reasoning=REASONING)
    spans = (TARGET.start, TARGET.stop), (REASONING.start, REASONING.stop)
    reference = dense.flashtrace(layers, PROMPT, *spans, hops, positions=positions, recursion=recursion)
    for name in ("scores", "hop_scores", "reasoning_mass"):
        close(getattr(ours, name), reference[name])


def test_shares_agree_with_the_dense_reference(case):
    model, ids, layers = case
    ours = FlashTrace(model, hops=1).attribute_ids(ids, prompt_length=PROMPT, target=TARGET, reasoning=REASONING)
    w = torch.zeros(LENGTH, dtype=torch.float64)
    w[TARGET.slice] = 1
    reference = dense.one_hop(layers, w)
    close(ours.head_scores[0], reference.head_shares)
    close(ours.residual_shares[0], reference.residual_shares)
    close(ours.mlp_shares[0], reference.mlp_shares, rtol=1e-4)
    whole = ours.head_scores.sum(-1) + ours.residual_shares
    torch.testing.assert_close(whole, torch.ones_like(whole))
    torch.testing.assert_close(ours.hop_scores.sum(-1), ours.head_scores.sum((1, 2)))


def test_ifr_agrees_with_the_dense_reference(case):
    model, ids, layers = case
    ours = IFR(model).attribute_ids(ids, prompt_length=PROMPT, target=TARGET)
    reference = dense.ifr_tokenwise(layers, PROMPT, (TARGET.start, TARGET.stop))
    close(ours.components["per_token"][:, :PROMPT], reference["columns"])
    close(ours.scores, reference["scores"])


def test_exhaustive_recursion_agrees_with_the_dense_reference(case):
    model, ids, layers = case
    method = RecursiveAttribution(model, hops=2)
    ours = method.attribute_ids(ids, prompt_length=PROMPT, target=TARGET, reasoning=REASONING)
    spans = (TARGET.start, TARGET.stop), (REASONING.start, REASONING.stop)
    reference = dense.exhaustive(layers, PROMPT, *spans, 2)
    for name in ("scores", "hop_scores", "reasoning_mass"):
        close(getattr(ours, name), reference[name])


def test_one_target_token_makes_the_three_methods_one(case):
    model, ids, _ = case
    one = {"prompt_length": PROMPT, "target": Span(35, 36)}
    flash = FlashTrace(model).attribute_ids(ids, **one)
    ifr = IFR(model).attribute_ids(ids, **one)
    recursive = RecursiveAttribution(model).attribute_ids(ids, **one)
    close(ifr.hop_scores[0], flash.hop_scores[0])
    close(recursive.hop_scores[0], flash.hop_scores[0] / flash.hop_scores[0].sum())


@pytest.mark.parametrize("hops", [0, 1, 2])
def test_agrees_with_the_authors_package_on_llama(hops):
    model, ids = tiny("llama", seed=5, num_hidden_layers=4), random_ids(LENGTH, seed=6)
    ours = FlashTrace(model, hops=hops).attribute_ids(ids, prompt_length=PROMPT, target=TARGET, reasoning=REASONING)
    spans = (TARGET.start, TARGET.stop), (REASONING.start, REASONING.stop)
    theirs = authors_flashtrace(model, ids[None], *spans, hops, chunk=16)
    for hop, raw in enumerate(theirs.raw_attributions):
        close(ours.hop_scores[hop], raw.token_importance_total)
    close(ours.scores, theirs.observation["sum"][:PROMPT])


def test_rounding_stays_far_below_that_of_the_literal_formula():
    """On the benchmark's shape, against a float64 reference: 2e-7 here, 5e-5 where large norms are subtracted."""
    model, ids = plain_llama(width=256, layers=4), random_ids(512, vocab_size=1000)
    reasoning, target = Span(320, 448), Span(448, 512)
    spans = (target.start, target.stop), (reasoning.start, reasoning.stop)
    exact = dense.flashtrace(dense.read_dense(model, ids), reasoning.start, *spans, 1)["scores"]
    given = {"prompt_length": reasoning.start, "target": target, "reasoning": reasoning}
    ours = FlashTrace(model).attribute_ids(ids, **given).scores
    theirs = authors_flashtrace(model, ids[None], *spans, 1).observation["sum"][: reasoning.start]
    gap, literal = (float((scores - exact).abs().max() / exact.max()) for scores in (ours, theirs))
    assert gap < 1e-6 and gap < literal / 20


def test_nothing_after_the_last_weighted_position_matters(case):
    model, ids, _ = case
    spans = {"prompt_length": PROMPT, "target": TARGET, "reasoning": REASONING}
    whole = FlashTrace(model).attribute_ids(ids, **spans)
    changed = ids.clone()
    changed[TARGET.stop :] = 7
    assert torch.equal(whole.hop_scores[:, TARGET.stop :], torch.zeros(2, LENGTH - TARGET.stop))
    close(FlashTrace(model).attribute_ids(changed, **spans).scores, whole.scores)


def test_without_reasoning_there_is_nothing_to_follow(case):
    model, ids, _ = case
    ours = FlashTrace(model, hops=3).attribute_ids(ids, prompt_length=PROMPT, target=TARGET)
    assert torch.equal(ours.scores, ours.hop_scores[0, :PROMPT])
    assert not ours.hop_scores[1:].any() and not ours.reasoning_mass.any()


def test_ignored_tokens_are_left_out_of_targets_and_scores(case):
    model, ids, _ = case
    spans = {"prompt_length": PROMPT, "target": TARGET, "reasoning": REASONING}
    first = int(ids[TARGET.start])
    ours = FlashTrace(model, ignore=[first, int(ids[2])]).attribute_ids(ids, **spans)
    shorter = FlashTrace(model, hops=0).attribute_ids(
        ids, prompt_length=PROMPT, target=Span(TARGET.start + 1, TARGET.stop)
    )
    kept = ~torch.isin(ids, torch.tensor([first, int(ids[2])]))
    assert not ours.hop_scores[:, ~kept].any()
    if first not in ids[TARGET.start + 1 : TARGET.stop]:
        close(ours.hop_scores[0], shorter.hop_scores[0] * kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_closes_and_stays_near_float32(family, dtype):
    ids = random_ids(LENGTH, seed=4)
    spans = {"prompt_length": PROMPT, "target": TARGET, "reasoning": REASONING}
    half = tiny(family, seed=3, dtype=dtype)
    ours = FlashTrace(half).attribute_ids(ids, **spans)
    exact = FlashTrace(half.float()).attribute_ids(ids, **spans)
    assert ours.scores.dtype == torch.float32
    gap = (ours.hop_scores - exact.hop_scores).abs().sum() / exact.hop_scores.sum()
    assert gap < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_a_block_that_does_not_close_is_refused_with_the_layer_and_the_gap():
    model, ids = tiny("llama"), random_ids(LENGTH)
    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, args, out: out * 1.02)
    with pytest.raises(ClosureError, match=r"llama, layer 1: .*relative gap 1\.9e-02, bound 1e-04"):
        FlashTrace(model).attribute_ids(ids, prompt_length=PROMPT, target=TARGET)
    handle.remove()
    FlashTrace(model).attribute_ids(ids, prompt_length=PROMPT, target=TARGET)


def test_flow_in_blocks_is_the_weighted_column_sum(monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(4, 12, 8), torch.randn(2, 30, 8)
    rows = torch.arange(18, 30)
    first = (torch.arange(30) - 9).clamp_min(0)
    lazy = QKPattern(rows, q, k, 0.3, first_key=first, softcap=5.0, sinks=torch.randn(4))
    weights = torch.rand(12)
    whole = weighted_flow(lazy, weights, 30)
    A = pattern_rows(lazy, torch.arange(12), 30)
    close(whole, torch.einsum("r,rhk->hk", weights, A))
    assert bool((A.sum(-1) < 1).all()), "a sink takes part of every row's mass"
    monkeypatch.setattr(pattern_module, "BLOCK_BYTES", 1)
    close(weighted_flow(lazy, weights, 30), whole)
    close(weighted_flow(StoredPattern(rows, A.transpose(0, 1)), weights, 30), whole)


def test_blocked_proximity_is_the_proximity_of_every_contribution():
    torch.manual_seed(0)
    flow, v, W_O, t = torch.rand(3, 4, 50), torch.randn(2, 50, 8), torch.randn(4, 8, 24), torch.randn(3, 24)
    c = torch.einsum("bhj,hjd,hdm->bhjm", flow, v.repeat_interleave(2, 0), W_O)
    close(source_proximity(flow, v, W_O, t), proximity(c, t[:, None, None]))


@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0, 1e4])
def test_channels_in_which_nothing_exceeds_the_target_are_passed_over_exactly(scale, monkeypatch):
    monkeypatch.setattr(proximity_module, "_BLOCK_BYTES", 1)
    torch.manual_seed(1)
    flow, v, W_O = torch.rand(2, 4, 50) ** 4, torch.randn(2, 50, 8), torch.randn(4, 8, 24)
    t = scale * torch.randn(2, 24)
    t[:, ::7] *= 1e-5
    c = torch.einsum("bhj,hjd,hdm->bhjm", flow, v.repeat_interleave(2, 0), W_O)
    close(source_proximity(flow, v, W_O, t), proximity(c, t[:, None, None]))


def test_a_contribution_far_below_the_target_keeps_its_precision():
    torch.manual_seed(0)
    t, c = torch.randn(64) * 1e3, torch.rand(64) * 1e-6
    exact = (t.double().abs() - (t.double() - c.double()).abs()).sum().clamp_min(0)
    close(proximity(c, t), exact, rtol=1e-5)
    assert float(proximity(torch.zeros(64), t)) == 0.0


def test_proximity_by_hand():
    t = torch.tensor([4.0, 4.0])
    parts = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, 0.0]])
    assert proximity(parts, t).tolist() == [2.0, 4.0, 0.0]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 4), st.integers(2, 12), st.integers(0, 10**6))
def test_recursion_is_the_sum_of_plain_products(hops, n, seed):
    """With a step that keeps proportions, sum_k (prod rho) alpha_k is the total of the plain matrix products."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(n, n, generator=generator, dtype=torch.float64).tril() + torch.eye(n)
    matrix /= matrix.sum(1, keepdim=True)
    through = torch.rand(n, generator=generator) < 0.5
    initial = torch.zeros(n, dtype=torch.float64)
    initial[-1] = 1
    found = recurse(lambda w: w / w.sum() @ matrix, initial, through, hops)
    mass, total = initial @ matrix, torch.zeros(n, dtype=torch.float64)
    for _ in range(hops + 1):
        total += mass
        mass = (mass * through) @ matrix
    torch.testing.assert_close(found.scores, total)
