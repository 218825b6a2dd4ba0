"""The report: nothing from a model acts on the page, nothing is fetched, the text is kept, its numbers are right."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console

from flashtrace_plugin import IFR, LRP, Attribution, FlashTrace, Recommended, Span
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.registry import METHODS
from flashtrace_plugin.report import colours
from flashtrace_plugin.report.flow import hop_rows, segments
from flashtrace_plugin.report.front import front_of
from flashtrace_plugin.report.html import as_html
from flashtrace_plugin.report.kinds import Kind, kinds_of
from flashtrace_plugin.report.layers import layer_maps
from flashtrace_plugin.report.marks import in_table, in_text, percent, shorten
from flashtrace_plugin.report.mass import mass_in_words, total_mass
from flashtrace_plugin.report.pieces import cuts_of
from flashtrace_plugin.report.terminal import print_attribution
from flashtrace_plugin.report.tokens import top_rows
from flashtrace_plugin.report.views import MAX_ROWS, views_of
from flashtrace_plugin.units.contents import Content
from tests.pages import NASTY, Page, made, read, shown_tokens, step
from tests.tiny import random_ids, tiny, tiny_tokenizer


def data_of(page):
    """What the script gets."""
    return json.loads(next(s for s in page.all("script") if s.attributes).text)


def numbers(packed, kind="<f4"):
    return np.frombuffer(base64.b64decode(packed), kind)


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
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy and "unsafe" not in policy
    style = base64.b64encode(hashlib.sha256(next(page.all("style")).text.encode()).digest()).decode()
    assert f"style-src 'sha256-{style}'" in policy
    assert not [e for e in page.all() if "style" in e.attributes]


@pytest.mark.parametrize("fragment", [False, True])
def test_nothing_is_fetched(fragment):
    html = as_html(made(), fragment=fragment)
    assert not [x for x in ("http://", "https://", "url(", "@import", "src=", "<link", "<iframe") if x in html]
    assert all(a.attributes["href"].startswith("#") for a in Page(html).root.all("a"))


def test_links_of_the_table_lead_to_their_tokens():
    page = read(made())
    ids = {t.attributes["id"]: i for i, t in enumerate(shown_tokens(page)) if "id" in t.attributes}
    rows = list(next(page.all("table", "top")).all("tr"))[1:]
    assert [ids[next(row.all("a")).attributes["href"][1:]] for row in rows] == [t.position for t in made().top(20)]


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
        part = next(page.all("div", name))
        assert "part" in part.classes and part.text == attribution.text(span)
        assert part.attributes["aria-label"].lower().startswith(name)


def test_shading_is_relative_to_a_percentile_of_what_is_shown():
    words = tuple(f" w{i}" for i in range(250))
    attribution = made(words, seed=3)
    attribution.scores[4] = 100  # an outlier
    shown = read(attribution, unit="word")
    top = torch.quantile(attribution.totals[[*range(250), *attribution.reasoning]].double(), 0.99)
    expected = [round(colours.LEVELS * min(1.0, float(v) / float(top)) ** 0.5) for v in attribution.totals]
    hidden = {250, 254, *range(255, 258)}  # tags, the answer and what follows it
    assert [step(t) for t in shown_tokens(shown)] == [0 if i in hidden else e for i, e in enumerate(expected)]
    assert sum(e > 10 for e in expected) > 100


def test_reasoning_is_shaded_with_what_passed_through_it():
    steps = [step(t) for t in shown_tokens(read(made(tuple("abcdefgh"), seed=2)))]
    assert max(steps[9:12]) > 0 and not any(steps[13:])


def test_tokens_of_templates_sinks_and_tags_are_told_apart():
    attribution = made(
        ("<s>", "user", " Hello", " you.", "<end>"), settings={"sink_positions": [0], "sink_share": 0.5}
    )
    attribution = replace(attribution, contents=(Content(7, 18, "user", 0),), messages=1)
    kinds = [Kind.SINK, Kind.TEMPLATE, Kind.CONTENT, Kind.CONTENT, Kind.TEMPLATE]
    kinds += [Kind.TEMPLATE, *[Kind.CONTENT] * 3, Kind.TEMPLATE, *[Kind.TARGET] * 2, Kind.TEMPLATE]
    assert kinds_of(attribution) == kinds
    classes = [set(t.classes) - {c for c in t.classes if c[1:].isdigit()} for t in shown_tokens(read(attribution))]
    letters = {Kind.SINK: {"k"}, Kind.TEMPLATE: {"t"}, Kind.CONTENT: set(), Kind.TARGET: {"a"}}
    assert classes == [letters[kind] for kind in kinds]


def test_every_view_has_a_button_and_one_is_chosen():
    page = read(made(hops=3))
    inputs = [i.attributes for i in page.all("input") if i.attributes.get("name", "").endswith("-view")]
    assert [i["value"] for i in inputs] == list("01234") and [i for i in inputs if "checked" in i] == inputs[:1]
    labels = [s.text for s in next(page.all("div", "choices")).all("label")]
    assert labels[:5] == ["Total", "Hop 0", "Hop 1", "Hop 2", "Hop 3"]


def test_the_script_gets_every_number_as_it_is():
    attribution = made(hops=2)
    data = data_of(read(attribution))
    assert np.array_equal(numbers(data["views"][0]["values"])[:4], attribution.scores.numpy())
    for k in range(3):
        assert np.array_equal(numbers(data["views"][1 + k]["values"]), attribution.hop_scores[k].numpy())


SENTENCES = ("One", " is", " here.", " Two", " follows.", " What", " now", "?", " Three")


@pytest.mark.parametrize("unit", ["sentence", "word", {"first": "One is here.", "third": "Three"}])
def test_units_add_up_to_what_by_says(unit):
    attribution = made(SENTENCES, settings={"sink_positions": [3], "sink_share": 0.1})
    cut = next(c for c in cuts_of(attribution, unit) if c.name == (unit if isinstance(unit, str) else "document"))
    sums = cut.sums(attribution.totals)
    found = attribution.by(unit)
    expected = [one.score for one in found if one.unit.content and one.score]
    kinds = kinds_of(attribution)
    named = set(cut.owner[: len(SENTENCES)].tolist())
    pieces = [p for p in sorted(named) if kinds[cut.first[p]] is Kind.CONTENT and (not cut.names or cut.names[p])]
    assert sums[pieces].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_token_of_two_units_counts_in_parts():
    attribution = made(("One is. T", "wo is.", " Three."), reasoning=0, hops=0)
    cut = next(c for c in cuts_of(attribution, "sentence") if c.name == "sentence")
    assert sorted(share for _, _, share in cut.parts) == pytest.approx([1 / 7, 6 / 7])
    expected = [one.score for one in attribution.by("sentence")]
    assert cut.sums(attribution.totals)[:3].tolist() == pytest.approx(expected)


def test_the_first_screen_names_question_answer_and_sources():
    attribution = made(SENTENCES)
    attribution.scores[:] = torch.tensor([0.1, 0.2, 0.3, 1.0, 1.0, 3.0, 3.0, 3.0, 0.0])
    front = front_of(attribution, "sentence", None)
    assert (front.asked, front.answer) == ("What now?", "a0 a1")
    assert [s.text for s in front.sources] == ["Two follows.", "One is here."]
    whole = float(attribution.scores.sum())
    assert [s.share for s in front.sources] == pytest.approx([2 / whole, 0.6 / whole])
    assert front.own == pytest.approx(9 / whole) and front.others == (0, pytest.approx(0, abs=1e-6))
    text = next(read(attribution).all("section", "front")).text
    for piece in ("What now?", "a0 a1", "Two follows.", percent(2 / whole), "the question itself", "Not checked"):
        assert piece in text


def test_the_question_is_that_of_the_last_user():
    tokens = ("Is", " it?", " Yes.", " Say", " it.")
    contents = (Content(0, 6, "user", 0), Content(6, 11, "assistant", 1), Content(11, 19, "user", 2))
    attribution = replace(made(tokens), contents=contents, messages=3)
    front = front_of(attribution, "sentence", None)
    assert (front.asked, front.question, front.own) == ("Say it.", False, 0)


class Verdict:
    """Stands for a verification."""

    sentence, holds = "Removing <it> lowers log P.", True


def test_a_verification_is_told():
    page = read(made(), verification=Verdict())
    assert "✓ Checked, it holds. Removing <it> lowers log P." in next(page.all("p", "check")).text
    Verdict.holds = False
    assert "it does not hold" in next(read(made(), verification=Verdict()).all("p", "check")).text


def test_what_verify_found_is_remembered():
    tokenizer = tiny_tokenizer()
    found = IFR(model := tiny("qwen3"), tokenizer).attribute("The key is red. The box is blue. It is on.", "red box")
    assert found.verified is None and "Not checked" in read(found).text
    verification = found.verify(model, unit="word", draws=2)
    assert found.verified is verification and verification.sentence in " ".join(read(found).text.split())


def test_where_mass_lies_is_told_and_adds_up():
    found = LRP(tiny("qwen3"), tiny_tokenizer(), hops=2).attribute("The key is red.", "<think>It is red</think>red")
    mass = total_mass(found)
    assert float(mass.sum()) == pytest.approx(1, rel=1e-5) and float(total_mass(made(seed=5)).sum()) == pytest.approx(
        1
    )
    assert torch.allclose(mass[found.prompt.slice], found.scores, atol=1e-6)
    words = mass_in_words(found, kinds_of(found), mass)
    shares = [float(part.split(" %")[0].removeprefix("< ")) for part in words.split("; ")]
    assert sum(shares) == pytest.approx(100, abs=0.3) and "on the answer itself" in words and words in read(found).text


def test_components_are_further_views():
    found = made(hops=0, components={"gate": torch.rand(9), "information": torch.rand(9)}, method="heta")
    assert [(v.group, v.label) for v in views_of(found)][2:] == [("Components", "Gate"), ("Components", "Information")]
    assert next(v for v in views_of(found) if v.label == "Gate").values[:9].equal(found.components["gate"])


SIGNED = torch.tensor([2.0, -1.0, 0.0, -4.0, 0.5, 0.0, 1.0, -0.25, 0.0, 3.0, 0.0, 0.0])


def test_relevance_is_a_view_with_signs():
    found = made(components={"relevance": SIGNED}, method="lrp")
    view = views_of(found)[-1]
    assert (view.group, view.label, view.signed) == ("Components", "Relevance (signed)", True)
    assert view.values.equal(SIGNED)
    data = data_of(read(found))
    assert data["views"][data["signs"]]["label"] == view.label
    assert np.array_equal(numbers(data["views"][-1]["values"]), SIGNED.numpy())


def test_only_what_is_clearly_negative_has_signs():
    rounding = torch.tensor([1.0, -1e-9, 0.5])
    components = {"information": rounding, "mine": torch.tensor([1.0, -0.1]), "relevance": SIGNED.abs()}
    labels = [(v.label, v.signed) for v in views_of(made(components=components))][-3:]
    assert labels == [("Information", False), ("Mine (signed)", True), ("Relevance (signed)", True)]


def test_tables_show_the_sign_of_a_token():
    found = made(components={"relevance": SIGNED}, method="lrp")
    rows = [[c.text for c in row.all("td")] for row in next(read(found).all("table", "top")).all("tr")][1:]
    signs = {0: "+", 1: "−", 2: "", 3: "−"}
    assert [r.sign for r in top_rows(found)] == [signs[r.position] for r in top_rows(found)]
    assert [(int(c[2]), c[3]) for c in rows] == [(r.position, r.sign) for r in top_rows(found)]
    assert "Sign" not in [h.text for h in read(made()).all("th")] and "sign" not in printed(made())
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
    assert rows[3].values.equal(found.components["per_token"][3]) and rows[3].label == "a3"


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
    assert [s.text for s in next(page.all("div", "choices")).all("label")][:2] == ["Total", "Hop 0"]
    assert "Hop 1" not in next(page.all("main")).text and "no mass was left" not in page.text


def test_head_maps_name_the_strongest_heads():
    attribution = made(hops=0, layers=5, heads=3)
    attribution.head_scores[0, 4, 1] = 2.0
    (found,) = layer_maps(attribution)
    assert found.strongest[0] == ("L4H1", 2.0) and found.rows[4].heads[1] == colours.LEVELS
    table = next(read(attribution).all("table", "heads"))
    assert len([c for c in table.all("td") if any(x.startswith("s") and x[1:].isdigit() for x in c.classes)]) == 15


def test_a_method_without_bypass_shares_shows_none():
    attribution = made(hops=0)
    assert "residual" in next(read(attribution).all("table", "heads")).text
    attribution.residual_shares.zero_()
    attribution.mlp_shares.zero_()
    page = read(attribution)
    assert "residual" not in next(page.all("table", "heads")).text
    assert "the heads of all layers add up to 100 %" in page.text


def test_top_rows_show_a_token_between_its_neighbours():
    attribution = made(("a", "b", " c", "d", "\n", "e"))
    row = next(r for r in top_rows(attribution) if r.position == 2)
    assert (row.before, row.token, row.after) == ("ab ", "c", "d↵e")
    assert sum(r.share for r in top_rows(attribution)) == pytest.approx(1)


def test_evidence_is_marked_in_the_text():
    page = read(made(), evidence=[1, 3])
    assert [i for i, t in enumerate(shown_tokens(page)) if "gold" in t.classes] == [1, 3]


def test_scores_of_zero_are_no_error():
    attribution = made(hops=0)
    for tensor in (attribution.scores, attribution.hop_scores, attribution.head_scores):
        tensor.zero_()
    text = read(attribution).text
    assert "Nothing in the prompt has a positive score." in text and "has a score above 0" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    attribution = made()
    attribution.scores[2] = value
    with pytest.raises(InputError, match=r"scores holds 1 numbers that are not finite, the first at \[2\]"):
        as_html(attribution)
    attribution = made()
    attribution.hop_scores[1, 5] = value
    with pytest.raises(InputError, match=r"hop_scores .* first at \[1, 5\]"):
        as_html(attribution)


def test_a_component_says_where_it_has_no_number():
    found = made(components={"gate": torch.tensor([1.0, float("nan"), 0.5])})
    view = views_of(found)[-1]
    assert view.values[:3].tolist() == [1.0, 0.0, 0.5] and "1 positions have no number and count as 0" in view.note


def test_results_without_tokens_and_with_too_few_scores_are_refused():
    with pytest.raises(InputError, match="has no tokens"):
        as_html(replace(made(), tokens=(), token_ids=()))
    with pytest.raises(InputError, match="3 scores for 4 tokens"):
        as_html(replace(made(), scores=torch.ones(3)))


def test_one_token_before_one_token():
    found = Attribution(
        scores=torch.ones(1),
        hop_scores=torch.tensor([[0.5, 0.5]]),
        reasoning_mass=torch.zeros(1),
        head_scores=torch.zeros(1, 0, 0),
        residual_shares=torch.zeros(1, 0),
        mlp_shares=torch.zeros(1, 0),
        tokens=("A", "B"),
        token_ids=(1, 2),
        prompt=Span(0, 1),
        reasoning=None,
        target=Span(1, 2),
        method="mine",
        closure_error=0.0,
    )
    page = read(found)
    assert [t.text for t in shown_tokens(page)] == ["A", "B"] and "the method 'mine' is not registered" in page.text


def test_a_graph_of_another_text_is_refused():
    other = FlashTrace(tiny("qwen3"), tiny_tokenizer()).graph("The key is red.", "<think>It is.</think>red")
    with pytest.raises(InputError, match="the graph is of another text"):
        as_html(made(), graph=other)


def test_settings_as_code_make_the_same_numbers():
    tokenizer = tiny_tokenizer()
    model = tiny("qwen3")
    options = {"hops": 2, "recursion": "generation", "positions": "predicting", "ignore": (".",)}
    found = FlashTrace(model, tokenizer, **options).attribute("The key is red.", "<think>It is red</think>red")
    code = next(read(found).all("pre")).text
    known = {"models": type("Models", (), {"load": lambda name: (model, tokenizer)})}
    body = "\n".join(line for line in code.splitlines() if "import models" not in line)
    exec(body, known)
    assert known["found"].scores.equal(found.scores) and known["found"].hop_scores.equal(found.hop_scores)
    assert METHODS["flashtrace"] is FlashTrace


def test_what_no_file_can_hold_becomes_a_sign(tmp_path):
    odd = "\ud800 \u202e \x1b[31m"
    found = made((odd, " b"), method=odd, settings={"model": odd, odd: [odd]}, components={odd: torch.rand(3)})
    found.to_html(tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).root.text
    assert "⟨U+D800⟩ ⟨U+202E⟩ ␛[31m" in text and not {"\u202e", "\x1b"} & set(text)


def test_code_from_a_file_is_a_string_only():
    evil = "x'); import os; os.system('y"
    code = next(read(made(settings={"model": evil, "hops": 1})).all("pre")).text
    compile(code, "page", "exec")
    assert repr(evil) in code


def test_the_closure_error_is_told_in_words():
    assert "relative gap of 1.3e-07" in read(made()).text
    assert "no gap to check" in read(made(closure_error=0.0)).text


@pytest.mark.parametrize("theme", [colours.LIGHT, colours.DARK], ids=["light", "dark"])
def test_colours_are_readable_and_ordered_by_lightness(theme):
    assert colours.contrast(theme.other["soft"], theme.stops[0]) >= 4.5
    for stops in (theme.stops, theme.below):
        palette = colours.palette(stops)
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
    pairs = zip(colours.palette(theme.stops), colours.palette(theme.below), strict=True)
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
    names = [
        {i.attributes["name"] for i in Page(html).root.all("input") if "name" in i.attributes}
        for html in (first, second)
    ]
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
    values = numbers(data_of(page)["views"][0]["values"])
    assert np.array_equal(values[: len(found.scores)], found.scores.numpy())


def test_a_result_without_texts():
    found = FlashTrace(tiny("gpt2")).attribute_ids(random_ids(12), prompt_length=8, target=Span(10, 12))
    assert [t.text for t in shown_tokens(read(found))] == list(found.tokens)
