"""The estimate before a run against what the run does, in calls of the model's blocks; and what is above the bound."""

from __future__ import annotations

import inspect
import pickle
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import (
    ALTI,
    HETA,
    IFR,
    LRP,
    CostError,
    FlashTrace,
    InputError,
    Recommended,
    RecursiveAttribution,
)
from flashtrace_plugin.cli import app
from flashtrace_plugin.core.flow import hop as flow_hop
from flashtrace_plugin.core.hessian.curvature import HessianProducts
from flashtrace_plugin.methods import METHODS, cost
from flashtrace_plugin.methods.heta.cost import _PATTERNS, _PRODUCT
from flashtrace_plugin.methods.ifr import ROW_COST
from flashtrace_plugin.methods.recursive import Recursive, RecursiveRows
from tests.tiny import random_ids, tiny, tiny_tokenizer

IDS = random_ids(48, seed=5)
SPANS = {"prompt_length": 20, "target": slice(40, 44), "reasoning": slice(20, 38)}
QUIET = {"progress": False}
PROMPT, GENERATION = (
    "The key of the red box is in the garden. Where is the key?\n",
    "<think>red box</think>In the garden.",
)


@contextmanager
def counted(model, monkeypatch):
    """Work of a run in forward passes of IDS: positions through blocks, the Hessian's products, and rows of a flow."""
    done = {"positions": 0, "products": 0.0, "rows": 0}
    block = type(model.model.layers[0])
    forward, product, rows = block.forward, HessianProducts.__call__, flow_hop._row_block

    def counting_forward(self, hidden, *args, **kwargs):
        done["positions"] += hidden.shape[0] * hidden.shape[1]
        return forward(self, hidden, *args, **kwargs)

    def counting_product(self, vectors):
        done["products"] += vectors.shape[0] * vectors.shape[1]
        return product(self, vectors)

    def counting_rows(layers, some, length):
        done["rows"] += len(some)
        return rows(layers, some, length)

    monkeypatch.setattr(block, "forward", counting_forward)
    monkeypatch.setattr(HessianProducts, "__call__", counting_product)
    monkeypatch.setattr(flow_hop, "_row_block", counting_rows)
    yield done
    monkeypatch.undo()


def work(done, model, depth=1.0):
    """What was counted, in forward passes."""
    forwards = done["positions"] / len(IDS) / len(model.model.layers)
    product = depth * (_PRODUCT + _PATTERNS * SPANS["target"].stop / model.config.hidden_size)
    return forwards + product * done["products"] / len(IDS) + ROW_COST * done["rows"]


def estimate(monkeypatch, method, **spans):
    """The estimate that a run is told."""
    seen = []
    monkeypatch.setattr("flashtrace_plugin.methods.base.check_cost", lambda m, task: seen.append(m.cost(task)))
    found = method.attribute_ids(IDS, **SPANS | spans)
    return seen[0], found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"probes": 3, "mask": None},
        {"last_layers": 1, "probes": 5},
        {"curvature": "low_rank", "rank": 5},
        {"curvature": "low_rank", "rank": 9, "window": 16, "overlap": 0.25, "mask": None},
        {"curvature": "low_rank", "rank": 3, "hops": 2},
        {"curvature": "gradient_squared"},
        {"curvature": None},
        {"curvature": None, "gate": None, "hops": 1},
    ],
)
def test_hetas_estimate_is_what_its_run_takes(options, monkeypatch):
    model = tiny("llama")
    with counted(model, monkeypatch) as done:
        expected, found = estimate(monkeypatch, HETA(model, **QUIET | options))
    depth = options.get("last_layers", 3) / 3
    assert expected / 2.5 < work(done, model, depth) < expected * 2.5
    assert found.settings["hvps"] == 0 or done["products"] > 0


@pytest.mark.parametrize("where", [{}, {"target": slice(30, 31), "reasoning": None}])
def test_a_target_early_in_the_text_takes_less(where, monkeypatch):
    model = tiny("llama")
    with counted(model, monkeypatch) as done:
        expected, _ = estimate(monkeypatch, HETA(model, curvature=None, **QUIET), **where)
    assert expected / 2 < work(done, model) < expected * 2


