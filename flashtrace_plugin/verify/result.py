"""What came of changing the text: numbers, a verdict and one sentence in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrace_plugin.attribution import plain
from flashtrace_plugin.evaluation.metrics.detection import middle_ranks
from flashtrace_plugin.frames import as_frame
from flashtrace_plugin.saved import Saved, read_saved

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "flashtrace-verification/1"
_LEAST_SHARE = 0.1
_LEAST_EFFECT = 0.1
"""Nats. Where replacing everything does less, rounding decides what is more and what is less."""


@dataclass(frozen=True, eq=False)
class Verification:
    """log P of a watched text, in nats, when units before it were replaced. Tensors are float64, on the CPU.

    unit:           "sentence", "word", …
    units:          U texts of the units that were compared, in the order of the text
    scores:         [U]         what the explanation says of them
    tokens:         U numbers of tokens that can be replaced
    watched:        "the answer", "the reasoning and the answer", …
    log_p:          after the text as it is
    target_log_p:   the target's part of it
    replaced_log_p: with all units replaced
    fractions:      F shares of the units, ascending
    named:          F tuples    indices of the units with the highest scores, best first: so many for each fraction
    removed:        [F]         with the named units replaced
    kept:           [F]         with all other units replaced
    random_removed: [draws, F]  the same for tokens of the other units, as many as the named ones have
    random_kept:    [draws, F]
    alone:          S indices of units that were also replaced one at a time
    alone_removed:  [S]         with this unit alone replaced
    replacement:    id of the token put in the place of each token replaced
    """

    unit: str
    units: tuple[str, ...]
    scores: Tensor
    tokens: tuple[int, ...]
    watched: str
    log_p: float
    target_log_p: float
    replaced_log_p: float
    fractions: tuple[float, ...]
    named: tuple[tuple[int, ...], ...]
    removed: Tensor
    kept: Tensor
    random_removed: Tensor
    random_kept: Tensor
    alone: tuple[int, ...]
    alone_removed: Tensor
    replacement: int

    @property
    def effect(self) -> float:
        """Nats by which replacing all units lowers log P: what there is to explain."""
        return self.log_p - self.replaced_log_p

    @property
    def drop(self) -> Tensor:
        """Nats by which replacing the named units lowers log P. result: [F]"""
        return self.log_p - self.removed

    @property
    def random_drop(self) -> Tensor:
        """The same for the random choices. result: [draws, F]"""
        return self.log_p - self.random_removed

    @property
    def share(self) -> Tensor:
        """:attr:`drop` relative to :attr:`effect`; nan where there is no effect. result: [F]"""
        return self.drop / self.effect if self._explains_something else torch.full_like(self.removed, torch.nan)

    @property
    def correlation(self) -> float:
        """Rank correlation (Spearman) of scores with what each unit does alone; nan where either is constant."""
        ranks = [middle_ranks(values) for values in (self.scores[list(self.alone)], -self.alone_removed)]
        return float(torch.corrcoef(torch.stack(ranks))[0, 1])

    @property
    def holds(self) -> bool:
        """Whether the units named first matter more than others, by the largest fraction.

        Without them log P falls by more than for any random choice, and by at least a tenth of :attr:`effect`, which
        is at least 0.1 nats. Equal scores of all units name none first.
        """
        if self._names_none:
            return False
        return bool(self.drop[-1] > self.random_drop[:, -1].max() and self.share[-1] >= _LEAST_SHARE)

    @property
    def _explains_something(self) -> bool:
        return self.effect >= _LEAST_EFFECT

    @property
    def _names_none(self) -> bool:
        return bool((self.scores == self.scores[0]).all())

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        if self._names_none:
            units = count_of(len(self.units), self.unit)
            return f"This explanation does not hold: it gives all {units} the same score."
        drop, drops = float(self.drop[-1]), self.random_drop[:, -1]
        change, drops = ("raise", -drops) if float(drops.mean()) < 0 else ("lower", drops)
        low, mean, high = (_nats(value) for value in (drops.min(), drops.mean(), drops.max()))
        compared = (
            f"the {count_of(len(self.named[-1]), self.unit)} named first {_moves(drop, self._log_p)}; "
            f"random {self.unit}s of equal length {change} it by {mean} [{low}, {high}]"
        )
        if self.holds:
            return f"Removing {compared}."
        every = f"replacing all {count_of(len(self.units), self.unit)}"
        if not self._explains_something:
            every += f" {_moves(self.effect, self._log_p)}, so nothing in them explains it"
            return f"This explanation does not hold: {every}."
        return f"This explanation does not hold: removing {compared}; {every} {_moves(self.effect, 'it')}."

    def __str__(self) -> str:
        return self.sentence

    @property
    def _log_p(self) -> str:
        """What is watched, with its log P."""
        part = "" if self.target_log_p == self.log_p else f", the answer's part {_nats(self.target_log_p)}"
        return f"log P of {self.watched} ({_nats(self.log_p)}{part})"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON: all fields, and the verdict that follows from them."""
        values = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        correlation = None if isnan(self.correlation) else self.correlation
        verdict = {"holds": self.holds, "sentence": self.sentence, "effect": self.effect, "correlation": correlation}
        return {"format": _FORMAT} | values | verdict

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verification:
        """The inverse of :meth:`to_dict`. Raises InputError for anything else."""
        saved = Saved.opened(data, "a verification", _FORMAT, [f.name for f in fields(cls)])
        units = saved.texts("units")
        u, f = len(units), len(saved.items("fractions"))
        alone = saved.ids("alone", stop=u)
        draws = len(saved.items("random_removed"))
        if not u or not f or not draws:
            raise saved.wrong("units" if not u else "fractions" if not f else "random_removed", "is empty")

        def log_ps(name: str, *sizes: int) -> Tensor:
            return saved.tensor(name, sizes, torch.float64, least=-inf)

        return cls(
            unit=saved.text("unit", data["unit"]),
            units=units,
            scores=log_ps("scores", u),
            tokens=saved.ids("tokens", u),
            watched=saved.text("watched", data["watched"]),
            **{name: saved.number(name) for name in ("log_p", "target_log_p", "replaced_log_p")},
            fractions=tuple(Saved({"fractions": x}, saved.what).number("fractions", 0.0) for x in data["fractions"]),
            named=tuple(Saved({"named": x}, saved.what).ids("named", stop=u) for x in saved.items("named", f)),
            removed=log_ps("removed", f),
            kept=log_ps("kept", f),
            random_removed=log_ps("random_removed", draws, f),
            random_kept=log_ps("random_kept", draws, f),
            alone=alone,
            alone_removed=log_ps("alone_removed", len(alone)),
            replacement=saved.whole("replacement", data["replacement"]),
        )

    def save(self, path: str | Path) -> None:
        """Writes JSON, from which :meth:`load` gives the same numbers."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Verification:
        """Reads what :meth:`save` wrote. Raises InputError for another kind of file."""
        return cls.from_dict(read_saved(path, "Verification.save"))

    def to_frame(self) -> pd.DataFrame:
        """A row for each fraction: units, tokens, drop and share, log P with them kept, ranges of random ones.

        Raises InputError without pandas.
        """
        drops, kept = self.random_drop, self.random_kept
        columns = {
            "fraction": self.fractions,
            "units": [len(named) for named in self.named],
            "tokens": [sum(self.tokens[i] for i in named) for named in self.named],
            "drop": self.drop.tolist(),
            "random_drop_low": drops.min(0).values.tolist(),
            "random_drop_high": drops.max(0).values.tolist(),
            "share": self.share.tolist(),
            "kept": self.kept.tolist(),
            "random_kept_low": kept.min(0).values.tolist(),
            "random_kept_high": kept.max(0).values.tolist(),
        }
        return as_frame(zip(*columns.values(), strict=True), list(columns))

    def _repr_html_(self) -> str:
        from flashtrace_plugin.report.displays import Format, number, share, table, text

        drops = self.random_drop
        named = [len(one) for one in self.named]
        ranges = [f"{_nats(low)} to {_nats(high)}" for low, high in zip(drops.min(0).values, drops.max(0).values)]
        rows = zip(self.fractions, named, self.drop.tolist(), ranges, strict=True)
        columns: dict[str, Format] = {
            "fraction": share,
            f"{self.unit}s": str,
            "nats lost": number,
            "random choices": text,
        }
        return table(self.sentence, columns, rows)


_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def count_of(count: int, noun: str) -> str:
    """``"three sentences"``; one is the noun alone."""
    number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    return noun if count == 1 else f"{number} {noun}s"


def _nats(value: float | Tensor) -> str:
    return f"{round(float(value), 1) + 0.0:.1f}"  # no "-0.0"


def _moves(drop: float, what: str) -> str:
    size = _nats(abs(drop))
    verb = "changes" if size == "0.0" else "raises" if drop < 0 else "lowers"
    return f"{verb} {what} by {size} nats"
