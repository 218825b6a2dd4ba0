"""Every registered method is a function of a bridge: made from its declaration, through the one door."""

from __future__ import annotations

import inspect
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("transformer_lens")

import flashtrace_lens
from flashtrace_lens import FlashTraceResult, bridge_for, flashtrace, names_filter
from flashtrace_lens.analysis import analysis_of
from flashtrace_plugin import FlashTrace, Method, MethodError, ReasoningWarning, Span, register_method
from flashtrace_plugin.core.flow.pattern import weighted_flow
from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.methods.base import options_of
from flashtrace_plugin.methods.options import Options, driven, option
from flashtrace_plugin.methods.registry import METHODS
from tests.tiny import random_ids, tiny, tiny_tokenizer

IDS = random_ids(40, seed=4)
SPANS = {"target": Span(31, 36), "reasoning": Span(17, 29)}
PROMPT = "The key of the red box"
GENERATION = "<think>\nFirst look at the box. The box is red.\n</think>\nIt is in the garden.</s>"


class LensRollout(Method):
    """Attention rollout (Abnar & Zuidema 2020): layer by layer, mass flows to what the heads read on average."""

    @dataclass(frozen=True)
    class Options(Options):
        residual: float = option(0.5, "share of the mass that stays at its position in every layer")

    name = "lens_rollout"
    drives = driven(hops=0, recursion="reasoning", positions="token", ignore=())

    def start(self, task):
        recorded, stays = task.record_all(), self.options.residual

        def step(weights):
            mass = weights[recorded.rows] / weights.sum()
            for layer in reversed(recorded.layers):
                mass = stays * mass + (1 - stays) * weighted_flow(layer.pattern, mass, len(mass)).mean(0)
            return Hop(torch.nn.functional.pad(mass, (0, task.length - len(mass))))

        return step


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_method(LensRollout)
    yield
    METHODS._registered.pop(LensRollout.name)


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3", seed=3, attn_implementation="eager")


@pytest.fixture(scope="module")
def bridge(model):
    return bridge_for(model, tiny_tokenizer())


def dense_rollout(model, target: Span) -> torch.Tensor:
    """Mean row of the product of all layers' (A + 1) / 2, heads averaged."""
    attentions = model(IDS[None], output_attentions=True).attentions
    product = torch.eye(len(IDS))
    for A in attentions:
        product = (A[0].mean(0) + torch.eye(len(IDS))) / 2 @ product
    return product[target.slice].mean(0)


# A method that is registered later -----------------------------------------------------------------------------------


def test_a_method_from_elsewhere_is_a_function_of_a_bridge(model, bridge):
    options = {"hops": 2, "residual": 0.3}
    ours = flashtrace_lens.lens_rollout(bridge, IDS, prompt_length=14, **SPANS, **options)
    theirs = LensRollout(model, **options).attribute_ids(IDS, prompt_length=14, **SPANS)
    assert isinstance(ours, FlashTraceResult)
    for name in ("scores", "hop_scores", "reasoning_mass"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)
    assert ours.attribution.closure_error < 2e-6  # the driver checks what the method did not
    assert ours.units == ["token"]


def test_it_is_attention_rollout(model, bridge):
    found = flashtrace_lens.lens_rollout(bridge, IDS, **SPANS)
    torch.testing.assert_close(found.hop_scores[0], dense_rollout(model, SPANS["target"]), rtol=1e-5, atol=1e-6)


def test_it_takes_a_cache(bridge):
    _, cache = bridge.run_with_cache(IDS, names_filter=names_filter)
    cached = flashtrace_lens.lens_rollout(bridge, IDS, cache=cache, **SPANS)
    assert cached.attribution.settings["source"] == "activation cache"
    torch.testing.assert_close(cached.scores, flashtrace_lens.lens_rollout(bridge, IDS, **SPANS).scores)


def test_one_function_each_found_by_name():
    assert flashtrace_lens.flashtrace is analysis_of(FlashTrace) is flashtrace
    assert flashtrace_lens.lens_rollout is analysis_of(LensRollout)
    assert pickle.loads(pickle.dumps(flashtrace_lens.ifr)) is flashtrace_lens.ifr
    assert set(METHODS) <= set(dir(flashtrace_lens))
    with pytest.raises(
        AttributeError, match="no attribute 'rollercoaster'; it has the methods recommended, flashtrace, ifr,"
    ):
        _ = flashtrace_lens.rollercoaster