def test_hooks_make_every_masked_text_a_whole_one(monkeypatch):
    model = tiny("llama")
    plain, _ = estimate(monkeypatch, HETA(model, curvature=None, **QUIET))
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    with counted(model, monkeypatch) as done:
        expected, _ = estimate(monkeypatch, HETA(model, curvature=None, **QUIET))
    handle.remove()
    assert expected > 1.5 * plain and expected / 2 < work(done, model) < expected * 2


@pytest.mark.parametrize("method", [IFR, RecursiveAttribution])
def test_token_wise_methods_count_their_rows(method, monkeypatch):
    model = tiny("llama")
    method(model).attribute_ids(IDS, **SPANS)  # the first call compares logits, which later ones do not
    with counted(model, monkeypatch) as done:
        expected, _ = estimate(monkeypatch, method(model))
    assert done["rows"] == (4 if method is IFR else 22)
    assert expected / 1.5 < work(done, model) < expected * 1.5


@pytest.mark.parametrize(
    ("method", "options", "hops"),
    [
        (LRP, {"hops": 3}, 4),
        (LRP, {"hops": 0, "context": "generation"}, 2),
        (Recommended, {}, 4),
        (FlashTrace, {"hops": 5}, 6),
        (FlashTrace, {"hops": 5, "sinks": "report"}, 7),
        (ALTI, {"hops": 2}, 3),
        (ALTI, {"hops": "auto"}, 1 + cost._CHOSEN_HOPS),
    ],
)
def test_other_methods_count_their_hops(method, options, hops, monkeypatch):
    model = tiny("llama")
    made = method(model, **options)
    assert estimate(monkeypatch, made)[0] == pytest.approx(1 + method.hop_cost * hops)
    made._hops_asked = False  # so that it is not warned of
    without, _ = estimate(monkeypatch, made, reasoning=None)
    followed = cost._CHOSEN_HOPS if made.driving.hops == "auto" else made.driving.hops
    assert without == pytest.approx(1 + method.hop_cost * (hops - followed))


def test_what_takes_too_long_is_refused_before_it_begins(monkeypatch):
    model = tiny("llama")
    heta = HETA(model, probes=4, max_cost=30, **QUIET)
    monkeypatch.setattr(heta, "start", lambda task: pytest.fail("it began"))
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(CostError) as refused:
        heta.attribute_ids(IDS, **SPANS)
    handle.remove()
    message = str(refused.value)
    assert (
        message.startswith("heta takes about ") and "of these 48 tokens, about " in message and " s here: " in message
    )
    assert "a masked text and, with curvature='full'" in message and "more than max_cost=30. Choose " in message
    assert "curvature='low_rank', rank=16 (about" in message and "curvature='gradient_squared' (about" in message
    assert message.endswith("or with max_cost=None (--yes on the command line)") and message.startswith(
        refused.value.estimate
    )
    assert len(passes) == 1, "only the pass that is timed"
    assert pickle.loads(pickle.dumps(refused.value)).estimate == refused.value.estimate


def test_the_bound_that_the_message_names_is_enough():
    heta = HETA(tiny("llama"), curvature="low_rank", rank=2, max_cost=3, **QUIET)
    with pytest.raises(CostError, match="curvature='gradient_squared'") as refused:
        heta.attribute_ids(IDS, **SPANS)
    assert "rank=16" not in str(refused.value), "what takes more is no remedy"
    named = int(str(refused.value).partition("allow it with max_cost=")[2].split()[0])
    settings = (
        HETA(heta.model, curvature="low_rank", rank=2, max_cost=named, **QUIET).attribute_ids(IDS, **SPANS).settings
    )
    assert "max_cost" not in settings


def test_without_a_bound_and_below_it_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(cost, "_forward_seconds", lambda *_: pytest.fail("timed"))
    model = tiny("llama")
    free = IFR(model, max_cost=None).attribute_ids(IDS, **SPANS)
    assert torch.equal(free.scores, IFR(model).attribute_ids(IDS, **SPANS).scores)
    monkeypatch.setattr(IFR, "cost", lambda self, task: pytest.fail("estimated"))
    IFR(model, max_cost=None).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize(
    ("number", "nearest", "above"),
    [
        (28731.2, "29,000", "29,000"),
        (10.0, "10", "10"),
        (2.123, "2.1", "2.2"),
        (0.0512, "0.051", "0.052"),
        (101, "100", "110"),
    ],
)
def test_estimates_have_two_digits(number, nearest, above):
    assert cost._round(number) == nearest and cost._round(number, cost.ceil) == above


