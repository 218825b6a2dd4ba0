"""Attributions to images: from messages or ids to patch grids, units and pictures, and what is refused on the way."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers

from flashtrace_plugin import (
    ALTI,
    HETA,
    IFR,
    LRP,
    Attribution,
    FlashTrace,
    InputError,
    Recommended,
    RecursiveAttribution,
    Span,
)
from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.images import overlay
from flashtrace_plugin.models.inputs import find_images
from tests.picture import entering, let_read, of_square
from tests.reference import dense
from tests.tiny import random_ids, tiny, tiny_tokenizer
from tests.vision import IMAGE, IMAGE_MARKS, IMAGES, VIDEO, drawing, tiny_processor, tiny_vision, with_images

GENERATION = "First look at the box. It is in the garden."
TARGET, REASONING = "garden", "First look at the box."
GRIDS = {"llava": [(4, 4), (4, 4)], "qwen2_5_vl": [(4, 2), (2, 2)], "gemma3": [(2, 2), (2, 2)]}


def messages():
    first = {"type": "image", "image": drawing()}
    second = {"type": "image", "image": drawing(28, 28)}
    return [
        {"role": "user", "content": [first, {"type": "text", "text": "Where is the key? "}, second]},
        {"role": "user", "content": [{"type": "text", "text": "It is in the kitchen."}]},
    ]


def explained(kind="qwen2_5_vl", method=FlashTrace, **options):
    model = tiny_vision(kind)
    explain = method(model, tiny_processor(kind, model), **options)
    return model, explain.attribute(messages(), GENERATION, target=TARGET, reasoning=REASONING)


@pytest.mark.parametrize("kind", IMAGE_MARKS)
def test_messages_with_images_are_what_the_processor_makes_of_them(kind):
    model, found = explained(kind)
    made = tiny_processor(kind, model).apply_chat_template(
        messages(), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert list(found.token_ids[: found.prompt.stop]) == made["input_ids"][0].tolist()
    assert [image.grid for image in found.images] == GRIDS[kind]
    assert "".join(found.tokens[found.prompt.stop :]) == GENERATION
    assert found.text(found.target) == " garden"

    inputs = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}
    for name in {"token_type_ids", "mm_token_type_ids"} & inputs.keys():
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(found.token_ids) - found.prompt.stop))
    layers = dense.read_dense(model, torch.tensor(found.token_ids), **inputs)
    spans = [(span.start, span.stop) for span in (found.target, found.reasoning)]
    theirs = dense.flashtrace(layers, found.prompt.stop, *spans, hops=1)["hop_scores"]
    assert torch.allclose(found.hop_scores.double(), theirs, rtol=1e-4, atol=1e-6)


def test_a_batch_gives_every_text_its_own_images():
    model, alone = explained()
    method = FlashTrace(model, tiny_processor("qwen2_5_vl", model))
    other = list(reversed(messages()))
    where = {"targets": [TARGET] * 3, "reasonings": [REASONING] * 3}
    found = method.attribute_batch([messages(), other, messages()], [GENERATION] * 3, **where)
    swapped = method.attribute(other, GENERATION, target=TARGET, reasoning=REASONING)
    for one, expected in zip(found, (alone, swapped, alone), strict=True):
        torch.testing.assert_close(one.hop_scores, expected.hop_scores)
        assert one.images == expected.images


@pytest.mark.parametrize("method", [FlashTrace, IFR, ALTI])
def test_methods_read_images(method):
    _, found = explained(method=method)
    assert found.patches(0).shape == (4, 2) and found.patches(1).shape == (2, 2)
    assert float(found.patches(0).sum()) > 0


@pytest.mark.parametrize("kind", [kind for kind, one in IMAGES.items() if one.grids[0] not in ((), (1, 1))])
def test_a_patch_is_where_its_pixels_are(kind):
    """Other pixels in one corner change what enters the text model most at that corner's patch."""
    model = tiny_vision(kind)
    ids, _, inputs = with_images(kind, model, random_ids(24))
    image = find_images(model, ids, inputs)[0]
    rows, columns = image.grid
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    flat = changed["pixel_values"].dim() < 4 or "image_grid_thw" in inputs
    if flat:  # patches that are merged stand together
        changed["pixel_values"][4 * (columns - 1) : 4 * columns] += 9.0
    else:
        changed["pixel_values"].view(-1, 3, 28, 28)[0, :, : 28 // rows, -28 // columns :] += 9.0
    before, after = (entering(model, ids, given)[list(image.positions)] for given in (inputs, changed))
    moved = (after - before).norm(dim=1).view(rows, columns)
    assert divmod(int(moved.argmax()), columns) == (0, columns - 1)


def test_a_patch_that_alone_is_read_is_found():
    """One layer whose values are 0 but at one patch: it has the score, and leaving it out matters most."""
    model = tiny_vision("llava", num_hidden_layers=1)
    text, wanted = random_ids(9), 6
    ids = torch.cat([text[:2], torch.full((16,), IMAGE), text[2:]])
    inputs = {"pixel_values": IMAGES["llava"].inputs["pixel_values"][:1]}
    let_read(model, ids, inputs, [2 + wanted])
    found = FlashTrace(model, hops=0).attribute_ids(ids, prompt_length=20, target=Span(24, 25), inputs=inputs)
    patches = found.patches(0).flatten()
    assert int(patches.argmax()) == wanted
    assert float(patches[wanted]) > 0.99 * float(found.scores.sum())

    whole = model(input_ids=ids[None], **inputs).logits[0, -1]
    moved = [(_without(model, ids, inputs, patch) - whole).norm().item() for patch in range(16)]
    assert max(range(16), key=moved.__getitem__) == wanted


def _without(model, ids, inputs, patch):
    """Logits with nothing where a patch enters the text model."""

    def empty(module, args, kwargs):
        embeddings = kwargs["inputs_embeds"].clone()
        embeddings[0, 2 + patch] = 0
        return args, kwargs | {"inputs_embeds": embeddings}

    handle = model.model.language_model.register_forward_pre_hook(empty, with_kwargs=True)
    try:
        with torch.no_grad():
            return model(input_ids=ids[None], **inputs).logits[0, -1]
    finally:
        handle.remove()


@pytest.mark.parametrize("method", [FlashTrace, RecursiveAttribution, ALTI, LRP, Recommended])
def test_an_image_counts_as_if_its_patches_were_words(method):
    """A plain language model that has the patches in its vocabulary, as two more lists of words, says the same."""
    model = tiny_vision("llava")
    ids, prompt, inputs = with_images("llava", model, random_ids(24))
    places = ids == IMAGE
    words = ids.masked_scatter(places, torch.arange(int(places.sum())) + 600)
    plain = transformers.LlamaForCausalLM(model.config.text_config).eval()
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    table = torch.zeros(632, plain.config.hidden_size)
    table[: plain.config.vocab_size] = plain.model.embed_tokens.weight.detach()
    table[600:] = entering(model, ids, inputs)[places]
    plain.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
    spans = {"prompt_length": prompt, "reasoning": Span(prompt, prompt + 5), "target": Span(len(ids) - 3, len(ids))}
    options = {"sinks": "keep"} if method is Recommended else {}  # these are measured by words alone
    ours = method(model, **options).attribute_ids(ids, inputs=inputs, **spans)
    theirs = method(plain, **options).attribute_ids(words, **spans)
    assert torch.allclose(ours.scores, theirs.scores, rtol=1e-3, atol=1e-6)
    assert float(ours.scores[places[:prompt]].sum()) > 0.01


@pytest.mark.parametrize("kind", ["gemma3", "glm4v", "internvl", "paligemma", "qwen2_5_vl"])
def test_relevance_is_conserved_with_images(kind):
    found = given(kind, LRP)
    told = found.settings
    parts = float(found.components["relevance"].double().sum()) + told["bias_share"] + told["position_share"]
    assert parts == pytest.approx(told["objective_value"], rel=1e-4, abs=1e-5)
    assert found.closure_error < 1e-5


def test_every_image_is_a_unit():
    _, found = explained()
    for unit in ("image", "message", "sentence", "word"):
        scored = found.by(unit)
        masses = {one.unit.name: one.score for one in scored if one.unit.kind == "image"}
        assert masses == {f"image {i}": pytest.approx(float(found.patches(i).sum()), rel=1e-5) for i in range(2)}
        assert float(scored.scores.sum()) == pytest.approx(float(found.scores.sum()), rel=1e-5)
    texts = {one.unit.text for one in found.by("sentence") if one.unit.kind == "sentence"}
    assert {"Where is the key?", "It is in the kitchen."} <= texts


def test_a_result_with_images_is_saved_and_loaded(tmp_path):
    _, found = explained()
    found.save(tmp_path / "found.json")
    again = Attribution.load(tmp_path / "found.json")
    assert again == found and again.images == found.images
    old = json.loads((tmp_path / "found.json").read_text())
    for change in ({"positions": []}, {"grid": [3, 3]}, {"positions": [10**6]}, {"kind": 1}, {"more": 1}):
        damaged = old | {"images": [old["images"][0] | change]}
        with pytest.raises(InputError, match="was it edited"):
            Attribution.from_dict(damaged)
    del old["images"]
    assert Attribution.from_dict(old).images == ()
    found.to_html(tmp_path / "report.html")


def test_an_overlay_shows_the_patches():
    _, found = explained()
    scores = torch.zeros(len(found.token_ids[: found.prompt.stop]))
    scores[found.images[0].positions[5]] = 1.0  # third row, right column
    picture = replace(found, scores=scores).overlay(drawing(280, 560))
    assert picture.size == (280, 560)
    warm = [x for x in [(70, 70), (210, 70), (210, 350), (70, 490)] if len(set(picture.getpixel(x))) > 1]
    assert warm == [(210, 350)]
    with pytest.raises(InputError, match=r"must be \[rows, columns\]"):
        overlay(torch.ones(3), drawing())
    with pytest.raises(InputError, match="strength"):
        overlay(torch.ones(3, 3), drawing(), strength=2)


def test_the_picture_of_the_docs_shows_the_square():
    found, _ = of_square()
    square = found.patches()[2:4, 2:4]
    assert square.shape == (2, 2) and float(square.sum()) > 0.99 * float(found.scores.sum())


def test_a_video_has_frames():
    model, text = tiny_vision("qwen2_5_vl"), random_ids(20)
    ids = torch.cat([text[:3], torch.full((16,), VIDEO), text[3:]])
    inputs = {
        "pixel_values_videos": torch.randn(64, 294, generator=torch.Generator().manual_seed(1)),
        "video_grid_thw": torch.tensor([[2, 8, 4]]),
        "mm_token_type_ids": 2 * (ids == VIDEO).long()[None],
    }
    found = FlashTrace(model).attribute_ids(
        ids, prompt_length=24, target=Span(30, 36), reasoning=Span(24, 30), inputs=inputs
    )
    assert [(image.kind, image.grid) for image in found.images] == [("video", (2, 4, 2))]
    assert found.patches(0).shape == (2, 4, 2)
    with pytest.raises(InputError, match="choose one frame"):
        found.overlay(drawing())
    layers = dense.read_dense(model, ids, **inputs)
    theirs = dense.flashtrace(layers, 24, (30, 36), (24, 30), hops=1)["hop_scores"]
    assert torch.allclose(found.hop_scores.double(), theirs, rtol=1e-4, atol=1e-6)


def test_patches_need_a_grid():
    model = tiny_vision("video_llava")
    ids, prompt, inputs = with_images("video_llava", model, random_ids(24))
    found = FlashTrace(model, hops=0).attribute_ids(
        ids, prompt_length=prompt, target=Span(len(ids) - 1, len(ids)), inputs=inputs
    )
    with pytest.raises(InputError, match=r"16 tokens of this image .* pass grid="):
        found.patches(0)
    with pytest.raises(InputError, match=r"a grid \[3, 4\] has not the 16 tokens"):
        found.patches(0, grid=(3, 4))
    assert torch.equal(found.patches(1, grid=(2, 8)).flatten(), found.scores[list(found.images[1].positions)])
    with pytest.raises(InputError, match="there are 2 images, so there is no image 2"):
        found.patches(2)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def given(kind="qwen2_5_vl", method=FlashTrace, ids=None, change=None, **inputs):
    """An attribution with inputs changed or, where None, left out."""
    model = tiny_vision(kind)
    own, prompt, known = with_images(kind, model, random_ids(24))
    ids = own if ids is None else ids(own)
    inputs = {name: value for name, value in (known | inputs).items() if value is not None}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        return method(model).attribute_ids(
            ids, prompt_length=prompt, target=Span(len(ids) - 5, len(ids)), inputs=inputs or None
        )
    finally:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert getattr(model.model, "rope_deltas", None) is None


NOTHING = {"pixel_values": None, "image_grid_thw": None, "mm_token_type_ids": None}
NANS = IMAGES["qwen2_5_vl"].inputs["pixel_values"].clone()
NANS[3, 5:7] = torch.nan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (NOTHING, "12 tokens that stand for images .* no image was given; pass what the processor returns"),
        (
            {"ids": lambda ids: ids.where(ids != IMAGE, 7)},
            "pixel_values was given, and no token of the text stands for it",
        ),
        ({"pixel_values": NANS}, "2 of 14112 numbers in pixel_values are NaN"),
        ({"image_grid_thw": torch.tensor([[1, 8, 4], [1, 2, 4]])}, "cannot be run with pixel_values, image_grid_thw"),
        (
            {"ids": lambda ids: ids.where(torch.arange(len(ids)) != 3, 7)},
            "Image features and image tokens do not match",
        ),
        ({"mm_token_type_ids": None}, "takes positions or its mask from mm_token_type_ids"),
        ({"mm_token_type_ids": torch.zeros(1, 3, dtype=torch.long)}, "has 3 numbers for a prompt of"),
        ({"pixels": torch.ones(1)}, "takes no input 'pixels'; it takes .*pixel_values"),
        ({"inputs_embeds": torch.ones(1)}, "the input 'inputs_embeds' cannot be given"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "hides tokens"),
        ({"image_grid_thw": None}, "cannot be run with"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        given(**options)


def test_heta_refuses_images():
    with pytest.raises(UnsupportedModelError, match="the method 'heta' does not read images"):
        given(method=HETA)


def test_relevance_refuses_features_that_are_added_between_layers():
    with pytest.raises(UnsupportedModelError, match="adds image features between its layers"):
        given("qwen3_vl", LRP)


def test_methods_at_the_embeddings_refuse_placeholders_without_images():
    for method in (LRP, HETA):
        with pytest.raises(InputError, match="no image was given"):
            given(method=method, **NOTHING)


def test_what_would_drop_the_images_refuses_them():
    model = tiny_vision("qwen2_5_vl")
    explain = FlashTrace(model, tiny_processor("qwen2_5_vl", model))
    with pytest.raises(UnsupportedModelError, match="no place for images"):
        explain.graph(messages(), GENERATION, target=TARGET, reasoning=REASONING)
    with pytest.raises(InputError, match="cannot be verified by replacing tokens"):
        explain.attribute(messages(), GENERATION, target=TARGET).verify()


def test_messages_with_images_need_a_processor():
    model = tiny("llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match=r"message 0 .* has a part of type 'image'.* the model's processor"):
        FlashTrace(model, tokenizer).attribute(messages(), GENERATION)


def test_a_processor_serves_texts_too():
    model = tiny_vision("llava")
    processor = tiny_processor("llava", model)
    ours = FlashTrace(model, processor).attribute("Where is the key?", GENERATION, target=TARGET)
    theirs = FlashTrace(model, processor.tokenizer).attribute("Where is the key?", GENERATION, target=TARGET)
    assert ours == theirs and ours.images == ()
