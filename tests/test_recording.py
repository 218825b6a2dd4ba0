"""A recorded text gives every target the numbers of a call of its own, runs the model once, and keeps to its bound."""

from __future__ import annotations

import pytest
import torch

from flashtrace_plugin import (
    ALTI,
    HETA,
    IFR,
    LRP,
    FlashTrace,
    InputError,
    Recommended,
    RecursiveAttribution,
    Span,
    reasoner,
)
from flashtrace_plugin.methods.passes import KeptPasses
from tests.test_threads import in_threads
from tests.tiny import random_ids, tiny

IDS = random_ids(44, seed=7)
TARGETS = [
    {"target": Span(38, 41), "reasoning": Span(18, 33)},
    {"target": Span(25, 28), "reasoning": Span(18, 22)},
    {"target": Span(43, 44), "reasoning": None},
    {"target": Span(16, 17), "reasoning": None},
]
METHODS = {
    "flashtrace": lambda model: FlashTrace(model, hops=2),
    "predicting": lambda model: FlashTrace(model, hops=2, positions="predicting", sinks="drop", ignore=[9]),
    "prompt": lambda model: FlashTrace(model, hops=2, recursion="prompt"),
    "ifr": IFR,
    "recursive": RecursiveAttribution,
    "alti": ALTI,
    "cp": lambda model: LRP(model, hops=2, reading="layers", objective="log_probability"),
    "attn": lambda model: LRP(model, rule="attn", memory_budget=0, sinks="report"),
    "recommended": Recommended,
    "heta": lambda model: HETA(model, probes=2, last_layers=2),
}
PROMPT = "v55 v20 ; the grass is green . v7 84 ; v20 12 ; v3 9 ; ? v55 think"
GENERATION = "<think> v55 v20 ; v20 12 ; </think> 12"


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3")


