"""Every family: its parts add up, its logits are the untouched model's, its scores are the dense reference's."""

from __future__ import annotations

import pytest

from flashtrace_plugin import FlashTrace, Span
from flashtrace_plugin.models.layouts import supported_families
from tests.reference import dense
from tests.tiny import FAMILIES, random_ids, tiny

IDS = random_ids(24)
PROMPT, REASONING, TARGET = 10, Span(10, 19), Span(19, 24)


def checked(model) -> tuple[float, float]:
    """Closure error of the package, and its largest gap to the dense reference relative to the largest score."""
    ours = FlashTrace(model, hops=2).attribute_ids(IDS, prompt_length=PROMPT, target=TARGET, reasoning=REASONING)
    layers = dense.read_dense(model, IDS)
    theirs = dense.flashtrace(layers, PROMPT, (TARGET.start, TARGET.stop), (REASONING.start, REASONING.stop), hops=2)[
        "hop_scores"
    ]
    gap = (ours.hop_scores - theirs).abs().amax(1) / theirs.amax(1)
    return ours.closure_error, gap.max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_exact(family):
    closure, gap = checked(tiny(family))
    assert closure < 2e-6
    assert gap < 1e-4


def test_every_family_of_the_table_is_tested():
    tested = {name.partition(":")[0] for name in FAMILIES}
    wrappers = {"gemma3"}
    assert tested == set(supported_families()) - wrappers
