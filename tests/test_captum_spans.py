"""Captum explains what Python explains: the same spans and the same numbers, whatever the tokens are."""

import pytest
import torch
from captum.attr import TextTokenInput

import flashtrace_captum
import flashtrace_plugin
from flashtrace_captum import FlashTrace, LLMTraceAttribution, TargetError, TokenIdsInput
from flashtrace_plugin import FlashTraceError, Span, SpanError
from tests.tiny import EOS, PAD, random_ids, tiny, tiny_tokenizer

PROMPT = "The key of the red box is in the garden. Question: where is the key?"
THINKING = "<think>\nThe box is red.\n</think>\n"
TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<turn over>\n{% endfor %}assistant:"
TAGS = ["<answer>", "</answer>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3")


def tokenizer_with(*special, template=None):
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.chat_template = template
    return made


def both(model, tokenizer, response, method="FlashTrace", **where):
    """The wrapper's result, from a method without a tokenizer, and Python's attribution."""
    made = getattr(flashtrace_captum, method)(model)
    got = LLMTraceAttribution(made, tokenizer).attribute(TextTokenInput(PROMPT, tokenizer), response, **where)
    if "answer" in where:
        where["target"] = where.pop("answer")
    return got, getattr(flashtrace_plugin, method)(model, tokenizer).attribute(PROMPT, response, **where)


class TestAsPython:
    @pytest.mark.parametrize("method", ["FlashTrace", "IFR", "RecursiveAttribution"])
    @pytest.mark.parametrize("special", [(), TAGS])
    def test_answer_tags(self, model, method, special):
        got, want = both(model, tokenizer_with(*special), f"{THINKING}It is <answer>garden</answer>", method)
        assert got.answer_text == "garden"
        assert got.attribution == want
        assert torch.equal(got.seq_attr, want.scores)

    @pytest.mark.parametrize("ends", ["<|im_end|>", "<|im_end|></s><pad><pad>", "<turn over>\n", "</s>", ""])
    def test_turn_ends(self, model, ends):
        tokenizer = tokenizer_with("<|im_end|>", "<turn over>", *TAGS, template=TURNS)
        got, want = both(model, tokenizer, f"{THINKING}It is in the garden.{ends}")
        assert got.attribution == want
        if not ends.endswith("\n"):
            assert got.answer_text == "It is in the garden."

    def test_turn_ends_that_only_the_model_knows(self, model):
        tokenizer = tokenizer_with("<stop>")
        stopping = tiny("qwen3")
        stopping.generation_config.eos_token_id = [EOS, tokenizer.convert_tokens_to_ids("<stop>")]
        got, want = both(stopping, tokenizer, f"{THINKING}It is in the garden.<stop>")
        assert got.answer_text == "It is in the garden."
        assert got.attribution == want
        assert both(model, tokenizer, f"{THINKING}It is in the garden.<stop>")[0].answer_text.endswith("<stop>")

    @pytest.mark.parametrize(
        "response",
        [
            "<think>\nQuestion one.\n</think>\n\\boxed{7} and <answer>a</answer> then <answer>\\boxed{8}</answer>.",
            "<reasoning>The box is red.</reasoning> garden",
            "[THINK]The box is red.[/THINK]garden",
            "It is in the garden.",
            "<think></think> 答案是花园 🙂",
            "<think>\n€é🙂\n</think>\n🙂",
        ],
    )
    def test_other_texts(self, model, response):
        got, want = both(model, tokenizer_with("[THINK]", "[/THINK]"), response)
        assert (got.attribution.target, got.attribution.reasoning) == (want.target, want.reasoning)
        assert torch.equal(got.seq_attr, want.scores)

    def test_the_format_of_the_method(self, model):
        tokenizer = tiny_tokenizer()
        response = "<plan>The box is red.</plan> garden <think>no</think> box"
        own = {"format": ("<plan>", "</plan>")}
        llm = LLMTraceAttribution(FlashTrace(model, **own), tokenizer)
        got = llm.attribute(TextTokenInput(PROMPT, tokenizer), response)
        assert got.attribution == flashtrace_plugin.FlashTrace(model, tokenizer, **own).attribute(PROMPT, response)
        assert "".join(got.output_texts[got.reasoning]) == "The box is red."

        class Mine(FlashTrace):
            def token_scores(self, input_ids, **where):
                return super().token_scores(input_ids, **where)

        mine = LLMTraceAttribution(Mine(model, **own), tokenizer).attribute(
            TextTokenInput(PROMPT, tokenizer), response
        )
        assert torch.equal(mine.seq_attr, got.seq_attr)

    @pytest.mark.parametrize("answer", ["garden", "red"])
    def test_a_piece_of_text(self, model, answer):
        got, want = both(model, tiny_tokenizer(), f"{THINKING}It is in the garden.", answer=answer)
        assert got.attribution == want

    def test_chat_messages(self, model):
        tokenizer = tokenizer_with("<turn over>", *TAGS, template=TURNS)
        messages, response = [{"role": "user", "content": PROMPT}], f"{THINKING}<answer>garden</answer><turn over>"
        llm = LLMTraceAttribution(FlashTrace(model), tokenizer)
        got = llm.attribute(TokenIdsInput.from_messages(messages, tokenizer), response)
        want = flashtrace_plugin.FlashTrace(model, tokenizer).attribute(messages, response)
        assert torch.equal(got.seq_attr, want.scores)
        assert got.attribution == want
        assert got.answer_text == "garden"

    def test_spans_that_clash_name_the_rule(self, model):
        with pytest.raises(SpanError, match=r"reasoning .* target .* was found as .*In this wrapper"):
            both(model, tiny_tokenizer(), f"{THINKING}It is in the garden.", reasoning="in the garden")


