"""How much memory a run takes, estimated before it and read after it."""

from __future__ import annotations

import sys

import torch
from transformers import PreTrainedModel


def forward_bytes(model: PreTrainedModel, length: int, rows: int) -> int:
    """Working memory of one sequence in a forward pass without gradients, weights not counted.

    length: positions that keys are kept for
    rows:   positions that logits are computed for
    """
    shape = _Shape(model)
    one_block = length * (8 * shape.width + 3 * shape.mlp_width) + 3 * _patterns(model) * shape.heads * length**2
    return 4 * (one_block + 4 * rows * shape.vocabulary)


def graph_bytes(model: PreTrainedModel, length: int) -> int:
    """Memory of a gradient's graph, kept for second derivatives: three patterns and the activations of every layer."""
    shape = _Shape(model)
    return 4 * shape.layers * (length * (9 * shape.mlp_width + 9 * shape.width) + 3 * shape.heads * length**2)


def product_bytes(model: PreTrainedModel, length: int, rows: int) -> int:
    """Working memory of one Hessian-vector product, the graph it shares with others not counted.

    Between the two halves of the backward pass every layer holds one pattern and a few activations per vector.
    """
    shape = _Shape(model)
    one_block = length * (8 * shape.width + 4 * shape.mlp_width) + shape.heads * length**2
    return 4 * (shape.layers * one_block + 12 * shape.heads * length**2 + 6 * rows * shape.vocabulary)


class _Shape:
    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.width, self.vocabulary = config.hidden_size, config.vocab_size
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        self.mlp_width = inner or 4 * self.width


def _patterns(model: PreTrainedModel) -> bool:
    """Whether attention writes whole patterns to memory."""
    return model.config.get_text_config()._attn_implementation in (None, "eager")


def peak_memory(device: torch.device) -> int | None:
    """Most bytes ever in use: allocated on the accelerator, or resident in this process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
