"""The baselines, by other routes."""

from __future__ import annotations

import pytest
import torch

from flashtrace_plugin import Span
from flashtrace_plugin.evaluation.baselines import BASELINES
from flashtrace_plugin.evaluation.baselines.base import chunks, falls
from flashtrace_plugin.evaluation.baselines.perturbation import CHUNK, WINDOW
from flashtrace_plugin.evaluation.baselines.sampling import lasso_weights
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.metrics import likelihood
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from tests.tiny import random_ids, tiny

CASE = Case(random_ids(20, seed=2), 10, Span(16, 20), Span(10, 16), evidence=(1, 4), question=(8, 9))


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3", attn_implementation="eager")


def log_prob(model, ids, span):
    logits = model(ids[None]).logits[0, span.start - 1 : span.stop - 1].log_softmax(-1)
    return logits.gather(-1, ids[span.slice, None]).sum()


@pytest.mark.parametrize("name", BASELINES)
def test_one_score_for_each_prompt_token_and_the_model_is_left_alone(name, model):
    scores = BASELINES[name].explain(model, CASE)
    assert scores.shape == (10,) and bool((scores >= 0).all()) and bool(scores.any())
    assert torch.equal(scores, BASELINES[name].explain(model, CASE)) and not scores.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_is_that_of_the_predicting_positions(model):
    with torch.no_grad():
        patterns = torch.stack(model(CASE.input_ids[None], output_attentions=True).attentions)[:, 0]
    expected = patterns[:, :, 15:19].sum(2).mean((0, 1))[:10]
    torch.testing.assert_close(BASELINES["attention"].explain(model, CASE), expected)


def test_leave_one_out_is_the_fall_of_the_whole_generation(model):
    with torch.no_grad():
        whole = log_prob(model, CASE.input_ids, CASE.generation)
        changed = []
        for place in range(10):
            ids = CASE.input_ids.clone()
            ids[place] = replacement_token(model)
            changed.append(whole - log_prob(model, ids, CASE.generation))
    expected = torch.stack(changed).clamp(min=0)
    torch.testing.assert_close(BASELINES["leave_one_out"].explain(model, CASE).float(), expected, rtol=1e-4, atol=1e-4)


def test_gradient_times_input_is_the_slope_along_the_embedding(model):
    found = BASELINES["gradient_x_input"].explain(model, CASE)
    embedded = model.get_input_embeddings()(CASE.input_ids[None]).detach()

    def value(place: int, step: float) -> float:
        moved = embedded.clone()
        moved[0, place] *= 1 + step
        with torch.no_grad():
            logits = model(inputs_embeds=moved).logits[0, 15:19].log_softmax(-1)
        return float(logits.gather(-1, CASE.input_ids[CASE.target.slice, None]).sum())

    slopes = [abs(value(place, 1e-2) - value(place, -1e-2)) / 2e-2 for place in range(10)]
    torch.testing.assert_close(found, torch.tensor(slopes), rtol=1e-2, atol=2e-3)


def test_the_answer_key_by_hand(model):
    assert BASELINES["answer_key"].explain(model, CASE).tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 1, 1]


def test_attention_rollout_is_a_product_of_matrices(model):
    with torch.no_grad():
        patterns = torch.stack(model(CASE.input_ids[None], output_attentions=True).attentions)[:, 0].mean(1)
    product = torch.eye(20)
    for pattern in patterns:  # from the embeddings up
        product = (pattern + torch.eye(20)) / 2 @ product
    expected = product[15:19].mean(0)[:10]
    torch.testing.assert_close(BASELINES["attention_rollout"].explain(model, CASE), expected)


def gradient_of(model, embedded):
    at = embedded.clone().requires_grad_()
    logits = model(inputs_embeds=at).logits[0, 15:19].log_softmax(-1)
    logits.gather(-1, CASE.input_ids[CASE.target.slice, None]).sum().backward()
    model.zero_grad(set_to_none=True)
    return at.grad[0]


def test_gradient_norm_is_the_length_of_the_gradient(model):
    embedded = model.get_input_embeddings()(CASE.input_ids[None]).detach()
    expected = gradient_of(model, embedded).norm(dim=-1)[:10]
    torch.testing.assert_close(BASELINES["gradient_norm"].explain(model, CASE), expected, rtol=1e-4, atol=1e-5)


