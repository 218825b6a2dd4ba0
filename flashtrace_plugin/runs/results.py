"""Reads what a run has found, one result after the other; a run that is still going on can be read, too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.runs.folder import read_manifest, results
from flashtrace_plugin.runs.rows import Failure

if TYPE_CHECKING:
    import pandas as pd


def read(folder: str | Path) -> Iterator[tuple[str, Attribution]]:
    """Ids and attributions of the rows that were explained, in the order in which they were found.

    Raises InputError for a folder of something else.
    """
    for head, line in _results(folder):
        if not head.failed:
            data = json.loads(line)
            yield data["id"], Attribution.from_dict(data)


def failures(folder: str | Path) -> Iterator[Failure]:
    """The rows that have no explanation, and why."""
    for head, line in _results(folder):
        if head.failed:
            data = json.loads(line)
            yield Failure(head.number, head.digest, data["id"], data["error"], data["message"])


def to_frame(folder: str | Path) -> pd.DataFrame:
    """A row for each row of the input that has a result, by its number: what fits into a table.

    id, answer, top (the strongest token), top_score, prompt, reasoning and target (tokens), closure_error, recovery
    and auroc (where evidence was given), error and message (of a failure). ``pandas.read_json(…, lines=True)`` on
    results.jsonl has everything.
    """
    import pandas as pd

    rows = {head.number: _summed_up(json.loads(line)) for head, line in _results(folder)}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(_COLUMNS)).sort_index().rename_axis("row")


_COLUMNS = (
    *("id", "answer", "top", "top_score", "prompt", "reasoning", "target", "closure_error"),
    *("recovery", "auroc", "error", "message"),
)


def _results(folder: str | Path) -> Iterator[Any]:
    path = Path(folder).expanduser()
    read_manifest(path)
    return results(path)


def _summed_up(data: Mapping[str, Any]) -> dict[str, Any]:
    if "error" in data:
        return {name: data[name] for name in ("id", "error", "message")}
    found = Attribution.from_dict(data)
    best = found.top(1)
    return {
        "id": data["id"],
        "answer": found.text(found.target).strip(),
        "top": best[0].token if best else None,
        "top_score": best[0].score if best else None,
        "prompt": len(found.prompt),
        "reasoning": len(found.reasoning or ()),
        "target": len(found.target),
        "closure_error": found.closure_error,
        **{name: value for name, value in data.get("evidence", {}).items() if name in _COLUMNS},
    }
