"""What a vision-language model is given beside token ids: checked, brought to it, and found among the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashtrace_plugin.errors import InputError, UnsupportedModelError
from flashtrace_plugin.images import ImageTokens, runs

_Inputs = Mapping[str, Any]
"""Arguments of the model's forward by name, as a processor returns them: ``pixel_values``, ``image_grid_thw``, …"""

_OURS = ("input_ids", "inputs_embeds", "labels", "past_key_values", "use_cache", "logits_to_keep", "position_ids")
"""What cannot be given: it is made here, or would take the place of the tokens."""

_PER_TOKEN = {"token_type_ids": 0, "mm_token_type_ids": 0}
"""_Inputs with a number for every token of the prompt, and the one that stands for what the model wrote after it."""

_PREFIX_MODELS = ("paligemma",)
"""Families whose tokens of type 0 are a prefix that is read as a whole; what the model writes is of type 1."""

_MEDIA = {
    "image": (
        ("image_token_id", "image_token_index", "image_patch_id"),
        ("pixel_values", "image_patches", "image_pixel_values"),
    ),
    "video": (("video_token_id", "video_token_index"), ("pixel_values_videos", "pixel_values")),
    "audio": (("audio_token_id", "audio_token_index"), ("input_features", "audio_values", "input_values")),
}
"""Kinds of media: what configurations call their placeholders, and the inputs that fill these."""

_SQUARE = frozenset(
    {"aya_vision", "cohere2_vision", "deepseek_vl", "gemma3", "got_ocr2", "idefics3", "internvl", "janus", "llava"}
    | {"paligemma", "qianfan_ocr", "smolvlm", "vipllava", "llama4"}
)
"""Families whose images, or tiles of them, are squares of patches in reading order."""


def checked_inputs(model: PreTrainedModel, input_ids: Tensor, prompt_length: int, inputs: _Inputs) -> dict[str, Any]:
    """The inputs on the model's device, those with a number for every token of the prompt as long as the text.

    input_ids: [1, N]

    Raises InputError for names that the model does not take, for values that are not finite, and for an image without
    its tokens or tokens without an image.
    """
    known = inspect.signature(model.forward).parameters
    unknown = sorted(inputs.keys() - known.keys() - {"attention_mask"})
    if unknown:
        raise InputError(
            f"{type(model).__name__} takes no input {unknown[0]!r}; it takes "
            f"{', '.join(name for name in known if name not in ('self', *_OURS))}"
        )
    made = sorted(inputs.keys() & set(_OURS))
    if made:
        raise InputError(f"the input {made[0]!r} cannot be given: it is made of the token ids; leave it out")
    _check_unpadded(inputs.get("attention_mask"))
    given = {name: value for name, value in inputs.items() if name != "attention_mask" and value is not None}
    checked = {name: _moved(model, name, value) for name, value in given.items()}
    for name in _PER_TOKEN.keys() & checked.keys():
        checked[name] = _lengthened(model, name, checked[name], prompt_length, input_ids.shape[1])
    check_placeholders(model, input_ids, checked)
    _check_types(model, known, checked)
    return checked


def _check_unpadded(mask: Any) -> None:
    if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
        raise InputError("the attention mask hides tokens; pass one sequence without padding")


