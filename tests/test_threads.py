"""One model, several threads and processes, and interrupts anywhere: the numbers are the same, the model untouched."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import sys
import threading

import accelerate
import pytest
import torch
import transformers
from torch.overrides import _get_current_function_mode_stack

from flashtrace_lens import bridge_for
from flashtrace_lens import flashtrace as on_bridge
from flashtrace_plugin import ALTI, HETA, LRP, FlashTrace, Span
from flashtrace_plugin.models.view import view_of
from tests.tiny import random_ids, tiny

IDS = random_ids(20, seed=2)
SPANS = {"prompt_length": 9, "target": Span(15, 18), "reasoning": Span(10, 14)}
METHODS = {
    "flashtrace": lambda model: FlashTrace(model, hops=2, positions="predicting"),
    "lrp": lambda model: LRP(model, rule="attn", memory_budget=0),
    "heta": lambda model: HETA(model, probes=2, last_layers=2),
    "alti": ALTI,
}


def scores(model, method="flashtrace"):
    return METHODS[method](model).attribute_ids(IDS, **SPANS).hop_scores


def state(model):
    """All that a call could leave on a model, by identity."""
    return [
        (
            {name: value for name, value in vars(m).items() if not isinstance(value, dict)},
            {name: dict(value) for name, value in vars(m).items() if isinstance(value, dict)},
            getattr(getattr(m, "config", None), "_attn_implementation", None),
        )
        for m in model.modules()
    ] + [(p.requires_grad, p.grad, p._version) for p in model.parameters()]


def in_threads(count, run):
    """What ``run`` gives, or raises, in so many threads that start together."""
    found, start = [], threading.Barrier(count)

    def body():
        start.wait()
        try:
            found.append(run())
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=body) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def busy():
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_threads_give_the_numbers_of_one(busy, family, count):
    model = tiny(family, seed=1).train()
    expected = {method: scores(model, method) for method in ("flashtrace", "lrp", "heta")}
    before, turns = state(model), 20 // count

    def run():
        return [(method, scores(model, method)) for _ in range(turns) for method in expected]

    for one in in_threads(count, run):
        assert isinstance(one, list), one
        assert all(torch.equal(found, expected[method]) for method, found in one)
    assert state(model) == before


def test_forward_passes_of_other_threads_see_nothing(busy):
    model = tiny("gptj", seed=1)
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    with torch.no_grad():
        logits, written = model(IDS[None]).logits, model.generate(IDS[None, :8], **options)
    done, wrong = threading.Event(), []

    def forward():
        while not done.is_set():
            with torch.no_grad():
                same = torch.equal(model(IDS[None]).logits, logits)
                same = same and torch.equal(model.generate(IDS[None, :8], **options), written)
            if not same:
                wrong.append(same)

    thread = threading.Thread(target=forward)
    thread.start()
    expected = scores(model, "lrp")
    for method in (*METHODS, "lrp"):
        found = scores(model, method)
    done.set()
    thread.join()
    assert not wrong
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_in_the_middle_of_a_call_the_model_is_the_users(family, method):
    """A hook of the user's stops the call in its forward pass; another thread then looks at the model and runs it."""
    model = tiny(family, seed=1).train()
    seen, other = [], threading.local()
    blocks = model.model.layers if family == "llama" else model.transformer.h

    def look():
        other.inside = True
        seen.append(state(model))
        with torch.no_grad():
            model(IDS[None])

    def stop(module, args):
        if not hasattr(other, "inside"):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()

    blocks[1].mlp.register_forward_pre_hook(stop)
    before = state(model)
    scores(model, method)
    assert seen
    assert all(found == before for found in seen)


def test_offloaded_weights_in_threads(busy):
    model = accelerate.cpu_offload(tiny("llama", seed=1, tie_word_embeddings=True), execution_device="cpu")
    expected = scores(tiny("llama", seed=1, tie_word_embeddings=True))
    before = [p.device.type for p in model.parameters()]
    for found in in_threads(4, lambda: [scores(model) for _ in range(3)]):
        assert isinstance(found, list), found
        assert all(torch.allclose(one, expected, atol=1e-6) for one in found)
    assert [p.device.type for p in model.parameters()] == before


