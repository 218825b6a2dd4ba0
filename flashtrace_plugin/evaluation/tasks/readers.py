"""Samples from data sets in their published columns, read with ``datasets`` from a file or, by name, from the hub.

    READERS["hotpotqa"]("dev.json")[0]

A file may be JSON, JSON lines, CSV or Parquet. Where a data set marks no evidence, deletion and
insertion alone measure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.tasks.paragraphs import read_paragraphs
from flashtrace_plugin.evaluation.tasks.text_sample import TextSample
from flashtrace_plugin.spans import Chars

_Row = Mapping[str, Any]
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_MOST = 2000
"""Rows that are read at most."""


@dataclass(frozen=True)
class _Reader:
    """Columns that a row must have, and how it becomes a sample; None leaves it out."""

    name: str
    columns: tuple[str, ...]
    sample: Callable[[_Row], TextSample | None]
    split: str = "test"

    def __call__(self, source: str | Path) -> Sequence[TextSample]:
        found = []
        for number, row in enumerate(islice(_rows(source, self.split), _MOST)):
            missing = [name for name in self.columns if row.get(name) is None]
            if missing:
                raise InputError(
                    f"row {number} of {source} lacks {', '.join(missing)}; {self.name} has the columns "
                    f"{', '.join(self.columns)}, this file {', '.join(row)}"
                )
            sample = self.sample(row)
            found += [sample] if sample is not None else []
        if not found:
            raise InputError(f"{source} holds no usable row of {self.name}")
        return found


def _rows(source: str | Path, split: str) -> Iterable[_Row]:
    """Rows as they stream in. Raises InputError for what cannot be read."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError("data sets need the package datasets: pip install 'flashtrace-plugin[tasks]'") from error
    path = Path(source)
    if path.suffix not in _FORMATS:
        return load_dataset(str(source), split=split, streaming=True)
    if not path.is_file():
        raise InputError(f"there is no file {path}; give one in {', '.join(_FORMATS)}, or the name of a data set")
    try:
        return list(
            islice(load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True), _MOST)
        )
    except (DatasetsError, ValueError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as {_FORMATS[path.suffix]} ({' '.join(str(error).split())})"
        ) from error


class _Text:
    """A prompt that grows, and the places of its evidence."""

    def __init__(self) -> None:
        self.text, self.evidence = "", []  # type: ignore[var-annotated]

    def add(self, piece: str, *, evidence: bool = False, end: str = " ") -> Chars:
        begin = len(self.text)
        self.text += piece + end
        place = (begin, begin + len(piece))
        if evidence and piece.strip():
            self.evidence.append(place)
        return place

    def asked(self, task: str, question: str, lead: str, expected: str, pattern: str) -> TextSample:
        begin = len(self.text)
        self.text += f"{question}{lead}"
        return TextSample(
            task=task,
            prompt=self.text,
            expected=expected,
            pattern=pattern,
            evidence=(tuple(self.evidence),),
            question=(begin, len(self.text)),
        )


def _short(answer: str) -> str:
    return rf"(?i)\s*(?P<answer0>{re.escape(answer.strip())})(?!\w)"


def _free(text: str) -> str:
    return rf"(?s)\s*(?P<answer0>{re.escape(text.strip())})"


def _math(row: _Row) -> TextSample | None:
    boxed = re.search(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", row["solution"])
    if boxed is None:
        return None
    answer, steps = boxed.group(1), row["solution"].strip()
    expected = f" {steps}\nAnswer: {answer}"
    pattern = rf"(?s)\s*(?P<reasoning>.+?)\nAnswer:\s*(?P<answer0>{re.escape(answer)})(?!\w)"
    return _Text().asked("math", f"{row['problem'].strip()}\n", "Solution:", expected, pattern)


def _hotpot(row: _Row) -> TextSample | None:
    """Paragraphs with the supporting sentences as evidence; both forms, of columns and of pairs, are read."""
    context, facts = row["context"], row["supporting_facts"]
    paragraphs = list(zip(context["title"], context["sentences"])) if isinstance(context, Mapping) else context
    wanted = {(t, n) for t, n in (zip(facts["title"], facts["sent_id"]) if isinstance(facts, Mapping) else facts)}
    text = _Text()
    for title, sentences in paragraphs:
        text.add(f"{title}:")
        for number, sentence in enumerate(sentences):
            text.add(sentence.strip(), evidence=(title, number) in wanted)
        text.text = text.text.rstrip() + "\n"
    return text.asked(
        "hotpotqa", f"Question: {row['question']}\n", "Answer:", f" {row['answer']}", _short(row["answer"])
    )


def _morehop(row: _Row) -> TextSample | None:
    """Paragraphs, with those that the decomposition of the question names as evidence."""
    support = {step.get("paragraph_support_title") for step in row["question_decomposition"]}
    text = _Text()
    for title, sentences in row["context"]:
        text.add(f"{title}: {' '.join(s.strip() for s in sentences)}", evidence=title in support, end="\n")
    answer = str(row["answer"])
    return text.asked("morehopqa", f"Question: {row['question']}\n", "Answer:", f" {answer}", _short(answer))


def _tell_me_why(row: _Row) -> TextSample | None:
    """A story with the sentences that annotators found helpful as evidence, where they are named."""
    helpful, text = set(row.get("helpful_sentences") or ()), _Text()
    for number, sentence in enumerate(re.split(r"(?<=[.!?])\s+", row["narrative"].strip())):
        text.add(sentence, evidence=number in helpful)
    return text.asked(
        "tellmewhy", f"\n{row['question']}\n", "Answer:", f" {row['answer'].strip()}", _free(row["answer"])
    )


def _long_ra(row: _Row) -> TextSample | None:
    """Long-range agreement (Vafa et al. 2021): the last word, which a distant word decides."""
    text = _Text()
    before, word, after = row["text"].partition(row["evidence"])
    text.add(before, end="")
    text.add(word, evidence=True, end="")
    return text.asked("longra", after.rstrip(), "", f" {row['target']}", _short(row["target"]))


def _wiki_bio(row: _Row) -> TextSample | None:
    table = row["input_text"]["table"]
    lines = [f"{head}: {content.strip()}" for head, content in zip(table["column_header"], table["content"])]
    first = row["target_text"].strip().split(" .")[0]
    question = "\n".join(lines) + "\n"
    return _Text().asked("wikibio", question, "Biography:", f" {first}", _free(first))


def _aider(row: _Row) -> TextSample | None:
    """An exercise: instructions and a stub, then the code, which is what is explained."""
    question = f"{row['instructions'].strip()}\n\n{row['stub'].rstrip()}\n\n"
    solution = row["solution"].strip()
    return _Text().asked("aider", question, "# Solution\n", solution, _free(solution))


_READ = (
    _Reader("math", ("problem", "solution"), _math),
    _Reader("morehopqa", ("question", "answer", "context", "question_decomposition"), _morehop),
    _Reader("hotpotqa", ("question", "answer", "context", "supporting_facts"), _hotpot, "validation"),
    _Reader("longra", ("text", "evidence", "target"), _long_ra),
    _Reader("tellmewhy", ("narrative", "question", "answer"), _tell_me_why),
    _Reader("wikibio", ("input_text", "target_text"), _wiki_bio),
    _Reader("aider", ("instructions", "stub", "solution"), _aider),
)

READERS: dict[str, Callable[[str | Path], Sequence[TextSample]]] = {
    "paragraphs": read_paragraphs,
    **{reader.name: reader for reader in _READ},
}
"""What reads a data set, by the name of its task."""
