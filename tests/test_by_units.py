"""Mass over units: it adds up, template tokens stand apart, and messages are found in what the template writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashtrace_plugin import Attribution, Conversation, FlashTrace, InputError, Recommended, Span, reasoner
from flashtrace_plugin.text import render
from flashtrace_plugin.units.contents import Content
from tests.tiny import random_ids, tiny, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The key is red. The box is blue.\n\nWhich is the key?"},
]
KINDS = ("word", "line", "sentence", "paragraph", "step", "message")


@pytest.fixture(scope="module")
def chat():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny("llama", seed=3), tokenizer


@pytest.fixture(scope="module")
def found(chat) -> Attribution:
    return FlashTrace(*chat).attribute(MESSAGES, "<think>the key is red</think>It is red.")


@pytest.mark.parametrize("kind", KINDS)
def test_mass_adds_up_over_every_kind_of_unit(found, kind):
    units = found.by(kind)
    assert float(units.scores.sum()) == pytest.approx(float(found.scores.sum()), rel=1e-6)
    assert float(units.tokens.sum()) == pytest.approx(len(found.prompt), rel=1e-6)
    contents = [one for one in units if one.unit.kind != "template"]
    assert sum(one.share for one in contents) == pytest.approx(1.0, rel=1e-5)
    assert 0 < units.template_share < 1


def test_a_units_score_is_that_of_its_tokens(found):
    units = found.by("sentence")
    text = "".join(found.tokens)
    key = next(one for one in units if one.unit.text == "The box is blue.")
    start = text.index("The box is blue.")
    stop = start + len("The box is blue.\n\n")  # with the white space behind it
    cursor, mass = 0, 0.0
    for token, score in zip(found.tokens, found.scores.tolist(), strict=False):
        whole = range(cursor, cursor + len(token))
        inside = [i for i in whole if not text[i].isspace()] or whole
        mass += score * sum(start <= i < stop for i in inside) / len(inside)
        cursor += len(token)
    assert key.score == pytest.approx(mass, rel=1e-3)
    assert key.unit.name == "user" and key.unit.message == 1


def test_messages_are_found_with_their_roles(found):
    units = [one.unit for one in found.by("message") if one.unit.content]
    assert [(u.name, u.message, u.text) for u in units] == [
        ("system", 0, MESSAGES[0]["content"]),
        ("user", 1, MESSAGES[1]["content"]),
    ]


def test_a_role_that_is_also_the_content_is_not_taken_for_it(chat):
    found = FlashTrace(*chat).attribute([{"role": "user", "content": "user"}], "red")
    start = "".join(found.tokens).index("user\nuser") + len("user\n")
    assert [(c.start, c.stop) for c in found.contents] == [(start, start + 4)]


def test_tool_calls_belong_to_the_message_that_makes_them(chat):
    call = {"type": "function", "function": {"name": "o", "arguments": {"box": 1}}}
    messages = [{"role": "user", "content": "Open."}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "content": "It is open."})
    found = FlashTrace(*chat).attribute(messages, "red")
    texts = {one.unit.message: one.unit.text for one in found.by("message") if one.unit.content}
    assert texts[1] == '{"name": "o", "arguments": {"box": 1}}' and texts[2] == "It is open."


MERGED = (  # as Gemma and Mistral write it: the system's message begins the user's
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first, rest = '', messages %}{% endif %}"
    "{% for m in rest %}<s>{{ m.role }}\n{{ first if loop.AT else '' }}{{ m.content | trim }}</s>\n{% endfor %}"
)


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_system_message_that_the_template_merges_with_the_users(chat, at):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MERGED.replace("AT", at)
    contents = ["Be brief.", " Where? \n", "It is red.", "Be brief."]
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    found = FlashTrace(chat[0], tokenizer).attribute(messages, "red")
    units = {one.unit.message: one.unit for one in found.by("message") if one.unit.content}
    assert [(units[i].name, units[i].text) for i in range(4)] == [(r, c.strip()) for r, c in zip(roles, contents)]
    assert [c.start for c in found.contents] == sorted(c.start for c in found.contents)
    assert float(found.by("message").scores.sum()) == pytest.approx(float(found.scores.sum()), rel=1e-6)


def test_a_dropped_message_is_not_found_in_another(chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}<s>{{ m.content }}</s>{% endfor %}"
    messages = [{"role": "system", "content": "key"}, {"role": "user", "content": "Which key?"}]
    found = FlashTrace(chat[0], tokenizer).attribute(messages, "red")
    assert [(c.message, found.tokens and c.stop - c.start) for c in found.contents] == [(1, len("Which key?"))]


def test_an_empty_message_has_no_unit_and_loses_nothing(chat):
    call = {"type": "function", "function": {"name": "o", "arguments": {"box": 1}}}
    messages = [{"role": "user", "content": "Open."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages += [{"role": "tool", "content": " "}, {"role": "user", "content": "And?"}]
    units = FlashTrace(*chat).attribute(messages, "red").by("message")
    texts = {one.unit.message: one.unit.text for one in units if one.unit.content}
    assert texts == {0: "Open.", 1: '{"name": "o", "arguments": {"box": 1}}', 3: "And?"}


def test_a_message_of_several_parts(chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{% for p in m.content %}{{ p.text }}\n{% endfor %}</s>{% endfor %}"
    )
    parts = [{"type": "text", "text": text} for text in ("The key", "is red.")]
    found = FlashTrace(chat[0], tokenizer).attribute([{"role": "user", "content": parts}], "red")
    assert [one.unit.text for one in found.by("message") if one.unit.content] == ["The key\nis red."]


def test_a_template_that_drops_a_message_is_told(chat):
    model, tokenizer = chat
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}<s>"
    found = FlashTrace(model, tokenizer).attribute(MESSAGES, "red")
    with pytest.raises(InputError, match="message 0 does not stand in the rendered prompt"):
        found.by("message")
    assert len(found.by("sentence").top(9)) == 3


def test_what_the_template_is_given_besides_messages(chat):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools | length }} {{ mode }} {{ messages[0].content }}"
    text, _ = render(
        tokenizer, Conversation([{"role": "user", "content": "red"}], tools=[{"name": "f"}], options={"mode": "x"})
    )
    assert text == "1 x red"


def test_documents_by_name_and_the_rest(found):
    units = found.by({"first": "The key is red.", "second": "The box is blue."})
    assert [u.unit.name for u in units][:2] == ["first", "second"]
    assert [u.unit.kind for u in units][2:] == ["rest", "template"]
    assert float(units.scores.sum()) == pytest.approx(float(found.scores.sum()), rel=1e-6)
    assert all(one.unit.kind == "document" for one in units.top(9))


def test_density_ranks_short_units_that_weigh_much_first(found):
    units = found.by("paragraph")
    torch.testing.assert_close(units.density, units.scores / units.tokens)
    best = units.top(1, by="density")[0]
    assert best.density == max(one.density for one in units if one.unit.content)


def test_ranges_and_spans_of_the_callers(found):
    text = "".join(found.tokens)
    start = text.index("The key is red.")
    units = found.by([(start, start + 15)])
    assert units[0].unit.text == "The key is red." and [u.unit.kind for u in units] == ["span", "rest", "template"]
    spans = found.by([Span(0, 3), Span(5, 9)])
    assert spans[1].score == pytest.approx(float(found.scores[5:9].sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ("chapter", "units must be one of 'word'"),
        ([], "units must be ranges"),
        ([(0, 5), (3, 8)], "overlap"),
        ([(5, 5)], "empty or outside"),
        ([(0, 10**6)], "empty or outside"),
        ([("a", 3)], "units must be ranges"),
        ([Span(0, 10**4)], "ends after the last"),
        ({"d": "The key is green."}, "is not in the prompt"),
        ({"d": "is"}, "occurs 3 times"),
        ({"d": " "}, "not empty"),
        (lambda text: [(0, 2)], "leaves out"),
    ],
)
def test_units_that_are_none(found, units, message):
    with pytest.raises((InputError, ValueError), match=message):
        found.by(units)


def test_a_span_may_not_cut_a_character():
    model = tiny("llama")
    ids = random_ids(8, seed=1)
    found = FlashTrace(model).attribute_ids(ids, prompt_length=5, target=(5, 8))
    found = replace(found, tokens=("a", "é", "", "b", "c", "d", "e", "f"), contents=(Content(0, 4),))
    assert found.by([Span(0, 3)])[0].unit.text == "aé"
    assert float(found.by("word").scores.sum()) == pytest.approx(float(found.scores.sum()), rel=1e-6)
    with pytest.raises(InputError, match="cuts a character: token 2"):
        found.by([Span(0, 2)])


def test_steps_of_the_reasoning():
    found = Recommended(*reasoner.load()).attribute(
        "the sun is green . v20 12 ; the sky is red . v55 v20 ; what is v55 ?",
        "<think> v55 v20 ; v20 12 ; </think> 12",
    )
    steps = found.by("step", part="reasoning")
    assert [one.unit.text for one in steps if one.unit.content] == ["v55 v20 ;", "v20 12 ;"]
    assert float(steps.scores.sum()) == pytest.approx(float(found.totals[found.reasoning.slice].sum()), rel=1e-5)
    assert found.by("step").top(1)[0].unit.text == "v20 12 ;"
    direct = Recommended(*reasoner.load()).attribute("v20 12 ; what is v20 ?", "12")
    with pytest.raises(InputError, match="no reasoning"):
        direct.by("step", part="reasoning")
    with pytest.raises(InputError, match="part must be"):
        direct.by("step", part="answer")


def test_contents_are_saved_and_older_files_are_read(found, tmp_path: Path):
    found.save(tmp_path / "a.json")
    assert Attribution.load(tmp_path / "a.json") == found and found.messages == 2
    data = {k: v for k, v in found.to_dict().items() if k not in ("contents", "messages")}
    assert Attribution.from_dict(data).by("sentence").template_share == 0


def test_a_frame_and_a_dictionary(found):
    frame = found.by("sentence").to_frame()
    assert list(frame.columns)[:6] == ["kind", "name", "message", "start", "stop", "text"]
    assert frame["score"].sum() == pytest.approx(float(found.scores.sum()), rel=1e-5)
    assert "top:" in repr(found.by("sentence"))
    with pytest.raises(InputError, match="by must be"):
        found.by("sentence").top(1, by="length")


def test_the_mass_of_sinks_counts_for_none_of_the_units(found):
    """Without a token that begins texts, the first word is the sink, and its sentence would take nearly all mass."""
    told = replace(found, settings={**found.settings, "sink_positions": [0, 6]})
    units, plain = told.by("word"), found.by("word")
    assert units[len(units) - 1].unit.kind == "sinks" and not units[len(units) - 1].unit.content
    assert units[len(units) - 1].score == pytest.approx(float(found.scores[[0, 6]].sum()), rel=1e-5)
    assert float(units.scores.sum()) == pytest.approx(float(plain.scores.sum()), rel=1e-6)
    assert float(units.tokens.sum()) == pytest.approx(len(found.prompt), rel=1e-6)
    assert float(units.scores[:-1].sum()) < float(plain.scores.sum())
    dropped = replace(told, scores=told.scores_without_sinks)
    assert [one.unit for one in dropped.by("word")] == [one.unit for one in plain]