def test_integrated_gradients_are_captum_s(model):
    attr = pytest.importorskip("captum.attr")
    embedded = model.get_input_embeddings()(CASE.input_ids[None]).detach()
    start = torch.cat([torch.zeros_like(embedded[:, :10]), embedded[:, 10:]], 1)

    def watched(at):
        logits = model(inputs_embeds=at).logits[:, 15:19].log_softmax(-1)
        wanted = CASE.input_ids[CASE.target.slice, None].expand(len(at), -1, -1)
        return logits.gather(-1, wanted).sum((1, 2))

    found = attr.IntegratedGradients(watched).attribute(embedded, start, n_steps=16, method="riemann_middle")
    expected = found.sum(-1).abs()[0, :10].float()
    torch.testing.assert_close(BASELINES["integrated_gradients"].explain(model, CASE), expected, rtol=1e-3, atol=1e-4)


def test_occlusion_is_captum_s(model):
    attr = pytest.importorskip("captum.attr")
    pad = replacement_token(model)

    def watched(prompt):
        rows = torch.cat([prompt, CASE.input_ids[10:].expand(len(prompt), -1)], 1).long()
        with torch.no_grad():
            return torch.stack([log_prob(model, row, CASE.generation) for row in rows])

    found = attr.Occlusion(watched).attribute(CASE.input_ids[None, :10].float(), (WINDOW,), baselines=float(pad))
    expected = found[0].clamp(min=0).float()
    torch.testing.assert_close(BASELINES["occlusion"].explain(model, CASE), expected, rtol=1e-4, atol=1e-4)


def test_probing_by_longer_contexts_adds_up_to_the_prompt(model):
    """What all tokens add, gains and losses, is what the prompt adds; by hand, one context after another."""
    values = []
    for begin in range(11):
        ids = CASE.input_ids[begin:]
        with torch.no_grad():
            values.append(float(log_prob(model, ids, Span(16 - begin, 20 - begin))))
    gains = torch.tensor(values[:-1]) - torch.tensor(values[1:])
    found = BASELINES["context_length_probing"].explain(model, CASE)
    torch.testing.assert_close(found, gains.clamp(min=0), rtol=1e-4, atol=1e-4)


def test_probing_where_the_answer_follows_the_prompt_at_once(model):
    case = Case(CASE.input_ids, 16, Span(16, 20), None, evidence=(1,))
    found = BASELINES["context_length_probing"].explain(model, case)
    assert found.shape == (16,) and float(found[-1]) == 0 and bool(found.any())


def test_the_hierarchy_agrees_with_leave_one_out_where_it_looks_closely(model):
    found, whole = (BASELINES[name].explain(model, CASE) for name in ("attribot", "leave_one_out"))
    chunk = falls(model, CASE, chunks(10, 4), CASE.generation).clamp(min=0)
    best = int(chunk.argmax())
    inside = chunks(10, 4)[best]
    torch.testing.assert_close(found[inside], whole[inside], rtol=1e-4, atol=1e-4)
    others = [i for i in range(10) if i not in inside]
    assert float(found[others].sum()) == pytest.approx(float(chunk.sum() - chunk[best]), abs=1e-4)


def test_chunks_share_what_they_lose(model):
    groups = chunks(10, CHUNK)
    expected = falls(model, CASE, groups, CASE.generation).clamp(min=0)
    found = BASELINES["leave_one_chunk_out"].explain(model, CASE)
    assert [float(found[g].sum()) for g in groups] == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_regression_of_context_cite():
    """It finds the weights of a linear function, and the authors' solver finds the same."""
    kept = torch.rand(64, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    weights = torch.tensor([3.0, 0.0, -2.0, 0.0, 1.0])
    outputs = kept.float() @ weights - 4
    found = lasso_weights(kept, outputs.double(), tokens=2)
    torch.testing.assert_close(found, weights, rtol=0, atol=0.1)
    assert found[[1, 3]].abs().max() < 1e-3, "sparse"
    from sklearn.linear_model import Lasso
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), Lasso(alpha=0.01)).fit(kept.float().numpy(), outputs.numpy() / 2)
    zero = pipeline.predict(torch.zeros(1, 5).numpy())
    each = [float(pipeline.predict(torch.eye(5)[i : i + 1].numpy())[0] - zero[0]) * 2 for i in range(5)]
    assert found.tolist() == pytest.approx(each, abs=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_says_what_it_costs(name):
    assert BASELINES[name].passes(CASE) >= 0 and BASELINES[name].about


def test_prefixes_are_reused_for_one_token_at_a_time(model, monkeypatch):
    """Later tokens are cheaper: on average half of the prompt need not be run."""
    seen, real = [], likelihood._batch
    monkeypatch.setattr(
        likelihood,
        "_batch",
        lambda m, ids, g, states=(), start=0: (
            seen.append(len(ids) * (g.stop - 1 - start)) or real(m, ids, g, states, start)
        ),
    )
    long = Case(random_ids(64, seed=2), 60, Span(62, 64), None, evidence=(1,))
    BASELINES["leave_one_out"].explain(model, long)
    assert sum(seen) < 0.7 * 61 * 63
