"""Cases: a prompt, what a model wrote after it, which part of that is explained, and where its evidence is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.metrics.scores import as_positions
from flashtrace_plugin.spans import Span, check_spans


@dataclass(frozen=True, eq=False)
class Case:
    """One target to explain. Positions count tokens from the first of the prompt.

    input_ids:      [N]        prompt and generation, which ends with the last answer
    prompt_length:  number of prompt tokens
    target:         the answer that is explained
    reasoning:      what the model wrote before it answered, if it did
    evidence:       prompt positions that decide the target, none where they are not known
    distractors:    prompt positions that look like evidence and are not, where a task marks them
    segment:        all positions of the part that holds the evidence, where a task has parts (DSA)
    other_evidence: prompt positions that decide the other answers of the same generation, for specificity
    question:       prompt positions that ask
    task, seed, number: the sample;  answer: which of its answers is the target, from 0
    right:          whether the model wrote this by itself and it is right
    forced:         whether the text was put into the model's mouth
    """

    input_ids: Tensor
    prompt_length: int
    target: Span
    reasoning: Span | None
    evidence: tuple[int, ...]
    distractors: tuple[int, ...] = ()
    segment: tuple[int, ...] = ()
    other_evidence: tuple[int, ...] = ()
    question: tuple[int, ...] = ()
    task: str = ""
    seed: int = 0
    number: int = 0
    answer: int = 0
    right: bool = True
    forced: bool = False

    def __post_init__(self) -> None:
        check_spans(len(self.input_ids), self.prompt_length, self.target, self.reasoning)
        if self.evidence:  # some data sets mark none
            as_positions("evidence", self.evidence, self.prompt_length)

    @property
    def gold(self) -> tuple[int, ...]:
        """The evidence, by the name under which metrics take it."""
        return self.evidence

    @property
    def generation(self) -> Span:
        """All that was written: reasoning, answers and what is between them."""
        return Span(self.prompt_length, len(self.input_ids))

    @property
    def spans(self) -> dict[str, Any]:
        """What ``attribute_ids`` takes beside the ids."""
        return {"prompt_length": self.prompt_length, "target": self.target, "reasoning": self.reasoning}

    @property
    def name(self) -> str:
        """Task, seed, number and answer, such as ``two codes/0/7/1``: one name for each case of a run."""
        return f"{self.task}/{self.seed}/{self.number}/{self.answer}"

    @property
    def digest(self) -> str:
        """First digits of the SHA-256 of ids and spans, which tells another case of the same name."""
        content = [self.input_ids.tolist(), self.prompt_length, str(self.target), str(self.reasoning), self.evidence]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def save_cases(path: str | Path, cases: Iterable[Case]) -> None:
    """Writes cases as JSON, so that models need not write again."""
    Path(path).write_text(json.dumps([plain_case(case) for case in cases]), encoding="utf-8")


def load_cases(path: str | Path) -> list[Case]:
    """Reads what :func:`save_cases` wrote. Raises InputError for another kind of file."""
    try:
        return [case_of(row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give a file written by save_cases") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not what save_cases writes ({error}); draw the cases again") from error


_SPANS = ("target", "reasoning")


def plain_case(case: Case) -> dict[str, Any]:
    """A case as JSON takes it."""
    return asdict(case) | {"input_ids": case.input_ids.tolist()}


def case_of(row: dict[str, Any]) -> Case:
    """The case that :func:`plain_case` wrote."""
    values = {field.name: row[field.name] for field in fields(Case)}
    values |= {name: None if row[name] is None else Span(**row[name]) for name in _SPANS}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Case(**values | {"input_ids": torch.tensor(row["input_ids"])})