class TestPartsAsPositions:
    @pytest.fixture(scope="class")
    def found(self, model):
        tokenizer = tiny_tokenizer()
        llm, inp = LLMTraceAttribution(FlashTrace(model), tokenizer), TextTokenInput(PROMPT, tokenizer)
        return lambda answer, **more: llm.attribute(inp, f"{THINKING}It is in the garden.", answer=answer, **more)

    @pytest.fixture(scope="class")
    def length(self, found):
        return len(found(None).output_tokens)

    def test_they_count_from_the_responses_ends(self, found, length):
        for answer in (slice(-4, None), slice(length - 4, length), slice(length - 4, None)):
            assert found(answer).answer == slice(length - 4, length)
        assert found(slice(-4, -1)).answer == slice(length - 4, length - 1)
        assert found(slice(None, 4)).answer == slice(0, 4)
        assert found(slice(-4, None), reasoning=slice(1, -6)).reasoning == slice(1, length - 6)

    @pytest.mark.parametrize("answer", [slice(-999, None), slice(3, -999), slice(-1, -4), slice(4, 3), slice(0.5, 3)])
    def test_outside_empty_or_no_positions(self, found, answer):
        with pytest.raises(SpanError, match=r"answer .*In this wrapper"):
            found(answer)


class TestTokenPositions:
    @pytest.mark.parametrize(
        ("target", "same"),
        [
            (slice(-4, None), slice(19, 23)),
            (slice(-4, -1), slice(19, 22)),
            (-2, slice(21, 22)),
            (torch.tensor(-2), slice(21, 22)),
            ([torch.tensor(20)], slice(20, 21)),
        ],
    )
    @pytest.mark.parametrize("padding", [0, 3])
    def test_negative_ones_count_from_the_last_real_token(self, model, target, same, padding):
        ids = random_ids(23, seed=3)[None]
        padded = torch.cat([ids, torch.full((1, padding), PAD)], 1)
        method = FlashTrace(model)
        got = method.attribute(padded, target, padded != PAD)
        assert torch.equal(got[:, :23], method.attribute(ids, same))

    def test_one_reasoning_for_each_example(self, model):
        ids = torch.stack([random_ids(23, seed=s) for s in (1, 2)])
        method = FlashTrace(model)
        got = method.attribute(ids, slice(-3, None), reasoning=[slice(9, 17), slice(-14, -6)])
        assert torch.equal(got[1:], method.attribute(ids[1:], slice(20, 23), reasoning=slice(9, 17)))

    @pytest.mark.parametrize(
        "target", [slice(-99, None), -24, [(18, 20)], [None, 20], [True], slice(0.5, 3), Span(22, 24)]
    )
    def test_bad_ones_raise_both_kinds_of_error(self, model, target):
        with pytest.raises(TargetError, match="target") as caught:
            FlashTrace(model).attribute(random_ids(23, seed=3)[None], target)
        assert isinstance(caught.value, AssertionError)
        assert isinstance(caught.value, FlashTraceError)
