"""Answers of model servers as the tokens that their model had, in the schemas of vLLM and of OpenAI."""

from __future__ import annotations

import copy

import pytest
import torch

from flashtrace_plugin import Conversation, FlashTrace, InputError, read_response
from flashtrace_plugin.text import tokenize
from tests.tiny import BOS, EOS, tiny, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if tools %}{{ tools }}\n{% endif %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "The key is red. Which is the key?"}]
ANSWER = "It is the red key, für Ö."


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def ids(tokenizer):
    found = tokenize(tokenizer, MESSAGES, ANSWER)
    return found.input_ids[: found.prompt_length].tolist(), found.input_ids[found.prompt_length :].tolist()


def piece(tokenizer, i: int) -> dict:
    """A token of logprobs: its text, which is broken for a part of a character, and its bytes."""
    vocabulary = {v: k for k, v in tokenizer.get_vocab().items()}
    known = bytes(BYTES[c] for c in vocabulary[i]) if i > BOS else vocabulary[i].encode()
    return {"token": known.decode(errors="replace"), "logprob": -0.5, "bytes": list(known), "top_logprobs": []}


def _bytes() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


BYTES = _bytes()


@pytest.fixture
def vllm(ids):
    """What vLLM answers to a request of chat/completions with return_token_ids."""
    prompt, written = ids
    return {
        "id": "chatcmpl-7",
        "object": "chat.completion",
        "created": 1763900000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "tool_calls": []},
                "logprobs": None,
                "finish_reason": "stop",
                "token_ids": [*written, EOS],
            }
        ],
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(written) + 1},
        "prompt_logprobs": None,
        "prompt_token_ids": prompt,
    }


@pytest.fixture
def openai(tokenizer, ids):
    """What servers answer to a request with "logprobs": true."""
    prompt, written = ids
    message = {"role": "assistant", "content": ANSWER, "refusal": None}
    told = {"content": [piece(tokenizer, i) for i in written], "refusal": None}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": told, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(written)},
    }


def test_ids_are_the_servers_own(tokenizer, ids, vllm):
    found = read_response(tokenizer, vllm)
    assert found.input_ids.tolist() == [*ids[0], *ids[1], EOS] and found.prompt_length == len(ids[0])
    assert found.written == len(ids[0]) + len(ids[1]) and found.generation == f"{ANSWER}</s>"


def test_with_the_messages_they_can_be_told_apart(tokenizer, vllm):
    model = tiny("llama", seed=3)
    found = FlashTrace(model, tokenizer, hops=0).attribute_text(read_response(tokenizer, vllm, MESSAGES))
    assert [u.unit.text for u in found.by("message") if u.unit.content] == [MESSAGES[0]["content"]]
    ids = read_response(tokenizer, vllm)
    again = FlashTrace(model, tokenizer, hops=0).attribute_ids(ids.input_ids, prompt_length=ids.prompt_length)
    assert torch.equal(found.scores, again.scores) and found.target == again.target


def test_tokens_of_logprobs_become_ids(tokenizer, ids, openai):
    found = read_response(tokenizer, openai, MESSAGES)
    assert found.input_ids.tolist() == [*ids[0], *ids[1]] and found.prompt_length == len(ids[0])
    assert any("\N{REPLACEMENT CHARACTER}" in row["token"] for row in openai["choices"][0]["logprobs"]["content"])


def test_an_answer_in_tokens_that_a_tokenizer_would_not_choose(tokenizer, ids, vllm, openai):
    written = [i for word in ANSWER.split(" ") for i in tokenizer(f" {word}", add_special_tokens=False)["input_ids"]]
    spelled = [i for c in " is" for i in tokenizer(c, add_special_tokens=False)["input_ids"]]
    joined = tokenizer(" is", add_special_tokens=False)["input_ids"]
    assert len(spelled) > len(joined) and written
    at = next(i for i in range(len(ids[1])) if ids[1][i : i + len(joined)] == joined)
    odd = [*ids[1][:at], *spelled, *ids[1][at + len(joined) :]]
    vllm["choices"][0]["token_ids"] = odd
    assert read_response(tokenizer, vllm, MESSAGES).input_ids.tolist() == [*ids[0], *odd]
    openai["choices"][0]["logprobs"]["content"] = [piece(tokenizer, i) for i in odd]
    with pytest.raises(InputError, match=rf"token {at} of the answer is ' ' at the server and ' is' here, after 'It'"):
        read_response(tokenizer, openai, MESSAGES)


