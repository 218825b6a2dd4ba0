"""Saved files that were damaged: an error of our own, or a result that can be shown; never a raw error."""

from __future__ import annotations

import copy
import io
import json
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from flashtrace_plugin import LRP, Attribution, FlashTrace, InputError
from flashtrace_plugin.graph.result import Graph
from flashtrace_plugin.report.html import as_html
from flashtrace_plugin.report.terminal import print_attribution, print_units
from flashtrace_plugin.saved import read_saved
from flashtrace_plugin.verify import Verification
from tests.tiny import tiny, tiny_tokenizer

PROMPT = [{"role": "user", "content": "The key of the red box is in the garden. Where is the key? Say it."}]
GENERATION = "<think>red box. key</think>In the garden."
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@cache
def written() -> dict[type, dict]:
    """What each kind of result saves, as JSON has it."""
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = FlashTrace(model, tokenizer, hops=2, sinks="report").attribute(PROMPT, GENERATION)
    graph = LRP(model, tokenizer).graph(PROMPT, GENERATION)
    results = (found, graph, found.verify(unit="word", draws=2))
    return {type(one): json.loads(json.dumps(one.to_dict())) for one in results}


KINDS = (Attribution, Graph, Verification)


def used(result: object) -> None:
    """What people do with a file."""
    if isinstance(result, Attribution):
        console = Console(file=io.StringIO(), width=80)
        print_attribution(result, console=console)
        print_units(result.by("word"), console=console)
        if not any(values.isnan().any() for values in result.components.values()):
            as_html(result).encode()
    elif isinstance(result, Graph):
        assert result.lost.isfinite().all() and len(result.routes(2)) <= 2
        repr(result).encode()
    else:
        json.dumps(result.to_dict(), allow_nan=False)
        str(result).encode()


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Ways to all values that a file holds; of a long list the first and the last."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    keys = dict(inside)
    kept = list(keys) if isinstance(value, dict) else list(keys)[:1] + list(keys)[1:][-1:]
    return [path, *(p for key in kept for p in places(keys[key], (*path, key)))]


def replaced(data: dict, path: tuple, new: object) -> dict:
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if new is REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new(inner[path[-1]]) if callable(new) else new
    return data


REMOVED = object()
ODD = (
    *(None, True, -1, -0.5, 0, 1, 7, 1e300, 10**30, float("nan"), float("inf"), "", "x", "\ud800", "\x1b[2J", [], {}),
    *(
        [[]],
        [[1.0], [1.0, 2.0]],
        {"shape": [10**12]},
        {"shape": [0, 10**12]},
        {"shape": "x"},
        [0, 0],
        [5, 2],
        [0, 10**6],
    ),
)


def longer(value: object) -> object:
    return value * 2 if isinstance(value, (list, str)) else value


def shorter(value: object) -> object:
    return value[:-1] if isinstance(value, (list, str)) else value


def turned(value: object) -> object:
    return value[::-1] if isinstance(value, (list, str)) else value


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_whole_is_read(kind):
    used(kind.from_dict(written()[kind]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_whole(kind, data):
    whole = written()[kind]
    damaged = whole
    for _ in range(data.draw(st.integers(1, 2))):
        where = [path for path in places(damaged) if path]
        new = data.draw(st.sampled_from([REMOVED, longer, shorter, turned, *ODD]))
        damaged = replaced(damaged, data.draw(st.sampled_from(where)), new)
    try:
        result = kind.from_dict(json.loads(json.dumps(damaged)))
    except InputError as error:
        str(error).encode()
        assert len(str(error)) < 600
        return
    for name in ("tokens", "pieces", "units"):
        assert len(getattr(result, name, ())) == len(damaged.get(name, ()))
    used(result)


LENGTHS = {
    Attribution: ("scores", "hop_scores", "reasoning_mass", "head_scores", "mlp_shares", "tokens", "token_ids"),
    Graph: ("shares", "inside", "outside", "tokens", "steps", "sources", "token_ids"),
    Verification: ("units", "scores", "tokens", "fractions", "named", "removed", "random_kept", "alone"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in LENGTHS.items() for name in names])
@pytest.mark.parametrize("change", [longer, shorter])
def test_lengths_that_contradict_each_other(kind, name, change):
    with pytest.raises(InputError):
        kind.from_dict(replaced(written()[kind], (name,), change))


@pytest.mark.parametrize(
    ("kind", "path", "new", "message"),
    [
        (Attribution, ("scores", 0), float("nan"), "scores of the attribution holds numbers that are not finite"),
        (Attribution, ("scores", 0), -0.25, "or below 0"),
        (Attribution, ("hop_scores", 1, 0), -1, "hop_scores of the attribution holds"),
        (Attribution, ("target",), [0, 3], "is outside the generation"),
        (Attribution, ("target",), [90, 99], "is outside the generation"),
        (Attribution, ("reasoning",), [30, 5], "is no span"),
        (Attribution, ("settings", "sink_positions"), [99], "a whole number >= 0 below"),
        (Attribution, ("settings", "deep"), json.loads("[" * 200 + "]" * 200), "nested too deeply"),
        (Attribution, ("head_scores",), {"shape": [10**12]}, "and no numbers"),
        (Attribution, ("components",), {"per_token": 3.0}, "has the sizes []"),
        (Attribution, ("contents", 0, "stop"), 10**6, "a whole number >= 0 below"),
        (Attribution, ("contents", 0, "message"), 1, "a whole number >= 0 below 1"),
        (Attribution, ("format",), "flashtrace-attribution/0", "expected 'flashtrace-attribution/1'"),
        (Graph, ("shares", 0, -1), 0.5, "a later one"),
        (Graph, ("shares", -1, 0), 1.5, "more than 1"),
        (Graph, ("answer", "ranges"), [[0, 10**6]], "a whole number >= 0 below"),
        (Verification, ("named", 0), [10**6], "a whole number >= 0 below"),
        (Verification, ("log_p",), "x", "not a finite number"),
        (Verification, ("random_removed",), [], "random_removed of the verification is empty"),
    ],
)
def test_what_is_said(kind, path, new, message):
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        kind.from_dict(replaced(written()[kind], path, new))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", "7" * 5000, '{"format": ' + "7" * 5000 + "}", "[" * 100_000, '{"a":' * 50_000, "\ufffe"],
)
def test_files_that_hold_something_else(kind, text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"expected a file written by {kind.__name__}\.save|is nested too deeply"):
        kind.load(path)


def test_files_of_other_bytes(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not JSON"):
        read_saved(tmp_path / "a.json", "save")
