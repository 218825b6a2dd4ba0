"""The graph of steps: conservation, tokens as units against the exhaustive recursion, routes, files, refusals."""

from __future__ import annotations

import json
import math
import warnings

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrace_plugin import (
    ALTI,
    HETA,
    IFR,
    LRP,
    FlashTrace,
    FlashTraceError,
    Graph,
    InputError,
    MethodError,
    Recommended,
    Recursive,
    RecursiveAttribution,
    Span,
    reasoner,
)
from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.core.routes import all_routes, passing, widest_routes
from flashtrace_plugin.errors import CostWarning
from flashtrace_plugin.graph import hops
from flashtrace_plugin.methods.base import Method
from tests.tiny import random_ids, tiny, tiny_tokenizer

IDS = random_ids(40, seed=4)
SPANS = {"prompt_length": 14, "target": Span(31, 36), "reasoning": Span(17, 29)}
UNITS = {"unit": [Span(0, 5), Span(5, 13)], "step_unit": [Span(18, 22), Span(22, 23), Span(25, 28)]}
PROMPT = "v55 v20 ; the grass is green . v7 84 ; v20 12 ; v3 9 ; ? v55 think"
GENERATION = "<think> v55 v20 ; v20 12 ; </think> 12"
CHAT = "The box is red. The key is in the box.", "<think>\nThe box is red. So look there.\n</think>\nIt is in the box."


def tokens(span: Span) -> list[Span]:
    return [Span(i, i + 1) for i in span]


