"""Whether an explanation of one answer is about that answer, where a generation gives several."""

from __future__ import annotations

from collections.abc import Iterable

from flashtrace_plugin.evaluation.metrics.detection import check_disjoint
from flashtrace_plugin.evaluation.metrics.scores import Scores, as_masses, as_positions


def specificity(scores: Scores, own: Iterable[int], other: Iterable[int]) -> float:
    """Share of the evidence's mass that lies on the evidence of the explained answer, in [0, 1]; higher is better::

        mass on own / ( mass on own + mass on other )

    own:   prompt positions of the evidence of the answer that was explained
    other: prompt positions of the evidence of the other answers of the same generation

    With two answers of as much evidence, chance is 1/2, and so is an explanation of the whole generation; 1/2 also
    where there is no mass on either. Raises InputError for negative scores, SpanError for positions outside the
    prompt or in both.
    """
    mass = as_masses(scores, "specificity")
    wanted, others = as_positions("own", own, len(mass)), as_positions("other", other, len(mass))
    check_disjoint(wanted, others, "own", "other")
    on_own, on_other = (float(mass[sorted(part)].sum()) for part in (wanted, others))
    return on_own / (on_own + on_other) if on_own + on_other > 0 else 0.5
