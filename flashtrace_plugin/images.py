"""Images among the tokens of a text: where their tokens stand, the grid of patches they are, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.spans import Span

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageTokens:
    """An image, a tile of one, or a video: a run of positions in the prompt that hold what a vision tower made of it.

    kind:      "image" or "video"
    positions: of its tokens, in the order of its patches; breaks between rows, which hold no patch, are left out
    grid:      (rows, columns) of patches, (frames, rows, columns) of a video; () where tokens are no patches in
               reading order, as behind a resampler
    """

    kind: str
    positions: tuple[int, ...]
    grid: tuple[int, ...] = ()

    @property
    def span(self) -> Span:
        """From its first token to its last."""
        return Span(self.positions[0], self.positions[-1] + 1)

    def __len__(self) -> int:
        return len(self.positions)

    def patches(self, scores: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """The scores [N] of its patches as a picture, [rows, columns] or [frames, rows, columns].

        grid: in place of one that is not known. Raises InputError for a grid of another number of patches.
        """
        chosen = tuple(grid or self.grid)
        if not chosen:
            raise InputError(
                f"how the {len(self)} tokens of this {self.kind} stand for places in it is not known for this model; "
                "pass grid=(rows, columns) if they are patches in reading order"
            )
        if torch.Size(chosen).numel() != len(self):
            raise InputError(f"a grid {list(chosen)} has not the {len(self)} tokens of this {self.kind}")
        return scores[list(self.positions)].view(chosen)


def runs(places: Sequence[bool]) -> Iterator[tuple[int, ...]]:
    """Positions of each run of places that are taken."""
    for taken, run in groupby(range(len(places)), key=places.__getitem__):
        if taken:
            yield tuple(run)


def overlay(patches: Tensor, image: Image, *, strength: float = 0.75) -> Image:
    """The image with a warm veil over the patches that matter, as strong as their scores.

    patches:  [rows, columns] scores >= 0 over the whole of the image, as the processor cut it
    image:    a PIL image
    strength: of the veil over the highest score, 0 to 1

    Raises InputError for what is no grid, and ImportError without Pillow.
    """
    from PIL import Image as Pillow

    if patches.dim() != 2:
        raise InputError(f"patches must be [rows, columns], got {list(patches.shape)}; choose one frame of a video")
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, got {strength!r}")
    share = patches.float().clamp_min(0)
    share = share / share.max() if share.max() > 0 else share
    alpha = Pillow.fromarray((share * strength * 255).round().to(torch.uint8).numpy())
    veil = Pillow.new("RGB", image.size, _WARM)
    grey = image.convert("L").convert("RGB")  # so that the image's own colours are not taken for scores
    return Pillow.composite(veil, grey, alpha.resize(image.size, Pillow.Resampling.NEAREST))


_WARM = (214, 69, 38)
