"""FlashTrace on TransformerLens' objects: bridges, activation caches, hooks, labels."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformer_lens")

from transformer_lens.model_bridge.sources import build_bridge_from_module

import flashtrace_lens.capture as capture_module
from flashtrace_lens import FlashTraceResult, bridge_for, flashtrace, names_filter
from flashtrace_plugin import HETA, IFR, FlashTrace, RecursiveAttribution, Span, reasoner
from flashtrace_plugin.core.flow.components import final_stream_shares
from flashtrace_plugin.errors import InputError, ReasoningWarning
from flashtrace_plugin.evaluation import tasks
from tests.tiny import random_ids, tiny, tiny_tokenizer

LENGTH = 40
IDS = random_ids(LENGTH, seed=4)
SPANS = {"target": (31, 36), "reasoning": (17, 29)}
PROMPT = "The key of the red box"
GENERATION = "<think>\nFirst look at the box. The box is red.\n</think>\nIt is in the garden."


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3", seed=3)


@pytest.fixture(scope="module")
def bridge(model):
    return bridge_for(model, tiny_tokenizer())


@pytest.fixture(scope="module")
def result(bridge):
    return flashtrace(bridge, IDS, hops=2, **SPANS)


def assert_equal(ours, theirs, tolerance: float = 0.0):
    for name in ("scores", "hop_scores", "heads", "components", "reasoning_mass"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [IFR, lambda m: RecursiveAttribution(m, hops=2), lambda m: FlashTrace(m, hops=2)])
def test_methods_take_a_bridge(model, bridge, method):
    spans = {"prompt_length": 14, "target": Span(31, 36), "reasoning": Span(17, 29)}
    ours, theirs = (method(m).attribute_ids(IDS, **spans) for m in (bridge, model))
    torch.testing.assert_close(ours.hop_scores, theirs.hop_scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.head_scores, theirs.head_scores, rtol=1e-5, atol=1e-6)


def test_heta_takes_a_bridge(model, bridge):
    spans = {"prompt_length": 14, "target": Span(36, 38)}
    ours, theirs = (HETA(m, probes=2, progress=False).attribute_ids(IDS, **spans) for m in (bridge, model))
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6)
    assert not any(parameter.grad is not None for parameter in bridge.original_model.parameters())


def test_text_has_the_positions_of_the_hugging_face_model(model, bridge):
    ours = FlashTrace(bridge).attribute(PROMPT, GENERATION)
    theirs = FlashTrace(model, tiny_tokenizer()).attribute(PROMPT, GENERATION)
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-6)


def test_results_of_the_package_get_labels(bridge, result):
    found = FlashTrace(bridge, hops=2).attribute_ids(
        IDS, prompt_length=result.attribution.prompt.stop, target=Span(31, 36), reasoning=Span(17, 29)
    )
    labelled = FlashTraceResult.of(found)
    assert labelled.attribution is found
    assert_equal(labelled, result)
    assert labelled.labels("component") == result.labels("component")


@pytest.mark.parametrize("method", [IFR, lambda m: RecursiveAttribution(m, hops=2)])
def test_tokens_of_labelled_results_have_their_scores(bridge, method):
    found = method(bridge).attribute_ids(IDS, prompt_length=14, target=Span(31, 36), reasoning=Span(17, 29))
    labelled = FlashTraceResult.of(found)
    assert torch.equal(labelled.values("token"), found.scores)
    assert [score for _, score in labelled.top(3)] == [score for _, _, score in found.top(3)]


def test_heta_has_no_components(bridge):
    found = HETA(bridge, curvature=None, mask=None).attribute_ids(IDS, prompt_length=14, target=Span(36, 38))
    labelled = FlashTraceResult.of(found)
    assert labelled.units == ["token", "head"]
    for ask in (labelled.values, labelled.labels, lambda unit: labelled.top(unit=unit)):
        with pytest.raises(InputError, match=r"heta divides no residual stream, so it has no components; .*gate in"):
            ask("component")
    assert torch.equal(labelled.values("head", hop=0), found.head_scores[0].flatten())


def test_results_are_labelled_by_what_they_hold_and_not_by_name(result):
    named = FlashTraceResult.of(replace(result.attribution, method="heta"))
    assert_equal(named, result)
    heads, residual, mlp = (getattr(result.attribution, n) for n in ("head_scores", "residual_shares", "mlp_shares"))
    lacking = {
        "nothing": {"head_scores": heads[:, :0, :0], "residual_shares": residual[:, :0], "mlp_shares": mlp[:, :0]},
        "no shares of the MLP": {"mlp_shares": mlp[:, :0]},
        "zeros for shares": {"residual_shares": residual * 0, "mlp_shares": mlp * 0},
    }
    for changed in lacking.values():
        labelled = FlashTraceResult.of(replace(result.attribution, method="theirs", **changed))
        assert "component" not in labelled.units
        assert labelled.component_labels == []
        assert labelled.components.shape == (3, 0)
        assert labelled.top(3) == result.top(3)
    nothing = FlashTraceResult.of(replace(result.attribution, method="theirs", **lacking["nothing"]))
    with pytest.raises(InputError, match=r"theirs measures no heads, so it has no heads; this result has 'token'$"):
        nothing.top(unit="head")


@pytest.mark.parametrize("kept", [0, 5, 10**6])
def test_rows_may_be_kept_or_recomputed(bridge, result, monkeypatch, kept):
    monkeypatch.setattr(capture_module, "_kept_rows", lambda _bridge, _layers, _length, rows: min(rows, kept))
    assert_equal(flashtrace(bridge, IDS, hops=2, **SPANS), result)


def test_kept_rows_never_exceed_the_budget_or_one_pattern(bridge, monkeypatch):
    monkeypatch.setattr(capture_module, "KEPT_BYTES", 0)
    for length in (40, 100):
        kept = capture_module._kept_rows(bridge, 3, length, n_rows=length)
        assert 0 < kept * 3 <= length
    monkeypatch.setattr(capture_module, "KEPT_BYTES", 1 << 30)
    assert capture_module._kept_rows(bridge, 3, 100, n_rows=100) == 100


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
@pytest.mark.parametrize("options", [{"names_filter": names_filter}, {}, {"remove_batch_dim": True}])
def test_a_cache_gives_the_same_numbers(family, options):
    bridge = bridge_for(tiny(family))
    _, cache = bridge.run_with_cache(IDS, **options)
    cached = flashtrace(bridge, IDS, cache=cache, hops=2, **SPANS)
    assert cached.attribution.settings["source"] == "activation cache"
    assert_equal(cached, flashtrace(bridge, IDS, hops=2, **SPANS), tolerance=1e-6)


def test_a_method_takes_a_cache(bridge, result):
    _, cache = bridge.run_with_cache(IDS, names_filter=names_filter)
    found = FlashTrace(cache, hops=2).attribute_ids(IDS, prompt_length=17, target=Span(31, 36), reasoning=Span(17, 29))
    torch.testing.assert_close(found.hop_scores, result.hop_scores)


def test_names_filter_selects_what_is_needed_and_no_more(bridge):
    _, cache = bridge.run_with_cache(IDS, names_filter=names_filter)
    assert len(cache) == 7 * len(bridge.blocks)
    assert not any("mlp.hook" in name or "scores" in name for name in cache.cache_dict)


def test_unprocessed_compatibility_mode_gives_the_same_numbers(model, result):
    bridge = bridge_for(model, tiny_tokenizer())
    bridge.enable_compatibility_mode(no_processing=True)
    assert_equal(flashtrace(bridge, IDS, hops=2, **SPANS), result)


# The model stays ----------------------------------------------------------------------------------------------------


def test_bridge_for_leaves_the_model_alone(model):
    logits, keys, kernel = model(IDS[None]).logits, list(model.state_dict()), model.config._attn_implementation
    bridge = bridge_for(model)
    flashtrace(bridge, IDS, **SPANS)
    assert torch.equal(model(IDS[None]).logits, logits)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == kernel
    assert bridge.blocks[0].attn.o.original_component.weight is model.model.layers[0].self_attn.o_proj.weight


def test_hooks_are_gone_afterwards_and_the_users_hooks_stay(bridge):
    seen = []
    bridge.add_hook("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x.shape) and None)
    try:
        flashtrace(bridge, IDS, **SPANS)
        assert len(seen) == 1
        assert sum(len(point.fwd_hooks) for point in set(bridge.hook_dict.values())) == 1
        assert not any(block.attn._forward_pre_hooks for block in bridge.blocks)
    finally:
        bridge.reset_hooks()


def test_training_flags_are_put_back(bridge):
    bridge.train()
    try:
        flashtrace(bridge, IDS, **SPANS)
        assert bridge.training
        assert all(block.training for block in bridge.blocks)
    finally:
        bridge.eval()


def test_a_bridge_under_hooks_is_attributed_as_it_runs(bridge, result):
    def silence(v, hook):
        v[:, :, 0] = 0
        return v

    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_v", silence)]):
        hooked = flashtrace(bridge, IDS, **SPANS)
    assert float(hooked.heads[0, 1, :2].sum()) == 0  # both query heads of the silenced KV head
    assert float(result.heads[0, 1, :2].sum()) > 0


def test_a_booted_bridge_is_checked_against_its_own_weights(model):
    shadow = tiny("qwen3", seed=3)
    bridge = build_bridge_from_module(shadow, type(shadow).__name__, hf_config=shadow.config)
    found = flashtrace(bridge, IDS, **SPANS)
    assert found.attribution.settings["logits_checked"]


# Labels -------------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_transformer_lens(bridge, result):
    assert result.labels("head") == bridge.all_head_labels
    assert result.labels("component")[:3] == ["embed", "0_attn_out", "0_mlp_out"]
    _, cache = bridge.run_with_cache(IDS)
    assert result.labels("component") == cache.decompose_resid(return_labels=True)[1]
    assert len(result.labels("token")) == len(result.scores) == 17


def test_components_divide_the_stream(result):
    torch.testing.assert_close(result.components.sum(-1), torch.ones(3))
    mlp, residual = result.attribution.mlp_shares, result.attribution.residual_shares
    torch.testing.assert_close(result.components[:, -1], mlp[:, -1])
    torch.testing.assert_close(result.components[:, -2], (1 - residual[:, -1]) * (1 - mlp[:, -1]))
    torch.testing.assert_close(result.components[:, 0], (residual * (1 - mlp)).prod(-1))


def test_a_hop_without_shares_divides_nothing(result):
    """Such as the one row that hops=inf has for all further hops: mass reached it, but it was not run."""
    residual, mlp = (getattr(result.attribution, name).clone() for name in ("residual_shares", "mlp_shares"))
    residual[1], mlp[1] = 0, 0
    labelled = FlashTraceResult.of(replace(result.attribution, residual_shares=residual, mlp_shares=mlp))
    assert labelled.components.sum(1).tolist() == pytest.approx([1, 0, 1])


def test_shares_of_the_stream_by_hand():
    """Layer 1 of 2: half bypasses attention, 0.6 of that the MLP (0.3); layer 2: 0.8 and 0.5 of it (0.4)."""
    shares = final_stream_shares(torch.tensor([[0.5, 0.8]]), torch.tensor([[0.4, 0.5]]))
    torch.testing.assert_close(shares, torch.tensor([[0.3 * 0.4, 0.5 * 0.6 * 0.4, 0.4 * 0.4, 0.2 * 0.5, 0.5]]))


def test_values_of_all_hops_are_weighted_by_what_reached_them(result):
    torch.testing.assert_close(result.values("token"), result.scores)
    rho = result.reasoning_mass
    expected = result.heads[0] + rho[0] * result.heads[1] + rho[0] * rho[1] * result.heads[2]
    torch.testing.assert_close(result.values("head"), expected.flatten())
    torch.testing.assert_close(result.values("head", hop=1), result.heads[1].flatten())


def test_hops_that_nothing_reaches_are_zero(bridge):
    with pytest.warns(ReasoningWarning, match="no reasoning was found"):
        result = flashtrace(bridge, IDS, target=(31, 36), hops=2)
    assert float(result.components[1:].abs().sum()) == 0


def test_top_is_sorted(result):
    best = result.top(4, unit="head", hop=0)
    assert [value for _, value in best] == sorted((value for _, value in best), reverse=True)
    layer, head = map(int, best[0][0].removeprefix("L").split("H"))
    assert best[0][1] == float(result.heads[0, layer, head]) == float(result.heads[0].max())


@pytest.mark.parametrize(
    "target", [(31, 36), [31, 36], slice(31, 36), slice(-9, -4), (-9, -4), (31, -4), Span(31, 36)]
)
def test_positions_are_given_as_in_transformer_lens(bridge, result, target):
    assert_equal(flashtrace(bridge, IDS, target=target, reasoning=slice(17, 29), hops=2), result)


@pytest.mark.parametrize("last", [-1, 39, slice(-1, None), torch.tensor(39)])
def test_one_position_may_be_an_index(bridge, last):
    ours = flashtrace(bridge, IDS, target=last, hops=0).attribution
    assert (ours.target, ours.prompt) == (Span(39, 40), Span(0, 39))


def test_a_text_gets_the_tokens_of_the_bridge(bridge):
    found = flashtrace(bridge, PROMPT, target=-1)
    assert list(found.attribution.token_ids) == bridge.to_tokens(PROMPT)[0].tolist()


# What it is good for ------------------------------------------------------------------------------------------------


def log_probability(bridge, ids, span, heads=()):
    """Log probability of the span's tokens while some heads, [(layer, head)], write nothing."""

    def silence(head):
        def hook(z, hook):
            z[:, :, head] = 0
            return z

        return hook

    hooks = [(f"blocks.{layer}.attn.hook_z", silence(head)) for layer, head in heads]
    logits = bridge.run_with_hooks(ids, fwd_hooks=hooks).log_softmax(-1)[0]
    return sum(float(logits[i - 1, ids[i]]) for i in span)


