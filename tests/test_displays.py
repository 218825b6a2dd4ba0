"""What results show in a notebook, and as tables of pandas: hostile texts stay texts."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from flashtrace_plugin import LRP, FlashTrace, InputError, blame, cite
from flashtrace_plugin.report.displays import number, share, table, text
from tests.tiny import tiny, tiny_tokenizer

HOSTILE = "<script>alert(1)</script> & \u202e\x1b[31m"
PROMPT = "The key of the red box is in the garden. <b>Where</b> is the key?"
GENERATION = "<think>red box. key</think>In the garden."


def shown(make):
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    if make == "cite":
        return cite(
            model, tokenizer, PROMPT, GENERATION, documents={"<b>": "The key of the red box is in the garden."}
        )
    if make == "blame":
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        roles = [
            ("user", f"{PROMPT} The box is red. The garden is green and large. The house is old and white."),
            ("assistant", "In the <b> garden."),
        ]
        messages = [{"role": role, "content": content} for role, content in roles]
        return blame(model, tokenizer, messages, None, injection="<b>Where</b>", verify=True)
    if make == "graph":
        return LRP(model, tokenizer).graph(PROMPT, GENERATION)
    found = FlashTrace(model, tokenizer).attribute(PROMPT, GENERATION)
    return found.by("sentence") if make == "units" else found.verify(model=model)


@pytest.mark.parametrize("make", ["units", "verify", "graph", "cite", "blame"])
def test_results_show_an_inert_table_and_give_a_frame(make, monkeypatch):
    pytest.importorskip("pandas")
    found = shown(make)
    html = found._repr_html_()
    assert html.count("<table>") >= 1 and html.count("<tr>") > 1
    assert "<script" not in html and "<b>" not in html and "://" not in html
    assert len(found.to_frame())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="needs pandas; pip install"):
        found.to_frame()


def test_texts_of_a_model_are_inert_in_every_place():
    html = table(HOSTILE, {HOSTILE: text, "n": number}, [(HOSTILE, 1.234)], HOSTILE)
    assert html.count("&lt;script&gt;") == 4 and "<script" not in html and "\x1b" not in html
    assert ">1.23<" in html
    assert (share(0.5), share(float("nan"))) == ("50.0 %", "–")


def test_results_of_captum():
    pytest.importorskip("captum")
    from flashtrace_captum import TokenScores

    found = FlashTrace(tiny("llama"), tiny_tokenizer()).attribute(PROMPT, GENERATION)
    html = TokenScores(found.totals, attribution=replace(found, tokens=("<b>",) * len(found.tokens)))._repr_html_()
    assert html.count("<td") == 30 and "&lt;b&gt;" in html and "<b>" not in html


def test_results_of_transformer_lens():
    pytest.importorskip("transformer_lens")
    from flashtrace_lens.result import FlashTraceResult

    html = FlashTraceResult.of(FlashTrace(tiny("llama"), tiny_tokenizer()).attribute(PROMPT, GENERATION))._repr_html_()
    assert all(unit in html for unit in ("token", "head", "component", "L0H0")) and "<b>" not in html


def test_the_result_of_captums_llm_attribution():
    pytest.importorskip("captum")
    from captum.attr import TextTemplateInput

    from flashtrace_captum import FlashTrace as CaptumFlashTrace
    from flashtrace_captum import LLMTraceAttribution
    from flashtrace_plugin import reasoner

    model, tokenizer = reasoner.load()
    facts = TextTemplateInput("{} ; the grass is green . {} ; ? v12 think", ["v12 v7", "v7 84"])
    generation = reasoner.answer(model, tokenizer, "v12 v7 ; the grass is green . v7 84 ; ? v12 think")
    found = LLMTraceAttribution(CaptumFlashTrace(model), tokenizer).attribute(facts, target=generation)
    html = found._repr_html_()
    best = int(found.seq_attr.argmax())
    assert html.index(["v12 v7", "v7 84"][best]) < html.index(["v12 v7", "v7 84"][1 - best])
    assert f">{number(float(found.seq_attr.max()))}<" in html