def test_ids_in_the_place_of_texts(tokenizer, ids, openai):
    rows = [{"token": f"token_id:{i}", "logprob": -1.0, "bytes": list(f"token_id:{i}".encode())} for i in ids[1]]
    openai["choices"][0]["logprobs"]["content"] = rows
    assert read_response(tokenizer, openai, MESSAGES).input_ids.tolist() == [*ids[0], *ids[1]]


def test_completions_have_their_ids_at_the_choice(tokenizer):
    prompt = tokenizer("The key is ")["input_ids"]
    written = tokenizer("red")["input_ids"]
    told = {"tokens": [tokenizer.decode([i]) for i in written], "token_logprobs": [-0.1] * len(written)}
    response = {"object": "text_completion", "choices": [{"index": 0, "text": "red", "logprobs": told}]}
    assert read_response(tokenizer, response, "The key is ").input_ids.tolist() == [*prompt, *written]
    response["choices"][0] |= {"prompt_token_ids": prompt, "token_ids": written, "logprobs": None}
    assert read_response(tokenizer, response).input_ids.tolist() == [*prompt, *written]


def test_a_call_of_a_tool_is_the_text_that_the_model_wrote(tokenizer, ids, vllm):
    call = tokenizer('<tool_call>{"name": "f", "arguments": {}}</tool_call>')["input_ids"]
    vllm["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    vllm["choices"][0]["token_ids"] = call
    assert read_response(tokenizer, vllm).generation.startswith("<tool_call>")


def changed(response, **changes):
    """The response with values at paths such as ``choices__0__token_ids``."""
    response = copy.deepcopy(response)
    for path, value in changes.items():
        *keys, last = path.split("__")
        inside = response
        for key in keys:
            inside = inside[int(key) if key.isdigit() else key]
        inside[last] = value
    return response


def test_another_prompt_is_told_by_its_first_token(tokenizer, ids, vllm):
    dated = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The key is blue."}], add_generation_prompt=True
    )
    prompt = dated["input_ids"]
    i = next(i for i, (a, b) in enumerate(zip(prompt, ids[0], strict=False)) if a != b)
    with pytest.raises(InputError, match=rf"token {i} of the prompt is .* at the server and .* here, after .*key is"):
        read_response(tokenizer, changed(vllm, prompt_token_ids=prompt), MESSAGES)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(InputError, match="tools and template options that were not passed"):
        read_response(tokenizer, vllm, Conversation(MESSAGES, tools=tools))


def test_a_begin_of_text_token_more_or_less(tokenizer, ids, vllm):
    with pytest.raises(InputError, match="begins with one more token '<s>' at the server than here"):
        read_response(tokenizer, changed(vllm, prompt_token_ids=[BOS, *ids[0]]), MESSAGES)
    with pytest.raises(InputError, match="begins with one more token '<s>' here than at the server"):
        read_response(tokenizer, changed(vllm, prompt_token_ids=ids[0][1:]), MESSAGES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices__0__token_ids": None}, "neither token_ids nor logprobs"),
        ({"choices__0__token_ids": [5, 100_000]}, "token id 100000, this tokenizer has"),
        ({"choices__0__token_ids": ["It", "is"]}, "must be a list of token ids"),
        ({"choices__0__message__content": "A blue key."}, "where the server wrote 'A blue key.'"),
        ({"choices": []}, "has no choices"),
        ({"prompt_token_ids": None}, "pass prompt="),
    ],
)
def test_what_is_refused(tokenizer, vllm, changes, message):
    with pytest.raises(InputError, match=message):
        read_response(tokenizer, changed(vllm, **changes))


def test_what_is_refused_without_ids(tokenizer, openai, vllm):
    with pytest.raises(InputError, match="counted 9 prompt tokens, here the prompt has"):
        read_response(tokenizer, changed(openai, usage={"prompt_tokens": 9}), MESSAGES)
    rows = [{"token": "\N{REPLACEMENT CHARACTER}", "logprob": -1.0, "bytes": None}]
    with pytest.raises(InputError, match="without bytes, which is no text"):
        read_response(tokenizer, changed(openai, choices__0__logprobs={"content": rows}), MESSAGES)
    with pytest.raises(InputError, match="there is no choice 1"):
        read_response(tokenizer, openai, MESSAGES, choice=1)
    with pytest.raises(InputError, match="has no choices"):
        read_response(tokenizer, [vllm])
