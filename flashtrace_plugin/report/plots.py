"""Small figures of an attribution, by matplotlib, which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.options import one_of

if TYPE_CHECKING:
    from flashtrace_plugin.attribution import Attribution

_WIDTH = 6.4
_COLOURS = {"prompt": "#4477aa", "reasoning": "#ccbb44", "target": "#aa3377", "rest": "#bbbbbb"}
"""Of parts; told apart by colour-blind people as well (Paul Tol's bright scheme)."""


def plot(attribution: Attribution, kind: str = "text", *, ax: Any = None) -> Any:
    """A figure of an attribution. result: matplotlib's axes

    kind: "text": what each token has, along the text; "hops": where each hop's mass lies; "heads": shares of the heads
          of every layer, of the target's own hop
    ax:   axes to draw into; by default those of a new figure

    Raises InputError for another kind, without matplotlib, and for heads of a method that has none.
    """
    draw, height = _KINDS[one_of("kind", kind, _KINDS)]
    if kind == "heads" and not attribution.head_scores[0].any():
        raise InputError(f"the method {attribution.method!r} has no shares of heads; choose 'text' or 'hops'")
    axes = _axes(height) if ax is None else ax
    draw(attribution, axes)
    return axes


def _axes(height: float) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise InputError("plot() needs matplotlib; pip install 'flashtrace-plugin[evaluation]'") from error
    return pyplot.subplots(figsize=(_WIDTH, height), layout="constrained")[1]


def _text(attribution: Attribution, axes: Any) -> None:
    totals = attribution.totals.index_fill(0, _positions(attribution), 0.0)
    for part, span in _parts(attribution):
        axes.bar(list(span), totals[span.slice], width=1.0, color=_COLOURS[part], label=part)
    axes.set(xlabel="token position", ylabel="importance", xlim=(-0.5, len(totals) - 0.5))
    for one in attribution.top(3):
        label = one.token.strip().replace("$", r"\$")[:16]
        axes.annotate(label, (one.position, one.score), ha="center", va="bottom", fontsize=8)
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _hops(attribution: Attribution, axes: Any) -> None:
    mass = attribution.hop_scores.sum(1).clamp(min=1e-12)
    left = mass.new_zeros(len(mass))
    parts = _parts(attribution)
    known = [(part, attribution.hop_scores[:, span.slice].sum(1) / mass) for part, span in parts]
    rest = (attribution.hop_scores.sum(1) > 0).float() - sum(share for _, share in known)
    hops = list(range(len(mass)))
    for part, share in [*known, ("rest", rest)]:
        axes.barh(hops, share, left=left, color=_COLOURS[part], label=part)
        left = left + share
    axes.set(xlabel="share of the hop's mass", ylabel="hop", yticks=hops, xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)


def _heads(attribution: Attribution, axes: Any) -> None:
    image = axes.imshow(attribution.head_scores[0], aspect="auto", cmap="viridis", origin="lower")
    axes.set(xlabel="head", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, label="share, hop 0")


def _parts(attribution: Attribution) -> list[tuple[str, Any]]:
    spans = {"prompt": attribution.prompt, "reasoning": attribution.reasoning, "target": attribution.target}
    return [(part, span) for part, span in spans.items() if span is not None]


def _positions(attribution: Attribution) -> Any:
    import torch

    return torch.tensor(attribution.sinks, dtype=torch.long)


_KINDS: dict[str, tuple[Callable[[Any, Any], None], float]] = {
    "text": (_text, 2.4),
    "hops": (_hops, 2.2),
    "heads": (_heads, 3.2),
}
"""How each kind is drawn, and how high its figure is in inches."""
