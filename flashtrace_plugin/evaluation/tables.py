"""Tables of measurements in Markdown: means with bootstrap intervals, and paired differences.

Needs pandas, from the extra ``flashtrace-plugin[evaluation]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flashtrace_plugin.evaluation.metrics.bootstrap import bootstrap

try:
    import pandas as pd
except ImportError as error:
    raise ImportError("tables need pandas: pip install 'flashtrace-plugin[evaluation]'") from error

_NOT_MEASURED = "–"


def cell(values: Iterable[float], digits: int = 3) -> str:
    """Mean and 95 % interval of one number per sample; one sample has no interval, none at all is a dash."""
    measured = pd.Series(list(values), dtype=float).dropna()
    if measured.empty:
        return _NOT_MEASURED
    found = bootstrap(measured)
    return interval_text(found.mean, found.low, found.high, found.n, digits)


def interval_text(mean: float, low: float, high: float, n: int, digits: int = 3) -> str:
    """The text of a mean of ``n`` numbers and its interval."""
    if n == 0:
        return _NOT_MEASURED
    # Adding 0 turns a rounded -0.0 into 0.0.
    mean, low, high = (round(x, digits) + 0.0 for x in (mean, low, high))
    return f"{mean:.{digits}f}" if n == 1 else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def means(values: pd.DataFrame, metrics: Sequence[str], *, by: str = "method", digits: int = 3) -> pd.DataFrame:
    """Means with intervals: rows in the order in which they ran, metrics as columns.

    values: one row for each sample and method;  by: the column that names the rows of the result

    A row of fewer samples than the others says how many it has.
    """
    groups = values.groupby(by, sort=False)
    most = groups.size().max()
    names = [str(name) if len(group) == most else f"{name} (n = {len(group)})" for name, group in groups]
    columns = {metric: [cell(group[metric], digits) for _, group in groups] for metric in metrics}
    return pd.DataFrame(columns, index=pd.Index(names, name=by))


def differences(
    values: pd.DataFrame, metrics: Sequence[str], reference: str, *, sample: Sequence[str], by: str = "method"
) -> pd.DataFrame:
    """Each method minus the reference on the same samples, with intervals.

    sample: the columns that together name a sample
    """
    names = [name for name in values[by].unique() if name != reference]
    wide = {metric: values.pivot(index=list(sample), columns=by, values=metric) for metric in metrics}
    columns = {metric: [cell(frame[name] - frame[reference]) for name in names] for metric, frame in wide.items()}
    return pd.DataFrame(columns, index=pd.Index(names, name=by))


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table with the index as its first column."""
    head: list[Any] = [frame.index.name or "", *frame.columns]
    rows = [[name, *row] for name, row in zip(frame.index, frame.to_numpy().tolist(), strict=True)]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows))
