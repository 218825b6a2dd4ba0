"""The result of an attribution: numbers, tokens, spans and settings, saved and loaded without loss."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.components import final_stream_shares
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.frames import as_frame
from flashtrace_plugin.images import ImageTokens, overlay
from flashtrace_plugin.saved import Saved, read_contents, read_images, read_saved, read_spans, short
from flashtrace_plugin.spans import Span
from flashtrace_plugin.units.contents import Content
from flashtrace_plugin.units.scores import Units, UnitScores, find_units, score_units

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image
    from typing_extensions import Unpack

    from flashtrace_plugin.report.html import ReportOptions
    from flashtrace_plugin.verify import Verification
    from flashtrace_plugin.verify.run import VerifyOptions

_FORMAT = "flashtrace-attribution/1"


class TokenScore(NamedTuple):
    """One token of the prompt with its score."""

    position: int
    token: str
    score: float


class OfModel:
    """A result that knows the model it explains, as long as others keep that; copies and files do not know it."""

    def remember(self, model: object) -> None:
        """Keeps a weak reference to the model, if there is one."""
        object.__setattr__(self, "_model", None if model is None else weakref.ref(model))

    @property
    def model(self) -> Any:
        """The model that was explained, or None where it is not known or gone."""
        reference = vars(self).get("_model")
        return None if reference is None else reference()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_model"}


@dataclass(frozen=True, eq=False)
class Attribution(OfModel):
    """Importance of the prompt's tokens for the target. All tensors are float32, on the CPU and detached.

    scores:          [prompt_length]   importance of each prompt token
    hop_scores:      [hops+1, N]       alpha_k over all positions: how mass moves from reasoning to prompt
    reasoning_mass:  [hops+1]          rho_k, share of hop k's mass that lies on the reasoning (Eq. 11/23)
    head_scores:     [hops+1, L, H]    share of each head
    residual_shares: [hops+1, L]       share of the residual bypass
    mlp_shares:      [hops+1, L]       share of the MLP in the layer's output (Eq. 21)
    components:      parts by name; HETA: gate, curvature, information; IFR: per_token [M, N]
    tokens:          N pieces of text
    token_ids:       N ids
    prompt, reasoning, target: spans of token positions; reasoning is None if there is none
    method, settings: what was run
    closure_error:   largest relative gap between the parts read from the model and the whole
    contents:        where contents are in the prompt's visible text; what lies between is the chat template's
    messages:        how many messages the prompt had; 0 for a text
    images:          where images are among the prompt's tokens, and the grids of patches that these are
    """

    scores: Tensor
    hop_scores: Tensor
    reasoning_mass: Tensor
    head_scores: Tensor
    residual_shares: Tensor
    mlp_shares: Tensor
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    prompt: Span
    reasoning: Span | None
    target: Span
    method: str
    closure_error: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, Tensor] = field(default_factory=dict)
    contents: tuple[Content, ...] = ()
    messages: int = 0
    images: tuple[ImageTokens, ...] = ()

    @property
    def hops(self) -> int:
        """Number of hops through the reasoning that were asked for."""
        return len(self.hop_scores) - 1

    @property
    def hop_weights(self) -> Tensor:
        """How much importance reaches each hop, prod_{m<k} rho_m: its weight in the total (Eq. 12/24). [hops+1]"""
        return torch.cat([self.reasoning_mass.new_ones(1), self.reasoning_mass[:-1]]).cumprod(0)

    @property
    def totals(self) -> Tensor:
        """Accumulated importance of every position, on the scale of ``scores``, which are its prompt part: [N]::

            sum_k ( prod_{m<k} rho_m ) alpha_k            Eq. 12/24, for all positions

        What lies on the reasoning counts again on the prompt it is passed on to, so totals do not add up to 1.
        """
        totals = self.hop_weights @ self.hop_scores
        prompt = totals[self.prompt.slice].sum()
        totals = totals * (self.scores.sum() / prompt) if prompt > 0 else totals  # Eq. 31 renormalises IFR's prompt
        totals[self.prompt.slice] = self.scores
        return totals

    @property
    def source_totals(self) -> Tensor:
        """:attr:`totals` without the reasoning that was followed: its mass counts on what it came from. [N]"""
        totals = self.totals
        if self.hops and self.reasoning is not None:
            totals[self.reasoning.slice] = 0.0
        return totals

    @property
    def stream_shares(self) -> Tensor:
        """Shares of the final residual stream by who wrote it: embeddings, then attention and MLP layer by layer.

        result: [hops+1, 1 + 2 L], or [hops+1, 1 + 3 L] where something else changed the stream, which then has shares
        of its own (``components["edit_shares"]`` [hops+1, L]: of the layers' outputs); [hops+1, 0] for a method that
        divides no residual stream. A hop that was not run, for nothing reached it, is 0. See
        :func:`~flashtrace_plugin.core.flow.components.final_stream_shares`.
        """
        residual, mlp = self.residual_shares, self.mlp_shares
        if not residual.any() or residual.shape != mlp.shape:
            return residual.new_zeros(len(residual), 0)
        return final_stream_shares(residual, mlp, self.components.get("edit_shares")) * residual.any(1, keepdim=True)

    @property
    def sinks(self) -> tuple[int, ...]:
        """Positions that draw mass whatever the target, known with ``sinks="report"`` or ``"drop"``."""
        return tuple(self.settings.get("sink_positions", ()))

    @property
    def scores_without_sinks(self) -> Tensor:
        """:attr:`scores` with 0 at the sinks: what is shown. [prompt_length]"""
        return self.scores.index_fill(0, torch.tensor(self.sinks, dtype=torch.long), 0.0)

    def top(self, k: int = 10) -> list[TokenScore]:
        """The k highest-scoring prompt tokens without :attr:`sinks`, best first; ties in the order of the text."""
        order = self.scores.argsort(descending=True, stable=True).tolist()
        best = [i for i in order if i not in self.sinks][:k]
        return [TokenScore(i, self.tokens[i], float(self.scores[i])) for i in best]

    def by(self, units: Units, *, part: str = "prompt") -> UnitScores:
        """Mass over units of text, adding up to that of the tokens::

            attribution.by("sentence").top(3)
            attribution.by({"contract": contract, "mail": mail}).to_frame()
            attribution.by("step", part="reasoning")

        units: "word", "line", "sentence", "paragraph", "step" (sentences and clauses between semicolons), "message",
               "image"; a splitter; documents by name, which stand in the prompt word for word; or ranges of
               characters of the visible text, or Spans of tokens. The visible text is that of all tokens, special
               ones by their names
        part:  "prompt", whose mass is :attr:`scores`, or "reasoning", whose mass is :attr:`totals`

        Every image is a unit of its own beside those asked for; with units="image" all text is of kind "rest". What
        the chat template or the tokenizer put into the prompt is a unit of kind "template", contents outside of
        the caller's units one of kind "rest", and the mass of :attr:`sinks` that of one of kind "sinks". Raises
        InputError for units that overlap, cut a character or are not there.
        """
        if part not in ("prompt", "reasoning"):
            raise InputError(f"part must be 'prompt' or 'reasoning', got {part!r}")
        where = self.prompt if part == "prompt" else self.reasoning
        if where is None:
            raise InputError("there is no reasoning whose units could be told apart; pass reasoning=... to attribute")
        text, begin = "".join(self.tokens[: where.stop]), len("".join(self.tokens[: where.start]))
        if part == "prompt":
            contents = self.contents or (Content(0, len(text)),)
            found = find_units(units, self.tokens[: where.stop], contents, self.messages, self.images)
            return score_units(found, self.tokens, self.scores, sinks=self.sinks)
        found = find_units(units, self.tokens[: where.stop], (Content(begin, len(text)),))
        inside = [unit for unit in found if unit.ranges[-1][1] > begin]
        return score_units(inside, self.tokens, self.totals[where.slice], where.start)

    def patches(self, index: int = 0, *, grid: Sequence[int] | None = None) -> Tensor:
        """Scores of an image's patches as a picture: [rows, columns], or [frames, rows, columns] of a video.

        index: of the image, in the order of the text
        grid:  the same in numbers, where it is not known for this model

        Raises InputError for an image that is not there, and where its tokens are no grid.
        """
        if not -len(self.images) <= index < len(self.images):
            raise InputError(f"there are {len(self.images)} images, so there is no image {index}; they count from 0")
        return self.images[index].patches(self.scores, grid)

    def overlay(
        self, image: Image, index: int = 0, *, grid: Sequence[int] | None = None, strength: float = 0.75
    ) -> Image:
        """The image in grey, with a warm veil over the patches that matter: a PIL image.

        image:       as the processor cut it, of any size
        index, grid: as for :meth:`patches`
        strength:    of the veil over the highest score, above 0 and at most 1
        """
        return overlay(self.patches(index, grid=grid), image, strength=strength)

    def verify(
        self,
        model: object = None,
        *,
        unit: Units = "sentence",
        through: str | None = None,
        **options: Unpack[VerifyOptions],
    ) -> Verification:
        """Replaces what the explanation names in the prompt, and watches log P of what the model wrote fall.

        model:       that was explained; known where the attribution was made in this process, as long as it lives
        unit:        what is replaced as a whole, as for :meth:`by`; all else of the prompt stays as it is
        through:     what is watched: "target", given all between prompt and target as it was, or "reasoning": all
                     that was generated up to the target's end. By default the latter where hops followed a reasoning
        fractions:   shares of the units that are replaced, best first, by default (0.05, 0.1, 0.2); at least one unit
        draws:       random choices of as many tokens of the other units to compare with, by default 8
        replacement: id put in the place of each token; by default the model's pad token, or its end token
        seed:        of the random choices
        batch_size:  rows per forward pass; by default as many as memory for the logits allows

        See docs/verify.md for the rule by which it holds. Raises InputError for a model that is unknown or of another
        family, and where no random choice of equal length is left; warns with ModelWarning for one of another name.
        """
        from flashtrace_plugin.verify.run import verify_attribution

        found = verify_attribution(self, model, unit=unit, through=through, **options)
        object.__setattr__(self, "_verified", found)
        return found

    @property
    def verified(self) -> Verification | None:
        """What :meth:`verify` found last, for reports; None where it was not run. Files do not keep it."""
        return vars(self).get("_verified")

    def text(self, span: Span) -> str:
        """The text of a span."""
        return "".join(self.tokens[span.slice])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Attribution):
            return False
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return {"format": _FORMAT} | {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Attribution:
        """The inverse of :meth:`to_dict`. Raises InputError for anything else, such as fields that contradict."""
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        saved = Saved.opened(data, "an attribution", _FORMAT, [*needed, "settings", "components"])
        tokens = saved.texts("tokens")
        spans = read_spans(saved, len(tokens))
        hop_scores = saved.tensor("hop_scores", (None, len(tokens)))
        prompt, hops = len(spans["prompt"]), len(hop_scores)
        heads, residual, mlp = _read_shares(saved, hops)
        return cls(
            scores=saved.tensor("scores", (prompt,)),
            hop_scores=hop_scores,
            reasoning_mass=saved.tensor("reasoning_mass", (hops,)),
            head_scores=heads,
            residual_shares=residual,
            mlp_shares=mlp,
            tokens=tokens,
            token_ids=saved.ids("token_ids", len(tokens)),
            **spans,
            method=saved.text("method", data["method"]),
            closure_error=saved.number("closure_error", 0.0),
            settings=_read_settings(saved, prompt),
            components=_read_components(saved, hops, len(tokens), len(spans["target"])),
            **read_contents(saved, len("".join(tokens[:prompt]))),
            images=read_images(saved, prompt),
        )

    def save(self, path: str | Path) -> None:
        """Writes JSON. float32 numbers survive exactly, and :meth:`load` gives an equal object."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Reads what :meth:`save` wrote. Raises InputError for another kind of file."""
        return cls.from_dict(read_saved(path, "Attribution.save"))

    def to_frame(self) -> pd.DataFrame:
        """A row for each position: token, part, score (nan behind the prompt), total, sink, and hop_0 … hop_K.

        Raises InputError without pandas.
        """
        count = len(self.tokens)
        spans = {"prompt": self.prompt, "reasoning": self.reasoning, "target": self.target}
        part = [next((n for n, span in spans.items() if span is not None and i in span), "") for i in range(count)]
        columns: dict[str, Any] = {
            "token": self.tokens,
            "part": part,
            "score": [*self.scores.tolist(), *[float("nan")] * (count - len(self.scores))],
            "total": self.totals.tolist(),
            "sink": [i in self.sinks for i in range(count)],
        }
        hops = {f"hop_{k}": values.tolist() for k, values in enumerate(self.hop_scores)}
        columns |= hops
        return as_frame(zip(*columns.values(), strict=True), list(columns)).rename_axis("position")

    def plot(self, kind: str = "text", *, ax: Any = None) -> Any:
        """A small figure by matplotlib: along the "text", of the "hops" or of the "heads" by layer. result: its axes

        ax: axes to draw into; by default those of a new figure

        Raises InputError for another kind, without matplotlib, and for heads of a method that has none.
        """
        from flashtrace_plugin.report.plots import plot

        return plot(self, kind, ax=ax)

    def to_html(self, path: str | Path, **options: Unpack[ReportOptions]) -> None:
        """Writes a report that opens in any browser without a network.

        options: ``unit``, ``graph``, ``verification`` and ``evidence``, as for
                 :func:`flashtrace_plugin.report.html.as_html`
        """
        from flashtrace_plugin.report.html import as_html

        Path(path).write_text(as_html(self, **options), encoding="utf-8")

    def _repr_html_(self) -> str:
        from flashtrace_plugin.report.html import as_html

        return as_html(self, fragment=True)

    def __repr__(self) -> str:
        best = ", ".join(f"{t.token.strip()!r} {t.score:.3f}" for t in self.top(5))
        return f"Attribution({self.method}, target {self.text(self.target)!r}, hops {self.hops}; top: {best})"


def generation_rows(per_token: Tensor, target: Span, scores: Tensor) -> Tensor:
    """Importance of the prompt for each token of the generation: NaN where the method did not look.

    per_token: [M, N]    importance of every position for each of the target's M tokens
    scores:    [P]       the prompt's scores, which the rows are scaled to add up to
    result:    [N-P, P]
    """
    start, length = len(scores), per_token.shape[1]
    computed = per_token[:, :start]
    total = computed.sum()
    rows = torch.full((length - start, start), torch.nan, dtype=torch.float32)
    rows[target.start - start : target.stop - start] = computed * (scores.sum() / total) if total > 0 else computed
    return rows


def plain(value: Any) -> Any:
    """A value as JSON has it: spans and slices as ``[start, stop]``, and lists for all else that holds items."""
    if isinstance(value, Tensor):
        # Nested lists cannot tell [2, 0] from [2]; a tensor without numbers is its shape.
        return value.tolist() if value.numel() else {"shape": list(value.shape)}
    if isinstance(value, (Span, slice)):
        return [value.start, value.stop]
    if isinstance(value, (Content, ImageTokens)):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


def _read_shares(saved: Saved, hops: int) -> list[Tensor]:
    """Shares of heads, residual stream and MLP; a method has those of all layers or none."""
    sizes = {"head_scores": (hops, None, None), "residual_shares": (hops, None), "mlp_shares": (hops, None)}
    found = [saved.tensor(name, size, least=-inf) for name, size in sizes.items()]
    layers = {one.shape[1] for one in found if one.numel()}
    if len(layers) > 1:
        raise saved.wrong("head_scores", f"and the other shares are of {', '.join(map(str, layers))} layers")
    if found[1].shape != found[2].shape:
        raise saved.wrong("mlp_shares", f"is of {found[2].shape[1]} layers, residual_shares of {found[1].shape[1]}")
    return found


def _read_settings(saved: Saved, prompt: int) -> dict[str, Any]:
    """Settings; those that results are drawn by are checked."""
    found = saved.plain("settings")
    if "sink_positions" in found:
        facts = Saved({"sink_share": None} | found, "settings")
        facts.ids("sink_positions", stop=prompt)
        facts.number("sink_share", 0.0)
    return found


def _read_components(saved: Saved, hops: int, length: int, target: int) -> dict[str, Tensor]:
    """Components, which may hold numbers that are not finite; those that have a meaning here have their sizes."""
    data = saved.mapping("components")
    known = Saved(data, "components")
    sizes = {"relevance": (length,), "per_token": (target, length), "edit_shares": (hops, None)}
    fixed = {name: known.tensor(name, sizes[name], least=-inf) for name in sizes if name in data}
    return {name: fixed[name] if name in fixed else known.numbers(short(name), data[name]) for name in data}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return plain(a) == plain(b)