# What is generated ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, LensRollout.name])
def test_signature_and_help_are_those_of_the_declaration(name):
    function, options = getattr(flashtrace_lens, name), options_of(METHODS[name])
    parameters = inspect.signature(function).parameters
    shared = ["bridge", "tokens", "target", "reasoning", "prompt_length", "cache"]
    assert list(parameters) == [*shared, *(one.name for one in options)]
    assert {one.name: parameters[one.name].default for one in options} == {one.name: one.default for one in options}
    keyword = {p.kind for p in list(parameters.values())[2:]}
    assert keyword == {inspect.Parameter.KEYWORD_ONLY}
    assert function.__name__ == name
    for one in options:
        assert function.__doc__.count(f"    {one.shown()}\n") == 1
        assert function.__doc__.count(one.shown()) == 1
    assert function.__doc__.startswith(METHODS[name].__doc__.splitlines()[0])


def test_options_that_do_not_exist_are_named(bridge):
    with pytest.raises(TypeError, match=r"no option hop; it takes hops, .*format"):
        flashtrace(bridge, IDS, target=-1, hop=2)


def test_options_that_every_function_has_are_refused():
    @dataclass(frozen=True)
    class WithCache(Options):
        cache: bool = option(True, "keep what was read")

    class Clashing(LensRollout):
        """Rollout with an option that the host has."""

        name, Options = "clashing", WithCache

    with pytest.raises(MethodError, match="'clashing' declares the option cache, which every function on a bridge"):
        analysis_of(Clashing)


@pytest.mark.parametrize("name", ["ifr", "recursive", "flashtrace", LensRollout.name])
def test_ignored_tokens_have_no_score(bridge, name):
    found = getattr(flashtrace_lens, name)(bridge, IDS, ignore=[int(IDS[3])], **SPANS)
    assert float(found.scores[3]) == 0
    assert float(found.scores.sum()) > 0


# The one door --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written():
    tokenizer = tiny_tokenizer()
    prompt, ids = (torch.tensor(tokenizer(text).input_ids) for text in (PROMPT, PROMPT + GENERATION))
    return len(prompt), ids


@pytest.mark.parametrize(
    "spans",
    [{}, {"target": "garden"}, {"target": "garden", "reasoning": "The box is red."}, {"target": slice(-3, -1)}],
)
def test_answers_and_texts_are_found_as_in_python(model, bridge, written, spans):
    prompt, ids = written
    ours = flashtrace(bridge, ids, prompt_length=prompt, **spans).attribution
    theirs = FlashTrace(model, tiny_tokenizer()).attribute(PROMPT, GENERATION, **spans)
    assert (ours.prompt, ours.reasoning, ours.target) == (theirs.prompt, theirs.reasoning, theirs.target)
    assert ours.reasoning is not None
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-6)


def test_a_text_of_the_bridge_finds_its_answer(bridge, written):
    prompt, _ = written
    added = bridge.to_tokens(PROMPT).shape[1] - prompt  # a beginning-of-sequence token
    found = flashtrace(bridge, PROMPT + GENERATION, prompt_length=prompt + added).attribution
    assert found.text(found.target).strip() == "It is in the garden."
    assert found.text(found.reasoning).strip().startswith("First look")


@pytest.mark.parametrize("lacking", [(), ("eos_token",), ("eos_token", "pad_token", "bos_token")])
def test_a_generation_ends_where_it_ends_on_the_hugging_face_model(model, lacking):
    """TransformerLens fills in tokens that a tokenizer lacks; where its vocabulary has none, with the unknown one."""
    tokenizer = tiny_tokenizer()
    for name in lacking:
        setattr(tokenizer, name, None)
    theirs = FlashTrace(model, tokenizer).end_ids()
    assert FlashTrace(bridge_for(model, tokenizer)).end_ids() == theirs


def test_hops_without_reasoning_are_said_out_loud_where_they_were_asked_for(bridge):
    with pytest.warns(ReasoningWarning, match=r"flashtrace: 2 hops were asked for.*Pass reasoning=") as caught:
        flashtrace(bridge, IDS, target=-1, hops=2)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReasoningWarning)
        flashtrace(bridge, IDS, target=-1, hops=0)
        flashtrace(bridge, IDS, hops=2, **SPANS)


@pytest.mark.parametrize("name", [LensRollout.name, "heta", "recommended"])
def test_methods_run_on_a_bridge_in_evaluation_mode(name):
    """What runs has no dropout; the user's own modules stay as they are, so that others may train them meanwhile."""
    bridge = bridge_for(tiny("gpt2", seed=3, resid_pdrop=0.5, embd_pdrop=0.5))
    options = {"probes": 1, "progress": False} if name == "heta" else {}
    expected = getattr(flashtrace_lens, name)(bridge, IDS, target=(20, 22), **options)
    bridge.train()
    found = getattr(flashtrace_lens, name)(bridge, IDS, target=(20, 22), **options)
    assert torch.equal(found.scores, expected.scores)
    assert bridge.training
    assert all(block.training for block in bridge.blocks)