def test_bridges_in_threads(busy):
    bridge = bridge_for(tiny("llama", seed=1)).train()
    expected = on_bridge(bridge, IDS, **SPANS).scores
    logits = bridge.eval()(IDS[None])
    bridge.train()
    before = state(bridge)
    for found in in_threads(4, lambda: [on_bridge(bridge, IDS, **SPANS).scores for _ in range(3)]):
        assert isinstance(found, list), found
        assert all(torch.equal(one, expected) for one in found)
    assert state(bridge) == before
    assert torch.equal(bridge.eval()(IDS[None]), logits)


def test_a_model_saved_during_an_attribution_is_as_it_was(tmp_path):
    model = tiny("llama", seed=1)
    expected = scores(model)
    folder, kernels = tmp_path / "during", []

    def save(module, args):
        def body():
            model.save_pretrained(folder)
            kernels.append(copy.deepcopy(model.config)._attn_implementation)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()

    handle = model.model.layers[1].register_forward_pre_hook(save)
    scores(model)
    handle.remove()
    assert set(kernels) == {"sdpa"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(scores(loaded), expected)
    assert "recorded" not in (folder / "config.json").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Interrupts
# ---------------------------------------------------------------------------------------------------------------------


def calls_of(run):
    """Number of Python calls of ``run``."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def interrupted(run, at):
    """``run`` with KeyboardInterrupt raised at its n-th Python call."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"
        if count == at and event == "call":
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)


def of_the_thread():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        _get_current_function_mode_stack(),
    )


@pytest.mark.parametrize("method", ["flashtrace", "lrp", "heta"])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_an_interrupt_anywhere_leaves_nothing(family, method):
    model = tiny(family, seed=1, num_hidden_layers=2).train()
    expected = scores(model, method)
    before, thread = state(model), of_the_thread()
    total = calls_of(lambda: scores(model, method))
    for at in range(1, total, max(1, total // 60)):
        interrupted(lambda: scores(model, method), at)
        assert state(model) == before, at
        assert of_the_thread() == thread, at
    assert torch.equal(scores(model, method), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def _work(model, queue):
    torch.set_num_threads(1)
    queue.put(scores(model).tolist())


@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_worker_processes(kind):
    if kind not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {kind}")
    model, context = tiny("gptj", seed=1), multiprocessing.get_context(kind)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of its parent's
    try:
        expected = scores(model).tolist()
        queue = context.Queue()
        workers = [context.Process(target=_work, args=(model, queue)) for _ in range(2 if kind == "fork" else 1)]
        for worker in workers:
            worker.start()
        found = [queue.get(timeout=120) for _ in workers]
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(threads)
    assert found == [expected] * len(workers)


# ---------------------------------------------------------------------------------------------------------------------
# The view
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gptj", "mpt"])
def test_views_and_activations_go_without_the_garbage_collector(family, method):
    """A circle would keep them, and the weights of a model that is deleted, until the collector runs."""
    model = tiny(family, seed=1)
    kinds = {type(module) for module in model.modules()}
    scores(model, method)  # proofs that are kept
    gc.collect()
    gc.disable()
    try:
        before = sum(type(one) in kinds for one in gc.get_objects())
        scores(model, method)
        assert sum(type(one) in kinds for one in gc.get_objects()) == before
    finally:
        gc.enable()


def test_a_view_shares_tensors_and_nothing_else():
    model = tiny("llama", seed=1, tie_word_embeddings=True).train()
    view = view_of(model)
    assert not set(view.modules()) & set(model.modules())
    assert all(a is b for a, b in zip(view.parameters(), model.parameters(), strict=True))
    assert view.lm_head.weight is view.model.embed_tokens.weight
    assert view.config is not model.config
    assert view.model.layers[0].self_attn.config is view.model.config is view.config
    assert not any(module.training for module in view.modules())
    assert all(module.training for module in model.modules())
