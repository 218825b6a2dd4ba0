"""Token texts as one can see them: nothing invisible, nothing that could act on the page or turn its text around."""

from __future__ import annotations

from markupsafe import Markup, escape

_BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)
# Control characters get the pictures that Unicode has for them, so that the page holds none; line feed and tab stay.
_VISIBLE = (
    {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"}
    | {0x7F: "␡", 0x200B: "⟨U+200B⟩", 0xFEFF: "⟨U+FEFF⟩"}
    | {c: f"⟨U+{c:04X}⟩" for c in _BIDI}
    | {c: f"⟨U+{c:04X}⟩" for c in (*range(0x80, 0xA0), *range(0xD800, 0xE000))}
)
# The marks are drawn by the style sheet, so that text copied from the page is the text of the model.
_MARKS = {"\n": '<i class="n"></i>\n', "\t": '<i class="tab"></i>\t'}


def in_text(token: str) -> Markup:
    """A token inside running text: line breaks and tabs work as such and carry a mark; an empty token is a mark."""
    if not token:
        return Markup('<i class="e"></i>')
    html = str(escape(token.translate(_VISIBLE)))
    for character, mark in _MARKS.items():
        html = html.replace(character, mark)
    return Markup(html)


def visible(text: str) -> str:
    """The text with line breaks and tabs, and a visible character for all else that could act on a terminal."""
    return text.translate(_VISIBLE)


def one_line(text: str) -> str:
    """The text with characters for line breaks and tabs."""
    return text.translate(_VISIBLE).replace("\n", "↵").replace("\t", "⇥")


def in_table(token: str) -> str:
    """A token by itself: one leading space is usual and left out, all others become characters."""
    if not token:
        return "⟨no text⟩"
    shown = one_line(token)
    body = shown.strip(" ")
    if not body:
        return "␣" * len(shown)
    lead, trail = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    return "␣" * (lead - 1) + body + "␣" * trail


def shorten(text: str, width: int) -> str:
    """The text on one line, cut in the middle to at most ``width`` characters."""
    line = " ".join(text.translate(_VISIBLE).split())
    if len(line) <= width:
        return line
    head = (width - 3) * 2 // 3
    return f"{line[:head]} … {line[len(line) - (width - 3 - head) :]}"


def percent(share: float) -> str:
    """A share in percent with a precision that fits a table."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %"
