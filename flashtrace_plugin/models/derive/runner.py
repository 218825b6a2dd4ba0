"""A model as relevance propagation needs it: from embeddings to logits, with its parts named."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from flashtrace_plugin.models.read.layouts import transformer_blocks
from flashtrace_plugin.models.user_hooks import hooked, whole_text
from flashtrace_plugin.models.view import view_of


class Runner(Protocol):
    """A model as relevance needs it: from embeddings to logits, with its parts named.

    model:  whose parameters are constants: a view of the user's
    blocks: its blocks, to cut the forward pass at; they take the hidden states first and return them first
    table:  weight of the token embeddings
    head:   weight of the language-model head, if that is a linear map
    whole:  whether the text after a position may change the numbers there
    hooked: whether hooks that are not ours are on it, which may look at positions
    own_kernel: whether it computes attention with the kernel that its configuration names
    """

    name: str
    model: nn.Module
    blocks: Sequence[nn.Module]
    table: Tensor
    head: Tensor | None
    whole: bool
    hooked: bool
    own_kernel: bool

    def embed(self, ids: Tensor) -> Tensor:
        """ids: [1, N]; result: [1, N, d]"""
        ...

    def vectors(self, ids: Tensor) -> Tensor:
        """What the embedding module makes of single tokens, which no hook sees. ids: [n]; result: [n, d]"""
        ...

    def logits(self, embeddings: Tensor, keep: Tensor) -> Tensor:
        """embeddings: [1, N, d]; keep: [r] positions; result: [r, V]"""
        ...

    def plain(self, ids: Tensor, keep: Tensor) -> Tensor:
        """The model's own logits. ids: [1, N]; keep: [r] positions; result: [r, V]"""
        ...


class HuggingFace:
    """A causal language model of transformers as a :class:`Runner`."""

    own_kernel = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = view_of(model)
        self.name = type(model).__name__
        self.blocks: Sequence[nn.Module] = _blocks(self.model)
        self.table = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        self.head = head.weight if type(head) is nn.Linear else None
        self.whole, self.hooked = whole_text(model), hooked(model)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def vectors(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings().forward(ids)

    def logits(self, embeddings: Tensor, keep: Tensor) -> Tensor:
        return self._run(keep, inputs_embeds=embeddings)

    def plain(self, ids: Tensor, keep: Tensor) -> Tensor:
        return self._run(keep, input_ids=ids)

    def _run(self, keep: Tensor, **inputs: Tensor) -> Tensor:
        if self._keeps:
            return self.model(use_cache=False, logits_to_keep=keep, **inputs).logits[0]
        return self.model(use_cache=False, **inputs).logits[0, keep]


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The list of as many modules as the model has layers; that of the family's layout if there is no such list."""
    layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return list(module)
    return transformer_blocks(model)
