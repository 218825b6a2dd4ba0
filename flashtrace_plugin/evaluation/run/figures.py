"""Figures of a run: mass by segment and hop, deletion and insertion, quality against length and against cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.metrics.flow import SEGMENTS
from flashtrace_plugin.evaluation.run.contestants import method_label
from flashtrace_plugin.evaluation.run.measures import KEPT, LOWER

_LINES = 8
"""Methods that a figure of lines can show."""

_FIRST = ("recommended", "random", "leave_one_out", "ifr", "attnlrp", "lrp", "attention")
_COLOURS = ("#0072b2", "#000000", "#999999", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#d55e00")
_SEGMENT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#bbbbbb")
_BINS = 4
_LEAST = 0.1
"""Forward passes that a method without any is drawn at."""


def write_figures(values: pd.DataFrame, folder: Path, reference: str) -> list[str]:
    """Writes the figures that the values allow, and gives their names. Raises InputError where there is no room."""
    drawn = []
    for name, draw in _FIGURES.items():
        figure = draw(values[values["error"].isna()], reference)
        if figure is not None:
            save(figure, folder / f"{name}.png")
            drawn.append(name)
    return drawn


def save(figure: Any, path: Path) -> None:
    """Raises InputError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); make room or give another folder") from error


def panels(count: int, height: float = 3.4) -> Any:
    """A figure with panels side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'flashtrace-plugin[evaluation]'") from error
    figure = Figure(figsize=(max(4.2, 3.8 * count), height), layout="constrained")
    for axis in figure.subplots(1, count, squeeze=False)[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def legend(figure: Any) -> None:
    """One legend for all panels, below them."""
    found = {text: handle for axis in figure.axes for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        found.values(), found, loc="outside lower center", ncols=min(4, len(found)), frameon=False, fontsize=8
    )


def compared(values: pd.DataFrame, reference: str) -> list[str]:
    """The methods that a figure of lines shows: the reference, well-known ones, then others, up to eight."""
    known = list(dict.fromkeys(values["method"]))
    order = [name for name in (reference, *_FIRST) if name in known]
    return [*order, *(name for name in known if name not in order)][:_LINES]


def _looks(values: pd.DataFrame, reference: str) -> dict[str, dict[str, str]]:
    """Colour and mark of every method, the same in all figures of a run; those beyond the colours are grey."""
    first = compared(values, reference)
    others = [name for name in dict.fromkeys(values["method"]) if name not in first]
    looks = {name: {"color": colour, "marker": "o"} for name, colour in zip(first, _COLOURS)}
    return looks | {name: {"color": "#aaaaaa", "marker": "sv^DPX*<>p"[i % 10]} for i, name in enumerate(others)}


def _better(metric: str) -> str:
    return f"{metric}, {'lower' if metric in LOWER else 'higher'} is better"


def _mass(values: pd.DataFrame, reference: str) -> Any:
    """Where each hop's mass lies (FlashTrace, Fig. 1 and 7): hop 0 to the last that all samples have."""
    if "mass" not in values:
        return None
    held = values[values["mass"].notna() & (values["reasoning_length"] > 0)]
    names = [
        name for name in compared(held, reference) if held.loc[held["method"] == name, "mass"].str.len().min() > 1
    ]
    if not names:
        return None
    figure = panels(len(names))
    for axis, name in zip(figure.axes, names, strict=True):
        shares = _by_hop(held.loc[held["method"] == name, "mass"].tolist())
        below = np.zeros(len(shares))
        for colour, segment, heights in zip(_SEGMENT_COLOURS, SEGMENTS, shares.T, strict=True):
            axis.bar(range(len(shares)), heights, bottom=below, color=colour, label=segment)
            below = below + heights
        axis.set(title=method_label(name), xlabel="hop", xticks=range(len(shares)), ylim=(0, 1))
    figure.axes[0].set_ylabel("share of the hop's mass")
    legend(figure)
    return figure


def _by_hop(masses: list[list[dict[str, float]]]) -> Any:
    """Mean share, [hops, segments], over the samples that reached the hop."""
    hops = min(5, max(map(len, masses)))
    rows = [[m[k] for m in masses if len(m) > k and sum(m[k].values()) > 0] for k in range(hops)]
    return np.array([[np.mean([one[s] for one in hop]) for s in SEGMENTS] for hop in rows if hop])


