"""Where a method gets its layers from: one small interface, filled by a Hugging Face model or by a host's adapter."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.images import ImageTokens

_ADAPTERS = {"transformer_lens": "flashtrace_lens"}
"""Host package -> adapter that reads its models. The host is never imported from here: who holds one of its
models has imported it already."""


class Source(Protocol):
    """Reads the layers of one model."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None if it carries none."""
        ...

    @property
    def language_model(self) -> Any:
        """The Hugging Face model that computes the logits, or None where no model is read."""
        ...

    def check_ids(self, input_ids: Tensor) -> Tensor:
        """The ids as [1, N] where the model wants them; raises InputError for ids it cannot take."""
        ...

    def layers(self, input_ids: Tensor, rows: Tensor) -> list[Layer]:
        """Records of all layers for ids [1, N]; ``rows`` [r] are the positions that may carry weight, increasing."""
        ...

    def layers_together(self, texts: Sequence[Tensor], rows: Sequence[Tensor]) -> list[list[Layer]]:
        """:meth:`layers` of several texts [n], with the same numbers; in one forward pass where that can be."""
        ...

    def given(self, input_ids: Tensor, prompt_length: int, inputs: Mapping[str, Any]) -> Source:
        """The source that gives its model more than the ids [1, N]: images and what belongs to them.

        Raises UnsupportedModelError where only ids can be read, InputError for inputs that do not fit.
        """
        ...

    def images(self, input_ids: Tensor) -> tuple[ImageTokens, ...]:
        """The images that it was given, as they stand among the ids [N]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What to note in the settings of a result: model, family, dtype, source."""
        ...

    def configs(self) -> list[Any]:
        """Configurations of the model that may name the tokens with which a text ends."""
        ...

    def whole_text(self) -> bool:
        """Whether the text after a position must be run, too, because it may change the numbers there."""
        ...

    def runner(self, input_ids: Tensor) -> Any:
        """The model as :mod:`flashtrace_plugin.models.derive.relevance` runs it on the ids [1, N]."""
        ...


class _HuggingFaceSource:
    """Streaming capture on views of the model; see :mod:`flashtrace_plugin.models.read.capture`."""

    tokenizer = None

    def __init__(self, model: Any, inputs: Mapping[str, Any] | None = None) -> None:
        from flashtrace_plugin.models.guard import check_model

        self.model = self.language_model = check_model(model)
        self.inputs = inputs or {}

    def check_ids(self, input_ids: Tensor) -> Tensor:
        from flashtrace_plugin.models.guard import check_ids

        return check_ids(self.model, input_ids)

    def layers(self, input_ids: Tensor, rows: Tensor) -> list[Layer]:
        from flashtrace_plugin.models.inputs import check_placeholders
        from flashtrace_plugin.models.read.capture import capture

        check_placeholders(self.model, input_ids, self.inputs)
        return capture(self.model, input_ids, rows, self.inputs)

    def given(self, input_ids: Tensor, prompt_length: int, inputs: Mapping[str, Any]) -> Source:
        from flashtrace_plugin.models.inputs import checked_inputs

        return _HuggingFaceSource(self.model, checked_inputs(self.model, input_ids, prompt_length, inputs))

    def images(self, input_ids: Tensor) -> tuple[ImageTokens, ...]:
        from flashtrace_plugin.models.inputs import find_images

        return find_images(self.model, input_ids, self.inputs) if self.inputs else ()

    def layers_together(self, texts: Sequence[Tensor], rows: Sequence[Tensor]) -> list[list[Layer]]:
        from flashtrace_plugin.models.read.capture import capture_together

        return capture_together(self.model, texts, rows)

    def describe(self) -> dict[str, Any]:
        from flashtrace_plugin.models.read.recurrence import kernels

        found = kernels(self.model)
        return {
            "model": self.model.config.name_or_path or type(self.model).__name__,
            "family": self.model.config.get_text_config().model_type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "source": "streaming",
        } | ({"recurrences": " ".join(found)} if found else {})

    def configs(self) -> list[Any]:
        return [self.model.config.get_text_config(), getattr(self.model, "generation_config", None)]

    def whole_text(self) -> bool:
        from flashtrace_plugin.models.user_hooks import whole_text

        return bool(self.inputs) or whole_text(self.model)  # an image is not to be cut off from its tokens

    def runner(self, input_ids: Tensor) -> Any:
        from flashtrace_plugin.models.derive.relevance import HuggingFace
        from flashtrace_plugin.models.inputs import check_placeholders

        check_placeholders(self.model, input_ids, self.inputs)

        return HuggingFace(self.model, self.inputs)


def source_for(model: Any) -> Source:
    """The source that reads this model. Raises UnsupportedModelError if there is none."""
    for cls in type(model).__mro__:
        adapter = _ADAPTERS.get(cls.__module__.partition(".")[0])
        if adapter is not None:
            return importlib.import_module(adapter).source(model)
    return _HuggingFaceSource(model)
