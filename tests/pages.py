"""Attributions made of random numbers, and pages read as trees: what tests of reports share."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

import torch

from flashtrace_plugin import Attribution, Span
from flashtrace_plugin.report.html import as_html

VOID = {"meta", "input", "br", "path", "link", "img", "rect"}
NASTY = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "</span></div>", " & ", "{{ 7 * 7 }}", "]]>")


def made(prompt=("The", " cat", "\n", " sat"), *, reasoning=3, target=2, hops=2, layers=3, heads=4, seed=0, **other):
    """An attribution with random numbers: prompt, an opening tag, reasoning, a closing tag, target, an end."""
    p, generator = len(prompt), torch.Generator().manual_seed(seed)
    thought = tuple(f" t{i}" for i in range(reasoning))
    answer = tuple(f" a{i}" for i in range(target))
    tokens = (*prompt, "<think>", *thought, "</think>", *answer, "<end>")
    through = Span(p + 1, p + 1 + reasoning) if reasoning else None
    where = Span(len(tokens) - 1 - target, len(tokens) - 1)
    scores = torch.rand(hops + 1, len(tokens), generator=generator) ** 3
    scores[:, where.stop :] = 0
    rho = scores[:, through.slice].sum(1) / scores.sum(1) if through else torch.zeros(hops + 1)
    carried = torch.cat([torch.ones(1), rho[:-1].cumprod(0)])
    values = {
        "scores": (carried[:, None] * scores[:, :p]).sum(0),
        "hop_scores": scores,
        "reasoning_mass": rho,
        "head_scores": torch.rand(hops + 1, layers, heads, generator=generator),
        "residual_shares": torch.rand(hops + 1, layers, generator=generator),
        "mlp_shares": torch.rand(hops + 1, layers, generator=generator),
        "tokens": tokens,
        "token_ids": tuple(range(len(tokens))),
        "prompt": Span(0, p),
        "reasoning": through,
        "target": where,
        "method": "flashtrace",
        "closure_error": 1.3e-7,
        "settings": {"hops": hops, "ignore": [], "model": "tiny"},
    }
    return Attribution(**values | other)


@dataclass
class Element:
    """A node of the page."""

    tag: str
    attributes: dict
    inside: list = field(default_factory=list)

    def all(self, tag=None, cls=None):
        """Elements below, in order, by tag and class."""
        for child in self.inside:
            if isinstance(child, Element):
                if tag in (None, child.tag) and (cls is None or cls in child.classes):
                    yield child
                yield from child.all(tag, cls)

    @property
    def classes(self):
        return (self.attributes.get("class") or "").split()

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.inside)


class Page(HTMLParser):
    """Reads a page and insists that its elements are closed in order; only table cells may be left open."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.path = [Element("page", {})]
        self.feed(html)
        self.close()
        assert len(self.path) == 1, [e.tag for e in self.path]

    @property
    def root(self):
        return self.path[0]

    def handle_starttag(self, tag, attributes):
        if tag in ("td", "th") and self.path[-1].tag == "td":
            self.path.pop()
        element = Element(tag, dict(attributes))
        self.path[-1].inside.append(element)
        if tag not in VOID:
            self.path.append(element)

    def handle_startendtag(self, tag, attributes):
        self.path[-1].inside.append(Element(tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag == "tr" and self.path[-1].tag == "td":
            self.path.pop()
        assert self.path.pop().tag == tag

    def handle_data(self, data):
        self.path[-1].inside.append(data)


def read(attribution, **options):
    return Page(as_html(attribution, **options)).root


def shown_tokens(page):
    """The token elements in the order of the text."""
    return [s for box in page.all("div", "tokens") for s in box.all("span")]


def step(element):
    """Step on the colour scale, negative for numbers below 0."""
    found = [c for c in element.classes if c[0] in "sm" and c[1:].isdigit()]
    return int(found[0][1:]) * (1 if found[0][0] == "s" else -1) if found else 0
