"""Targets in the words people use: sentences, lines, tool calls and their arguments, in every format of the table."""

from __future__ import annotations

import pytest

from flashtrace_plugin import FlashTrace, Line, Sentence, SpanError, ToolCall
from flashtrace_plugin.units.targets import find_calls
from tests.tiny import tiny, tiny_tokenizer

HERMES = (
    'Sure.\n<tool_call>\n{"name": "send", "arguments": {"to": "bob", "cc": [{"a": "q \\"x\\""}, 2]}}\n</tool_call>'
)
SEND = '{"to": "me", "n": 3}'
FORMATS = {
    "hermes": '<tool_call>{"name": "send", "arguments": ' + SEND + "}</tool_call>",
    "llama": '<|python_tag|>{"name": "send", "parameters": ' + SEND + "}",
    "mistral": '[TOOL_CALLS][{"name": "send", "arguments": ' + SEND + "}]",
    "mistral, newer": "[TOOL_CALLS]send[ARGS]" + SEND,
    "harmony": "<|channel|>commentary to=functions.send <|constrain|>json<|message|>" + SEND + "<|call|>",
    "plain": '{"name": "send", "arguments": ' + SEND + "}",
}


def locate(target, text, begin=0):
    start, stop = target.locate(text, (begin, len(text)))
    return text[start:stop]


@pytest.mark.parametrize("name", FORMATS)
def test_an_argument_is_found_in_every_format(name):
    text = FORMATS[name]
    assert [call.name for call in find_calls(text)] == ["send"]
    assert locate(ToolCall(0).argument("to"), text) == "me" and locate(ToolCall(-1).argument("n"), text) == "3"
    assert "send" in locate(ToolCall(0), text) and "me" in locate(ToolCall(0), text)


def test_inside_an_argument():
    assert locate(ToolCall().argument("cc.0.a"), HERMES) == 'q \\"x\\"'
    assert locate(ToolCall().argument("cc.1"), HERMES) == "2"
    assert locate(ToolCall().argument("cc"), HERMES).startswith('[{"a"')


def test_several_calls_are_counted_in_the_order_of_the_text():
    text = FORMATS["hermes"] + "\n" + FORMATS["hermes"].replace("send", "drop").replace('"me"', '"you"')
    assert [call.name for call in find_calls(text)] == ["send", "drop"]
    assert locate(ToolCall(1).argument("to"), text) == "you"
    two = '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "z"}}]'
    assert locate(ToolCall(1), two) == '{"name": "g", "arguments": {"y": "z"}}'


def test_parallel_calls_in_mistrals_newer_form():
    two = FORMATS["mistral, newer"] + '[TOOL_CALLS]drop[ARGS]{"to": "you"}'
    assert [call.name for call in find_calls(two)] == ["send", "drop"]
    assert locate(ToolCall(0).argument("to"), two) == "me" and locate(ToolCall(1).argument("to"), two) == "you"


@pytest.mark.parametrize("thought", [FORMATS["hermes"], "I write <tool_call> first."])
def test_a_call_in_the_thinking_is_none(thought):
    thinking = f"<think>{thought}</think>"
    text = thinking + FORMATS["hermes"].replace("send", "drop").replace('"me"', '"you"')
    assert locate(ToolCall(0).argument("to"), text, len(thinking)) == "you"
    with pytest.raises(SpanError, match="has 0 tool calls"):
        locate(ToolCall(0), thinking + "Done.", len(thinking))


def test_a_call_before_the_final_channel_of_harmony_is_one():
    text = FORMATS["harmony"] + "<|start|>assistant<|channel|>final<|message|>Done."
    assert locate(ToolCall(0).argument("to"), text, text.index("Done.")) == "me"


def test_a_marker_inside_an_argument_begins_no_call():
    text = FORMATS["hermes"].replace('"me"', '"see [TOOL_CALLS] or <tool_call>"')
    assert locate(ToolCall(-1).argument("to"), text) == "see [TOOL_CALLS] or <tool_call>"


@pytest.mark.parametrize(
    ("target", "text", "message"),
    [
        (ToolCall(1), FORMATS["hermes"], "has 1 tool calls, so there is no call 1"),
        (ToolCall(0), "No call here.", "has 0 tool calls"),
        (ToolCall().argument("bcc"), FORMATS["plain"], "'bcc' is not among to, n"),
        (ToolCall().argument("to.x"), FORMATS["plain"], "'x' is not among none"),
        (ToolCall(), "<tool_call>{'name': 'send'}</tool_call>", "not valid JSON"),
        (ToolCall(), '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', "not valid JSON"),
        (ToolCall(), '<tool_call>{"name": "f"} and more</tool_call>', "goes on behind its JSON"),
        (ToolCall(), '<tool_call>{"a": ' + "[" * 10**5 + "</tool_call>", "nested too deeply"),
        (Sentence(5), "One. Two.", "has 2 sentences, so there is no sentence 5"),
        (Line(-3), "One.\n\nTwo.", "has 2 lines, so there is no line -3"),
    ],
)
def test_what_is_not_there(target, text, message):
    with pytest.raises(SpanError, match=message):
        locate(target, text)


def test_sentences_and_lines_of_the_answer_count_behind_the_reasoning():
    method = FlashTrace(tiny("llama"), tiny_tokenizer())
    generation = "<think>Red. Box.</think>The key is red. It is here.\nIn the garden."

    def explained(target):
        found = method.attribute("Where is the key?", generation, target=target)
        assert found.text(found.reasoning).strip() == "Red. Box."
        return found.text(found.target).strip()

    assert explained(Sentence(0)) == "The key is red." and explained(Sentence(-2)) == "It is here."
    assert explained(Line(1)) == "In the garden."


def test_a_method_explains_an_argument():
    method = FlashTrace(tiny("llama"), tiny_tokenizer())
    found = method.attribute("Send it to the garden.", FORMATS["hermes"], target=ToolCall(0).argument("to"))
    assert "me" in found.text(found.target) and len(found.text(found.target)) < 8
    with pytest.raises(SpanError, match="without a tokenizer"):
        FlashTrace(tiny("llama")).attribute_ids(list(range(4, 20)), prompt_length=4, target=ToolCall(0))
