"""Comparing methods: every metric of one explanation, and a run over cases and methods that can be killed and go on.

values = run(model, cases, {"FlashTrace": scorer(FlashTrace(model))}, out=Path("results.jsonl"))
means(values, METRICS);  differences(values, METRICS, "FlashTrace", sample=SAMPLE)         # from tables
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from flashtrace_plugin.errors import InputError, ReasoningWarning
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.metrics import auroc, recovery, recovery_ceiling, specificity
from flashtrace_plugin.evaluation.metrics.deletion import (
    DeletionCurve,
    deletion_groups,
    deletion_rows,
    replacement_token,
)
from flashtrace_plugin.evaluation.metrics.likelihood import token_log_likelihood
from flashtrace_plugin.evaluation.metrics.scores import as_scores
from flashtrace_plugin.evaluation.metrics.sufficiency import insertion_rows, kept_counts, top_positions
from flashtrace_plugin.spans import Span

if TYPE_CHECKING:
    import pandas as pd

Scorer = Callable[[Case], Tensor]
"""Scores [prompt_length] of one case, 0 or more, higher for what matters more."""

DELETIONS = 10
KEPT = (0.1, 0.2)
METRICS = (
    "recovery",
    "AUROC",
    "specificity",
    "RISE",
    "MAS",
    "RISE of the answer",
    "MAS of the answer",
    *(f"log P, top {fraction:.0%}" for fraction in KEPT),
    *(f"log P of the answer, top {fraction:.0%}" for fraction in KEPT),
)
"""Names of the measurements; recovery, AUROC, specificity and log P are better higher, RISE and MAS lower."""
SAMPLE = ("task", "seed", "number", "answer")
"""The columns that together name a case."""


def scorer(method: Any) -> Scorer:
    """A method as a function of a case; signed scores count by their size."""

    def scores(case: Case) -> Tensor:
        with warnings.catch_warnings():
            if case.reasoning is None:  # which is known, so there is nothing to warn about
                warnings.simplefilter("ignore", ReasoningWarning)
            return method.attribute_ids(case.input_ids, **case.spans).scores.abs()

    return scores


def measure(
    model: Any,
    case: Case,
    scores: Tensor,
    *,
    ends: Tensor | None = None,
    steps: int = DELETIONS,
    batch_size: int | None = None,
) -> dict[str, float]:
    """All metrics of one explanation by their name in ``METRICS``; specificity only where there is other evidence.

    scores: [prompt_length]
    ends:   [2, generation]   from :func:`ends_of`, which are the same for every method

    Besides them: ``ceiling`` of recovery, ``AUROC of own`` evidence against other evidence, and ``falls``, 1 where
    deleting the whole prompt makes the generation less likely (else RISE and MAS say nothing), ``falls, answer``.
    ``DELETIONS`` groups are deleted; with insertion that is ``DELETIONS`` + 1 rows to run, in batches. Raises
    InputError for scores that are unusable or negative.
    """
    values = as_scores(scores, case.prompt_length)
    known = ends_of(model, case, batch_size=batch_size) if ends is None else ends
    return _against_evidence(case, values) | _against_model(model, case, values, known, steps, batch_size)


def ends_of(model: Any, case: Case, *, batch_size: int | None = None) -> Tensor:
    """log P of each generated token with the prompt as it is and with all of it replaced. result: [2, generation]"""
    rows = deletion_rows(case.input_ids, (tuple(range(case.prompt_length)),), replacement_token(model))
    return token_log_likelihood(model, rows, generation=case.generation, batch_size=batch_size)


def _against_evidence(case: Case, scores: Tensor) -> dict[str, float]:
    found = {
        "recovery": recovery(scores, case.evidence),
        "ceiling": recovery_ceiling(case.prompt_length, case.evidence),
        "AUROC": auroc(scores, case.evidence),
    }
    if case.other_evidence:
        found["specificity"] = specificity(scores, case.evidence, case.other_evidence)
        found["AUROC of own"] = auroc(scores, case.evidence, against=case.other_evidence)
    return found


def _against_model(
    model: Any, case: Case, scores: Tensor, ends: Tensor, steps: int, batch_size: int | None
) -> dict[str, float]:
    """Deletion and insertion, watched on the whole generation and on the answer alone in the same forward passes."""
    token, groups = replacement_token(model), deletion_groups(scores, steps)
    deleted = deletion_rows(case.input_ids, groups, token)[1:-1]  # the ends are known
    kept = top_positions(scores, kept_counts(KEPT, case.prompt_length))
    inserted = insertion_rows(case.input_ids, case.prompt_length, kept, token)
    rows = torch.cat([deleted, inserted])
    found = token_log_likelihood(model, rows, generation=case.generation, batch_size=batch_size)
    by_token = torch.cat([ends[:1], found[: len(deleted)], ends[1:]]), found[len(deleted) :]
    measured: dict[str, float] = {}
    for name, watched in (("", case.generation), (" of the answer", case.target)):
        deletion, insertion = (part[:, _inside(case, watched)].sum(-1) for part in by_token)
        curve = DeletionCurve(deletion, groups, scores, token)
        measured |= {f"RISE{name}": curve.rise, f"MAS{name}": curve.mas(), f"falls{name}": float(curve.falls)}
        measured |= {f"log P{name}, top {part:.0%}": float(x) for part, x in zip(KEPT, insertion, strict=True)}
    return measured


def _inside(case: Case, span: Span) -> slice:
    return slice(span.start - case.prompt_length, span.stop - case.prompt_length)


def run(
    model: Any,
    cases: Iterable[Case],
    scorers: Mapping[str, Scorer],
    *,
    out: Path,
    steps: int = DELETIONS,
    batch_size: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Measures every method on every case, one line of JSON for each as soon as it is known.

    cases:      with different names
    scorers:    methods by name
    out:        file of the lines; what it holds already is not computed again, and a last line that was cut off is
                dropped
    steps:      groups of deletion; 20 in the papers
    batch_size: rows per forward pass
    result:     one row for each line of the file

    Raises InputError for a file of another model or of other cases of the same name, and for one that cannot be
    written; what was measured stays.
    """
    finished = finished_lines(out, str(model.config.name_or_path))
    for case in tqdm(cases, desc="cases", unit="case", disable=not progress):
        for name in scorers:
            check_same(finished.get((case.name, name), case.digest), case, out)
        missing = [name for name in scorers if (case.name, name) not in finished]
        ends = ends_of(model, case, batch_size=batch_size) if missing else None
        for name in missing:
            append_line(out, _line(model, case, name, scorers[name], ends, steps, batch_size))
    return read_results(out)


