"""Every family: its parts add up, its logits are the untouched model's, its scores are the dense reference's.

``python -m tests.families`` writes what these checks measure into docs/families.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from flashtrace_plugin import FlashTrace, Span
from flashtrace_plugin.models.read.capture import logit_gap
from tests import families
from tests.reference import dense
from tests.tiny import FAMILIES, random_ids, tiny

IDS = random_ids(24)
PROMPT, REASONING, TARGET = 10, Span(10, 19), Span(19, 24)


@dataclass(frozen=True)
class Checked:
    """Closure error, and the largest gaps to the untouched model's logits and to the reference's numbers."""

    closure: float
    logits: float
    scores: float
    mlp_shares: float


def check(model, ids=IDS, prompt=PROMPT, inputs=None) -> Checked:
    """ids: [N], of which the last 14 are reasoning and target"""
    given, late = inputs or {}, len(ids) - len(IDS)
    reasoning, target = (Span(span.start + late, span.stop + late) for span in (REASONING, TARGET))
    options = {"prompt_length": prompt, "target": target, "reasoning": reasoning}
    ours = FlashTrace(model, hops=2).attribute_ids(ids, **options, inputs=inputs)
    layers = dense.read_dense(model, ids, **given)
    spans = [(span.start, span.stop) for span in (target, reasoning)]
    theirs = dense.flashtrace(layers, prompt, *spans, hops=2)["hop_scores"]
    first = dense.one_hop(layers, dense.weights_at(dict.fromkeys(range(*spans[0]), 1.0), len(ids)))
    return Checked(
        closure=ours.closure_error,
        logits=logit_gap(model, ids[None], given),
        scores=((ours.hop_scores - theirs).abs().amax(1) / theirs.amax(1)).max().item(),
        mlp_shares=(ours.mlp_shares[0] - first.mlp_shares).abs().max().item(),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_exact(family):
    found = check(tiny(family))
    assert found.closure < 2e-6
    assert found.logits < 1e-6
    assert found.scores < 1e-4
    assert found.mlp_shares < 1e-5


def test_the_page_is_up_to_date():
    """All but the measured digits, which the tests above bound."""
    text = families.PAGE.read_text(encoding="utf-8")
    assert families.page(families.noted(text)) == text, "stale; run python -m tests.families"