def same(found, expected):
    for name in ("scores", "hop_scores", "reasoning_mass", "head_scores", "residual_shares", "mlp_shares"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert found.components.keys() == expected.components.keys()
    assert found.settings.keys() == expected.settings.keys()


@pytest.mark.filterwarnings("ignore::flashtrace_plugin.errors.ReasoningWarning")
@pytest.mark.parametrize("name", METHODS)
def test_every_target_has_the_numbers_of_a_call_of_its_own(model, name):
    method = METHODS[name](model)
    recording = method.record_ids(IDS, prompt_length=14)
    for spans in (*TARGETS, TARGETS[0]):
        same(recording.attribute(**spans), METHODS[name](model).attribute_ids(IDS, prompt_length=14, **spans))
    assert recording.passes == 1


@pytest.mark.parametrize("family", ["gemma3_text", "falcon", "qwen3_next", "granite"])
@pytest.mark.filterwarnings("ignore::flashtrace_plugin.errors.ReasoningWarning")
def test_other_blocks(family):
    model = tiny(family)
    recording = FlashTrace(model, hops=1).record_ids(IDS, prompt_length=14)
    for spans in TARGETS[:3]:
        same(recording.attribute(**spans), FlashTrace(model, hops=1).attribute_ids(IDS, prompt_length=14, **spans))
    assert recording.passes == 1


def test_texts_methods_and_graphs_share_one_pass():
    model, tokenizer = reasoner.load()
    recording = FlashTrace(model, tokenizer).record(PROMPT, GENERATION)
    assert (recording.passes, recording.pass_seconds, recording.nbytes) == (0, 0.0, 0)
    same(recording.attribute(), FlashTrace(model, tokenizer).attribute(PROMPT, GENERATION))
    same(recording.attribute(target=-1), FlashTrace(model, tokenizer).attribute(PROMPT, GENERATION, target=-1))
    ifr = recording.using(IFR(model, tokenizer))
    same(ifr.attribute(), IFR(model, tokenizer).attribute(PROMPT, GENERATION))
    graph, fresh = recording.graph(unit="step"), FlashTrace(model, tokenizer).graph(PROMPT, GENERATION, unit="step")
    torch.testing.assert_close(graph.shares, fresh.shares, rtol=1e-4, atol=1e-5)
    assert recording.passes == ifr.passes == 1 and recording.pass_seconds > 0 and recording.nbytes > 0
    lrp = recording.using(Recommended(model, tokenizer))
    lrp.attribute()
    lrp.attribute(target=-1)
    assert lrp.passes == 2  # it linearises the model, which a recording of layers is not
    alti = recording.using(ALTI(model, tokenizer))
    same(alti.attribute(), ALTI(model, tokenizer).attribute(PROMPT, GENERATION))
    assert alti.passes == 3  # the prompt's positions, too
    same(recording.attribute(), FlashTrace(model, tokenizer).attribute(PROMPT, GENERATION))
    assert recording.passes == 3


def test_a_sink_and_a_context_are_not_computed_again(model, monkeypatch):
    recording, swept = Recommended(model).record_ids(IDS, prompt_length=14), []
    import flashtrace_plugin.models.derive.sweep as sweep

    backward = sweep.Sweep.backward
    monkeypatch.setattr(sweep.Sweep, "backward", lambda self, *args: swept.append(1) or backward(self, *args))
    recording.attribute(**TARGETS[0])
    first = len(swept)
    recording.attribute(target=Span(37, 41), reasoning=TARGETS[0]["reasoning"])
    assert len(swept) - first < first
    recording.attribute(**TARGETS[0])
    assert len(swept) - first < first


@pytest.mark.parametrize("method", [FlashTrace, LRP])
def test_what_takes_more_memory_than_is_allowed_is_run_again(model, method):
    recording = method(model).record_ids(IDS, prompt_length=14, max_bytes=1000)
    for spans in TARGETS[:2]:
        same(recording.attribute(**spans), method(model).attribute_ids(IDS, prompt_length=14, **spans))
    assert recording.passes == 2 and recording.nbytes == 0
    with pytest.raises(InputError, match="max_bytes must be a whole number of bytes >= 0, got -1"):
        method(model).record_ids(IDS, prompt_length=14, max_bytes=-1)


def test_layers_make_room_for_a_linearisation(model):
    layers = FlashTrace(model).record_ids(IDS, prompt_length=14)
    layers.attribute(**TARGETS[0])
    linear = LRP(model).record_ids(IDS, prompt_length=14)
    linear.attribute(**TARGETS[0])
    bound = linear.nbytes + layers.nbytes // 2
    both = FlashTrace(model).record_ids(IDS, prompt_length=14, max_bytes=bound)
    for method in (FlashTrace, LRP, LRP, FlashTrace):
        both.using(method(model)).attribute(**TARGETS[0])
        assert 0 < both.nbytes <= bound
    assert both.passes == 3


def test_a_model_that_has_changed_is_refused():
    model = tiny("llama")
    recording = FlashTrace(model).record_ids(IDS, prompt_length=14)
    recording.using(IFR(model)).attribute(**TARGETS[0])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(InputError, match="changed since the text was recorded"):
        recording.attribute(**TARGETS[0])
    recording.drop()
    same(recording.attribute(**TARGETS[0]), FlashTrace(model).attribute_ids(IDS, prompt_length=14, **TARGETS[0]))
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    with pytest.raises(InputError, match="hooks"):
        recording.attribute(**TARGETS[0])
    handle.remove()
    same(recording.attribute(**TARGETS[0]), FlashTrace(model).attribute_ids(IDS, prompt_length=14, **TARGETS[0]))


def test_another_model_is_refused_and_errors_leave_the_recording_usable(model):
    recording = FlashTrace(model).record_ids(IDS, prompt_length=14)
    with pytest.raises(InputError, match="another model"):
        recording.using(IFR(tiny("llama")))
    with pytest.raises(InputError, match="target"):
        FlashTrace(model, ignore=IDS.tolist()).record_ids(IDS, prompt_length=14).attribute(**TARGETS[0])
    recording.attribute(**TARGETS[0])
    assert repr(recording) == "Recording(flashtrace, 44 tokens, 1 passes)"


def test_threads_and_inference_mode(model):
    recording = Recommended(model).record_ids(IDS, prompt_length=14)
    expected = Recommended(model).attribute_ids(IDS, prompt_length=14, **TARGETS[0])
    with torch.inference_mode():
        same(recording.attribute(**TARGETS[0]), expected)
    for found in in_threads(3, lambda: recording.attribute(**TARGETS[0])):
        same(found, expected)
    assert recording.passes == 1


def test_method_is_left_as_it_was(model):
    method = FlashTrace(model)
    method.record_ids(IDS, prompt_length=14).attribute(**TARGETS[0])
    assert not isinstance(method.passes, KeptPasses)


def test_a_bridge_is_recorded_and_its_hooks_are_watched():
    from flashtrace_lens import bridge_for

    bridge = bridge_for(tiny("llama"))
    recording = FlashTrace(bridge).record_ids(IDS, prompt_length=14)
    for spans in TARGETS[:2]:
        same(recording.attribute(**spans), FlashTrace(bridge).attribute_ids(IDS, prompt_length=14, **spans))
    assert recording.passes == 1
    bridge.add_hook("blocks.1.hook_mlp_out", lambda activation, hook: activation * 1.5)
    with pytest.raises(InputError, match="hooks"):
        recording.attribute(**TARGETS[0])


@pytest.mark.parametrize("method", [FlashTrace, LRP, Recommended])
@pytest.mark.parametrize("family", ["qwen3_next:hybrid", "falcon_h1", "nemotron_h", "lfm2"])
def test_hybrids_are_linearised_in_a_recording_as_in_a_call(family, method):
    """What a recurrence makes of its values stays frozen for every target, not only where a call opens it."""
    explain = method(tiny(family))
    recording = explain.record_ids(random_ids(24), prompt_length=10)
    for target in (Span(19, 24), Span(14, 16)):
        fresh = explain.attribute_ids(random_ids(24), prompt_length=10, target=target)
        torch.testing.assert_close(
            recording.attribute(target=target).hop_scores, fresh.hop_scores, rtol=1e-4, atol=1e-6
        )
