"""Tasks of reasoning-gym (``pip install 'flashtrace-plugin[tasks]'``) with their evidence marked in the question."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import networkx

from flashtrace_plugin.evaluation.tasks.text_sample import TextSample
from flashtrace_plugin.spans import Chars


def _make(rng: random.Random, task: str, kind: str, mark: Callable[[dict[str, Any]], list[Chars]]) -> TextSample:
    entry = _entry(kind, rng.randrange(2**31))
    question, answer = entry["question"].strip(), str(entry["answer"])
    text = f"{question}\nAnswer:"
    return TextSample(
        task=task,
        prompt=text,
        expected=f" {answer}",
        pattern=rf"(?i)\s*(?P<answer0>{re.escape(answer)})\b",
        evidence=(tuple(mark(entry | {"question": question})),),
        question=(max(0, question.rfind("\n")), len(text)),
        parameters={"kind": kind},
    )


def _entry(kind: str, seed: int) -> dict[str, Any]:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise ImportError(
            f"these tasks need reasoning-gym and what it imports ({error.name}): "
            "pip install 'flashtrace-plugin[tasks]'"
        ) from error
    return create_dataset(kind, seed=seed, size=1)[0]


def _needle(entry: dict[str, Any]) -> list[Chars]:
    """The one statement that says what is asked for."""
    said = re.search(r"Who (.+?)\?", entry["question"])
    found = said and re.search(rf"[^.]*? {re.escape(said.group(1))}(?=\.)", entry["question"])
    return [_stripped(found)] if found else []


def _family(entry: dict[str, Any]) -> list[Chars]:
    """The sentences on the shortest way from one person to the other."""
    text, people = entry["question"], networkx.Graph()
    for match in re.finditer(r"(\w+) is married to (\w+)(?=\.)\. They have [^.]*? called ([^.]+)", text):
        one, other, children = match.group(1), match.group(2), re.findall(r"[A-Z]\w*", match.group(3))
        couple, family = (match.start(1), match.end(2)), (match.end(2) + 2, match.end(3))
        people.add_edge(one, other, said=[couple])
        for child in children:
            for parent in (one, other):
                people.add_edge(parent, child, said=[couple, family])
    way = networkx.shortest_path(people, entry["metadata"]["person1"], entry["metadata"]["person2"])
    return sorted({place for a, b in pairwise(way) for place in people[a][b]["said"]})


def _numbers(entry: dict[str, Any]) -> list[Chars]:
    """Every number of the question: all that can decide the result."""
    return [match.span() for match in re.finditer(r"\d[\d,.]*(?<![,.])", entry["question"])]


def _premises(entry: dict[str, Any]) -> list[Chars]:
    """The premises that the conclusion is drawn from: both, or the one that is inverted."""
    data = entry["metadata"]
    chosen = [data["selected_premise"]] if data.get("type") == "inversion" else [1, 2]
    return [_place(entry["question"], data[f"premise{number}"]) for number in chosen]


def _place(text: str, piece: str) -> Chars:
    begin = text.index(piece)
    return begin, begin + len(piece)


def _stripped(found: re.Match[str]) -> Chars:
    return found.start() + len(found.group()) - len(found.group().lstrip()), found.end()


_KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], list[Chars]]]] = {
    "haystack": ("needle_haystack", _needle),
    "family relations": ("family_relationships", _family),
    "word problems": ("gsm_symbolic", _numbers),
    "syllogisms": ("syllogism", _premises),
}

GYM: dict[str, Callable[[random.Random], TextSample]] = {
    name: partial(_make, task=name, kind=kind, mark=mark) for name, (kind, mark) in _KINDS.items()
}
"""The tasks by name."""
