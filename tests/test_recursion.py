"""Recursion for any base: hops found by themselves, all hops at once, and matrices of others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrace_plugin import IFR, LRP, FlashTrace, InputError, Recursive, RecursiveAttribution, Span
from flashtrace_plugin.core.recursion import ENOUGH, Rows, recurse, solve
from tests.tiny import random_ids, tiny, tiny_tokenizer

IDS = random_ids(40, seed=4)
SPANS = {"prompt_length": 14, "target": Span(31, 36), "reasoning": Span(17, 29)}


def random_matrix(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.1 + torch.rand(n, n, generator=generator)).tril(-1) + 0.2 * torch.eye(n)


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 12), st.integers(0, 10**6))
def test_all_hops_at_once_are_very_many_hops(n, seed):
    matrix = random_matrix(n, seed)
    rows = Rows(torch.arange(1, n), matrix[1:])
    through = torch.zeros(n, dtype=torch.bool)
    through[1 : n - 1] = True
    initial = torch.zeros(n).index_fill(0, torch.tensor([n - 1]), 1.0)
    many = recurse(lambda w: rows.step(w).alpha, initial, through, 200)
    once = solve(rows, initial, through)
    torch.testing.assert_close(once.scores, many.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(once.hop_scores[0] + once.reasoning_mass[0] * once.hop_scores[1], once.scores)


def test_hops_found_by_themselves_stop_when_a_thousandth_is_left():
    found = RecursiveAttribution(tiny("llama"), hops="auto").attribute_ids(IDS, **SPANS)
    many = RecursiveAttribution(tiny("llama"), hops=60).attribute_ids(IDS, **SPANS)
    assert 0 < found.settings["mass_left"] <= ENOUGH
    assert found.settings["hops_followed"] == found.hops < 60
    assert found.settings["mass_left"] == pytest.approx(float(found.reasoning_mass.prod()), rel=1e-4)
    torch.testing.assert_close(found.scores, many.scores, rtol=0, atol=2e-3 * float(many.scores.max()))


@pytest.mark.parametrize("positions", ["token", "predicting"])
def test_infinitely_many_hops_of_the_exhaustive_recursion(positions):
    model = tiny("qwen3")
    many = RecursiveAttribution(model, hops=200, positions=positions).attribute_ids(IDS, **SPANS)
    once = RecursiveAttribution(model, hops=float("inf"), positions=positions).attribute_ids(IDS, **SPANS)
    torch.testing.assert_close(once.scores, many.scores, rtol=1e-4, atol=1e-6)
    assert once.settings["hops"] == "inf" and once.settings["hops_followed"] == "all"
    with pytest.raises(InputError, match="hops=inf needs a row of importance for every token, which 'flashtrace'"):
        FlashTrace(model, hops=float("inf")).attribute_ids(IDS, **SPANS)


def test_a_row_that_keeps_all_to_itself_leads_nowhere():
    matrix = random_matrix(6, 0)
    matrix[2] = torch.eye(6)[2]
    rows = Rows(torch.arange(1, 6), matrix[1:])
    through = torch.tensor([False, True, True, True, True, False])
    found = solve(rows, torch.eye(6)[5], through)
    assert bool(found.scores.isfinite().all())


def test_a_method_with_and_without_hops_of_its_own():
    model = tiny("llama")
    same = Recursive(FlashTrace(model), hops=3).attribute_ids(IDS, **SPANS)
    assert torch.equal(same.scores, FlashTrace(model, hops=3).attribute_ids(IDS, **SPANS).scores)
    single = IFR(model)
    lifted = Recursive(single, hops=2).attribute_ids(IDS, **SPANS)
    assert lifted.hops == 2 and lifted.method == "ifr"
    assert single.attribute_ids(IDS, **SPANS).hops == 0, "the base is left as it was"
    assert Recursive(LRP(model), hops=0).attribute_ids(IDS, **SPANS).hops == 0


def test_a_matrix_of_another_method_is_recursed_like_its_own():
    model = tiny("llama")
    rows = torch.arange(14, 40)
    alphas = [
        RecursiveAttribution(model, hops=0).attribute_ids(IDS, prompt_length=14, target=Span(i, i + 1)).hop_scores[0]
        for i in rows.tolist()
    ]
    matrix = torch.stack(alphas)
    ours = RecursiveAttribution(model, hops=3).attribute_ids(IDS, **SPANS)
    found = Recursive(matrix, hops=3).attribute_ids(IDS, **SPANS)
    torch.testing.assert_close(found.scores, ours.scores, rtol=1e-4, atol=1e-6)
    assert found.method == "matrix" and found.tokens[0] == f"<{int(IDS[0])}>"
    whole = torch.cat([torch.zeros(14, 40), matrix])
    assert torch.equal(Recursive(whole, hops=3).attribute_ids(IDS, **SPANS).scores, found.scores)
    signed = Recursive(-matrix, hops=3).attribute_ids(IDS, **SPANS)
    assert torch.equal(signed.scores, found.scores)


def test_a_matrix_finds_its_spans_with_a_tokenizer():
    tokenizer = tiny_tokenizer()
    prompt, generation = "Where is the key?", "<think>red box</think>garden"
    ids = tokenizer(prompt + generation, return_tensors="pt")["input_ids"][0]
    start = len(tokenizer(prompt)["input_ids"])
    found = Recursive(random_matrix(len(ids), 1), tokenizer, hops=float("inf")).attribute_ids(ids, prompt_length=start)
    assert found.text(found.target) == "garden" and found.text(found.reasoning) == "red box"
    assert len(found.scores) == start


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (random_matrix(40, 0).T, "not lower triangular: row 0, of token 0, scores position 1"),
        (torch.ones(40), "a matrix .N, N. or .M, N."),
        (torch.ones(41, 40), "a matrix .N, N. or .M, N."),
        (torch.full((40, 40), torch.inf).tril(), "holds infinity"),
        (torch.zeros(40, 40), "no importance in the row of token 17"),
        (random_matrix(40, 0)[35:], "no importance in the row of token 17"),
        (random_matrix(30, 0), "30 columns for 40 tokens"),
    ],
)
def test_matrices_that_cannot_be_recursed(matrix, message):
    with pytest.raises(InputError, match=message):
        Recursive(matrix).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize("hops", [-1, 1.5, "many", True, None])
def test_hops_that_are_none(hops):
    with pytest.raises(InputError, match="hops must be a whole number >= 0, 'auto' or infinity"):
        FlashTrace(tiny("llama"), hops=hops)


def test_following_the_prompt_goes_on_through_all_before_the_target():
    model = tiny("llama")
    found = FlashTrace(model, hops=1, recursion="prompt").attribute_ids(IDS, **SPANS)
    first = FlashTrace(model, hops=0).attribute_ids(IDS, **SPANS).hop_scores[0]
    torch.testing.assert_close(found.reasoning_mass[0], first[:31].sum() / first.sum())
    assert found.settings["hops_followed"] == 1 and float(found.hop_scores[1, 31:].sum()) == 0
    LRP(model, hops=1, recursion="prompt").attribute_ids(IDS, **SPANS)
