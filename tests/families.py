"""Writes docs/families.md: what the tests of the families measure, and what is refused.

    python -m tests.families

Measuring takes a few minutes; all else on the page is cheap, so a test compares it with the page as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from flashtrace_plugin import HETA, LRP, FlashTrace, Span
from flashtrace_plugin.errors import FlashTraceError
from flashtrace_plugin.models.read.layouts import REASONS, Layout, layout_for
from tests.tiny import FAMILIES, config_of, random_ids, tiny
from tests.vision import CLASSES, IMAGES, LARGE, PREFIX, TYPES, UNREAD, tiny_vision, with_images
from tests.vision import config_of as vision_config_of

PAGE = Path(__file__).parent.parent / "docs" / "families.md"

INTRODUCTION = """# Model families

Written by `python -m tests.families` from the checks in `tests/test_families.py`; do not edit by hand.

Every row is a random model of three layers in float32, all of whose parameters are drawn away from their defaults
(norm gains from 1, biases and sinks from 0, multipliers from 1), over 24 tokens with windows of 8.

- **closure**: how far the parts of attention (residual stream, every source through every head, bias) are from the
  whole, relative to what attention writes. It is measured on every call; above 1e-4 (float32) the model is refused.
- **logits**: the largest difference to the untouched model's logits, relative to the largest; checked once per model.
- **scores**: the largest difference of three hops of FlashTrace to the slow reference in `tests/reference`, which
  reads the model a second time, through eager attention and its projections, relative to the largest score.
- **sources**: `streaming` is plain hooks on the untouched Hugging Face model; `hook points` is a `TransformerBridge`.

What follows a colon names a second layout of the same family. Multimodal models in this table are run on token ids
alone, as text.

Layers without softmax attention (linear attention, state space models, convolutions) have coefficients in the place of
a pattern; the reference forms them from the recurrence's formula ([hybrids.md](hybrids.md)).

FlashTrace, IFR and RecursiveAttribution read every row. LRP conserves relevance in every row but those that are
refused below (`tests/test_relevance_core.py`), and HETA runs wherever a model is a function of its embeddings.
[loading.md](loading.md) says what a model may be loaded with; [adding-a-family.md](adding-a-family.md) how to add one.

"""

VISION = """
## Vision-language models

The types of transformers' mapping for images and text, built and checked in the same way (`tests/test_vision.py`), on
text alone and with two images, or one that is cut into tiles. Their blocks have the layout of their text model and are
found where that keeps them, so a type needs no line of its own. The last column is the grids of the images that are
tested, [images.md](images.md) says what they are. got_ocr2 and what is built like it run in float64 with images, since
their random vision towers make features so large that all else drowns in rounding.

