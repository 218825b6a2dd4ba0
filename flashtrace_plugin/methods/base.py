"""What every method shares: texts or ids in, checked spans, an :class:`Attribution` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.core.flow.hop import Hop, closure_tolerance, one_hop, row_hops
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.errors import ClosureError, InputError
from flashtrace_plugin.models.read.source import source_for
from flashtrace_plugin.spans import Span, SpanLike, as_span, check_spans
from flashtrace_plugin.text import Prompt, TokenizedText, from_ids, tokenize


@dataclass(frozen=True)
class Task:
    """One sequence with its spans, checked. ``input_ids`` is [1, N] on the model's device."""

    input_ids: Tensor
    prompt_length: int
    target: Span
    reasoning: Span | None

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def mask(self, *spans: Span | None) -> Tensor:
        """The positions of some spans. result: [N] bool"""
        inside = torch.zeros(self.length, dtype=torch.bool)
        for span in spans:
            if span is not None:
                inside[span.slice] = True
        return inside


class Method(ABC):
    """What all methods share: texts and ids in, an :class:`Attribution` out.

    model:     a Hugging Face causal language model, or a TransformerBridge of TransformerLens
    tokenizer: the model's tokenizer; only texts need it
    """

    name: ClassVar[str]

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.source = source_for(model)
        self.tokenizer = tokenizer if tokenizer is not None else self.source.tokenizer

    def attribute(
        self,
        prompt: Prompt,
        generation: str,
        *,
        target: SpanLike | str | None = None,
        reasoning: SpanLike | str | None = None,
    ) -> Attribution:
        """Attributes a generated text to its prompt.

        prompt:     a text, or chat messages that go through the tokenizer's template
        generation: what the model wrote after it, thinking included
        target:     what to explain: a piece of the generation, or a Span of token positions. By default the answer:
                    what follows ``</think>``, narrowed by ``<answer>`` or ``\\boxed{}``; see
                    :func:`flashtrace_plugin.spans.find_parts`
        reasoning:  what to follow importance through; by default the thinking before the target

        Raises SpanError or InputError for spans and texts that do not fit, UnsupportedModelError and ClosureError
        for a model that cannot be decomposed. The model is left as it was found.
        """
        text = tokenize(self._need_tokenizer(), prompt, generation)
        where, through = text.locate(target, reasoning)
        return self._attribute(text, where, through)

    def attribute_ids(
        self, input_ids: Tensor, *, prompt_length: int, target: SpanLike, reasoning: SpanLike | None = None
    ) -> Attribution:
        """Attributes a generated sequence of token ids.

        input_ids:     [N] or [1, N], prompt and generation
        prompt_length: number of prompt tokens
        target:        positions to explain, a Span or (start, stop)
        reasoning:     positions to follow importance through
        """
        if not isinstance(prompt_length, int):
            raise InputError(f"prompt_length must be a whole number of tokens, got {prompt_length!r}")
        target = as_span("target", target)
        reasoning = None if reasoning is None else as_span("reasoning", reasoning)
        ids = self.source.check_ids(torch.as_tensor(input_ids))[0].cpu()
        if self.tokenizer is None:
            labels = tuple(f"<{i}>" for i in ids.tolist())
            return self._attribute(TokenizedText(ids, prompt_length, labels, "", ()), target, reasoning)
        return self._attribute(from_ids(self.tokenizer, ids, prompt_length), target, reasoning)

    def attribute_batch(
        self,
        prompts: Sequence[Prompt],
        generations: Sequence[str],
        *,
        targets: Sequence[SpanLike | str | None] | None = None,
        reasonings: Sequence[SpanLike | str | None] | None = None,
        progress: bool = False,
    ) -> list[Attribution]:
        """Attributes several texts, one after the other, with the numbers of :meth:`attribute`.

        Sequences are not padded into one tensor: a sequence long enough to be worth explaining fills the device
        by itself, and padding would change what some families compute.
        """
        if isinstance(prompts, str) or isinstance(generations, str):
            raise InputError("attribute_batch takes lists of texts; pass one text to attribute")
        n = len(prompts)
        columns = [prompts, generations, targets or [None] * n, reasonings or [None] * n]
        if len({len(column) for column in columns}) != 1:
            raise InputError(
                f"prompts, generations, targets and reasonings must be equally long, got {[len(c) for c in columns]}"
            )
        rows: Iterable[tuple[Any, ...]] = zip(*columns, strict=True)
        if progress:
            from tqdm.auto import tqdm

            rows = tqdm(rows, total=n, desc=self.name)
        return [self.attribute(p, g, target=t, reasoning=r) for p, g, t, r in rows]

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("texts need a tokenizer: pass one as the second argument, or use attribute_ids")
        return self.tokenizer

    def _attribute(self, text: TokenizedText, target: Span, reasoning: Span | None) -> Attribution:
        check_spans(len(text.input_ids), text.prompt_length, target, reasoning)
        task = Task(self.source.check_ids(text.input_ids), text.prompt_length, target, reasoning)
        numbers = self._run(task)
        # Options first, then what is known only after the run.
        settings = self.settings() | self.source.describe() | numbers.pop("settings", {})
        return Attribution(
            tokens=text.tokens,
            token_ids=tuple(text.input_ids.tolist()),
            prompt=Span(0, text.prompt_length),
            reasoning=reasoning,
            target=target,
            method=self.name,
            settings=settings,
            **numbers,
        )

    def settings(self) -> dict[str, Any]:
        """The options of this method, for the record."""
        return {}

    @abstractmethod
    def _run(self, task: Task) -> dict[str, Any]:
        """The numbers of an :class:`Attribution`: its tensors, ``closure_error`` and ``components``; and, under
        ``settings``, what to add to the options."""