@pytest.mark.parametrize("bound", [0, -1, "much", True, float("nan")])
def test_bounds_that_are_none(bound):
    with pytest.raises(InputError, match="max_cost must be a number of forward passes above 0, or None"):
        IFR(tiny("llama"), max_cost=bound)


def test_a_graph_is_bounded_too():
    with pytest.raises(CostError, match=r"recursive takes about 1\.9 forward passes"):
        RecursiveAttribution(tiny("llama"), tiny_tokenizer(), max_cost=1.5).graph_ids(IDS, **SPANS)


def test_recursion_over_another_librarys_rows_and_over_a_matrix():
    rows = RecursiveRows(tiny("llama"), None, lambda ids, positions: torch.ones(len(positions), len(ids)), max_cost=40)
    with pytest.raises(
        CostError, match=r"recursive takes about 55 .*a run of the base for every token of the reasoning"
    ):
        rows.attribute_ids(IDS, **SPANS)
    matrix = torch.ones(48, 48).tril()
    assert Recursive(matrix, max_cost=0.1).attribute_ids(IDS, **SPANS).hop_scores.isfinite().all()
    with pytest.raises(CostError, match=r"max_cost=2\. Choose a shorter text"):
        Recursive(FlashTrace(tiny("llama"), hops=9, max_cost=2), hops=9).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_bound(name):
    assert inspect.signature(METHODS[name]).parameters["max_cost"].default == 10_000
    assert METHODS[name].cost_of


def test_hosts_take_the_bound_and_raise_the_same_error():
    captum = pytest.importorskip("flashtrace_captum")
    with pytest.raises(CostError, match="max_cost=7"):
        captum.HETA(tiny("llama"), max_cost=7, **QUIET).attribute(IDS[None], target=-1)
    inseq = pytest.importorskip("inseq")
    pytest.importorskip("flashtrace_inseq")
    with pytest.raises(CostError, match="max_cost=2"):
        inseq.load_model(tiny("llama"), "ifr", tokenizer=tiny_tokenizer()).attribute(
            PROMPT, PROMPT + GENERATION * 4, target=[24, 54], max_cost=2, show_progress=False
        )


def test_bridges_and_caches_are_timed_as_well():
    lens = pytest.importorskip("flashtrace_lens")
    bridge = lens.bridge_for(tiny("llama"), tiny_tokenizer())
    spans = {"prompt_length": 20, "target": slice(40, 44), "reasoning": slice(20, 38)}
    with pytest.raises(CostError, match=r"about 1\.9 forward passes of these 48 tokens, about .* here"):
        lens.recursive(bridge, IDS, max_cost=1.5, **spans)
    _, cache = bridge.run_with_cache(IDS[None])
    with pytest.raises(CostError, match=r"about 1\.9 forward passes of these 48 tokens, about .* here"):
        RecursiveAttribution(cache, max_cost=1.5).attribute_ids(IDS, **spans)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("qwen3").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def call(folder, *more):
    texts = [
        "--prompt",
        PROMPT,
        "--generation",
        GENERATION,
        "--method",
        "heta",
        "--curvature",
        "low_rank",
        "--rank",
        "2",
    ]
    return CliRunner().invoke(app, ["attribute", "--model", str(folder), *texts, "--progress", "false", *more])


def test_the_command_line_refuses_and_with_yes_tells_and_runs(folder):
    refused = call(folder, "--max-cost", "12.5")
    assert refused.exit_code == 2 and "more than --max-cost 12.5" in refused.stderr and not refused.stdout
    allowed = call(folder, "--max-cost", "12.5", "--yes")
    assert allowed.exit_code == 0, allowed.output
    assert allowed.stderr.startswith("heta takes about ") and "max_cost" not in allowed.stderr
    unbounded = call(folder, "--max-cost", "null")
    assert unbounded.exit_code == 0 and unbounded.stdout == allowed.stdout and "takes about" not in unbounded.stderr
