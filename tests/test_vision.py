"""Vision-language models: every type that is read, on text alone and with images."""

from __future__ import annotations

import pytest

from flashtrace_plugin.models.read.layouts import supported_families
from tests import tiny, vision
from tests.test_families import check
from tests.vision import CLASSES, TYPES, tiny_vision


@pytest.mark.parametrize("kind", TYPES)
def test_text_alone_is_exact(kind):
    found = check(tiny_vision(kind))
    assert found.closure < 2e-6
    assert found.logits < 1e-6
    assert found.scores < 1e-4
    assert found.mlp_shares < 1e-5


def test_every_text_model_of_the_table_is_tested():
    causal = [tiny.config_of(family) for family in tiny.FAMILIES]
    both = causal + [vision.config_of(kind) for kind in TYPES]
    assert {config.get_text_config().model_type for config in both} == set(supported_families())


def test_the_types_are_those_of_transformers():
    assert set(TYPES) <= set(CLASSES)
