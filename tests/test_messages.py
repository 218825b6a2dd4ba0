"""Texts and chat messages that cannot be what was meant are refused with the index of the message and the remedy."""

from __future__ import annotations

import json
from collections import UserList

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import InputError, Span
from flashtrace_plugin.cli.app import app
from flashtrace_plugin.loading import write
from flashtrace_plugin.methods.registry import METHODS
from flashtrace_plugin.text import tokenize
from tests.tiny import tiny, tiny_tokenizer

GENERATION = "<think>red box</think>garden"
USER = {"role": "user", "content": "Where?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"a": 1}}}]}

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ADDING = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m.role not in ['user', 'system'] %}{{ raise_exception('Unknown role ' + m.role) }}"
    "{% endif %}{{ m.content.strip() }}{% endfor %}"
)
PARTS = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
CALLS = (
    "{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)


def rendered(template, messages):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text = tokenize(tokenizer, messages, GENERATION)
    return "".join(text.tokens[: text.prompt_length])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (5, "must be a text or a list of chat messages, got int"),
        (b"abc", "got bytes"),
        (USER, r"got dict; write \[\{"),
        ((m for m in [USER]), "got generator"),
        (["Where?"], "message 0 is a str, not a dictionary; write"),
        ([USER, [USER]], "message 1 is a list, not a dictionary"),
        ([USER, {"content": "x"}], "message 1 has the role None, which is no text; write"),
        ([{"role": "", "content": "x"}], "message 0 has the role ''"),
        ([USER, {"role": "user"}], r"message 1 \(role 'user'\) has no content that is a text, got NoneType"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "has no content that is a text"),
        ([{"role": "user", "content": 3}], "has no content that is a text, got int"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "message 0 .* has a part of type 'image'"),
        ([USER, {"role": "user", "content": ["x"]}], "message 1 .* has a part of type 'str'; only text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has a part of type 'text'"),
        ([], "the prompt is empty"),
        (UserList(), "the prompt is empty"),
    ],
)
@pytest.mark.parametrize("template", [PLAIN, ADDING, STRICT, PARTS])
def test_messages_that_are_none(template, messages, message):
    with pytest.raises(InputError, match=message):
        rendered(template, messages)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            STRICT,
            [USER, {"role": "wizard", "content": "x"}],
            r"fails at message 1 \(role 'wizard'\): Unknown role wiz",
        ),
        (STRICT, [{"role": "wizard", "content": "x"}, USER], "fails at message 0"),
        (ADDING, [USER, {"role": "user", "content": [{"type": "text", "text": "x"}]}], "fails at message 1"),
        (PLAIN, [USER, {"role": "user", "content": [{"type": "text", "text": "x"}]}], "prints the parts of message 1"),
        (ADDING, [USER, CALL], r"fails at message 1 \(role 'assistant'\)"),
        ("{{ messages[0].foo.bar }}", [USER], "fails at message 0 .*'foo'"),
        ("{% for %}", [USER], "chat template fails"),
        ({"rag": PLAIN}, [USER], "chat template fails .*multiple chat templates"),
        (None, [USER], "need a tokenizer with a chat template; pass the prompt as a text instead"),
    ],
)
def test_messages_that_the_template_does_not_take(template, messages, message):
    with pytest.raises(InputError, match=message):
        rendered(template, messages)


@pytest.mark.parametrize("kind", [list, tuple, UserList])
def test_any_sequence_of_messages_is_one(kind):
    assert rendered(PLAIN, kind([USER, USER])) == "user: Where?\nuser: Where?\n"


def test_parts_and_tool_calls_go_to_templates_made_for_them():
    parts = [{"role": "user", "content": [{"type": "text", "text": "red "}, {"type": "text", "text": "box"}]}]
    assert rendered(PARTS, parts) == "red box"
    assert rendered(CALLS, [USER, CALL]) == "user: Where?assistant: look"


@pytest.mark.parametrize(
    ("prompt", "generation", "message"),
    [
        ("a\udfff", "b", r"the prompt has '\\udfff' at character 1, half of a surrogate pair"),
        ("a", "<think>b\ud800</think>c", r"the generation has '\\ud800' at character 8"),
        ([{"role": "user", "content": "\ud800"}], "b", "the prompt has"),
    ],
)
def test_halves_of_characters(prompt, generation, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN
    with pytest.raises(InputError, match=message):
        tokenize(tokenizer, prompt, generation)
    if generation == "b":
        with pytest.raises(InputError, match=message):
            write(tiny("llama"), tokenizer, prompt, 2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("prompt", "generation"), [("a", "b"), (" ", "b"), ("a", "\u200b"), ("\n\n", "x")])
def test_a_prompt_of_one_token_or_of_white_space(name, prompt, generation):
    tokenizer = tiny_tokenizer()
    found = METHODS[name](tiny("llama"), tokenizer).attribute(prompt, generation)
    assert len(found.scores) == len(tokenizer(prompt)["input_ids"]) and bool(torch.isfinite(found.scores).all())
    assert found.target == Span(len(found.scores), len(found.token_ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "v1", "--generation", ""], "the generation is empty"),
        (["--prompt", "v1", "--generation", " \n"], "the generation is empty"),
        (["--prompt", "", "--generation", "b"], "the prompt is empty"),
        (["--prompt", "v1", "--generation", "v2\ud800"], "half of a surrogate pair"),
        (["--messages-file", "[]"], "holds no chat messages"),
        (["--messages-file", json.dumps([USER, {"role": "user"}])], "message 1 (role 'user') has no content"),
        (["--messages-file", json.dumps([{"content": "x"}])], "message 0 has the role None"),
    ],
)
def test_the_command_line_tells_them_in_one_line(arguments, message, tmp_path):
    if arguments[0] == "--messages-file":
        path = tmp_path / "messages.json"
        path.write_text(arguments[1])
        arguments = ["--messages-file", str(path), "--generation", "b"]
    result = CliRunner().invoke(app, ["attribute", *arguments])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
