"""Explains a bucket of rows: together where that goes well, one by one where a row does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.metrics import auroc, recovery
from flashtrace_plugin.loading import write
from flashtrace_plugin.runs.buckets import Bucket
from flashtrace_plugin.runs.lines import line_of_failure, line_of_result
from flashtrace_plugin.runs.recipe import fingerprint
from flashtrace_plugin.runs.rows import Failure, Row, failed
from flashtrace_plugin.text import with_messages
from flashtrace_plugin.units.scores import UnitScores
from flashtrace_plugin.units.shares import unit_tokens

if TYPE_CHECKING:
    from flashtrace_plugin.methods.base import Method

_OF_A_ROW = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)
"""What a row can raise in this package, transformers, torch, a chat template and methods of others. What is wrong with
the disk, the installation or the device is no row's, and ends the run."""


class Explainer:
    """A method that explains buckets; the model is loaded by who makes it.

    max_new_tokens: tokens that the model writes at most where a row has no generation
    """

    def __init__(self, method: Method, max_new_tokens: int) -> None:
        if method.tokenizer is None:
            raise InputError("rows are texts, which need a tokenizer: pass one as the method's second argument")
        self.method, self.max_new_tokens = method, max_new_tokens
        self.fingerprint = fingerprint(method)

    def lines(self, bucket: Bucket) -> list[bytes]:
        """A line for every row: its explanation, or why there is none."""
        rows = [row for row in bucket if isinstance(row, Row)]
        return [*map(line_of_failure, (row for row in bucket if isinstance(row, Failure))), *self._lines(rows)]

    def _lines(self, rows: Sequence[Row]) -> Iterator[bytes]:
        found = self._together([row for row in rows if row.generation is not None])
        for row in rows:
            try:
                explained = found[row.number] if row.number in found else self._alone(row)
                yield line_of_result(row, explained, _known(row, explained))
            except torch.AcceleratorError:
                raise  # the device computes nothing any more
            except _OF_A_ROW as error:
                yield line_of_failure(failed(row, error, row.id))

    def _together(self, rows: Sequence[Row]) -> dict[int, Attribution]:
        """Explanations by row number, without rows that fail; none where what a row raises stops them all."""
        if len(rows) < 2:
            return {}
        try:
            found = self.method.attribute_batch(
                [row.prompt for row in rows],
                [row.generation or "" for row in rows],
                targets=[row.target for row in rows],
                reasonings=[row.reasoning for row in rows],
                errors="return",
            )
        except torch.AcceleratorError:
            raise
        except _OF_A_ROW:
            return {}
        return {row.number: one for row, one in zip(rows, found, strict=True) if isinstance(one, Attribution)}

    def _alone(self, row: Row) -> Attribution:
        where = {"target": row.target, "reasoning": row.reasoning}
        if row.generation is not None:
            return self.method.attribute(row.prompt, row.generation, **where)
        model = self.method.source.language_model
        if model is None:
            raise InputError("the row has no generation, and there is no model here that could write one")
        tokenizer = self.method.tokenizer
        text = write(model, tokenizer, row.prompt, self.max_new_tokens)
        return self.method.attribute_text(with_messages(tokenizer, row.prompt, text), **where)


def _known(row: Row, found: Attribution) -> dict[str, Any]:
    """What a line has beside the attribution: mass of the documents, and whether the evidence was found."""
    more: dict[str, Any] = {"generated": True} if row.generation is None else {}
    if row.documents:
        more["documents"] = found.by(row.documents).to_dict()["units"]
    if row.evidence:
        more["evidence"] = _evidence(row.evidence, found)
    return more


def _evidence(evidence: Sequence[str | int], found: Attribution) -> dict[str, Any]:
    """Positions of the evidence, and how well the scores find it."""
    gold = {one for one in evidence if isinstance(one, int)}
    texts = {f"evidence {i}": one for i, one in enumerate(evidence) if isinstance(one, str)}
    gold.update(_tokens(found.by(texts), found) if texts else ())
    outside = sorted(i for i in gold if not 0 <= i < len(found.prompt))
    if outside:
        raise InputError(f"evidence {outside[0]} is no position of the prompt, which has {len(found.prompt)} tokens")
    scores = {"recovery": recovery(found.scores, gold), "auroc": auroc(found.scores, gold)}
    return {"positions": sorted(gold)} | scores


def _tokens(units: UnitScores, found: Attribution) -> list[int]:
    """Tokens of the units of content."""
    wanted = [unit.content for unit in units.units]
    tokens = unit_tokens(
        found.tokens[found.prompt.slice], [unit.ranges for unit in units.units], [True] * len(units.units)
    )
    return [i for place, content in zip(tokens, wanted, strict=True) if content for i in place]
