"""All that is measured of one explanation, in groups by name: against evidence, by deletion and insertion, …

    subject = Subject(model, case)
    measure(subject, scores, ("evidence", "curves"))     # {"recovery": …, "RISE": …}

What is the same for every method on a case, such as the likelihood without a prompt, is computed once and kept by the
subject. A metric that is not defined for a case has no entry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.metrics import auroc, dsa, f1, recovery, recovery_ceiling, specificity
from flashtrace_plugin.evaluation.metrics.deletion import (
    DeletionCurve,
    deletion_groups,
    deletion_rows,
    replacement_token,
)
from flashtrace_plugin.evaluation.metrics.flow import mass_by_hop
from flashtrace_plugin.evaluation.metrics.likelihood import token_log_likelihood
from flashtrace_plugin.evaluation.metrics.patching import patch_effects, patching
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_scores
from flashtrace_plugin.evaluation.metrics.soft import soft_faithfulness
from flashtrace_plugin.evaluation.metrics.sufficiency import insertion_rows, kept_counts, top_positions
from flashtrace_plugin.spans import Span

DELETIONS = 10
"""Groups of a deletion curve unless more are asked for; the papers take 20."""

KEPT = (0.1, 0.2, 0.3, 0.5)
"""Shares of the prompt that insertion keeps."""


@dataclass(eq=False)
class Subject:
    """A case with the model that wrote it, and what is true of it whatever the method.

    steps:      groups of deletion;  batch_size: rows per forward pass, by default as many as memory allows
    """

    model: Any
    case: Case
    steps: int = DELETIONS
    batch_size: int | None = None

    @cached_property
    def token(self) -> int:
        """What stands in the place of a deleted token."""
        return replacement_token(self.model)

    @cached_property
    def ends(self) -> Tensor:
        """log P of each generated token with the prompt as it is and with all of it replaced. [2, generation]"""
        return self.likelihood(
            deletion_rows(self.case.input_ids, (tuple(range(self.case.prompt_length)),), self.token)
        )

    @cached_property
    def effects(self) -> Tensor:
        """What patching each prompt token does to log P of the target. [prompt_length]"""
        return patch_effects(
            self.model,
            self.case.input_ids,
            prompt_length=self.case.prompt_length,
            target=self.case.target,
            batch_size=self.batch_size,
        )

    @cached_property
    def forward_seconds(self) -> float:
        """Seconds of the model's own forward pass on this text, the best of three: the unit of cost."""
        ids, seconds = self.case.input_ids[None].to(self.model.device), []
        with torch.no_grad():
            for _ in range(3):
                began = time.perf_counter()
                float(self.model(ids, use_cache=False).logits[0, -1, 0])  # reading it waits for an accelerator
                seconds.append(time.perf_counter() - began)
        return min(seconds)

    def likelihood(self, rows: Tensor) -> Tensor:
        """log P of each generated token. rows: [R, N]; result: [R, generation]"""
        return token_log_likelihood(self.model, rows, generation=self.case.generation, batch_size=self.batch_size)


def measure(subject: Subject, scores: Scores, groups: Iterable[str] = ("evidence", "curves")) -> dict[str, Any]:
    """All metrics of the groups by their name; scores are over the prompt and >= 0, or an Attribution.

    groups: of ``GROUPS``

    Raises InputError for scores that are unusable or negative, and for an unknown group.
    """
    values = as_scores(scores, subject.case.prompt_length)
    found: dict[str, Any] = {"all scores equal": float(values.max() == values.min())}
    for name in groups:
        if name not in GROUPS:
            raise InputError(f"measure is {name!r}; known ones are {', '.join(GROUPS)}")
        found |= GROUPS[name](subject, values, scores)
    return found


def _evidence(subject: Subject, scores: Tensor, given: Scores) -> dict[str, Any]:
    case = subject.case
    if not case.evidence:
        return {}
    found = {
        "recovery": recovery(scores, case.evidence),
        "ceiling": recovery_ceiling(case.prompt_length, case.evidence),
        "F1": f1(scores, case.evidence),
    }
    if len(set(case.evidence)) < case.prompt_length:
        found["AUROC"] = auroc(scores, case.evidence)
    if case.other_evidence:
        found["specificity"] = specificity(scores, case.evidence, case.other_evidence)
        found["AUROC of own"] = auroc(scores, case.evidence, against=case.other_evidence)
    if case.distractors and not set(case.distractors) & {*case.evidence, *case.segment}:
        found["DSA"] = dsa(scores, case.evidence, case.distractors, evidence_segment=case.segment or None)
    return found