def _moved(model: PreTrainedModel, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.to(model.device)
    bad = int((~value.isfinite()).sum())
    if bad:
        raise InputError(
            f"{bad} of {value.numel()} numbers in {name} are NaN or infinite; check the image's processing"
        )
    return value.to(model.device, model.dtype)


def _lengthened(model: PreTrainedModel, name: str, value: Tensor, prompt: int, length: int) -> Tensor:
    """Types of the prompt's tokens, and those of what the model wrote. result: [1, N]"""
    types = value.reshape(1, -1)
    if types.shape[1] == length:
        return types
    if types.shape[1] != prompt:
        raise InputError(
            f"{name} has {types.shape[1]} numbers for a prompt of {prompt} tokens and a text of {length}; give one "
            "for each token of either"
        )
    written = 1 if model.config.model_type in _PREFIX_MODELS else _PER_TOKEN[name]
    return torch.nn.functional.pad(types, (0, length - prompt), value=written)


def check_placeholders(model: PreTrainedModel, input_ids: Tensor, inputs: _Inputs) -> None:
    """Raises InputError for placeholders that nothing fills, and for images and the like without placeholders."""
    for kind, (names, fillers) in _MEDIA.items():
        number = _placeholder(model.config, names)
        given = [name for name in fillers if inputs.get(name) is not None]
        count = 0 if number is None else int((input_ids == number).sum())
        if count and not given:
            raise InputError(
                f"the text has {count} tokens that stand for {kind}s (id {number}) and no {kind} was given; pass what "
                f"the processor returns as inputs={{...}}, such as {fillers[0]}, or leave the tokens out"
            )
        own = [name for name in given if name == fillers[0] or (name in fillers and kind != "video")]
        if own and number is not None and not count and not _filled_by_others(model.config, input_ids, own, kind):
            raise InputError(
                f"{own[0]} was given, and no token of the text stands for it (id {number}); let the processor write "
                f"the {kind}'s tokens into the prompt, or leave it out"
            )


def _filled_by_others(config: Any, input_ids: Tensor, names: list[str], kind: str) -> bool:
    """Whether tokens of another kind are filled by the same input, as videos in some families by pixel_values."""
    others = (_placeholder(config, own) for other, (own, fill) in _MEDIA.items() if other != kind and names[0] in fill)
    return any(number is not None and bool((input_ids == number).any()) for number in others)


def placeholders(config: Any) -> list[int]:
    """Ids in whose place images, videos and sounds are put."""
    numbers = (_placeholder(config, names) for names, _ in _MEDIA.values())
    return [number for number in numbers if number is not None]


def _placeholder(config: Any, names: tuple[str, ...]) -> int | None:
    numbers = (getattr(config, name, None) for name in names)
    return next((number for number in numbers if isinstance(number, int)), None)


def _check_types(model: PreTrainedModel, known: Mapping[str, Any], inputs: _Inputs) -> None:
    """Raises InputError where a model's positions or mask would silently be those of a text without images."""
    needed = [name for name in _PER_TOKEN if name in known and name not in inputs]
    if needed and any(name.startswith("pixel_values") for name in inputs):
        raise InputError(
            f"{type(model).__name__} takes positions or its mask from {needed[0]}, without which it would read the "
            "image as text; pass it as the processor returns it (return_mm_token_type_ids=True, "
            "return_token_type_ids=True)"
        )


def run_with(model: PreTrainedModel, input_ids: Tensor, inputs: _Inputs, **options: Any) -> Any:
    """The model's output. Raises InputError where it refuses the inputs, such as too many tokens for an image."""
    if not inputs:
        return model(input_ids=input_ids, use_cache=False, **options)
    try:
        return model(input_ids=input_ids, use_cache=False, **inputs, **options)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, TypeError, IndexError, StopIteration, AttributeError) as error:
        if isinstance(error, InputError | UnsupportedModelError):
            raise
        raise InputError(
            f"{type(model).__name__} cannot be run with {', '.join(inputs)}: {error}. Does the number of image tokens "
            "fit the images, and were all inputs that the processor returned passed?"
        ) from error


def find_images(model: PreTrainedModel, input_ids: Tensor, inputs: _Inputs) -> tuple[ImageTokens, ...]:
    """Images, tiles and videos of a text, in its order. input_ids: [N]"""
    config = model.config
    found: list[ImageTokens] = []
    for kind in ("image", "video"):
        number = _placeholder(config, _MEDIA[kind][0])
        if number is not None and bool((input_ids == number).any()):
            found += _of_kind(kind, (input_ids == number).tolist(), input_ids, config, inputs)
    return tuple(sorted(found, key=lambda image: image.positions))


def _of_kind(kind: str, places: list[bool], input_ids: Tensor, config: Any, inputs: _Inputs) -> Iterator[ImageTokens]:
    """Runs of placeholders, cut where an image's grid says that another begins."""
    grids = list(_grids(kind, config, inputs))
    known = [i for i, here in enumerate(places) if here]
    if grids and sum(torch.Size(grid).numel() for grid in grids) == len(known):
        for grid in grids:
            count = torch.Size(grid).numel()
            yield ImageTokens(kind, tuple(known[:count]), grid[1:] if kind == "image" and grid[0] == 1 else grid)
            del known[:count]
        return
    side = _side(kind, len(known), config, inputs)
    for run in runs(places):
        if side and len(run) % (side * side) == 0:
            tiles = range(0, len(run), side * side)
            yield from (ImageTokens(kind, run[i : i + side * side], (side, side)) for i in tiles)
        else:
            yield ImageTokens(kind, run)


def _grids(kind: str, config: Any, inputs: _Inputs) -> Iterator[tuple[int, ...]]:
    """Frames, rows and columns of the tokens of each image, where the inputs tell them."""
    vision = getattr(config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None) or 1
    thw, sizes = inputs.get(f"{kind}_grid_thw"), inputs.get("image_sizes")
    if thw is not None:
        merges = torch.as_tensor(inputs.get(f"{kind}_merge_sizes", [merge] * len(thw))).tolist()
        for (t, h, w), times in zip(torch.as_tensor(thw).tolist(), merges, strict=False):
            yield t, h // times, w // times
    elif sizes is not None and kind == "image" and vision is not None and hasattr(vision, "patch_size"):
        step = vision.patch_size * merge
        for h, w in torch.as_tensor(sizes).tolist():
            yield 1, h // step, w // step


def _side(kind: str, count: int, config: Any, inputs: _Inputs) -> int:
    """Patches along the side of each square that ``count`` tokens are; 0 where they are none.

    There is one square for every set of pixels: an image, or a tile where the processor cuts images up.
    """
    pixels = inputs.get("pixel_values")
    if kind != "image" or config.model_type not in _SQUARE or not isinstance(pixels, Tensor) or pixels.dim() < 4:
        return 0
    tiles = pixels.shape[:-3].numel()
    side = isqrt(count // tiles)
    return side if side * side * tiles == count else 0
