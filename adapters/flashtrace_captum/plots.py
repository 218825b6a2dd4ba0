"""Plots that stay readable from 2 to 20,000 tokens: a fixed size, windows for the overview, names for the top.

Token texts are never read as mathematics (``$``), and scores of any dtype, device or grad flag are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from flashtrace_captum.labels import in_context, label, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ALL_BARS = 40
"""Up to this many features each has its bar."""
_TOP = 20
"""Features that are named where not all are."""
_WINDOWS = 100
"""Windows of the overview at most."""
_ALL_ROWS, _ALL_COLUMNS = 30, 30
"""Rows and columns of a heat map that are shown one by one."""
_ANNOTATED = 300
"""Cells of a heat map up to which their numbers are written in."""
_POSITIVE, _NEGATIVE = "#4772b3", "#d0365b"
"""Captum's colours of bars."""

_Plot = tuple["Figure", "Axes"]


def plot_scores(scores: Tensor, tokens: Sequence[str], title: str) -> _Plot:
    """One score per token, [n]: a bar for each, or windows over the text and the largest scores in context."""
    values = _numbers(scores)
    if len(values) <= _ALL_BARS:
        return _all_bars(values, tokens, title)
    return _overview(values, tokens, title)


def plot_rows(scores: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, first: int = 0) -> _Plot:
    """A heat map of [rows, columns]; many rows are added up in windows, of many columns the largest are shown.

    first: number of the first row, for the names of windows
    """
    values, names = _windowed_rows(_numbers(scores), rows, first)
    shown_columns = _top_columns(values)
    fig, ax = _figure(max(6.4, 2.5 + 0.42 * len(shown_columns)), max(3.2, 2.0 + 0.26 * len(names)))
    limit = float(np.abs(values).max()) or 1.0
    image = ax.imshow(values[:, shown_columns], vmin=-limit, vmax=limit, cmap=_colours(), aspect="auto")
    scale = fig.colorbar(image, ax=ax).ax
    scale.set_ylabel("attribution", rotation=-90, va="bottom")
    scale.set_ylim(-limit if values.min() < 0 else 0, limit)
    every = len(shown_columns) == len(columns)
    labels = [label(columns[i]) if every else f"{label(columns[i])}  {i}" for i in shown_columns]
    _name_ticks(ax.xaxis, range(len(labels)), labels, rotation=90)
    _name_ticks(ax.yaxis, range(len(names)), names)
    _annotate(ax, values[:, shown_columns], limit)
    chosen = "" if every else f" (the {len(shown_columns)} largest of {len(columns)} input features)"
    ax.set_title(shortened(title, 90) + chosen, fontsize="medium", parse_math=False)
    return fig, ax


def shown(plot: _Plot, show: bool) -> _Plot | None:
    """Captum's protocol: show it and return None, or return it."""
    if not show:
        return plot
    import matplotlib.pyplot as plt

    plt.show()
    return None


def _numbers(scores: Tensor) -> np.ndarray[Any, Any]:
    return scores.detach().float().cpu().numpy()


def _all_bars(values: np.ndarray[Any, Any], tokens: Sequence[str], title: str) -> _Plot:
    fig, ax = _figure(max(6.4, 1.2 + 0.3 * len(values)), 4.0)
    _bars(ax, np.arange(len(values)), values, 0.8)
    _name_ticks(ax.xaxis, range(len(values)), [label(token) for token in tokens], rotation=60, ha="right")
    ax.set_ylabel("attribution")
    ax.set_title(shortened(title, 90), fontsize="medium", parse_math=False)
    return fig, ax


def _overview(values: np.ndarray[Any, Any], tokens: Sequence[str], title: str) -> _Plot:
    """Above: sums over windows of the text. Below: the largest scores, the largest of all at the top."""
    width = math.ceil(len(values) / _WINDOWS)
    starts = np.arange(0, len(values), width)
    middles = (starts + np.minimum(starts + width, len(values)) - 1) / 2
    fig, above, below = _two_panels(9.0, 7.6)
    _bars(above, middles, np.add.reduceat(values, starts), 0.9 * width)
    above.set_xlim(-0.5, len(values) - 0.5)
    above.set_xlabel("token position" if width == 1 else f"token position, windows of {width} tokens")
    above.set_ylabel("attribution")
    above.set_title(shortened(title, 90), fontsize="medium", parse_math=False)
    top = np.argsort(-np.abs(values), kind="stable")[:_TOP][::-1]
    _bars(below, np.arange(len(top)), values[top], 0.8, horizontal=True)
    _name_ticks(below.yaxis, range(len(top)), [f"{in_context(tokens, i)}  {i}" for i in top])
    below.set_xlabel(f"attribution: the {len(top)} largest of {len(values)}, with their positions")
    return fig, above


def _bars(ax: Axes, at: Any, values: np.ndarray[Any, Any], size: float, *, horizontal: bool = False) -> None:
    colours = [_POSITIVE if value >= 0 else _NEGATIVE for value in values]
    if horizontal:
        ax.barh(at, values, height=size, color=colours)
    else:
        ax.bar(at, values, width=size, color=colours)
    ax.spines[["top", "right"]].set_visible(False)


def _windowed_rows(
    values: np.ndarray[Any, Any], rows: Sequence[str], first: int
) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Rows as they are, or sums of equal windows of them with the range in their names."""
    if len(values) <= _ALL_ROWS:
        return values, [label(row) for row in rows]
    width = math.ceil(len(values) / _ALL_ROWS)
    starts = list(range(0, len(values), width))
    parts = [rows[a : a + width] for a in starts]
    names = [
        f"{label(''.join(part), 28)}  {first + a}–{first + a + len(part) - 1}"
        for a, part in zip(starts, parts, strict=True)
    ]
    return np.add.reduceat(values, starts, axis=0), names


def _top_columns(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The columns with the largest sums of magnitudes, in the order of the text."""
    if values.shape[1] <= _ALL_COLUMNS:
        return np.arange(values.shape[1])
    return np.sort(np.argsort(-np.abs(values).sum(0), kind="stable")[:_ALL_COLUMNS])


def _annotate(ax: Axes, values: np.ndarray[Any, Any], limit: float) -> None:
    """Writes the numbers that can be told from 0 by their colour."""
    if values.size > _ANNOTATED:
        return
    for (row, column), value in np.ndenumerate(values):
        if abs(value) < 0.01 * limit:
            continue
        colour = "white" if abs(value) > 0.6 * limit else "black"
        ax.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=6.5, color=colour)


def _name_ticks(axis: Any, at: Sequence[int], names: Sequence[str], **style: Any) -> None:
    axis.set_ticks(list(at), labels=list(names), parse_math=False, fontsize="small", **style)


def _colours() -> Any:
    """Captum's convention: negative red, zero white, positive green."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("RdWhGn", ["red", "white", "green"])


def _figure(width: float, height: float) -> _Plot:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained", facecolor="white")


def _two_panels(width: float, height: float) -> tuple[Figure, Axes, Axes]:
    """Two plots, one above the other, each with a left margin of its own."""
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=(width, height), layout="constrained", facecolor="white")
    above, below = fig.subfigures(2, 1, squeeze=False, height_ratios=[1, 2])[:, 0]
    return fig, above.subplots(), below.subplots()