def _curves(subject: Subject, scores: Tensor, given: Scores) -> dict[str, Any]:
    """Deletion and insertion, watched on the whole generation and on the answer alone in the same forward passes."""
    case, token, groups = subject.case, subject.token, deletion_groups(scores, subject.steps)
    deleted = deletion_rows(case.input_ids, groups, token)[1:-1]  # the ends are known
    kept = top_positions(scores, kept_counts(KEPT, case.prompt_length))
    inserted = insertion_rows(case.input_ids, case.prompt_length, kept, token)
    found = subject.likelihood(torch.cat([deleted, inserted]))
    by_token = torch.cat([subject.ends[:1], found[: len(deleted)], subject.ends[1:]]), found[len(deleted) :]
    measured: dict[str, Any] = {}
    for name, watched in (("", case.generation), (" of the answer", case.target)):
        deletion, insertion = (part[:, _inside(case, watched)].sum(-1) for part in by_token)
        curve = DeletionCurve(deletion, groups, scores, token)
        measured |= {f"RISE{name}": curve.rise, f"MAS{name}": curve.mas(), f"AOPC{name}": curve.aopc}
        measured |= {f"falls{name}": float(curve.falls), f"deletion{name}": deletion.tolist()}
        measured |= {f"log P{name}, top {part:.0%}": float(x) for part, x in zip(KEPT, insertion, strict=True)}
    return measured


def _soft(subject: Subject, scores: Tensor, given: Scores) -> dict[str, Any]:
    case = subject.case
    options: dict[str, Any] = {"prompt_length": case.prompt_length, "scores": scores, "generation": case.target}
    found = soft_faithfulness(subject.model, case.input_ids, **options)
    equal = soft_faithfulness(subject.model, case.input_ids, **options, retention=0.5)
    return {
        "Soft-NC": found.nc,
        "Soft-NS": found.ns,
        "Soft-NC less random": found.nc - found.random_nc,
        "Soft-NS less random": found.ns - found.random_ns,
        "pi-Soft-NC": equal.nc,
        "pi-Soft-NS": equal.ns,
    }


def _patched(subject: Subject, scores: Tensor, given: Scores) -> dict[str, Any]:
    found = patching(scores, subject.effects)
    names = {"Patch-Corr": found.correlation, "Intervention@5": found.top_effect, "misattribution": found.missed}
    return {name: value for name, value in names.items() if value is not None}


def _flow(subject: Subject, scores: Tensor, given: Scores) -> dict[str, Any]:
    """Mass by hop and segment, and rho by hop; nothing for what is no Attribution."""
    if not isinstance(given, Attribution):
        return {}
    rho = [float(x) for x in given.reasoning_mass]
    by_hop = dict(zip(_RHO, rho)) if subject.case.reasoning is not None else {}
    return {"rho": rho, "mass": mass_by_hop(given)} | by_hop


GROUPS: dict[str, Callable[[Subject, Tensor, Scores], dict[str, Any]]] = {
    "evidence": _evidence,
    "curves": _curves,
    "soft": _soft,
    "patching": _patched,
    "flow": _flow,
}
"""What can be measured, by name."""

_HIGHER = (
    "recovery",
    "AUROC",
    "specificity",
    "AUROC of own",
    "F1",
    "DSA",
    *(f"log P, top {part:.0%}" for part in KEPT),
    *(f"log P of the answer, top {part:.0%}" for part in KEPT),
    "AOPC",
    "AOPC of the answer",
    "Soft-NC",
    "Soft-NS",
    "Soft-NC less random",
    "Soft-NS less random",
    "pi-Soft-NC",
    "pi-Soft-NS",
    "Patch-Corr",
    "Intervention@5",
)
LOWER = ("RISE", "MAS", "RISE of the answer", "MAS of the answer", "misattribution", "sensitivity")
_RHO = tuple(f"rho, hop {hop}" for hop in range(5))
"""Share of each hop's mass that lies on the reasoning, where there is one (FlashTrace, Eq. 11)."""

NEUTRAL = ("cost", "seconds", "ceiling", *_RHO)
METRICS = (*_HIGHER, *LOWER, *NEUTRAL)
"""Names of what tables show: better higher; those of ``LOWER`` better lower; those of ``NEUTRAL`` neither."""


def _inside(case: Case, span: Span) -> slice:
    return slice(span.start - case.prompt_length, span.stop - case.prompt_length)
