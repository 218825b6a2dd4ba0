"""One colour scale for everything that is shaded: lightness alone carries the number, so it survives colour blindness
and print, and one text colour stays readable (contrast of 4.5 and more, WCAG 2.2 AA) on every step of it. Negative
numbers have a scale of the same lightness in blue, which colour-blind people tell from orange, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from torch import Tensor

LEVELS = 40
"""Steps of the scale above 0."""

CLIP = 99
"""Percentile of what is shown from which on everything has the strongest colour, so that one outlier hides nothing."""


@dataclass(frozen=True)
class _Theme:
    """Colours of a page, light or dark.

    name:  as in the CSS property color-scheme
    ink:   text
    stops: the scale, from the page's background (value 0) to the maximum (value 1)
    below: the scale of negative numbers, likewise
    other: further colours by name
    """

    name: str
    ink: str
    stops: tuple[str, ...]
    below: tuple[str, ...]
    other: Mapping[str, str]

    def variables(self) -> str:
        """All colours as CSS custom properties: s0 … s40 the scale, m0 … m40 that of negative numbers."""
        named = {"ink": self.ink, "paper": self.stops[0], **self.other}
        for letter, stops in {"s": self.stops, "m": self.below}.items():
            named |= {f"{letter}{i}": colour for i, colour in enumerate(palette(stops))}
        return f"color-scheme:{self.name};" + "".join(f"--{name}:{colour};" for name, colour in named.items())


LIGHT = _Theme(
    "light",
    "#14161a",
    ("#ffffff", "#ffe9c2", "#ffc069", "#f78a3a", "#e4602c"),
    ("#ffffff", "#dcecfb", "#a3cdf3", "#6aaae6", "#4489d0"),
    {
        "soft": "#575d69",
        "line": "#d9dce2",
        "panel": "#f5f6f8",
        "bars": "#c9d3e0",
        "prompt": "#d9682a",
        "reasoning": "#2f6fb2",
        "target": "#7a3e9d",
        "rest": "#8b919c",
        "pin0": "#b3400f",
        "pin1": "#1f62a8",
    },
)
DARK = _Theme(
    "dark",
    "#f6f7f9",
    ("#16181d", "#4a3417", "#774a0d", "#9f500c", "#bb4d1a"),
    ("#16181d", "#17304c", "#154a78", "#1a5d9b", "#2a6db4"),
    {
        "soft": "#a9b0bd",
        "line": "#343a45",
        "panel": "#1e2128",
        "bars": "#3b4a60",
        "prompt": "#d9682a",
        "reasoning": "#6aa9ea",
        "target": "#cf97ee",
        "rest": "#7d8491",
        "pin0": "#f09a5e",
        "pin1": "#7ab4f0",
    },
)


def level(value: float, top: float) -> int:
    """Step of the scale, 0 to LEVELS, by the square root of a magnitude relative to ``top``; 0 where that is 0."""
    if top <= 0 or value <= 0:
        return 0
    return min(LEVELS, round(LEVELS * sqrt(value / top)))


def clipped_top(magnitudes: Tensor) -> float:
    """The magnitude that gets the strongest colour: the percentile ``CLIP`` of those above 0; 0 if there is none."""
    found = magnitudes[magnitudes > 0].double().sort().values
    if not len(found):
        return 0.0
    at = CLIP / 100 * (len(found) - 1)
    low, high = found[int(at)], found[min(int(at) + 1, len(found) - 1)]
    return float(low + (high - low) * (at - int(at)))


def palette(stops: Sequence[str]) -> list[str]:
    """Colours of the steps 0 to LEVELS, even along the stops."""
    return [_blend(stops, k / LEVELS) for k in range(LEVELS + 1)]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance, 0 (black) to 1 (white), of a colour ``#rrggbb`` (WCAG 2.2)."""
    red, green, blue = (_linear(c / 255) for c in _channels(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(c: float) -> float:
    return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4


def _blend(stops: Sequence[str], x: float) -> str:
    """The colour at ``x`` in 0 to 1 on the polygon through the stops."""
    parts = list(pairwise(stops))
    i = min(int(x * len(parts)), len(parts) - 1)
    part, (a, b) = x * len(parts) - i, (_channels(c) for c in parts[i])
    return "#" + "".join(f"{round(p + (q - p) * part):02x}" for p, q in zip(a, b, strict=True))


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