class LayerMethod(Method):
    """A method that works on recorded layers, one forward pass for all of them."""

    def _record(self, task: Task, rows: Tensor) -> Recorded:
        """Layers of the sequence up to the last row; what comes after cannot matter, so it is not run."""
        layers = self.source.layers(task.input_ids[:, : int(rows[-1]) + 1], rows)
        return Recorded(layers, rows, task.length, self.source.describe().get("family", "this model"))


@dataclass(frozen=True)
class Recorded:
    """Layers of one sequence, with the positions [r] that may carry weight; the family is named in errors."""

    layers: list[Layer]
    rows: Tensor
    length: int
    family: str

    def hop(self, weights: Tensor) -> Hop:
        """One hop from weights [N] over all positions."""
        return self.checked(one_hop(self.layers, weights[self.rows], self.length))

    def each(self, positions: Tensor) -> Hop:
        """One hop from every given position [B] by itself."""
        return self.checked(row_hops(self.layers, torch.searchsorted(self.rows, positions), self.length))

    def checked(self, hop: Hop) -> Hop:
        """The hop, if the parts of every layer add up to the whole. Raises ClosureError with the size of the gap."""
        bound = closure_tolerance(self.layers[0].resid_mid.dtype)
        if not hop.closure_error <= bound:
            raise ClosureError(
                f"{self.family}, layer {hop.worst_layer}: attention's parts do not add up to the residual stream "
                f"(relative gap {hop.closure_error:.1e}, bound {bound:.0e}). The block is not what its family's "
                "layout says, so any attribution of it would be wrong"
            )
        return hop


def checked_hops(hops: int) -> int:
    """Raises InputError unless ``hops`` is a whole number >= 0."""
    if not isinstance(hops, int) or isinstance(hops, bool) or hops < 0:
        raise InputError(f"hops must be a whole number >= 0, got {hops!r}; 0 explains the target without recursion")
    return hops


def one_of(name: str, value: str, known: Iterable[str]) -> str:
    """Raises InputError unless ``value`` is one of the known ones."""
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value
