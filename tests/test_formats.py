"""Reasoning and tool-call formats: every line of the tables, a user's own, and what is refused."""

from __future__ import annotations

import pytest

from flashtrace_plugin import FlashTrace, InputError, ReasoningWarning, SpanError
from flashtrace_plugin.formats import (
    FORMATS,
    TOOL_CALLS,
    ReasoningFormat,
    ToolCallFormat,
    chosen_formats,
    find_parts,
    find_thinking,
    find_tool_calls,
    register_format,
    thinking_before,
)
from flashtrace_plugin.text import end_ids
from tests.tiny import tiny, tiny_tokenizer


def written(entry: ReasoningFormat) -> str:
    between = "" if not entry.answer else f"<|start|>assistant{entry.answer}"
    return f"{entry.opening} two and two {entry.closing}{between} It is 4. {entry.stop}"


@pytest.mark.parametrize("name", FORMATS)
def test_every_reasoning_format_is_found(name):
    text = written(FORMATS[name])
    found = find_parts(text)
    assert text[slice(*found.target)] == "It is 4." and text[slice(*found.reasoning)] == "two and two"
    assert found.reasoning_rule == str(FORMATS[name]) and found.target_rule == f"what follows {FORMATS[name]}"
    begin = text.index("It is")
    assert thinking_before(text, begin).chars == found.reasoning
    assert thinking_before(text, text.index("two")) is None


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if not f.written])
def test_the_opening_may_be_part_of_the_prompt(name):
    text = written(FORMATS[name]).removeprefix(FORMATS[name].opening)
    assert text[slice(*find_parts(text).reasoning)] == "two and two"


@pytest.mark.parametrize("name", FORMATS)
def test_thinking_that_was_cut_off_names_what_is_missing(name):
    with pytest.raises(SpanError, match="was cut off before an answer"):
        find_thinking(f"{FORMATS[name].opening} two and")


def test_a_closing_marker_of_prose_alone_means_nothing():
    text = "Here is my response: 4"
    assert find_parts(text).reasoning is None and find_thinking(text).begin == 0


def test_the_chat_template_chooses_between_formats():
    text = "<reasoning>a</reasoning> b <think>c</think> d"
    assert text[slice(*find_parts(text).target)] == "d"
    own = chosen_formats(None, "{{ '<reasoning>' }}")
    assert text[slice(*find_parts(text, own).target)] == "b <think>c</think> d"


def test_a_pair_of_ones_own_and_a_registered_format(monkeypatch):
    monkeypatch.setattr("flashtrace_plugin.formats.FORMATS", dict(FORMATS))
    method = FlashTrace(tiny("llama"), tiny_tokenizer(), format=("<plan>", "</plan>"))
    found = method.attribute("Where?", "<plan>red box</plan> garden")
    assert found.text(found.reasoning) == "red box" and found.settings["format"] == ["<plan>", "</plan>"]
    register_format(ReasoningFormat("plan", "<plan>", "</plan>"))
    assert chosen_formats("plan")[0].closing == "</plan>"


@pytest.mark.parametrize("choice", ["no such", ("<a>",), ("<a>", "<a>"), ("", "</a>"), 3])
def test_formats_that_cannot_be(choice):
    with pytest.raises(InputError, match=r"format must be|never closes"):
        FlashTrace(tiny("llama"), format=choice)


def test_hops_without_reasoning_are_said_out_loud():
    method = FlashTrace(tiny("llama"), tiny_tokenizer(), hops=2)
    with pytest.warns(ReasoningWarning, match="2 hops were asked for, but no reasoning was found.*format="):
        found = method.attribute("Where?", "In the garden.")
    assert found.settings["hops_followed"] == 0 and found.hops == 2


def test_tool_calls_are_found_in_order():
    text = '<tool_call>{"name": "a"}</tool_call> and <tool_call>{"name": "b"}</tool_call>[TOOL_CALLS][{"name": "c"}]'
    calls = find_tool_calls(text)
    assert [(name, text[slice(*chars)]) for name, chars in calls] == [
        ("hermes", '{"name": "a"}'),
        ("hermes", '{"name": "b"}'),
        ("mistral", '[{"name": "c"}]'),
    ]
    assert all(isinstance(entry, ToolCallFormat) for entry in TOOL_CALLS.values())
    assert find_tool_calls("no call") == []


def test_what_ends_a_text_is_known_by_name_template_and_model():
    tokenizer = tiny_tokenizer()
    assert end_ids(tokenizer) == {1, 2}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|stop|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|stop|>{% endfor %}"
    names = {tokenizer.convert_ids_to_tokens(i) for i in end_ids(tokenizer)}
    assert names == {"<pad>", "</s>", "<|im_end|>", "<|stop|>"}
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "<|im_end|>" in {tokenizer.convert_ids_to_tokens(i) for i in end_ids(tokenizer)}
