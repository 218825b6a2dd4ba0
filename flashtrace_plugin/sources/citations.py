"""Every sentence of an answer with the documents that it comes from, checked by really taking them away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.likelihood import token_log_likelihood
from flashtrace_plugin.formats import chosen_formats
from flashtrace_plugin.frames import as_frame
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.sources.explainer import explainer
from flashtrace_plugin.spans import Chars, Span
from flashtrace_plugin.text import Prompt, TokenizedText, tokenize
from flashtrace_plugin.units.scores import SINKS, TEMPLATE, UnitScores
from flashtrace_plugin.units.shares import unit_tokens
from flashtrace_plugin.units.split import SPLITTERS, split
from flashtrace_plugin.units.targets import Sentence

if TYPE_CHECKING:
    import pandas as pd

LEAST_EFFECT = 0.5
"""Nats per token of a sentence by which its log P must fall without the documents, else none is its source; see
docs/sources.md for the sentences that it was chosen on."""
_LEAST_SHARE = 0.5
"""Documents are cited that have this part of the largest mass, or of the largest effect of one document."""
_NONE = "no source: from the question or the model's own knowledge"


@dataclass(frozen=True)
class CitedSource:
    """A document as the source of a sentence.

    name:     of the document
    share:    of the sentence's mass on all documents
    sentence: of the document, the one with most of it
    effect:   nats by which replacing this document lowers log P of the sentence; None where that was not tried
    """

    name: str
    share: float
    sentence: str
    effect: float | None


@dataclass(frozen=True)
class Citation:
    """A sentence of the answer with its sources.

    text:      the sentence
    chars:     where it is in the answer
    target:    its tokens
    documents: all documents, those with most mass first
    mass:      share of the sentence's mass on contents that lies on the documents
    relative:  mass per token of the documents, relative to that of all contents; 1 is chance
    log_p:     of the sentence, in nats; with thinking before the answer, of the thinking and the sentence. None where
               no document was replaced
    effect:    nats by which replacing all documents lowers it
    """

    text: str
    chars: Chars
    target: Span
    documents: tuple[CitedSource, ...]
    mass: float
    relative: float
    log_p: float | None
    effect: float | None

    @property
    def supported(self) -> bool:
        """Whether the sentence rests on the documents: without all of them, or without the first, log P falls by
        ``LEAST_EFFECT`` for each token. Where that was not tried: whether they have more mass per token than chance.

        It is no check of what the sentence says: one that only takes up words of a document rests on it as well.
        """
        if self._lost is None:
            return self.relative > 1.0
        return self._lost >= LEAST_EFFECT * len(self.target)

    @property
    def _lost(self) -> float | None:
        """Nats that the documents are worth. Without any a model may fall back on what it knows, and lose less than
        without the first."""
        alone = self.documents[0].effect
        return None if self.effect is None or alone is None else max(self.effect, alone)

    @property
    def sources(self) -> tuple[CitedSource, ...]:
        """The documents to cite, those with most mass first; none if unsupported.

        They have at least half of the largest mass, or of what replacing a single document costs at most.
        """
        least = _LEAST_SHARE * self.documents[0].share
        costly = _LEAST_SHARE * max((one.effect or 0.0 for one in self.documents), default=0.0)
        chosen = (
            one
            for one in self.documents
            if one.share >= least or (one.effect is not None and one.effect >= costly > 0)
        )
        return tuple(chosen) if self.supported else ()

    @property
    def confidence(self) -> float | None:
        """Part of what the documents are worth that the first one has by itself, 0 to 1; None where it was not tried.

        It is low where several documents say the same, because each of them can be spared.
        """
        if self._lost is None:
            return None
        return max((self.documents[0].effect or 0.0) / self._lost, 0.0) if self.supported else 0.0

    def __str__(self) -> str:
        told = [_told(one, self.effect) for one in self.sources] or [_NONE + self._why]
        return "\n".join([" ".join(self.text.split()), *(f"  <- {line}" for line in told)])

    @property
    def _why(self) -> str:
        if self.effect is None:
            return f" (the documents have {self.relative:.1f} times the mass per token of all contents)"
        return f" (without all documents its log P is {abs(self.effect):.1f} nats {_moved(self.effect)})"


@dataclass(frozen=True)
class Citations:
    """The sentences of an answer with their sources, in its order.

    answer:    the text, without reasoning
    documents: by name
    method, settings: what was run
    """

    answer: str
    sentences: tuple[Citation, ...]
    documents: Mapping[str, str]
    method: str
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, index: int) -> Citation:
        return self.sentences[index]

    def __iter__(self) -> Iterator[Citation]:
        return iter(self.sentences)

    def __str__(self) -> str:
        return "\n".join(map(str, self.sentences))

    def to_markdown(self) -> str:
        """The answer with a footnote behind every sentence."""
        parts, cursor = [], 0
        for i, one in enumerate(self.sentences, start=1):
            parts.append(f"{self.answer[cursor : one.chars[1]]}[^{i}]")
            cursor = one.chars[1]
        notes = [f"[^{i}]: {self._note(one)}" for i, one in enumerate(self.sentences, start=1)]
        return "".join([*parts, self.answer[cursor:]]).strip() + "\n\n" + "\n".join(notes) + "\n"

    def to_frame(self) -> pd.DataFrame:
        """A row for each sentence and document: sentence, text, supported, document, share, cited, effect, quote.

        Raises InputError without pandas.
        """
        columns = ("sentence", "text", "supported", "document", "share", "cited", "effect", "quote")
        rows = (
            (i, one.text, one.supported, d.name, d.share, d in one.sources, d.effect, d.sentence)
            for i, one in enumerate(self.sentences)
            for d in one.documents
        )
        return as_frame(rows, columns)

    def _repr_html_(self) -> str:
        from flashtrace_plugin.report.displays import table, text

        rows = [(one.text, "; ".join(_told(s, one.effect) for s in one.sources) or _NONE) for one in self.sentences]
        return table("Sentences of the answer and their sources", {"sentence": text, "sources": text}, rows)

    def _note(self, one: Citation) -> str:
        return "; ".join(_told(source, one.effect, "**") for source in one.sources) or f"*{_NONE}*{one._why}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        rows = [
            {
                "text": one.text,
                "start": one.chars[0],
                "stop": one.chars[1],
                "tokens": [one.target.start, one.target.stop],
                "supported": one.supported,
                "confidence": one.confidence,
                "log_p": one.log_p,
                "effect": one.effect,
                "mass": one.mass,
                "relative": one.relative,
                "sources": [source.name for source in one.sources],
                "documents": [asdict(source) for source in one.documents],
            }
            for one in self.sentences
        ]
        return {
            "format": "flashtrace-citations/1",
            "answer": self.answer,
            "method": self.method,
            "settings": dict(self.settings),
            "sentences": rows,
        }


def _told(source: CitedSource, effect: float | None, mark: str = "") -> str:
    """One source in a line."""
    line = f"{mark}{source.name}{mark} {source.share:.0%}: “{' '.join(source.sentence.split())}”"
    if source.effect is None or effect is None:
        return line
    return (
        f"{line} (without it log P is {abs(source.effect):.1f} nats {_moved(source.effect)}, without all {effect:.1f})"
    )


def _moved(drop: float) -> str:
    return "lower" if drop >= 0 else "higher"


def cite(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    answer: str,
    *,
    documents: Mapping[str, str],
    method: str = "recommended",
    verify: bool = True,
    **options: Any,
) -> Citations:
    """The documents that every sentence of an answer comes from.

    prompt, answer: as for :meth:`~flashtrace_plugin.Method.attribute`; sentences are those behind the thinking
    documents: texts by name, each of which stands in the prompt once, word for word
    method:    name of the method; each sentence costs one attribution
    verify:    whether documents are really replaced, each by itself and all, to see log P of the sentences fall: one
               forward pass for each and two more, for all sentences together
    options:   of the method

    Raises InputError for documents that are not in the prompt, and what the method raises.
    """
    if not isinstance(documents, Mapping) or not documents:
        raise InputError(f"documents must be texts by name, {{'name': 'text'}}, got {documents!r}")
    explain = explainer(model, tokenizer, method, options)
    text = tokenize(explain.tokenizer, prompt, answer, explain.end_ids())
    written, pieces = _sentences(explain, text)
    found = [explain.attribute_text(text, target=Sentence(i)) for i in range(len(pieces))]
    scored = [attribution.by(documents) for attribution in found]
    log_p = _log_p(explain, text, found, _places(text, scored[0])) if verify else [None] * len(found)
    cited = [
        _citation(attribution, units, written, chars, known)
        for attribution, units, chars, known in zip(found, scored, pieces, log_p, strict=True)
    ]
    return Citations(written, tuple(cited), dict(documents), explain.name, found[0].settings)


def _sentences(explain: Method, text: TokenizedText) -> tuple[str, list[Chars]]:
    """The answer without its reasoning, and the characters of its sentences there."""
    visible, (start, stop) = text.answer(chosen_formats(explain.driving.format, text.template))
    pieces = split(visible[start:stop], SPLITTERS["sentence"], "sentence")
    if not pieces:
        raise SpanError("nothing follows the reasoning, so there is no sentence to cite for")
    return visible[start:stop], pieces


def _places(text: TokenizedText, scored: UnitScores) -> list[list[int]]:
    """The tokens of each document."""
    found = unit_tokens(
        text.tokens[: text.prompt_length], [u.ranges for u in scored.units], [u.content for u in scored.units]
    )
    places = [place for place, unit in zip(found, scored.units, strict=True) if unit.content]
    empty = next((unit.name for place, unit in zip(places, scored.units) if not place), None)
    if empty is not None:
        raise InputError(f"the document {empty!r} has no token of its own to replace; pass verify=False")
    return places


def _log_p(
    explain: Method, text: TokenizedText, found: Sequence[Attribution], places: Sequence[Sequence[int]]
) -> Tensor:
    """log P of each sentence, then without each of the documents, and last without all. result: [sentences, D + 2]"""
    lm = explain.source.language_model
    removed = [*places, list(chain.from_iterable(places))]
    rows = text.input_ids.repeat(len(removed) + 1, 1)
    for row, place in zip(rows[1:], removed, strict=True):
        row[list(place)] = replacement_token(lm)
    stop = max(attribution.target.stop for attribution in found)
    by_token = token_log_likelihood(lm, rows, generation=Span(text.prompt_length, stop))
    watched = torch.zeros(len(found), by_token.shape[1], dtype=torch.float64)
    for row, attribution in zip(watched, found, strict=True):
        for span in (attribution.reasoning, attribution.target):
            if span is not None:
                row[span.start - text.prompt_length : span.stop - text.prompt_length] = 1.0
    return watched @ by_token.T


def _citation(
    attribution: Attribution, scored: UnitScores, written: str, chars: Chars, log_p: Tensor | None
) -> Citation:
    effects = None if log_p is None else log_p[0] - log_p[1:]
    inside = [i for i, unit in enumerate(scored.units) if unit.content]
    best = _best_sentences(attribution, [scored.units[i].ranges[0] for i in inside])
    masses, total = scored.scores[inside], float(scored.scores[inside].sum())
    order = masses.argsort(descending=True, stable=True).tolist()
    documents = tuple(
        CitedSource(
            scored.units[inside[i]].name,
            float(masses[i]) / total if total else 0.0,
            best[i],
            None if effects is None else float(effects[i]),
        )
        for i in order
    )
    content = torch.tensor([unit.kind not in (TEMPLATE, SINKS) for unit in scored.units])
    mass, tokens = float(scored.scores[content].sum()), float(scored.tokens[content].sum())
    share = total / mass if mass else 0.0
    return Citation(
        written[slice(*chars)],
        chars,
        attribution.target,
        documents,
        share,
        share * tokens / float(scored.tokens[inside].sum()),
        None if log_p is None else float(log_p[0]),
        None if effects is None else float(effects[-1]),
    )


def _best_sentences(attribution: Attribution, documents: Sequence[Chars]) -> list[str]:
    """Of each document, given by its characters in the visible text, the sentence with most mass."""
    text, best = "".join(attribution.tokens), []
    for start, stop in documents:
        pieces = split(text[start:stop], SPLITTERS["sentence"], "sentence")
        best.append(attribution.by([(start + a, start + b) for a, b in pieces]).top(1)[0].unit.text)
    return best
