"""Spans, and finding reasoning and answer in a generated text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashtrace_plugin import FlashTraceError, Span, SpanError
from flashtrace_plugin.formats import find_parts
from flashtrace_plugin.spans import check_spans, find_text, tokens_over, trim


def parts(text: str) -> tuple[str, str | None]:
    found = find_parts(text)
    target, reasoning = found.target, found.reasoning
    return text[slice(*target)], None if reasoning is None else text[slice(*reasoning)]


@pytest.mark.parametrize(
    ("text", "target", "reasoning"),
    [
        ("<think> a is 3 </think> It is 3.", "It is 3.", "a is 3"),
        ("a is 3 </think>\n\n3", "3", "a is 3"),
        ("<think>x</think>Sum: <answer> 4 </answer> done", "4", "x"),
        ("<think>x</think>So \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}", "x"),
        ("<think>maybe \\boxed{3}</think> The answer is 4.", "The answer is 4.", "maybe \\boxed{3}"),
        ("<think>x</think><answer>so \\boxed{5}</answer>", "5", "x"),
        ("<think>x</think>\\boxed{1} or rather \\boxed{2}", "2", "x"),
        ("<think>x</think>\\boxed{never closed", "\\boxed{never closed", "x"),
        ("<think></think> yes", "yes", None),
        ("a <think>b</think> c <think>d</think> e", "e", "b</think> c <think>d"),
        ("Paris", "Paris", None),
        ("2+2 is 4, so \\boxed{4}", "4", "2+2 is 4, so"),
        ("I think <answer>4</answer>", "4", "I think"),
    ],
)
def test_reasoning_and_answer_are_found(text, target, reasoning):
    assert parts(text) == (target, reasoning)


@pytest.mark.parametrize(
    "text",
    ["<think> still going", "<think>a</think>", "<think>a</think>  \n", "<think>a</think><answer> </answer> b"],
)
def test_a_generation_without_an_answer_is_refused_with_the_remedy(text):
    with pytest.raises(SpanError, match="pass target="):
        find_parts(text)


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (4, 2), (-1, 2)])
def test_empty_reversed_and_negative_spans_are_refused(start, stop):
    with pytest.raises(SpanError, match=rf"span {start}:{stop} is empty, reversed or negative"):
        Span(start, stop)


def test_a_span_is_a_half_open_range():
    span = Span(2, 5)
    assert list(span) == [2, 3, 4] and len(span) == 3 and 4 in span and 5 not in span
    assert "abcdefg"[span.slice] == "cde" and str(span) == "2:5"


@pytest.mark.parametrize(
    ("length", "prompt", "target", "reasoning", "message"),
    [
        (10, 0, Span(3, 4), None, "prompt has 0 of 10"),
        (10, 10, Span(3, 4), None, "prompt has 10 of 10"),
        (10, 4, Span(8, 11), None, "target 8:11 is outside the generation 4:10"),
        (10, 4, Span(3, 6), None, "target 3:6 is outside"),
        (10, 4, Span(8, 9), Span(2, 6), "reasoning 2:6 is outside"),
        (10, 4, Span(6, 9), Span(5, 7), "overlap"),
        (10, 4, Span(5, 6), Span(7, 9), "comes after target"),
    ],
)
def test_spans_that_do_not_fit_are_refused(length, prompt, target, reasoning, message):
    with pytest.raises(SpanError, match=message) as error:
        check_spans(length, prompt, target, reasoning)
    assert isinstance(error.value, FlashTraceError) and isinstance(error.value, ValueError)


def test_a_piece_of_text_must_occur_once():
    assert find_text("a b a", " b ", "target") == (2, 3)
    for piece, message in (("c", "occurs 0 times"), ("a", "occurs 2 times"), (" ", "is empty")):
        with pytest.raises(SpanError, match=message):
            find_text("a b a", piece, "target")
    with pytest.raises(SpanError, match="occurs 2 times"):
        find_text("1, 1, 1", "1, 1", "target")


def test_no_token_over_the_characters_is_refused():
    with pytest.raises(SpanError, match="no token covers"):
        tokens_over([(0, 2), (5, 6)], (3, 4), "target")


PIECES = [*"ab <>{}\\/\n", "<think>", "</think>", "\\boxed{", "<answer>", "</answer>"]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_whatever_is_found_lies_in_order_inside_the_text(text):
    try:
        found = find_parts(text)
    except SpanError:
        return
    target, reasoning = found.target, found.reasoning
    assert 0 <= target[0] < target[1] <= len(text) and trim(text, target) == target
    assert reasoning is None or 0 <= reasoning[0] < reasoning[1] <= target[0]
