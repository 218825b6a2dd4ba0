"""The report in headless Chromium: what people see, click, type, print and save, and that it is quick."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from flashtrace_plugin import LRP, Recommended, explain, reasoner
from flashtrace_plugin.report.compare import compare
from flashtrace_plugin.report.html import as_html
from tests import browser
from tests.pages import NASTY, made

if browser.missing():
    pytest.skip(str(browser.missing()), allow_module_level=True)
expect = pytest.importorskip("playwright.sync_api").expect
PROMPT = "the sun is green . v20 12 ; the sky is red . v55 v20 ; the moon is calm . v3 76 ; ? v55 think"
BIDI = ("abc ", "\u202e", "\u05e9\u05dc\u05d5\u05dd ", "👩\u200d🔬", "\x1b[31m", "\tx", " = 1", "\u2066", "é")


@pytest.fixture(scope="module")
def chromium():
    with browser.launched() as running:
        yield running


@pytest.fixture(scope="module")
def explained():
    """The bundled model's answer in two steps, with its graph and what verify found."""
    model, tokenizer = reasoner.load()
    answer = reasoner.answer(model, tokenizer, PROMPT)
    found = explain(model, tokenizer, PROMPT, answer)
    found.verify(unit="step", draws=2)
    signed = LRP(model, tokenizer).attribute(PROMPT, answer)
    return found, Recommended(model, tokenizer).graph(PROMPT, answer, unit="step"), signed


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens a page; it must not fetch, log or raise anything."""
    wrong = []

    def open_page(html, **options):
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        page = chromium.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "blob:")) else wrong.append(r.url))
        page.goto((tmp_path / "page.html").as_uri())
        return page

    yield open_page
    for context in chromium.contexts:
        context.close()
    assert not wrong


@pytest.fixture
def report(opened, explained):
    found, graph, _ = explained
    return opened(as_html(found, unit="step", graph=graph))


def shades(page, where=".text:not(:last-of-type) .tokens span, .text .tokens span"):
    """Steps of all tokens on the colour scale, negative below 0."""
    script = """spans => spans.map(s => [...s.classList].find(c => /^[sm]\\d+$/.test(c)) || "s0")
        .map(c => (c[0] == "m" ? -1 : 1) * c.slice(1))"""
    return page.locator(where).evaluate_all(script)


def rows(page):
    return [row.split("\t") for row in page.locator(".top tbody tr").all_inner_texts()]


def test_the_script_shows_what_the_page_without_it_shows(opened, explained):
    found, graph, _ = explained
    html = as_html(found, unit="step", graph=graph)
    before, after = opened(html, java_script_enabled=False), opened(html)
    assert shades(before) == shades(after) and max(shades(after)) == 40
    assert [row[0] for row in rows(before)] == [row[0] for row in rows(after)[: len(rows(before))]]
    assert before.locator(".controls").is_hidden() and after.locator(".controls").is_visible()
    text = before.locator("main").inner_text()
    for part in (
        "Strongest sources",
        "v20 12 ;",
        "Checked",
        "Of all mass",
        "Routes from the sources",
        "Widest routes",
    ):
        assert part in text


def test_a_view_a_unit_and_the_table_go_together(report, explained):
    found, _, _ = explained
    total = shades(report)
    report.get_by_label("Hop 0", exact=True).check()
    assert shades(report) != total
    report.get_by_label("Token", exact=True).check()
    report.get_by_label("Part").select_option("")
    best = found.hop_scores[0].clone()
    best[[i for i in range(len(best)) if i in found.target or found.tokens[i].strip() in ("<think>", "</think>")]] = 0
    assert int(rows(report)[0][3]) == int(best.argmax())
    report.get_by_label("Part").select_option("reasoning")
    assert {int(row[2]) for row in rows(report)} <= set(found.reasoning)
    report.get_by_role("button", name="At").click()
    assert [int(r[2]) for r in rows(report)] == sorted(int(r[2]) for r in rows(report))


def test_units_of_the_table_are_those_of_by(report, explained):
    found, _, _ = explained
    expected = [(f"{100 * one.share:.1f} %") for one in found.by("step").top(3)]
    shares = [next(cell for cell in row if cell.endswith(" %")) for row in rows(report)]
    assert shares[:3] == expected


def test_scale_cut_off_and_switches(report):
    report.locator(".fine summary").click()
    root = shades(report)
    report.get_by_label("Linear").check()
    linear = shades(report)
    report.get_by_label("Log").check()
    assert sum(linear) < sum(root) < sum(shades(report))
    assert report.locator(".histogram rect").count() == 41
    report.get_by_label("Cut off shades below").fill("30")
    assert all(s == 0 or s >= 30 for s in shades(report)) and max(shades(report)) == 40
    report.get_by_label("Cut off shades below").fill("0")


def test_what_explains_nothing_is_shaded_on_demand(opened):
    found = made(settings={"sink_positions": [0], "sink_share": 0.5})
    page = opened(as_html(found))
    page.locator(".fine summary").click()
    for label, where in (("The answer itself", ".target span"), ("Template and tags", ".t"), ("Sinks", ".k")):
        assert max(map(abs, shades(page, f".text {where}"))) == 0
        page.get_by_label(label).check()
        assert max(shades(page, f".text {where}")) > 0


def test_a_step_shows_its_sources_and_two_are_compared(report, explained):
    _, graph, _ = explained
    spans = report.locator(".text .reasoning span")
    spans.first.click()
    assert "Step 1" in report.locator(".chip").inner_text() and "what Step 1" in report.locator(".legend").inner_text()
    row = next(r for r in rows(report) if len(r) > 3)
    best = graph.by_source(0).top(1)[0]
    assert row[1].split("\n")[0].strip() == best.unit.text
    share = float(graph.totals[0].max())
    assert f"{100 * share:.1f} %" in row
    spans.last.click()
    assert report.locator(".chip").count() == 2 and min(shades(report)) < 0 < max(shades(report))
    head = report.locator(".top thead").inner_text()
    assert "First" in head and "Second" in head and "Difference" in head
    report.get_by_role("button", name="By all routes").click()
    assert "directly" in report.locator(".legend").inner_text()
    report.keyboard.press("Escape")
    assert report.locator(".chip").count() == 0 and report.locator(".edge.on").count() == 0


def test_keyboard_steps_jumps_and_chooses(report):
    report.locator(".text .tokens").last.focus()
    report.keyboard.press("ArrowRight")
    assert report.locator(".tip").is_visible() and report.locator(".at").count() > 0
    while "v" not in report.locator(".at").first.inner_text():
        report.keyboard.press("ArrowRight")
    said = report.locator("[role=status].sr").inner_text()
    assert "%" in said
    report.keyboard.press("Enter")
    assert report.locator(".chip").count() == 1
    report.keyboard.press("Escape")
    report.locator(".text .tokens").first.focus()
    report.keyboard.press("n")
    assert max(shades(report, ".at")) > 0
    report.get_by_role("button", name="Strong ▸").click()
    assert report.locator(".at").count() > 0


def test_search_marks_and_counts(report):
    report.get_by_role("searchbox").fill("V20 12")
    report.locator(".found:has-text('found')").wait_for()
    assert report.locator(".found").inner_text().startswith("2 found")
    assert (
        report.locator(".text .hit").all_inner_texts() == ["v20", "12"] * 2
        or report.locator(".text .hit").count() == 4
    )
    report.get_by_role("searchbox").fill("")
    expect(report.locator(".hit")).to_have_count(0)


def test_a_tap_shows_numbers(opened, explained):
    found, _, _ = explained
    page = opened(as_html(found, unit="step"), has_touch=True, viewport={"width": 390, "height": 800})
    page.locator(".text .tokens span").nth(8).tap()
    assert "%" in page.locator(".tip").inner_text() and "Total" in page.locator(".tip").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def saved(page, kind):
    with page.expect_download() as download:
        page.locator(f"[data-save={kind}]").click()
    return download.value.path().read_bytes()


def test_files_of_what_is_shown(report, explained):
    found, _, _ = explained
    table = list(csv.DictReader(io.StringIO(saved(report, "csv").decode())))
    expected = found.by("step").top(3)
    assert [row["text"] for row in table[:3]] == [one.unit.text for one in expected]
    assert [float(r["score"]) for r in table[:3]] == pytest.approx([one.score for one in expected], rel=1e-6)
    drawing = ElementTree.fromstring(saved(report, "svg"))
    ink = "".join(e.text or "" for e in drawing.iter("{http://www.w3.org/2000/svg}text"))
    assert "".join(ink.split()) == "".join("".join(found.tokens).split())
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}rect"))) > 3
    assert saved(report, "png")[:8] == b"\x89PNG\r\n\x1a\n"


def test_code_is_copied(report):
    report.locator("details:has(> summary:has-text('Settings'))").evaluate("d => d.open = true")
    report.locator(".code").evaluate("d => d.open = true")
    report.locator("[data-copy]").click()
    report.locator("[data-copy]:has-text('Copied'), [data-copy]:has-text('Selected')").wait_for()
    assert "attribute_ids" in report.evaluate("getSelection().toString()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened, explained, tmp_path, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=browser.MISSING_AXE)
    found, graph, signed = explained
    compare(found, signed, tmp_path / "two.html", unit="step")
    pages = [as_html(found, unit="step", graph=graph, evidence=[5, 6]), (tmp_path / "two.html").read_text("utf-8")]
    for html in pages:
        page = opened(html, color_scheme=scheme)
        page.locator(".fine summary").click()
        for token in page.locator(".text .reasoning span").all()[:1]:
            token.click()
        result = axe.Axe().run(page)
        assert result.violations_count == 0, result.generate_report()


@pytest.mark.parametrize("length, seconds", [(3_000, 1.0), (20_000, 3.0)])
def test_long_texts_open_and_switch_quickly(opened, length, seconds):
    words = tuple(f" word{i % 97}" + "." * (i % 19 == 18) + "\n" * (i % 190 == 189) for i in range(length - 500))
    html = as_html(made(words, reasoning=480, target=15))
    opening = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd / 1000"
    # Other processes share the cores: what counts is what it can do.
    assert any(opened(html).evaluate(opening) < seconds for _ in range(3))
    script = """async (view) => { const begun = performance.now(); document.querySelector(view).click();
        await new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)));
        return performance.now() - begun }"""
    page = opened(html)
    assert min(page.evaluate(script, f'input[name$="-view"][value="{k}"]') for k in (1, 2, 1)) < 300


def test_hostile_texts_are_inert(opened):
    found = replace(made(prompt=(*NASTY, *BIDI)), components={NASTY[0]: torch.rand(4)}, method=NASTY[1])
    page = opened(as_html(found, unit="word"))
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    page.get_by_label("Token", exact=True).check()
    page.locator(".text .tokens span").nth(1).hover()
    assert "onerror" in page.locator(".tip").inner_text() and page.locator("img").count() == 0
    text = page.locator("body").inner_text()
    assert not [c for c in text if c in "\u202e\u2066\x1b"] and "⟨U+202E⟩" in text and "␛" in text
    page.get_by_role("searchbox").fill("<img")
    page.locator(".found:has-text('1 found')").wait_for()
    page.get_by_role("searchbox").fill("")
    table = saved(page, "csv").decode()
    assert "'= 1" in table and "\n= 1" not in table and ",= 1" not in table
    ElementTree.fromstring(saved(page, "svg"))


def test_lines_go_the_way_of_their_script(opened):
    words = ("\u05e9\u05dc\u05d5\u05dd", " \u05e2\u05d5\u05dc\u05dd", ".\n", "left", " to", " right.")
    page = opened(as_html(made(words), unit="word"))
    boxes = [page.locator(".text .tokens span").nth(i).bounding_box() for i in (0, 1, 3, 4)]
    assert boxes[0]["x"] > boxes[1]["x"] and boxes[2]["x"] < boxes[3]["x"]


def test_long_lines_of_code_and_tabs_stay_inside(opened):
    code = ("def f(x):\n", "\treturn", " " + "a" * 900, "\n", "    y = 1")
    page = opened(as_html(made(code), unit="word"), viewport={"width": 600, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab = page.locator(".text .tokens span").nth(1).bounding_box()
    assert tab["width"] > 60


def test_print_keeps_colours_and_all_text(report):
    report.emulate_media(media="print")
    shaded = report.locator(".text .tokens .s40").first
    assert shaded.evaluate("e => getComputedStyle(e).printColorAdjust") == "exact"
    assert report.locator(".ramp").is_visible() and report.locator(".choices").first.is_hidden()
    assert report.locator(".top .bar").first.is_visible()
    assert len(report.pdf(print_background=False)) > 10_000


def test_two_attributions_side_by_side(opened, explained, tmp_path):
    found, _, signed = explained
    compare(found, signed, tmp_path / "two.html", unit="step", names=("ours", "theirs"))
    page = opened((tmp_path / "two.html").read_text(encoding="utf-8"))
    assert page.locator(".text").count() == 2 and page.locator(".text").last.is_visible()
    left, right = (shades(page.locator(".text").nth(i), ".tokens span") for i in (0, 1))
    assert left != right and max(left + right) == 40
    by = [one.by("step") for one in (found, signed)]
    top = max(range(len(by[0])), key=lambda i: by[0].scores[i])
    texts = " ".join(" ".join(row) for row in rows(page))
    for one in by:
        assert f"{100 * one[top].share:.1f} %" in texts
    page.get_by_label("Difference").check()
    assert page.locator(".text").last.is_hidden() and min(shades(page)) < 0
