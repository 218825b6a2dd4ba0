"""Differences of two methods on the same samples."""

from __future__ import annotations

from collections.abc import Iterable

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.metrics.bootstrap import Estimate, bootstrap


def paired(
    values: Iterable[float],
    reference: Iterable[float],
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Estimate:
    """Mean of ``values`` less ``reference``, sample by sample, with a bootstrap interval over samples.

    values, reference: one number per sample, in the same order; other arguments and errors as in :func:`bootstrap`

    The interval leaves out how much samples differ among themselves, so it is narrower than those of the two means.
    """
    first, second = [float(v) for v in values], [float(v) for v in reference]
    if len(first) != len(second):
        raise InputError(f"there are {len(first)} values and {len(second)} of the reference; give one pair per sample")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return bootstrap(differences, confidence=confidence, resamples=resamples, seed=seed)