"""

OTHERS = """
Any model type that is not in the table is refused by name. So are encoder-decoders, models without a language-model
head, and sequences that begin with padding; Gemma 4's assistants because they read another model's keys and values.
"""

_NO_SOFTMAX = "has no softmax attention|mixes tokens by something else beside its attention"
_UNKNOWN, _NO_VALUES = "Unsupported architecture", "no hook point blocks.1.attn.hook_v"
NOT_BOOTED = {
    "aria_text": _UNKNOWN,
    "bailing_hybrid": _UNKNOWN,
    "bamba": _NO_SOFTMAX,
    "cohere2_moe": _UNKNOWN,
    "cwm": _UNKNOWN,
    "dots1": _UNKNOWN,
    "exaone_moe": _UNKNOWN,
    "falcon:40b": "split_with_sizes",
    "falcon_h1": _NO_SOFTMAX,
    "falcon_h1:norm": _NO_SOFTMAX,
    "falcon_mamba": _NO_SOFTMAX,
    "flint": _UNKNOWN,
    "fuyu": _UNKNOWN,
    "gemma4": _NO_VALUES,
    "gemma4_text": _NO_VALUES,
    "gemma4_text:shared": _NO_VALUES,
    "gemma4_unified": _NO_VALUES,
    "gemma4_unified_text": _UNKNOWN,
    "gpt_bigcode:multi_head": "only supports multi_query=True",
    "granite_swa": _UNKNOWN,
    "granitemoe_swa": _UNKNOWN,
    "granitemoe_swa:routed": _UNKNOWN,
    "granitemoehybrid": "Original component not set for model.rotary_emb",
    "granitemoehybrid:dense": "Original component not set for model.rotary_emb",
    "granitemoeshared": _UNKNOWN,
    "helium": _UNKNOWN,
    "hunyuan_v1_moe": _UNKNOWN,
    "hy_v3": _UNKNOWN,
    "jamba": _NO_SOFTMAX,
    "kimi_linear": _UNKNOWN,
    "kolibri1": _UNKNOWN,
    "lfm2": _NO_SOFTMAX,
    "lfm2_moe": _NO_SOFTMAX,
    "lfm3": _UNKNOWN,
    "lfm3:plain": _UNKNOWN,
    "mamba": _NO_SOFTMAX,
    "mamba2": _NO_SOFTMAX,
    "mellum": _UNKNOWN,
    "mimo_v2_flash": _UNKNOWN,
    "minimax_m3_vl_text": _UNKNOWN,
    "ministral": _UNKNOWN,
    "moshi": _UNKNOWN,
    "nemotron_h": _NO_SOFTMAX,
    "olmo_hybrid": _NO_SOFTMAX,
    "persimmon": _UNKNOWN,
    "phi4_multimodal": _UNKNOWN,
    "qwen3_5_moe_text:hybrid": _NO_SOFTMAX,
    "qwen3_5_text:hybrid": _NO_SOFTMAX,
    "qwen3_next:hybrid": _NO_SOFTMAX,
    "solar_open": _UNKNOWN,
}
"""Families that TransformerLens 4.3 does not boot, or without what is needed, and the reason."""

SPARSE = {"layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"], "index_n_heads": 2}
NO_LRP = ("gemma4_text", "gemma4_text:shared")
"""Families that LRP refuses."""
REFUSED = {
    "lfm2 with a bias in its convolution": ("lfm2", {"conv_bias": True}, FlashTrace),
    "opt with do_layer_norm_before=False": ("opt", {"do_layer_norm_before": False}, FlashTrace),
    "bloom with its residual after the norm": (
        "bloom",
        {"apply_residual_connection_post_layernorm": True},
        FlashTrace,
    ),
    "minimax_m3_vl_text with sparse attention": ("minimax_m3_vl_text", SPARSE, FlashTrace),
    **{f"{family}, by LRP": (family, {}, LRP) for family in NO_LRP},
    "gemma4_text with embeddings in every layer, by HETA": ("gemma4_text", {}, HETA),
}


def page(numbers: Callable[[str], tuple[str, str, str]]) -> str:
    """The page. numbers: closure, logits and scores of a family, as they are shown"""
    return INTRODUCTION + _table(numbers) + VISION + _vision(numbers) + "\n## Refused\n\n" + _refused() + OTHERS


def measured(family: str) -> tuple[str, str, str]:
    """What the test of a family measures."""
    from tests.test_families import check
    from tests.tiny import random_ids

    kind, _, how = family.partition(" ")
    if how == "with images":
        model = tiny_vision(kind, dtype=torch.float64 if kind in LARGE else torch.float32)
        found = check(model, *with_images(kind, model, random_ids(24)))
    else:
        found = check(tiny_vision(kind) if how else tiny(family))
    return f"{found.closure:.0e}", f"{found.logits:.1g}", f"{found.scores:.0e}"


def noted(text: str) -> Callable[[str], tuple[str, str, str]]:
    """What a page says was measured; "?" for a family that is not there."""
    found = dict(
        re.findall(r"^\| (\S+(?: as text| with images)?) \| [^|]+ \| (\S+ \| \S+ \| \S+) \|", text, re.MULTILINE)
    )

    def numbers(family: str) -> tuple[str, str, str]:
        closure, logits, scores = found.get(family, "? | ? | ?").split(" | ")
        return closure, logits, scores

    return numbers


def _table(numbers: Callable[[str], tuple[str, str, str]]) -> str:
    lines = ["| family | sources | closure | logits | scores | block |", "|---|---|---|---|---|---|"]
    for family in FAMILIES:
        cells = family, _sources(family), *numbers(family), _block(layout_for(config_of(family)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _vision(numbers: Callable[[str], tuple[str, str, str]]) -> str:
    """A row for every type that is read, twice where it is with images, and one for each that is not."""
    lines = ["| type | text model | closure | logits | scores | images |", "|---|---|---|---|---|---|"]
    for kind in TYPES:
        text = vision_config_of(kind).get_text_config().model_type
        for how in [*(["as text"] if kind not in PREFIX else []), *(["with images"] if kind in IMAGES else [])]:
            cells = f"{kind} {how}", text, *numbers(f"{kind} {how}"), _images(kind) if how == "with images" else ""
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Of transformers' other types for images and text:",
        "",
        "| type | why it is not read |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {kind} | {_why(kind)} |" for kind in CLASSES if kind not in TYPES)]) + "\n"


def _images(kind: str) -> str:
    """How the images' tokens are known."""
    grids = [" x ".join(map(str, grid)) for grid in IMAGES[kind].grids]
    return ", ".join(grids) if all(grids) else "positions, no grid"


def _why(kind: str) -> str:
    if kind in UNREAD:
        return UNREAD[kind]
    config = getattr(transformers, CLASSES[kind]).config_class() if kind != "gemma3n" else None
    kinds = ["gemma3n_text"] if config is None else [config.model_type, config.get_text_config().model_type]
    return next(REASONS[name] for name in kinds if name in REASONS)


def _sources(family: str) -> str:
    return "streaming" if family in NOT_BOOTED else "streaming, hook points"


def _block(layout: Layout) -> str:
    """The layout in words."""
    parts = ["mixer or MLP alone" if not layout.mlp else "parallel" if layout.mid is None else "sequential"]
    parts += ["norm after attention"] if layout.post_norm else []
    parts += ["residual multiplier"] if layout.multiplier else []
    parts += ["stream scaled at its end"] if layout.out_scale else []
    parts += ["gated heads"] if layout.gate else []
    kinds = {repr(one.reader).partition(".")[2]: one for one in (layout, *layout.others, *layout.mixers) if one.reader}
    parts += [_RECURRENCES[kind] for kind in kinds if kind in _RECURRENCES]
    parts += ["attention of its own"] if not kinds.keys() <= _RECURRENCES.keys() else []
    return ", ".join(parts)


_RECURRENCES = {
    "DELTA_RULE": "delta rule",
    "MAMBA2": "Mamba-2",
    "MAMBA": "Mamba-1",
    "CONVOLUTION": "short convolution",
}


def _refused() -> str:
    lines = ["| model | message |", "|---|---|"]
    for name, (family, settings, method) in REFUSED.items():
        lines.append(f"| {name} | {_message(family, settings, method)} |")
    return "\n".join(lines) + "\n"


def _message(family: str, settings: dict, method: type) -> str:
    try:
        method(tiny(family, **settings)).attribute_ids(random_ids(24), prompt_length=10, target=Span(19, 24))
    except FlashTraceError as error:
        return str(error)
    raise SystemExit(f"{family} with {settings} is not refused any more; remove it from the list")


def main() -> None:
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page(measured), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
