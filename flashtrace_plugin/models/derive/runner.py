"""A model as relevance propagation needs it: from embeddings to logits, with its parts named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from flashtrace_plugin.errors import UnsupportedModelError
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
    """A causal language model of transformers as a :class:`Runner`.

    inputs: what else it is given: images, which are then part of what :meth:`embed` makes of a text
    """

    own_kernel = True

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> None:
        self.model: Any = view_of(model)
        self.inputs = inputs or {}
        if inputs and getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None):
            raise UnsupportedModelError(
                f"{type(model).__name__} adds image features between its layers, where relevance would have to start "
                "as well as at the embeddings; use FlashTrace, IFR or RecursiveAttribution"
            )
        self.name = type(model).__name__
        self.blocks: Sequence[nn.Module] = _blocks(self.model)
        self.table = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        self.head = head.weight if type(head) is nn.Linear else None
        self.whole, self.hooked = bool(inputs) or whole_text(model), hooked(model)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def embed(self, ids: Tensor) -> Tensor:
        if not self.inputs:
            return self.model.get_input_embeddings()(ids)
        self._ids = ids
        seen: list[Tensor] = []
        with self._entering(seen.append):
            self.plain(ids, ids.new_zeros(1))
        if len(seen) != 1:
            raise UnsupportedModelError(
                f"{self.name} does not hand its text model embeddings in which images have their place, so relevance "
                "has no place to start from; use FlashTrace, IFR, RecursiveAttribution or ALTI"
            )
        return seen[0]

    def vectors(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings().forward(ids)

    def logits(self, embeddings: Tensor, keep: Tensor) -> Tensor:
        if not self.inputs:
            return self._run(keep, inputs_embeds=embeddings)
        # The model makes positions and masks of ids and images, so it gets these, and its text model the embeddings.
        with self._entering(lambda _: embeddings):
            return self.plain(self._ids, keep)

    @contextmanager
    def _entering(self, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """While active, ``change`` sees what enters the text model and may put something else in its place."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if kwargs.get("inputs_embeds") is None:
                return None
            new = change(kwargs["inputs_embeds"])
            return None if new is None else (args, kwargs | {"inputs_embeds": new})

        handle = self.model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def plain(self, ids: Tensor, keep: Tensor) -> Tensor:
        return self._run(keep, input_ids=ids, **self.inputs)

    def _run(self, keep: Tensor, **inputs: Any) -> Tensor:
        if self._keeps:
            return self.model(use_cache=False, logits_to_keep=keep, **inputs).logits[0]
        return self.model(use_cache=False, **inputs).logits[0, keep]


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The list of as many modules as the model has layers; that of the family's layout if there is no such list."""
    text = model.config.get_text_config()
    inside = model if text is model.config else model.get_decoder()  # a vision tower may have as many
    layers = text.num_hidden_layers
    for module in inside.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return list(module)
    return transformer_blocks(model)
