"""Means that carry their uncertainty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import nan

import torch

from flashtrace_plugin.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` samples with its bootstrap interval; the interval of a single sample is unknown, nan."""

    mean: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


def bootstrap(values: Iterable[float], *, confidence: float = 0.95, resamples: int = 9999, seed: int = 0) -> Estimate:
    """Mean of per-sample values with a percentile bootstrap interval (Efron, 1979).

    values:     one number per independent sample; for two methods on the same samples pass their differences
    confidence: coverage of the interval, above 0 and below 1
    resamples:  number of samples drawn with replacement
    seed:       the same seed gives the same interval

    Raises InputError for no values, values that are not finite and a confidence out of range.
    """
    sample = torch.as_tensor(list(values), dtype=torch.float64)
    if sample.dim() != 1 or not len(sample):
        raise InputError(f"bootstrap needs one number per sample and at least one, got shape {list(sample.shape)}")
    if not bool(sample.isfinite().all()):
        raise InputError(f"{int((~sample.isfinite()).sum())} of {len(sample)} values are not finite; leave them out")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be above 0 and below 1, got {confidence}; 0.95 is usual")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}; 9999 is usual")
    mean = float(sample.mean())
    if len(sample) == 1:
        return Estimate(mean, nan, nan, 1, confidence)
    low, high = _interval(sample.tolist(), confidence, resamples, seed)
    return Estimate(mean, low, high, len(sample), confidence)


def _interval(values: list[float], confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    import numpy as np

    found = (
        need_scipy()
        .bootstrap(
            (np.array(values),),
            np.mean,
            n_resamples=resamples,
            confidence_level=confidence,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return float(found.low), float(found.high)


def need_scipy():  # type: ignore[no-untyped-def]
    """scipy.stats, or an ImportError that names the extra."""
    try:
        import scipy.stats
    except ImportError as error:
        raise ImportError("this metric needs scipy: pip install 'flashtrace-plugin[evaluation]'") from error
    return scipy.stats
