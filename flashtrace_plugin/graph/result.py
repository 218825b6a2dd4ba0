"""The graph of reasoning steps as a result: what rests on what, all routes, the widest ones, and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrace_plugin.attribution import OfModel, plain
from flashtrace_plugin.core.routes import all_routes, passing, widest_routes
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.frames import as_frame
from flashtrace_plugin.saved import Saved, read_saved, read_spans, short
from flashtrace_plugin.spans import Span
from flashtrace_plugin.units.scores import Unit, UnitScore, UnitScores

if TYPE_CHECKING:
    import networkx
    import pandas as pd
    from typing_extensions import Unpack

    from flashtrace_plugin.verify import Verification
    from flashtrace_plugin.verify.run import VerifyOptions

_FORMAT = "flashtrace-graph/1"
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Route:
    """A way from a step or the answer to a source: ``nodes`` count sources, steps and answer, ``units`` are theirs.

    weight: product of the shares along it; the routes of a node to all sources add up to what it rests on in all
    """

    weight: float
    nodes: tuple[int, ...]
    units: tuple[Unit, ...]

    def __str__(self) -> str:
        texts = [" ".join(unit.text.split()) for unit in self.units]
        return f"{self.weight:.3f}  " + " <- ".join([*texts[:-1], f"prompt: {texts[-1]}"])


@dataclass(frozen=True, eq=False)
class Graph(OfModel):
    """S sources, which are units of the prompt, R steps, which are units of the reasoning, and the answer.

    Nodes are counted in this order: sources 0 … S-1, steps S … S+R-1, the answer S+R. Tensors are float64, on the CPU.

    sources:  S units; the template's and the rest come last
    steps:    R units in the order of the text; what lies between the caller's units is a step of kind "rest"
    answer:   the target
    shares:   [R+1, S+R]  what each step, and last the answer, rests on directly: one hop, less what lies inside
              itself. A row and its ``outside`` add up to 1; both are 0 for a step that rests on nothing but itself
    inside:   [R+1]       share of the hop's mass that lies on the step itself, or on the answer itself
    outside:  [R+1]       share of what is left that lies on generated text of neither reasoning nor target
    tokens:   [S+R+1]     tokens of each node; a token that two nodes share counts in parts
    pieces:   N pieces of text, one for each token
    token_ids: N ids
    prompt, reasoning, target: spans of token positions; reasoning is None if there is none
    method, settings: what was run
    closure_error: largest relative gap between the parts read from the model and the whole, over all hops
    """

    sources: tuple[Unit, ...]
    steps: tuple[Unit, ...]
    answer: Unit
    shares: Tensor
    inside: Tensor
    outside: Tensor
    tokens: Tensor
    pieces: tuple[str, ...]
    token_ids: tuple[int, ...]
    prompt: Span
    reasoning: Span | None
    target: Span
    method: str
    closure_error: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[Unit, ...]:
        """Sources, steps and the answer."""
        return (*self.sources, *self.steps, self.answer)

    @cached_property
    def totals(self) -> Tensor:
        """What each step, and last the answer, rests on by all routes; with :attr:`lost` it adds up to 1. [R+1, S]"""
        return all_routes(self.shares)

    @property
    def lost(self) -> Tensor:
        """Share that ends elsewhere than on the prompt: on text :attr:`outside`, or on a dead end. [R+1]"""
        return 1 - self.totals.sum(1)

    @property
    def scores(self) -> Tensor:
        """Importance of the sources for the answer by all routes, as all hops of an attribution give it. [S]

        What the answer's hop leaves on the answer itself explains nothing: ``(1 - inside) * totals`` of the answer.
        """
        return (1 - self.inside[-1]) * self.totals[-1]

    @cached_property
    def importance(self) -> Tensor:
        """Share of the answer that passes through each step; may add up to more than 1. [R]"""
        return passing(self.shares)

    @property
    def use(self) -> Tensor:
        """:attr:`importance` relative to an even share: 1 where a step has what its tokens would have alike. [R]"""
        tokens = self.tokens[len(self.sources) : -1]
        even = self.importance.sum() * tokens / tokens.sum()
        return self.importance / torch.where(even > 0, even, torch.inf)

    def unused(self, below: float = 0.1) -> list[int]:
        """Indices of the steps that next to nothing depends on: those whose :attr:`use` is less than ``below``."""
        return [i for i, use in enumerate(self.use.tolist()) if use < below and self.steps[i].content]

    def by_source(self, step: int | None = None) -> UnitScores:
        """What a step, by its index, or the answer rests on among the sources, by all routes.

        Raises InputError for a step that there is not.
        """
        scores = self.scores if step is None else self.totals[self._row(step)]
        return UnitScores(self.sources, scores.float(), self.tokens[: len(self.sources)].float())

    def top(self, k: int = 5) -> list[UnitScore]:
        """The k sources that the answer rests on most, best first, without template and rest."""
        return self.by_source().top(k)

    def routes(self, k: int = 5, *, step: int | None = None, source: int | None = None) -> list[Route]:
        """The k widest routes, those with the largest product of shares, widest first.

        step:   where they begin, by index; by default at the answer
        source: where they end, by index; by default at any source but template and rest

        Raises InputError for a step or source that there is not.
        """
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k must be a whole number of routes >= 1, got {k!r}")
        wanted = [s == source if source is not None else unit.content for s, unit in enumerate(self.sources)]
        if source is not None and not any(wanted):
            raise InputError(f"there is no source {source}; sources are 0 to {len(self.sources) - 1}")
        row = self._row(step)
        shares = self.shares * torch.tensor([*wanted, *[True] * len(self.steps)])
        return [Route(w, nodes, tuple(self.nodes[n] for n in nodes)) for w, nodes in widest_routes(shares, k)[row]]

    def _row(self, step: int | None) -> int:
        if step is None:
            return len(self.steps)
        if type(step) is not int or not 0 <= step < len(self.steps):
            known = f"0 to {len(self.steps) - 1}" if self.steps else "none"
            raise InputError(f"there is no step {step!r}; steps are {known}, and None is the answer")
        return step

    def verify(self, step: int | None = None, model: object = None, **options: Unpack[VerifyOptions]) -> Verification:
        """Replaces what a step, by its index, or the answer rests on directly, and watches its log P fall.

        The units that are replaced are the sources and the earlier steps, all else stays; ``model`` and the options
        are those of :meth:`flashtrace_plugin.Attribution.verify`. Raises InputError as that does, and for a step that
        there is not.
        """
        from flashtrace_plugin.verify.run import verify_step

        return verify_step(self, self._row(step), model, **options)

    def to_frame(self) -> pd.DataFrame:
        """A row for each edge, from what rests on something to what that is: node, on, share, text, on_text.

        Raises InputError without pandas.
        """
        columns = ("node", "on", "share", "text", "on_text")
        texts = [unit.text for unit in self.nodes]
        return as_frame([(v, u, s, texts[v], texts[u]) for v, u, s in self.edges()], columns)

    def edges(self, at_least: float = 0.0) -> list[tuple[int, int, float]]:
        """Edges with mass: node, the earlier node that it rests on directly, and the share; only shares as large."""
        return [
            (len(self.sources) + v, u, float(self.shares[v, u]))
            for v, u in self.shares.nonzero().tolist()
            if self.shares[v, u] >= at_least
        ]

    def to_networkx(self, at_least: float = 0.0) -> networkx.DiGraph:
        """All nodes, and edges of at least this share from what rests on something to what that is.

        A node has ``part`` ("source", "step" or "answer"), ``kind``, ``name``, ``text`` and ``score``, its share of
        the answer (:attr:`importance` of a step, :attr:`totals` of a source); an edge has ``share``.
        """
        import networkx as nx

        graph = nx.DiGraph(method=self.method)
        parts = ["source"] * len(self.sources) + ["step"] * len(self.steps) + ["answer"]
        scores = [*self.totals[-1].tolist(), *self.importance.tolist(), 1.0]
        for i, (unit, part, score) in enumerate(zip(self.nodes, parts, scores, strict=True)):
            graph.add_node(i, part=part, kind=unit.kind, name=unit.name, text=unit.text, score=score)
        graph.add_weighted_edges_from(self.edges(at_least), weight="share")
        return graph

    def to_graphml(self, path: str | Path, at_least: float = 0.0) -> None:
        """Writes :meth:`to_networkx` for programs such as Gephi or yEd; what XML cannot hold becomes visible."""
        from flashtrace_plugin.graph.files import write_graphml

        write_graphml(self.to_networkx(at_least), path)

    def to_dot(self, at_least: float = 0.01) -> str:
        """The graph in Graphviz' language, the answer on top; edges of a smaller share are left out."""
        from flashtrace_plugin.graph.files import as_dot

        return as_dot(self.to_networkx(at_least))

    def to_html(self, path: str | Path) -> None:
        """Writes a page that opens in any browser without a network: the answer, every step, and the widest routes."""
        from flashtrace_plugin.graph.files import as_page

        Path(path).write_text(as_page(self), encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        units = {"answer": asdict(self.answer)} | {n: [asdict(u) for u in values[n]] for n in ("sources", "steps")}
        return {"format": _FORMAT} | {name: plain(value) for name, value in (values | units).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Graph:
        """The inverse of :meth:`to_dict`. Raises InputError for anything else."""
        needed = [f.name for f in fields(cls) if f.default_factory is MISSING]
        saved = Saved.opened(data, "a graph", _FORMAT, needed)
        pieces = saved.texts("pieces")
        length = len("".join(pieces))
        sources, steps = (tuple(_unit(saved, n, one, length) for one in saved.items(n)) for n in ("sources", "steps"))
        rows = len(steps) + 1
        return cls(
            sources=sources,
            steps=steps,
            answer=_unit(saved, "answer", data["answer"], length),
            shares=_shares(saved, len(sources), rows),
            inside=saved.tensor("inside", (rows,), torch.float64),
            outside=saved.tensor("outside", (rows,), torch.float64),
            tokens=saved.tensor("tokens", (len(sources) + rows,), torch.float64),
            pieces=pieces,
            token_ids=saved.ids("token_ids", len(pieces)),
            **read_spans(saved, len(pieces)),
            method=saved.text("method", data["method"]),
            closure_error=saved.number("closure_error", 0.0),
            settings=saved.plain("settings") if "settings" in data else {},
        )

    def save(self, path: str | Path) -> None:
        """Writes JSON. Numbers survive exactly, and :meth:`load` gives an equal object."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Reads what :meth:`save` wrote. Raises InputError for another kind of file."""
        return cls.from_dict(read_saved(path, "Graph.save"))

    def _repr_html_(self) -> str:
        from flashtrace_plugin.report.displays import number, share, table, text

        title = f"What “{self.answer.text}” rests on: {len(self.sources)} sources, {len(self.steps)} steps"
        sources = table(title, {"share": share, "source": text}, [(one.share, one.unit.text) for one in self.top(5)])
        routes = [(one.weight, " ← ".join(unit.text for unit in one.units)) for one in self.routes(3)]
        return sources + table("Widest routes", {"weight": number, "route": text}, routes)

    def __repr__(self) -> str:
        best = ", ".join(f"{one.unit.text[:40]!r} {one.share:.1%}" for one in self.top(3))
        counts = f"{len(self.sources)} sources, {len(self.steps)} steps"
        return f"Graph({self.method}, {counts}, answer {self.answer.text[:40]!r}; top: {best})"


def _shares(saved: Saved, sources: int, rows: int) -> Tensor:
    """What each step, and last the answer, rests on: nothing that comes after it, and no more than all of it."""
    found = saved.tensor("shares", (rows, sources + rows - 1), torch.float64)
    if bool(found[:, sources:].triu().any()):
        raise saved.wrong("shares", "lets a step rest on itself or on a later one")
    most = float(found.sum(1).max())
    if most > 1 + _ROUNDING:
        raise saved.wrong("shares", f"has a row that adds up to {most:.3g}, more than 1")
    return found


def _unit(saved: Saved, name: str, value: Any, length: int) -> Unit:
    """A unit of a text of so many characters."""
    if not isinstance(value, dict) or value.keys() != {f.name for f in fields(Unit)}:
        raise saved.wrong(name, f"holds {short(value)}, not a unit")
    kind, text, called = (saved.text(name, value[key]) for key in ("kind", "text", "name"))
    message = None if value["message"] is None else saved.whole(name, value["message"])
    inner = Saved(value, f"graph's {name}")
    pairs = [Saved({"ranges": pair}, inner.what).ids("ranges", 2, length + 1) for pair in inner.items("ranges")]
    return Unit(kind, text, tuple((a, b) for a, b in pairs), called, message)