@pytest.mark.skipif(not (reasoner.path() / "model.safetensors").exists(), reason="no trained reasoner")
def test_heads_with_large_shares_matter_to_the_answer():
    model, tokenizer = reasoner.load()
    bridge = bridge_for(model, tokenizer)
    generator, drops = torch.Generator().manual_seed(0), {"top": 0.0, "random": 0.0, "bottom": 0.0}
    for seed in range(8):
        sample = tasks.make("variable_tracking", seed, hops=2, chains=3, length=64)
        ids = torch.tensor(tokenizer(f"{sample.prompt} {sample.generation}").input_ids)
        prompt = len(sample.prompt.split())
        target = Span(len(ids) - len(sample.answer.split()), len(ids))
        reasoning = Span(prompt + 1, target.start - 1)
        spans = {"target": target, "reasoning": reasoning, "prompt_length": prompt}
        result = flashtrace(bridge, ids, positions="predicting", **spans)
        order, mixed = result.values("head", hop=0).argsort(descending=True), torch.randperm(16, generator=generator)
        chosen = {"top": order[:4], "bottom": order[-4:], "random": mixed[:4]}
        with torch.no_grad():
            whole = log_probability(bridge, ids, target)
            for name, heads in chosen.items():
                pairs = [divmod(int(i), result.heads.shape[-1]) for i in heads]
                drops[name] += (whole - log_probability(bridge, ids, target, pairs)) / 8
    assert drops["top"] > drops["random"] + 1
    assert drops["top"] > drops["bottom"] + 1


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the page writes a report
    page = Path(__file__).parent.parent / "docs" / "transformer-lens.md"
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)
    ranked, log_p = namespace["ranked"], namespace["log_probability"]
    assert log_p(ranked[:4]) < log_p(ranked[-4:]) - 1
