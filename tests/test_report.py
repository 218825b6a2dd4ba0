"""The report: nothing from a model acts on the page, nothing is fetched, the text is kept, its numbers are right."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from flashtrace_plugin import IFR, LRP, Attribution, FlashTrace, Recommended, Span
from flashtrace_plugin.report import colours
from flashtrace_plugin.report.flow import hop_rows, segments
from flashtrace_plugin.report.html import as_html
from flashtrace_plugin.report.layers import layer_maps
from flashtrace_plugin.report.marks import in_table, in_text, percent, shorten
from flashtrace_plugin.report.terminal import print_attribution
from flashtrace_plugin.report.tokens import top_rows
from flashtrace_plugin.report.views import MAX_ROWS, views_of
from tests.tiny import random_ids, tiny, tiny_tokenizer

VOID = {"meta", "input", "br", "path", "link", "img"}
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
    boxes = page.all("div", "tokens")
    return [s for box in boxes for s in box.all("span") if "part" not in s.classes]


def step(element, key):
    """Step on the colour scale in the view with this key."""
    found = [c.removeprefix(key) for c in element.classes if c.startswith(key) and c.removeprefix(key).isdigit()]
    return int(found[0]) if found else 0


def test_texts_and_settings_from_outside_are_escaped():
    attribution = made(prompt=NASTY, settings={"model": NASTY[0], NASTY[1]: [NASTY[0]]}, method=NASTY[1])
    attribution = replace(attribution, components={NASTY[0]: torch.rand(4)})
    page = read(attribution)
    assert [s.attributes for s in page.all("script")] == [{"type": "application/json"}, {}]
    assert not list(page.all("img"))
    assert not [name for e in page.all() for name in e.attributes if name.startswith("on")]
    assert [s.text for s in shown_tokens(page)[: len(NASTY)]] == list(NASTY)


def test_the_page_allows_its_own_script_and_nothing_else():
    page = read(made())
    policy = next(m for m in page.all("meta") if "http-equiv" in m.attributes).attributes["content"]
    script = next(s for s in page.all("script") if not s.attributes).text
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("fragment", [False, True])
def test_nothing_is_fetched(fragment):
    html = as_html(made(), fragment=fragment)
    assert not [x for x in ("http://", "https://", "url(", "@import", "src=", "<link", "<iframe") if x in html]
    assert all(a.attributes["href"].startswith("#") for a in Page(html).root.all("a"))


def test_links_of_the_table_lead_to_their_tokens():
    page = read(made())
    tokens = shown_tokens(page)
    ids = {t.attributes["id"]: i for i, t in enumerate(tokens) if "id" in t.attributes}
    rows = list(next(page.all("table", "top")).all("tr"))[1:]
    for row, top in zip(rows, made().top(20), strict=True):
        assert ids[next(row.all("a")).attributes["href"][1:]] == top.position


def test_the_text_is_kept_with_its_white_space():
    prompt = ("  def", " f", "(x", "):", "\n", "\t", "return", " x", "\n\n", "  ", "")
    attribution = made(prompt)
    page = read(attribution)
    assert [t.text for t in shown_tokens(page)] == list(attribution.tokens)
    assert [i.attributes["class"] for t in shown_tokens(page) for i in t.all("i")] == ["n", "tab", "n", "n", "e"]


def test_reasoning_and_target_are_marked():
    attribution = made()
    page = read(attribution)
    for name, span in (("reasoning", attribution.reasoning), ("target", attribution.target)):
        part = next(page.all("span", name))
        assert "part" in part.classes and part.text == attribution.text(span)
        assert part.attributes["aria-label"].lower().startswith(name)


def test_shading_is_relative_to_the_maximum_of_each_view():
    attribution = made(seed=3)
    tokens = shown_tokens(read(attribution))
    views = [("a", attribution.scores), *zip("bcd", attribution.hop_scores, strict=True)]
    for key, values in views:
        expected = [round(colours.LEVELS * float(v / values.max()) ** 0.5) for v in values]
        shown = [step(t, key) for t in tokens]
        assert shown == expected + [0] * (len(tokens) - len(expected))
        assert max(shown) == colours.LEVELS


def test_every_view_has_a_button_and_one_is_chosen():
    page = read(made(hops=3))
    inputs = [i.attributes for i in page.all("input") if i.attributes["name"].endswith("-view")]
    assert [i["value"] for i in inputs] == list("abcde") and [i for i in inputs if "checked" in i] == inputs[:1]
    assert [s.text for s in next(page.all("nav")).all("label")][:5] == ["Total", "Hop 0", "Hop 1", "Hop 2", "Hop 3"]


def test_components_are_further_views():
    found = made(hops=0, components={"gate": torch.rand(9), "information": torch.rand(9)}, method="heta")
    assert [(v.group, v.label) for v in views_of(found)][2:] == [("Components", "Gate"), ("Components", "Information")]
    assert next(v for v in views_of(found) if v.label == "Gate").values == found.components["gate"].tolist()


SIGNED = torch.tensor([2.0, -1.0, 0.0, -4.0, 0.5, 0.0, 1.0, -0.25, 0.0, 3.0, 0.0, 0.0])


def test_relevance_is_a_view_with_signs():
    found = made(components={"relevance": SIGNED}, method="lrp")
    view = views_of(found)[-1]
    assert (view.group, view.label, view.signed) == ("Components", "Relevance (signed)", True)
    assert view.values == SIGNED.tolist() and (view.maximum, view.where, view.whole) == (4.0, 3, 11.75)
    page = read(found)
    shades = [next((c for c in t.classes if c.startswith("e")), "") for t in shown_tokens(page)]
    steps = [round(colours.LEVELS * abs(float(v) / 4) ** 0.5) for v in SIGNED]
    expected = [f"e{'-' if v < 0 else ''}{s}" if s else "" for v, s in zip(SIGNED, steps, strict=True)]
    assert shades == expected and "e-40" in shades
    style = next(page.all("style")).text
    assert ".ft .e-40{--e:var(--n40)}" in style and ".ft .e28{--e:var(--k28)}" in style and ".ft .d-1{" not in style
    legend = next(page.all("p", "for-e")).text
    assert "−4.000 (blue: speaks against) to 4.000 (orange: supports), the strongest on token 3" in legend
    data = json.loads(next(s for s in page.all("script") if s.attributes).text)
    assert data["views"][-1] == ["Relevance (signed)", 11.75, SIGNED.tolist(), True]


def test_only_what_is_clearly_negative_has_signs():
    rounding = torch.tensor([1.0, -1e-9, 0.5])
    components = {"information": rounding, "mine": torch.tensor([1.0, -0.1]), "relevance": SIGNED.abs()}
    labels = [(v.label, v.signed) for v in views_of(made(components=components))][-3:]
    assert labels == [("Information", False), ("Mine (signed)", True), ("Relevance (signed)", True)]


def test_tables_show_the_sign_of_a_token():
    found = made(components={"relevance": SIGNED}, method="lrp")
    rows = [[c.text for c in row.all()] for row in next(read(found).all("table", "top")).all("tr")]
    assert "Sign" in rows[0]
    signs = {0: "+", 1: "−", 2: "", 3: "−"}
    assert [r.sign for r in top_rows(found)] == [signs[r.position] for r in top_rows(found)]
    for cells, row in zip(rows[1:], top_rows(found), strict=True):
        at = cells.index(str(row.position), 1)
        assert cells[at + 1] == row.sign
    assert "Sign" not in read(made()).text and "sign" not in printed(made())
    lines = printed(found).splitlines()
    for line, row in zip(lines[5:], top_rows(found), strict=False):
        assert line.split()[0] == str(row.position) and f" {row.sign} " in line
    key = lines[5 + len(top_rows(found))]
    assert key == "sign: of its direct relevance; + supports the target, − speaks against it"
    assert max(map(len, lines)) <= 80


def printed(attribution, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    print_attribution(attribution, console=console)
    return console.export_text()


def test_the_papers_setting_suggests_the_recommended_method_in_one_line():
    papers = made(settings={"positions": "token"})
    line = "The method “recommended” finds the evidence better, see docs/recommended.md"
    assert read(papers).text.count(line) == 1 and printed(papers).splitlines().count(line) == 1
    others = (made(settings={"positions": "predicting"}), made(settings={"positions": "token"}, method="ifr"))
    assert not any("recommended" in text for other in others for text in (read(other).text, printed(other)))


def test_rows_of_ifr_are_views_up_to_a_limit():
    many = MAX_ROWS + 5
    found = made(hops=0, target=many, method="ifr")
    found = replace(found, components={"per_token": torch.rand(many, len(found.tokens))})
    rows = views_of(found)[2:]
    assert len(rows) == MAX_ROWS and rows[0].group == f"Target tokens, first {MAX_ROWS} of {many}"
    assert rows[3].values == found.components["per_token"][3].tolist() and rows[3].label == "a3"
    assert len({v.key for v in views_of(found)}) == MAX_ROWS + 2


def test_segments_cover_the_text_without_gaps():
    for attribution in (made(), made(reasoning=0), made(target=1, prompt=("x",))):
        cut = segments(attribution)
        assert cut[0].span.start == 0 and cut[-1].span.stop == len(attribution.tokens)
        assert all(a.span.stop == b.span.start for a, b in pairwise(cut))
    assert [s.part for s in segments(made())] == ["prompt", "rest", "reasoning", "rest", "target", "rest"]


def test_shares_of_hops_add_up_and_agree_with_the_attribution():
    attribution = made(hops=3, seed=1)
    rows = hop_rows(attribution)
    for row, rho in zip(rows, attribution.reasoning_mass, strict=True):
        assert sum(row.shares.values()) == pytest.approx(1, abs=1e-6)
        assert row.shares["reasoning"] == pytest.approx(float(rho), abs=1e-6)
        assert sum(width for _, width, _ in row.strip) == pytest.approx(100)
    assert sum(row.score for row in rows) == pytest.approx(1)
    first = attribution.hop_scores[0, attribution.prompt.slice].sum() / attribution.scores.sum()
    assert rows[0].score == pytest.approx(float(first), rel=1e-5)


def test_a_hop_without_mass_is_told():
    attribution = made(hops=2)
    attribution.hop_scores[2] = attribution.head_scores[2] = attribution.reasoning_mass[2] = 0
    assert hop_rows(attribution)[2].shares == {} and len(layer_maps(attribution)) == 2
    assert "no mass was left to follow" in read(attribution).text


def test_hops_that_had_nothing_to_follow_are_not_shown():
    attribution = made(reasoning=0, hops=2)
    attribution.hop_scores[1:] = attribution.head_scores[1:] = 0
    assert [row.number for row in hop_rows(attribution)] == [0]
    page = read(attribution)
    assert [s.text for s in next(page.all("nav")).all("label")][:2] == ["Total", "Hop 0"]
    assert "Hop 1" not in page.text and "no mass was left" not in page.text


def test_head_maps_name_the_strongest_heads():
    attribution = made(hops=0, layers=5, heads=3)
    attribution.head_scores[0, 4, 1] = 2.0
    (found,) = layer_maps(attribution)
    assert found.strongest[0] == ("L4H1", 2.0) and found.rows[4].heads[1] == colours.LEVELS
    table = next(read(attribution).all("table", "map"))
    assert len([c for c in table.all("td") if any(x.startswith("H") for x in c.classes)]) == 15


def test_a_method_without_bypass_shares_shows_none():
    attribution = made(hops=0)
    assert "residual" in next(read(attribution).all("table", "map")).text
    attribution.residual_shares.zero_()
    attribution.mlp_shares.zero_()
    page = read(attribution)
    assert "residual" not in next(page.all("table", "map")).text
    assert "the heads of all layers add up to 100 %" in page.text


def test_top_rows_show_a_token_between_its_neighbours():
    attribution = made(("a", "b", " c", "d", "\n", "e"))
    row = next(r for r in top_rows(attribution) if r.position == 2)
    assert (row.before, row.token, row.after) == ("ab ", "c", "d↵e")
    assert sum(r.share for r in top_rows(attribution)) == pytest.approx(1)


def test_evidence_is_marked_in_text_and_table():
    page = read(made(), evidence=[1, 3])
    assert [i for i, t in enumerate(shown_tokens(page)) if "gold" in t.classes] == [1, 3]
    assert len(list(next(page.all("table", "top")).all("b", "gold"))) == 2


def test_scores_of_zero_are_no_error():
    attribution = made(hops=0)
    for tensor in (attribution.scores, attribution.hop_scores, attribution.head_scores):
        tensor.zero_()
    assert "No token of the prompt has a positive score." in read(attribution).text


def test_the_closure_error_is_told_in_words():
    assert "relative gap of 1.3e-07" in read(made()).text
    assert "no gap to check" in read(made(closure_error=0.0)).text


@pytest.mark.parametrize("theme", [colours.LIGHT, colours.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("root", [False, True])
def test_colours_are_readable_and_ordered_by_lightness(theme, root):
    assert colours.contrast(theme.other["soft"], theme.stops[0]) >= 4.5
    for stops in (theme.stops, theme.below):
        palette = colours.palette(stops, root=root)
        assert min(colours.contrast(c, theme.ink) for c in palette) >= 4.5
        light = [colours.luminance(c) for c in palette]
        assert light == sorted(light, reverse=theme is colours.LIGHT)
        assert (palette[0], palette[-1]) == (theme.stops[0], stops[-1])


# What people without one kind of cones see, in linear RGB (Machado et al. 2009, severity 1).
BLIND = {
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}
XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def seen(colour, kind):
    """CIE L*a*b* of a colour #rrggbb in these eyes."""
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = (XYZ @ (torch.tensor(BLIND[kind]) @ linear).clamp(0, 1) / XYZ.sum(1)).clamp(min=1e-4) ** (1 / 3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("theme", [colours.LIGHT, colours.DARK], ids=["light", "dark"])
def test_signs_are_told_apart_without_one_kind_of_cones(theme, kind):
    pairs = zip(colours.palette(theme.stops, root=True), colours.palette(theme.below, root=True), strict=True)
    far = [float((seen(a, kind) - seen(b, kind)).norm()) for a, b in pairs]
    assert far[-1] > 40 and min(far[10:]) > 12  # 2.3 is just noticeable


def test_contrast_of_known_colours():
    assert colours.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert colours.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_invisible_characters_are_shown():
    assert in_text("\x00\x1b\u202e\u200b\r") == "␀␛⟨U+202E⟩⟨U+200B⟩␍"
    assert [in_table(t) for t in ("", " ", "  ", " x", "  x ", "\n", "a\tb")] == [
        "⟨no text⟩",
        "␣",
        "␣␣",
        "x",
        "␣x␣",
        "↵",
        "a⇥b",
    ]
    assert shorten("one\n two", 20) == "one two" and shorten("x" * 50, 20) == "x" * 11 + " … " + "x" * 6
    assert [percent(x) for x in (0, 0.0001, 0.1234, 1)] == ["0.0 %", "< 0.1 %", "12.3 %", "100.0 %"]


def test_a_long_text_stays_small():
    words = tuple(f" word{i % 97}" for i in range(2000))
    html = as_html(made(words, reasoning=400, target=20, hops=4, layers=48, heads=32))
    assert len(html.encode()) < 1_500_000


def test_fragments_do_not_get_in_each_others_way():
    first, second = made()._repr_html_(), made()._repr_html_()
    assert "<html" not in first and "<body" not in first
    names = [{i.attributes["name"] for i in Page(html).root.all("input")} for html in (first, second)]
    assert not names[0] & names[1]


def test_a_page_is_the_same_every_time(tmp_path):
    made().to_html(tmp_path / "one.html")
    assert (tmp_path / "one.html").read_text(encoding="utf-8") == as_html(made())


@pytest.mark.parametrize("cls", [FlashTrace, IFR, LRP, Recommended])
def test_results_of_methods(cls):
    tokenizer = tiny_tokenizer()
    found = cls(tiny("qwen3"), tokenizer).attribute("The key <b>\nis red.\n", "<think>red</think>It is red.")
    page = read(found)
    assert "".join(t.text for t in shown_tokens(page)) == "".join(found.tokens)
    data = json.loads(next(s for s in page.all("script") if s.attributes).text)
    assert data["views"][0][2] == pytest.approx(found.scores.tolist(), rel=5e-3)


def test_a_result_without_texts():
    found = FlashTrace(tiny("gpt2")).attribute_ids(random_ids(12), prompt_length=8, target=Span(10, 12))
    assert [t.text for t in shown_tokens(read(found))] == list(found.tokens)
