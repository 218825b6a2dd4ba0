"""Vision-language models: every type that is read, on text alone and with images."""

from __future__ import annotations

import pytest
import torch
import transformers

from flashtrace_plugin import FlashTrace, Span
from flashtrace_plugin.core.flow.hop import one_hop
from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.models.inputs import find_images
from flashtrace_plugin.models.read.capture import capture
from flashtrace_plugin.models.read.layouts import layout_for, supported_families
from tests import tiny, vision
from tests.reference import dense
from tests.test_families import check
from tests.tiny import random_ids
from tests.vision import CLASSES, IMAGE, IMAGES, LARGE, PREFIX, TYPES, UNREAD, tiny_vision, with_images


def attributed(model, ids, prompt, inputs, **options):
    spans = {"reasoning": Span(prompt, len(ids) - 5), "target": Span(len(ids) - 5, len(ids))}
    return FlashTrace(model, **options).attribute_ids(ids, prompt_length=prompt, inputs=inputs, **spans)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in PREFIX])
def test_text_alone_is_exact(kind):
    found = check(tiny_vision(kind))
    assert found.closure < 2e-6
    assert found.logits < 1e-6
    assert found.scores < 1e-4
    assert found.mlp_shares < 1e-5


@pytest.mark.parametrize("kind", IMAGES)
def test_images_are_exact(kind):
    model = tiny_vision(kind, dtype=torch.float64 if kind in LARGE else torch.float32)
    ids, prompt, inputs = with_images(kind, model, random_ids(24))
    found = check(model, ids, prompt, inputs)
    assert found.closure < 2e-6
    assert found.logits < 1e-6
    assert found.scores < 1e-4
    assert found.mlp_shares < 1e-5
    images = find_images(model, ids, inputs)
    assert [(len(image), image.grid) for image in images] == list(zip(IMAGES[kind].counts, IMAGES[kind].grids))
    assert [i for image in images for i in image.positions] == (ids == IMAGE).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("kind", ["gemma3", "paligemma", "qwen2_5_vl", "qwen3_vl"])
def test_positions_of_an_image_are_read_as_the_model_reads_them(kind):
    """Also forwards, where an image or a prefix is read as a whole."""
    model = tiny_vision(kind)
    ids, _, inputs = with_images(kind, model, random_ids(24))
    weights = (ids == IMAGE).float()
    ours = one_hop(capture(model, ids[None], torch.arange(len(ids)), inputs), weights, len(ids))
    layers = dense.read_dense(model, ids, **inputs)
    theirs = dense.one_hop(layers, weights.double())
    assert ours.closure_error < 2e-6
    assert torch.allclose(ours.alpha[0].double(), theirs.alpha, rtol=1e-4, atol=1e-6)
    last = int((ids == IMAGE).nonzero()[-1])
    forwards = [bool((layer.pattern[:, last, last + 1 :] > 0).any()) for layer in layers]
    both = [bool((layer.pattern.triu(1) > 0).any()) for layer in layers]
    assert all(both) == (kind in ("gemma3", "paligemma")) and all(forwards) == (kind == "paligemma")


def test_a_prefix_model_without_its_prefix_is_refused():
    with pytest.raises(UnsupportedModelError, match="in both directions"):
        check(tiny_vision("paligemma"))


def test_every_text_model_of_the_table_is_tested():
    causal = [tiny.config_of(family) for family in tiny.FAMILIES]
    both = causal + [vision.config_of(kind) for kind in TYPES]
    assert {config.get_text_config().model_type for config in both} == set(supported_families())


def test_the_types_are_those_of_transformers():
    assert set(TYPES) | set(UNREAD) <= set(CLASSES)
    assert not set(TYPES) & set(UNREAD)


def test_a_configuration_without_a_text_model_is_told():
    model = tiny_vision("llava")
    model.config.text_config = None
    with pytest.raises(UnsupportedModelError, match="no configuration of a text model"):
        check(model)


def test_an_unknown_text_model_is_named():
    model = tiny_vision("llava")
    model.config.text_config.model_type = "mine"
    with pytest.raises(UnsupportedModelError, match="'llava' with the text model 'mine' is not supported"):
        check(model)


def test_a_refused_family_is_told_why():
    with pytest.raises(UnsupportedModelError, match=r"'mllama'.* is not supported: its cross-attention layers"):
        layout_for(transformers.MllamaConfig())
