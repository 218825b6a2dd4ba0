"""The caller's number format and gradient mode change nothing: every method gives its numbers, or says why not."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

import flashtrace_plugin
from flashtrace_plugin import FlashTrace, FlashTraceError, Span, UnsupportedModelError
from flashtrace_plugin.methods.registry import METHODS
from tests.tiny import random_ids, tiny

IDS = random_ids(16)
SPANS = {"prompt_length": 6, "target": Span(12, 15), "reasoning": Span(7, 11)}

CASES = [
    *[(name, {}) for name in METHODS],
    ("flashtrace", {"hops": 2, "sinks": "drop", "positions": "predicting"}),
    ("flashtrace", {"hops": "auto", "recursion": "generation"}),
    ("recursive", {"hops": float("inf")}),
    ("heta", {"curvature": "low_rank", "rank": 4, "hops": 1}),
    ("heta", {"curvature": "gradient_squared", "gate": "per_head", "mask": "mean"}),
    ("heta", {"gate": "uniform", "window": 8, "last_layers": 2}),
    ("lrp", {"rule": "attn"}),
    ("lrp", {"reading": "product", "objective": "log_probability", "context": "generation"}),
]
IDENTITY = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]
FAMILIES = ["llama", "qwen3_next"]


def attribute(model, name, options):
    return METHODS[name](model, **options).attribute_ids(IDS, **SPANS)


@contextmanager
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def autocast() -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


MODES: list[Callable[[], AbstractContextManager[None]]] = [
    *(autocast, double_by_default, deterministic),
    *(torch.inference_mode, torch.no_grad, torch.enable_grad),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDENTITY)
def test_the_callers_modes_change_no_number(family, name, options):
    model = tiny(family)
    try:
        expected = attribute(model, name, options)
    except FlashTraceError as error:
        pytest.skip(f"refused in any mode: {error}")
    for mode in MODES:
        fresh = tiny(family)
        with mode():
            found = attribute(fresh, name, options)
        assert found.scores.dtype == torch.float32, mode
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(found.hop_scores, expected.hop_scores, rtol=1e-5, atol=1e-8)
        assert ("autocast" in found.settings) == (mode is autocast)


def test_autocast_is_on_again_after_the_call():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = FlashTrace(tiny("llama")).attribute_ids(IDS, **SPANS)
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert found.settings["autocast"] == "switched off for the call" and found.settings["dtype"] == "float32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDENTITY)
def test_other_formats_of_the_weights(name, options, dtype):
    expected = attribute(tiny("llama"), name, options).scores
    try:
        found = attribute(tiny("llama", dtype=dtype), name, options).scores
    except FlashTraceError as error:
        assert "load it" in str(error)
        return
    assert found.dtype == torch.float32
    similarity = torch.cosine_similarity(found.double(), expected.double(), 0)
    assert similarity > (0.99 if dtype != torch.float64 else 1 - 1e-9)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDENTITY)
def test_weights_made_in_inference_mode(name, options):
    expected = attribute(tiny("llama"), name, options).scores
    with torch.inference_mode():
        model = tiny("llama")
    try:
        found = attribute(model, name, options).scores
    except UnsupportedModelError as error:
        assert "inference_mode() and can have no backward pass; load the model outside of it" in str(error)
        return
    assert name not in ("lrp", "recommended")
    torch.testing.assert_close(found, expected)


MAKERS = {"zeros", "ones", "eye", "empty", "full", "rand", "randn", "linspace"}


def made_in_the_default_type(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
            torchs = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if torchs and not {"dtype"} & {keyword.arg for keyword in node.keywords}:
                yield f"{path}:{node.lineno}"


def test_no_tensor_is_made_in_the_callers_default_type():
    root = Path(flashtrace_plugin.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "adapters").rglob("*.py")]
    found = [place for path in files if "reasoner" not in path.parts for place in made_in_the_default_type(path)]
    assert not found, "\n".join(found)