def _line(
    model: Any, case: Case, name: str, score: Scorer, ends: Tensor | None, steps: int, batch_size: int | None
) -> dict[str, Any]:
    begin = time.perf_counter()
    scores = score(case)
    scored = time.perf_counter()
    found = measure(model, case, scores, ends=ends, steps=steps, batch_size=batch_size)
    return {
        "model": str(model.config.name_or_path),
        **{column: getattr(case, column) for column in SAMPLE},
        "case": case.name,
        "digest": case.digest,
        "method": name,
        "right": case.right,
        "forced": case.forced,
        "prompt_length": case.prompt_length,
        "generation_length": len(case.generation),
        **found,
        "seconds": scored - begin,
        "seconds to measure": time.perf_counter() - scored,
    }


def read_results(out: Path) -> pd.DataFrame:
    """The lines of a file that :func:`run` wrote, a metric that was not defined for a case as nan."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables need pandas: pip install 'flashtrace-plugin[evaluation]'") from error
    return pandas.DataFrame(list(_lines(out)))


def _lines(out: Path) -> Iterator[dict[str, Any]]:
    """The complete lines. Raises InputError for one that is not what :func:`run` writes."""
    if not out.exists():
        return
    for number, text in enumerate(out.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            return
        try:
            line = json.loads(text)
            _ = line["case"], line["method"], line["digest"], line["model"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"line {number} of {out} is not a result ({error}); give another file as out") from error
        yield line


def finished_lines(out: Path, model: str) -> dict[tuple[str, str], str]:
    """Digests by case and method of what the file holds, after a line that was cut off is removed from it."""
    found = {}
    for line in _lines(out):
        if line["model"] != model:
            raise InputError(f"{out} holds results of the model {line['model']!r}, not {model!r}; give another file")
        found[line["case"], line["method"]] = line["digest"]
    _cut_unfinished(out)
    return found


def _cut_unfinished(out: Path) -> None:
    text = out.read_bytes() if out.exists() else b""
    if text and not text.endswith(b"\n"):
        with out.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def check_same(digest: str, case: Case, out: Path) -> None:
    if digest != case.digest:
        raise InputError(f"{out} holds results of another case named {case.name!r}; give another file as out")


def append_line(out: Path, line: Mapping[str, Any]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}); the lines before are kept, make room and run again"
        ) from error