def _curves(values: pd.DataFrame, reference: str) -> Any:
    """Both ends: what is left of the likelihood as the best tokens go, and as only they stay."""
    if "deletion" not in values:
        return None
    falling = values[(values["falls"] == 1) & values["deletion"].notna()]
    if not len(falling):
        return None
    figure = panels(2, 4.2)
    deletion, insertion = figure.axes
    looks = _looks(values, reference)
    for name in compared(values, reference):
        colour, part = looks[name]["color"], falling[falling["method"] == name]
        curves = [_normal(np.array(curve)) for curve in part["deletion"]]
        if curves and len({len(c) for c in curves}) == 1:
            deletion.plot(
                np.linspace(0, 1, len(curves[0])), np.mean(curves, 0), color=colour, label=method_label(name)
            )
        kept = [values.loc[values["method"] == name, f"log P, top {share:.0%}"].mean() for share in KEPT]
        insertion.plot(KEPT, kept, color=colour, marker="o", ms=3, label=method_label(name))
    deletion.set(xlabel="share of the prompt deleted", ylabel="likelihood left, normalised", title="deletion")
    insertion.set(xlabel="share of the prompt kept", ylabel="log P(generation), nats", title="insertion")
    legend(figure)
    return figure


def _normal(curve: Any) -> Any:
    return np.minimum.accumulate(np.clip((curve - curve[-1]) / abs(curve[0] - curve[-1]), 0, 1))


def _lengths(values: pd.DataFrame, reference: str) -> Any:
    """Quality against the length of the reasoning, in bins of as many samples (FlashTrace, Fig. 5)."""
    thinking = values[values["reasoning_length"] > 0]
    if thinking["reasoning_length"].nunique() < 2:
        return None
    metrics = [metric for metric in ("MAS", "RISE", "AUROC") if metric in thinking]
    bins = pd.qcut(thinking["reasoning_length"], _BINS, duplicates="drop")
    figure, looks = panels(len(metrics), 4.0), _looks(values, reference)
    for axis, metric in zip(figure.axes, metrics, strict=True):
        for name in compared(values, reference):
            part = thinking[thinking["method"] == name]
            groups = part.groupby(bins.loc[part.index], observed=True)
            at = groups["reasoning_length"].mean()
            axis.plot(at, groups[metric].mean(), ms=3, label=method_label(name), **looks[name])
        axis.set(title=_better(metric), xlabel="tokens of reasoning")
    legend(figure)
    return figure


def _costs(values: pd.DataFrame, reference: str) -> Any:
    """Quality against forward passes, every method a point."""
    metrics = [
        metric for metric in ("AUROC", "MAS", "specificity") if metric in values and values[metric].notna().any()
    ]
    if "cost" not in values or not metrics:
        return None
    figure, looks = panels(len(metrics), 4.6), _looks(values, reference)
    for axis, metric in zip(figure.axes, metrics, strict=True):
        for name, look in looks.items():
            part = values[values["method"] == name]
            axis.scatter(
                max(part["cost"].median(), _LEAST), part[metric].mean(), label=method_label(name), s=40, **look
            )
        axis.set(xscale="log", xlabel="cost, forward passes", title=_better(metric))
        axis.grid(alpha=0.3)
    legend(figure)
    return figure


def cost_figure(values: pd.DataFrame, methods: list[str]) -> Any:
    """AUROC of the evidence against forward passes, a panel for each model; the first method stands out."""
    models = list(dict.fromkeys(values["model"]))
    figure = panels(len(models), 4.8)
    looks = dict(zip(methods, _COLOURS * len(methods)))
    for axis, model in zip(figure.axes, models, strict=True):
        for number, (name, colour) in enumerate(looks.items()):
            part = values[(values["model"] == model) & (values["method"] == name)]
            if len(part):
                look = {"marker": "*", "s": 160} if number == 0 else {"marker": "osv^DP"[number % 6], "s": 45}
                at = max(part["cost"].median(), _LEAST)
                axis.scatter(at, part["AUROC"].mean(), color=colour, label=method_label(name), **look)
        axis.set(xscale="log", xlabel="cost, forward passes", title=model, ylim=(0.4, 1.02))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("AUROC of the evidence")
    legend(figure)
    return figure


_FIGURES: dict[str, Callable[[pd.DataFrame, str], Any]] = {
    "mass": _mass,
    "curves": _curves,
    "reasoning-length": _lengths,
    "quality-cost": _costs,
}
