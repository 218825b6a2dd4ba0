"""Draws docs/images/patches.png: an image, and where a model that reads only its red square has read.

python -m tests.picture
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flashtrace_plugin import Attribution, FlashTrace, Span
from flashtrace_plugin.models.read.capture import capture
from tests.tiny import random_ids
from tests.vision import IMAGE, drawing, tiny_vision

PATH = Path(__file__).parent.parent / "docs" / "images" / "patches.png"


def entering(model, ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The stream [N, d] that enters the text model, images included."""
    with torch.no_grad():
        return capture(model, ids[None], torch.arange(len(ids)), inputs)[0].resid_pre


def let_read(model, ids: Tensor, inputs: dict[str, Tensor], positions: list[int]) -> None:
    """Makes the values of a model of one layer 0 everywhere but at the positions."""
    block = model.model.language_model.layers[0]
    wish = torch.zeros(len(ids), 1, dtype=torch.float64).index_fill(0, torch.tensor(positions), 1.0)
    with torch.no_grad():
        normed = block.input_layernorm(entering(model, ids, inputs)).double()
        direction = torch.linalg.lstsq(normed, wish).solution[:, 0].float()
        block.self_attn.v_proj.weight.copy_(torch.ones(len(block.self_attn.v_proj.weight), 1) * direction)


def of_square(side: int = 4) -> tuple[Attribution, Image.Image]:
    """What a model that reads only the patches of a red square has read of the picture, and the picture."""
    size, square = 7 * side, slice(2, 4)
    picture = drawing(size, size, at=(14, 14))
    model = tiny_vision("llava", num_hidden_layers=1, hidden_size=128)
    text = random_ids(9)
    ids = torch.cat([text[:2], torch.full((side * side,), IMAGE), text[2:]])
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3)
    inputs = {"pixel_values": pixels.permute(2, 0, 1)[None] / 127.5 - 1}
    red = [2 + row * side + column for row in range(side)[square] for column in range(side)[square]]
    let_read(model, ids, inputs, red)
    options = {"prompt_length": 4 + side * side, "target": Span(len(ids) - 1, len(ids)), "inputs": inputs}
    return FlashTrace(model, hops=0).attribute_ids(ids, **options), picture


def main() -> None:
    found, picture = of_square()
    large = picture.resize((224, 224), Image.Resampling.NEAREST)
    both = Image.new("RGB", (464, 224), "white")
    both.paste(large, (0, 0))
    both.paste(found.overlay(large), (240, 0))
    both.save(PATH)
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
