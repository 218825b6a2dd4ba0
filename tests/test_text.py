"""Texts and chat messages become the tokens the model saw, and spans the user meant."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flashtrace_plugin import FlashTrace, InputError, Span, SpanError
from flashtrace_plugin.text import from_ids, pieces, tokenize
from tests.tiny import tiny, tiny_tokenizer

PROMPT, GENERATION = "What is 2+2?\n", "<think> two and two </think> It is 4."


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *vocabulary])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_the_default_spans_are_the_thinking_and_the_answer(tokenizer):
    text = tokenize(tokenizer, PROMPT, GENERATION)
    target, reasoning = text.locate(None, None)
    assert "".join(text.tokens[target.slice]).strip() == "It is 4."
    assert "".join(text.tokens[reasoning.slice]).strip() == "two and two"
    assert "".join(text.tokens) == PROMPT + GENERATION


@pytest.mark.parametrize("piece", ["4", "is 4."])
def test_a_target_by_text_keeps_the_thinking_before_it(tokenizer, piece):
    text = tokenize(tokenizer, PROMPT, GENERATION)
    target, reasoning = text.locate(piece, None)
    assert piece in "".join(text.tokens[target.slice])
    assert "".join(text.tokens[reasoning.slice]).strip() == "two and two"


def test_a_target_inside_the_thinking_has_no_reasoning_unless_given(tokenizer):
    text = tokenize(tokenizer, PROMPT, GENERATION)
    assert text.locate("and two", None)[1] is None
    target, reasoning = text.locate("and two", "<think> two")
    assert reasoning.stop <= target.start


def test_a_target_can_be_chosen_where_the_thinking_was_cut_off(tokenizer):
    text = tokenize(tokenizer, PROMPT, "<think> two and")
    assert text.locate("two", None)[1] is None


def test_spans_are_passed_through(tokenizer):
    text = tokenize(tokenizer, PROMPT, GENERATION)
    n, p = len(text.input_ids), text.prompt_length
    assert text.locate(Span(n - 2, n), Span(p, p + 3)) == (Span(n - 2, n), Span(p, p + 3))
    assert text.locate((n - 2, n), slice(p, p + 3)) == (Span(n - 2, n), Span(p, p + 3))
    with pytest.raises(SpanError, match=r"target must be a Span\(start, stop\) of token positions"):
        text.locate(3.5, None)


def test_ids_give_the_same_text_as_the_text_itself(tokenizer):
    text = tokenize(tokenizer, PROMPT, GENERATION)
    again = from_ids(tokenizer, text.input_ids, text.prompt_length)
    assert again.generation == GENERATION and again.locate(None, None) == text.locate(None, None)


@pytest.mark.parametrize("piece", ["東京", "🙂", "café"])
def test_characters_of_several_tokens_stay_whole(tokenizer, piece):
    generation = "<think>é is a cafe</think> 東京 🙂 done café"
    text = tokenize(tokenizer, "Où est 東?", generation)
    again = from_ids(tokenizer, text.input_ids, text.prompt_length)
    assert "".join(text.tokens) == "Où est 東?" + generation and again.generation == generation
    assert again.offsets == text.offsets
    assert again.locate(piece, None) == text.locate(piece, None)
    assert "".join(text.tokens[text.locate(piece, None)[0].slice]).strip() == piece


def test_a_text_cut_inside_a_character_is_kept_up_to_it(tokenizer):
    ids = tokenizer("4 東")["input_ids"][:-1]
    assert from_ids(tokenizer, torch.tensor(ids), 1).generation.startswith(" ")


def test_a_boundary_inside_a_token_keeps_the_prompt_the_model_saw(tokenizer):
    text = tokenize(tokenizer, "the answ", "er is 4")
    alone = tokenizer("the answ")["input_ids"]
    assert text.input_ids.tolist()[: len(alone)] == alone and text.prompt_length == len(alone)
    assert text.offsets[0][0] == 0 and "".join(text.tokens) == "the answer is 4"


def test_word_level_tokenizers_keep_their_spaces():
    tokenizer = words("v1", "v2", "is", "4")
    assert "".join(pieces(tokenizer, tokenizer("v1 is v2 is 4")["input_ids"])) == "v1 is v2 is 4"


def test_chat_messages_go_through_the_template(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} A:{% endif %}"
    )
    text = tokenize(tokenizer, [{"role": "user", "content": "What is 2+2?"}], " 4")
    assert "".join(text.tokens) == "What is 2+2? A: 4"
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        tokenize(tokenizer, [{"role": "user", "content": "x"}], "y")


@pytest.mark.parametrize(("prompt", "generation"), [("", "a"), ([], "a"), ("a", ""), ("a", "  \n")])
def test_empty_texts_are_refused(tokenizer, prompt, generation):
    with pytest.raises(InputError, match="is empty"):
        tokenize(tokenizer, prompt, generation)


class Slow:
    """A tokenizer without offsets, as slow tokenizers are."""

    is_fast = False

    def __init__(self, fast, lossy=False):
        self.fast, self.lossy = fast, lossy

    def __call__(self, text, **options):
        return self.fast(text.lower() if self.lossy else text, **options)

    def batch_decode(self, ids):
        return self.fast.batch_decode(ids)


def test_a_tokenizer_without_offsets_is_used_if_it_reproduces_the_text(tokenizer):
    exact = tokenize(tokenizer, PROMPT, GENERATION)
    assert tokenize(Slow(tokenizer), PROMPT, GENERATION).locate(None, None) == exact.locate(None, None)
    with pytest.raises(InputError, match="use a fast tokenizer, or attribute_ids"):
        tokenize(Slow(tokenizer, lossy=True), PROMPT, GENERATION)


def test_attribute_explains_a_text_and_attribute_batch_does_the_same(tokenizer):
    method = FlashTrace(tiny("llama"), tokenizer, hops=2)
    one = method.attribute(PROMPT, GENERATION, target="4")
    assert one.text(one.target).strip().startswith("4") and one.text(one.prompt) == PROMPT
    ids = method.attribute_ids(
        torch.tensor(one.token_ids), prompt_length=one.prompt.stop, target=one.target, reasoning=one.reasoning
    )
    torch.testing.assert_close(ids.scores, one.scores)
    batch = method.attribute_batch([PROMPT, "Say it"], [GENERATION, " yes"], targets=["4", None])
    assert batch[0] == one and batch[1].reasoning is None
    with pytest.raises(InputError, match=r"equally long, got \[2, 1, 2, 2\]"):
        method.attribute_batch([PROMPT, PROMPT], [GENERATION])
    with pytest.raises(InputError, match="takes lists of texts"):
        method.attribute_batch("ab", "cd")
    with pytest.raises(InputError, match="must be a text, got NoneType"):
        method.attribute(PROMPT, None)


def test_texts_need_a_tokenizer_and_spans_must_fit():
    with pytest.raises(InputError, match="attribute_ids"):
        FlashTrace(tiny("llama")).attribute(PROMPT, GENERATION)
    with pytest.raises(SpanError, match="occurs 0 times"):
        FlashTrace(tiny("llama"), tiny_tokenizer()).attribute(PROMPT, GENERATION, target="five")