def random_shares(sources: int, steps: int, seed: int) -> torch.Tensor:
    """Rows that add up to 1, some of them with edges of 0."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(steps + 1, sources + steps, generator=generator, dtype=torch.float64) ** 3
    shares *= torch.rand(shares.shape, generator=generator) > 0.2
    shares[:, 0] += 0.01
    shares = shares.tril(sources - 1)
    return shares / shares.sum(1, keepdim=True)


def as_networkx(shares: torch.Tensor, sources: int) -> nx.DiGraph:
    graph = nx.DiGraph()
    for v, u in shares.nonzero().tolist():
        graph.add_edge(v + sources, u, weight=-math.log(float(shares[v, u])))
    for u in range(sources):
        graph.add_edge(u, "end", weight=0.0)
    return graph


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 10**6))
def test_the_closed_form_is_the_sum_over_all_routes_and_the_widest_are_shortest_paths(sources, steps, seed):
    shares = random_shares(sources, steps, seed)
    graph = as_networkx(shares, sources)
    paths = list(nx.all_simple_paths(graph, sources + steps, "end"))
    widths = [math.exp(-nx.path_weight(graph, path, "weight")) for path in paths]
    summed, through = torch.zeros(sources), torch.zeros(steps)
    for path, width in zip(paths, widths, strict=True):
        summed[path[-2]] += width
        for step in path[1:-2]:
            through[step - sources] += width
    torch.testing.assert_close(all_routes(shares)[-1].float(), summed)
    torch.testing.assert_close(passing(shares).float(), through)
    found = widest_routes(shares, 3)[-1]
    shortest = nx.shortest_simple_paths(graph, sources + steps, "end", "weight")
    for (width, nodes), path in zip(found, shortest, strict=False):
        assert width == pytest.approx(math.exp(-nx.path_weight(graph, path, "weight")))
        assert width == pytest.approx(math.exp(-nx.path_weight(graph, [*nodes, "end"], "weight")))
    assert len(found) == min(3, len(paths))


@pytest.mark.parametrize("positions", ["token", "predicting"])
@pytest.mark.parametrize("target", [Span(31, 36), Span(33, 34)])
def test_with_tokens_as_units_it_is_the_exhaustive_recursion(positions, target):
    model, spans = tiny("qwen3"), SPANS | {"target": target}
    units = {"unit": tokens(Span(0, 14)), "step_unit": tokens(SPANS["reasoning"])}
    once = RecursiveAttribution(model, hops=float("inf"), positions=positions).attribute_ids(IDS, **spans)
    graph = RecursiveAttribution(model, positions=positions).graph_ids(IDS, **spans, **units)
    torch.testing.assert_close(graph.scores.float(), once.scores, rtol=1e-5, atol=1e-6)
    if len(target) == 1:  # FlashTrace takes a longer target as one vector, the other takes the mean of its rows
        graph = FlashTrace(model, positions=positions).graph_ids(IDS, **spans, **units)
        torch.testing.assert_close(graph.scores.float(), once.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [FlashTrace, IFR, RecursiveAttribution, ALTI, LRP, Recommended])
def test_mass_adds_up(method):
    graph = method(tiny("llama")).graph_ids(IDS, **SPANS, **UNITS)
    assert [unit.kind for unit in graph.steps] == ["rest", "span", "span", "rest", "span", "rest"]
    assert graph.shares.shape == (7, 3 + 6) and torch.equal(graph.shares, graph.shares.tril(2))
    torch.testing.assert_close(graph.shares.sum(1) + graph.outside, torch.ones(7, dtype=torch.float64))
    assert bool((graph.inside >= 0).all()) and bool((graph.outside > 0).all()) and graph.closure_error < 1e-4
    assert float(graph.tokens.sum()) == pytest.approx(14 + 12 + 5)
    ends = passing(graph.shares) @ graph.outside[:-1] + graph.outside[-1]
    assert float(graph.lost[-1]) == pytest.approx(float(ends))
    assert float(graph.scores.sum() + (1 - graph.inside[-1]) * graph.lost[-1] + graph.inside[-1]) == pytest.approx(1)
    assert graph.settings["hops"] == "inf" and graph.settings["unit"] == "list"


@pytest.mark.parametrize("method", [FlashTrace, ALTI, LRP])
def test_a_row_is_what_a_hop_of_its_own_finds(method):
    model = tiny("llama")
    graph = method(model).graph_ids(IDS, **SPANS, **UNITS)
    step = method(model, hops=0).attribute_ids(IDS, prompt_length=14, target=Span(22, 23)).hop_scores[0]
    mass = torch.stack([step[0:5].sum(), step[5:13].sum(), step[13:14].sum(), step[17:18].sum(), step[18:22].sum()])
    torch.testing.assert_close(graph.shares[2, :5].float(), mass / (step.sum() - step[22]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(graph.inside[2].float(), step[22] / step.sum(), rtol=1e-4, atol=1e-6)


def test_a_matrix_has_a_graph_and_ignored_tokens_are_left_out():
    matrix = (0.1 + torch.rand(40, 40, generator=torch.Generator().manual_seed(1))).tril()
    graph = Recursive(matrix, ignore=[int(IDS[19]), int(IDS[22])]).graph_ids(IDS, **SPANS, **UNITS)
    assert graph.shares.shape == (7, 9)
    assert bool((graph.shares[:, 5] == 0).all()), "nothing rests on a step that is left out"
    assert bool((graph.shares[2] == 0).all()) and float(graph.inside[2] + graph.outside[2]) == 0
    rows = matrix * torch.tensor([i not in (19, 22) for i in range(40)])
    rows = rows / rows.sum(1, keepdim=True)
    row = rows[[18, 20, 21]].mean(0)
    expected = torch.stack([row[:5].sum(), row[5:13].sum(), row[13], row[17]]) / row[:18].sum()
    torch.testing.assert_close(graph.shares[1, :4].float(), expected)


def test_sinks_are_left_out_or_told():
    model = tiny("llama", bos_token_id=int(IDS[0]))
    for sinks in ("report", "drop"):
        graph = FlashTrace(model, sinks=sinks).graph_ids(IDS, **SPANS, unit=tokens(Span(0, 14)))
        found = FlashTrace(model, sinks=sinks, hops=0).attribute_ids(IDS, **SPANS)
        for name in ("sink_share", "sink_positions"):
            assert graph.settings[name] == pytest.approx(found.settings[name])
        dropped = found.settings["sink_positions"] if sinks == "drop" else []
        assert all(float(graph.shares[:, i].sum()) == 0 for i in dropped)


def test_units_of_a_text_and_a_split_token():
    prompt, generation = CHAT
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    method = FlashTrace(model, tokenizer)
    graph = method.graph(prompt, generation, unit="sentence")
    assert [u.text for u in graph.sources] == ["The box is red.", "The key is in the box."]
    assert [u.text for u in graph.steps] == ["The box is red.", "So look there."]
    assert graph.answer.text == "It is in the box."
    assert graph.nodes == (*graph.sources, *graph.steps, graph.answer)
    begin = len(prompt) + generation.index("The")
    halves = [(begin, begin + 2), (begin + 2, begin + 9)]  # " The" is one token
    split = method.graph(prompt, generation, step_unit=halves)
    torch.testing.assert_close(split.shares.sum(1) + split.outside, torch.ones(4, dtype=torch.float64))
    assert float(split.tokens.sum()) == pytest.approx(float(graph.tokens.sum()))
    documents = method.graph(prompt, generation, unit={"box": "The box is red."}, step_unit=str.splitlines)
    assert [u.kind for u in documents.sources] == ["document", "rest"] and len(documents.steps) == 1


def test_without_reasoning_and_with_one_unit():
    graph = FlashTrace(tiny("llama")).graph_ids(IDS, prompt_length=14, target=Span(20, 22), unit=[Span(0, 14)])
    assert graph.steps == () and graph.shares.shape == (1, 1) and graph.unused() == []
    assert graph.importance.shape == (0,) and graph.reasoning is None
    assert [route.nodes for route in graph.routes()] == [(1, 0)]
    assert float(graph.lost[-1]) == pytest.approx(float(graph.outside[-1]))
    assert Graph.from_dict(graph.to_dict()) == graph


def test_a_target_inside_the_reasoning_rests_on_the_steps_before_it():
    graph = FlashTrace(tiny("llama")).graph_ids(
        IDS,
        prompt_length=14,
        target=Span(24, 27),
        reasoning=Span(17, 24),
        unit=[Span(0, 14)],
        step_unit=tokens(Span(17, 24)),
    )
    assert len(graph.steps) == 7 and graph.target == Span(24, 27)


@pytest.fixture(scope="module")
def chain() -> Graph:
    return LRP(*reasoner.load()).graph(PROMPT, GENERATION, unit="step")


def test_the_widest_route_of_a_chain_is_the_chain(chain):
    best = chain.routes(1)[0]
    assert [unit.text for unit in best.units] == ["12", "v20 12 ;", "v20 12 ;"]
    assert str(best) == f"{best.weight:.3f}  12 <- v20 12 ; <- prompt: v20 12 ;"
    assert best.nodes == (8, 7, 3)
    first = next(i for i, unit in enumerate(chain.sources) if unit.text == "v55 v20 ;")
    assert chain.routes(1, step=0, source=first)[0].nodes == (6, first)
    assert [route.nodes[1:-1] for route in chain.routes(1, source=first)] == [(7, 6)]
    every = chain.routes(50, source=first)
    assert sum(route.weight for route in every) == pytest.approx(float(chain.totals[-1, first]))
    assert [one.unit.text for one in chain.by_source(1).top(1)] in (["v20 12 ;"], ["? v55 think"])
    assert chain.top(1)[0].share == pytest.approx(float(chain.scores.max() / chain.scores.sum()))


def test_steps_for_another_question_are_unused():
    prompt = "v55 v20 ; v7 84 ; the grass is green . v20 12 ; v3 v7 ; ? v55 v3 think"
    generation = "<think> v55 v20 ; v20 12 ; v3 v7 ; v7 84 ; </think> 12 84"
    method = Recommended(*reasoner.load())
    for target, others in ((-2, [2, 3]), (-1, [0, 1])):
        graph = method.graph(prompt, generation, target=target, unit="step")
        assert graph.unused() == others
        assert graph.unused(math.inf) == [0, 1, 2, 3] and graph.unused(0) == []
        assert float(graph.use @ graph.tokens[-5:-1] / graph.tokens[-5:-1].sum()) == pytest.approx(1)


def test_files(chain, tmp_path):
    path = tmp_path / "graph.json"
    chain.save(path)
    loaded = Graph.load(path)
    assert loaded == chain and torch.equal(loaded.shares, chain.shares) and loaded.sources == chain.sources
    assert loaded != "graph"
    frame = chain.to_frame()
    assert list(frame.columns) == ["node", "on", "share", "text", "on_text"] and len(frame) == len(chain.edges())
    drawn = chain.to_networkx(at_least=0.05)
    assert nx.is_directed_acyclic_graph(drawn) and drawn.number_of_nodes() == 9
    assert min(share for *_, share in drawn.edges(data="share")) >= 0.05
    assert drawn.nodes[7] == {"part": "step", "kind": "step", "name": "", "text": "v20 12 ;"} | {
        "score": float(chain.importance[1])
    }
    chain.to_graphml(tmp_path / "graph.graphml")
    assert nx.read_graphml(tmp_path / "graph.graphml").number_of_edges() == len(chain.edges())
    assert "Graph(lrp, 6 sources, 2 steps, answer '12'; top: " in repr(chain)


def test_text_is_inert_in_files(tmp_path):
    nasty = 'a "b" \\N <script>\x00</script> box.'
    graph = FlashTrace(tiny("llama"), tiny_tokenizer()).graph(nasty, CHAT[1], unit="word")
    dot = graph.to_dot(at_least=0.0)
    assert '\\"b\\"' in dot and "\\\\N" in dot and "\x00" not in dot
    assert dot.count(" -> ") == len(graph.edges())
    graph.to_graphml(tmp_path / "graph.graphml")
    assert len(nx.read_graphml(tmp_path / "graph.graphml")) == len(graph.nodes)
    graph.to_html(tmp_path / "graph.html")
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "\x00" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_page_shows_answer_steps_and_routes(chain, tmp_path):
    chain.to_html(tmp_path / "graph.html")
    page = (tmp_path / "graph.html").read_text(encoding="utf-8")
    assert page.index("Widest routes") < page.index("Answer: ") < page.index("Step 2: ") < page.index("Step 1: ")
    for i in range(len(chain.nodes)):
        assert page.count(f'id="n{i}"') == 1


@pytest.mark.parametrize("damage", [{"format": "other"}, {"shares": None}, {"sources": [{"kind": 1}]}])
def test_files_that_are_no_graph(chain, tmp_path, damage):
    with pytest.raises(InputError, match="the graph lacks sources, steps"):
        Graph.from_dict({"format": "flashtrace-graph/1"})
    path = tmp_path / "graph.json"
    for text in ("{", "[]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"Graph\.save"):
            Graph.load(path)
    path.write_text(json.dumps(chain.to_dict() | damage), encoding="utf-8")
    with pytest.raises(InputError):
        Graph.load(path)


def test_too_many_steps_are_refused_and_many_are_told(monkeypatch):
    method = FlashTrace(tiny("llama"))
    units = {"unit": [Span(0, 14)], "step_unit": tokens(SPANS["reasoning"])}
    with pytest.raises(InputError, match="12 steps take one hop each, about 0 s here, and are more than max_units=11"):
        method.graph_ids(IDS, **SPANS, **units, max_units=11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.graph_ids(IDS, **SPANS, **units, max_units=12)
    monkeypatch.setattr(hops, "_MANY", 11)
    with pytest.warns(CostWarning, match="12 steps take one hop each"):
        method.graph_ids(IDS, **SPANS, **units)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_units": 0}, "max_units must be a whole number >= 1"),
        ({"step_unit": [Span(16, 20)]}, "before the reasoning, which begins at"),
        ({"step_unit": [Span(17, 20), Span(19, 22)]}, "overlap"),
        ({"step_unit": [(70, 70)]}, "empty or outside"),
        ({"step_unit": "chapter"}, "units must be one of"),
        ({"unit": [Span(0, 20)]}, "the unit 0:20 ends after the last of 14 tokens"),
    ],
)
def test_bad_units(options, message):
    with pytest.raises(FlashTraceError, match=message):
        FlashTrace(tiny("llama")).graph_ids(IDS, **SPANS, **options)


def test_questions_that_have_no_answer(chain):
    for call, message in (
        (lambda: chain.routes(0), "k must be"),
        (lambda: chain.routes(source=9), "there is no source 9; sources are 0 to 5"),
        (lambda: chain.by_source(2), "there is no step 2; steps are 0 to 1"),
        (lambda: chain.verify(True), "there is no step True"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_methods_that_cannot_be_asked_for_steps():
    with pytest.raises(MethodError, match="the method 'heta' has no graph of steps"):
        HETA(tiny("llama")).graph_ids(IDS, **SPANS)
    with pytest.raises(InputError, match="recursion='generation' says nothing about it"):
        FlashTrace(tiny("llama"), recursion="generation").graph_ids(IDS, **SPANS)


def test_mass_behind_a_step_is_refused():
    class Late(Method):
        name = "late"

        def start(self, task):
            return lambda weights: Hop(torch.arange(40.0) < 31)

    with pytest.raises(MethodError, match="put mass on position"):
        Late(tiny("llama")).graph_ids(IDS, **SPANS)
