"""How text falls into units: by hand, and by properties for any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashtrace_plugin import InputError
from flashtrace_plugin.units.split import SPLITTERS, split

TEXT = """Dr. Smith paid $3.50 for it. "Is it, e.g., good?" he asked. See Fig. 3 and Eq. (2.1). This line is
wrapped at 3.14 units.

1. First item. Then more.
- bullet one
- bullet two. It ends.
```python
x = a.b(1.5)
print(x). y
```
The U.S. won at 5 p.m. on Jan. 5th. v1.2.3 is out."""


def parts(text, kind):
    return [text[a:b] for a, b in split(text, SPLITTERS[kind], kind)]


def test_numbers_abbreviations_code_and_lists_do_not_fall_apart():
    assert parts(TEXT, "sentence") == [
        "Dr. Smith paid $3.50 for it.",
        '"Is it, e.g., good?" he asked.',
        "See Fig. 3 and Eq. (2.1).",
        "This line is\nwrapped at 3.14 units.",
        "1. First item.",
        "Then more.",
        "- bullet one",
        "- bullet two.",
        "It ends.",
        "```python\nx = a.b(1.5)\nprint(x). y\n```",
        "The U.S. won at 5 p.m. on Jan. 5th.",
        "v1.2.3 is out.",
    ]


def test_steps_end_at_semicolons_too():
    assert parts("v55 v20 ; v20 12 ;\nSo it is 12. Done", "step") == ["v55 v20 ;", "v20 12 ;", "So it is 12.", "Done"]


def test_words_lines_and_paragraphs():
    assert parts("a b\n\nc  d\ne", "word") == ["a", "b", "c", "d", "e"]
    assert parts("a b\n\nc  d\ne", "line") == ["a b", "c  d", "e"]
    assert parts("a b\n \nc  d\ne", "paragraph") == ["a b", "c  d\ne"]


@pytest.mark.parametrize("kind", sorted(SPLITTERS))
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.text("ab. \n;`-1)é", max_size=60))
def test_pieces_follow_each_other_and_leave_out_white_space_only(kind, text):
    cursor = 0
    for a, b in split(text, SPLITTERS[kind], kind):
        assert cursor <= a < b and not text[cursor:a].strip() and text[a:b].strip() == text[a:b]
        cursor = b
    assert not text[cursor:].strip()


def test_a_splitter_of_the_callers_may_give_texts_or_ranges():
    assert split("ab cd", lambda text: ["ab", "cd"], "mine") == [(0, 2), (3, 5)]
    assert split("ab cd", lambda text: [(0, 3), (3, 5)], "mine") == [(0, 2), (3, 5)]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["ab"], "leaves out 'cd'"),
        (["ab", "x", "cd"], "gave 'x', which does not follow"),
        ([(0, 3), (2, 5)], "2:5 after 3 of 5"),
        ([(0, 9)], "0:9 after 0 of 5"),
        ([(3, 5)], "leaves out 'ab'"),
        ([7], "must give texts or"),
    ],
)
def test_a_splitter_that_is_wrong_is_told_so(pieces, message):
    with pytest.raises(InputError, match=message):
        split("ab cd", lambda text: pieces, "mine")


def test_wide_spaces_after_a_letter_are_spaces():
    """sentencex 1.0.30 takes them for one byte, and breaks."""
    text = "Plan A\N{NO-BREAK SPACE}. It works.\N{EM SPACE}B\N{EM SPACE}."
    assert parts(text, "sentence")[-1].endswith("B\N{EM SPACE}.")
