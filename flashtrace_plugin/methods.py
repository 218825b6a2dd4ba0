"""The methods users call: FlashTrace, IFR and the exhaustive token-level recursion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.core.hop import Hop, closure_tolerance, one_hop, row_hops
from flashtrace_plugin.core.layer import Layer
from flashtrace_plugin.core.recursion import Recursion, recurse
from flashtrace_plugin.errors import ClosureError, InputError
from flashtrace_plugin.models.source import source_for
from flashtrace_plugin.spans import Span, check_spans
from flashtrace_plugin.text import Prompt, TokenizedText, from_ids, tokenize

POSITIONS = {"token": 0, "predicting": 1}
RECURSIONS = ("reasoning", "generation")


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
        target: Span | str | None = None,
        reasoning: Span | str | None = None,
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
        self, input_ids: Tensor, *, prompt_length: int, target: Span, reasoning: Span | None = None
    ) -> Attribution:
        """Attributes a generated sequence of token ids.

        input_ids:     [N] or [1, N], prompt and generation
        prompt_length: number of prompt tokens
        target:        positions to explain
        reasoning:     positions to follow importance through
        """
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
        targets: Sequence[Span | str | None] | None = None,
        reasonings: Sequence[Span | str | None] | None = None,
        progress: bool = False,
    ) -> list[Attribution]:
        """Attributes several texts, one after the other, with the numbers of :meth:`attribute`.

        Sequences are not padded into one tensor: a sequence long enough to be worth explaining fills the device
        by itself, and padding would change what some families compute.
        """
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
        return Recorded(layers, rows, task.length)


@dataclass(frozen=True)
class Recorded:
    """Layers of one sequence, with the positions [r] that may carry weight."""

    layers: list[Layer]
    rows: Tensor
    length: int

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
                f"the parts of layer {hop.worst_layer} do not add up to its residual stream: relative gap "
                f"{hop.closure_error:.1e}, bound {bound:.0e}. The model's block is not what its family's layout says, "
                "so any attribution of it would be wrong"
            )
        return hop


class FlashTrace(LayerMethod):
    """Span-wise, recursive attribution (arXiv 2602.01914): one forward pass, one pass per hop, any span length.

    hops:      how many times importance is followed through the reasoning (K; the paper's default is 1)
    recursion: "reasoning" follows the mass on the reasoning, as in the paper; "generation" that on reasoning and
               target, as the authors' facade does
    positions: "token", a token's own position stands for it, as in the paper; "predicting", the position to the
               left, whose logits produced it
    ignore:    tokens left out of targets and scores, as ids or as the text of a token without surrounding space
    """

    name = "flashtrace"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        hops: int = 1,
        recursion: str = "reasoning",
        positions: str = "token",
        ignore: Iterable[str | int] = (),
    ) -> None:
        super().__init__(model, tokenizer)
        self.hops = checked_hops(hops)
        self.recursion = one_of("recursion", recursion, RECURSIONS)
        self.positions = one_of("positions", positions, POSITIONS)
        self.ignore = tuple(ignore)

    def settings(self) -> dict[str, Any]:
        return {
            "hops": self.hops,
            "recursion": self.recursion,
            "positions": self.positions,
            "ignore": list(self.ignore),
        }

    def _run(self, task: Task) -> dict[str, Any]:
        shift = POSITIONS[self.positions]
        kept = ~self._ignored(task)
        target = task.mask(task.target) & kept
        if not bool(target.any()):
            raise InputError(f"all tokens of target {task.target} are ignored; ignore fewer, or choose another target")
        through = task.mask(task.reasoning, task.target if self.recursion == "generation" else None) & kept
        rows = (target | through).nonzero()[:, 0] - shift
        recorded = self._record(task, rows)
        hops: list[Hop] = []

        def step(weights: Tensor) -> Tensor:
            hops.append(recorded.hop(weights))
            return hops[-1].alpha[0] * kept

        initial = torch.zeros(task.length)
        initial[target.nonzero()[:, 0] - shift] = 1.0
        found = recurse(step, initial, through, self.hops if bool(through.any()) else 0, shift)
        return _numbers(task, found, hops, self.hops)

    def _ignored(self, task: Task) -> Tensor:
        ids = task.input_ids[0].cpu()
        chosen = torch.tensor([i for i in self.ignore if isinstance(i, int)], dtype=torch.long)
        ignored = torch.isin(ids, chosen)
        words = {word for word in self.ignore if isinstance(word, str)}
        if words:
            texts = self._need_tokenizer().batch_decode([[i] for i in ids.tolist()])
            ignored |= torch.tensor([text.strip() in words for text in texts])
        return ignored


class IFR(LayerMethod):
    """Information flow routes, token by token (Ferrando & Voita 2024; Eq. 30/31): FlashTrace's baseline.

    Every target token is attributed by itself and the results are averaged, at M times the cost. The columns are
    kept in ``components["per_token"]`` [M, N].
    """

    name = "ifr"

    def _run(self, task: Task) -> dict[str, Any]:
        positions = torch.arange(task.target.start, task.target.stop)
        hop = self._record(task, positions).each(positions)
        mean = hop.alpha.mean(0)
        prompt = mean[: task.prompt_length]
        total = prompt.sum()
        return {
            "scores": prompt / total if total > 0 else prompt,
            "hop_scores": mean[None],
            "reasoning_mass": _share(mean, task.mask(task.reasoning))[None],
            "head_scores": hop.head_shares.mean(0)[None],
            "residual_shares": hop.residual_shares.mean(0)[None],
            "mlp_shares": hop.mlp_shares.mean(0)[None],
            "components": {"per_token": hop.alpha},
            "closure_error": hop.closure_error,
        }


class RecursiveAttribution(LayerMethod):
    """The exhaustive token-level recursion (FlashTrace, App. D.3): every token of reasoning and target by itself.

    Its matrix of one row per token is exact where FlashTrace aggregates, and costs |reasoning| + |target| times more.
    """

    name = "recursive"

    def __init__(self, model: Any, tokenizer: Any = None, *, hops: int = 1) -> None:
        super().__init__(model, tokenizer)
        self.hops = checked_hops(hops)

    def settings(self) -> dict[str, Any]:
        return {"hops": self.hops}

    def _run(self, task: Task) -> dict[str, Any]:
        rows = task.mask(task.reasoning, task.target).nonzero()[:, 0]
        each = self._record(task, rows).each(rows)
        total = each.alpha.sum(1, keepdim=True)
        matrix = each.alpha / torch.where(total > 0, total, 1.0)
        hops: list[Hop] = []

        def step(weights: Tensor) -> Tensor:
            # Normalised, because rho already carries how much mass is passed on (Eq. 12).
            w = weights[rows] / weights[rows].sum()
            hops.append(_mixture(each, w))
            return w @ matrix

        initial = task.mask(task.target).float()
        found = recurse(step, initial, task.mask(task.reasoning), self.hops if task.reasoning else 0)
        return _numbers(task, found, hops, self.hops)


def _mixture(each: Hop, w: Tensor) -> Hop:
    """Shares of a weighted mean of rows; w: [B], sum 1."""
    return Hop(
        alpha=(w @ each.alpha)[None],
        head_shares=torch.einsum("b,blh->lh", w, each.head_shares)[None],
        residual_shares=(w @ each.residual_shares)[None],
        mlp_shares=(w @ each.mlp_shares)[None],
        closure_error=each.closure_error,
        worst_layer=each.worst_layer,
    )


def _numbers(task: Task, found: Recursion, hops: Sequence[Hop], asked: int) -> dict[str, Any]:
    """Fields of an Attribution; hops that had no mass to follow stay zero."""

    def padded(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(asked + 1 - len(values), *values.shape[1:])])

    return {
        "scores": found.scores[: task.prompt_length].clone(),
        "hop_scores": padded(found.hop_scores),
        "reasoning_mass": padded(found.reasoning_mass),
        "head_scores": padded(torch.cat([h.head_shares for h in hops])),
        "residual_shares": padded(torch.cat([h.residual_shares for h in hops])),
        "mlp_shares": padded(torch.cat([h.mlp_shares for h in hops])),
        "closure_error": max(h.closure_error for h in hops),
    }


def _share(alpha: Tensor, inside: Tensor) -> Tensor:
    total = alpha.sum()
    return (alpha * inside).sum() / total if total > 0 else total


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


class _Methods(Mapping[str, type[Method]]):
    """Looks classes up by name and imports their module when they are asked for."""

    _homes: ClassVar[dict[str, tuple[str, str]]] = {
        "flashtrace": (__name__, "FlashTrace"),
        "ifr": (__name__, "IFR"),
        "recursive": (__name__, "RecursiveAttribution"),
        "heta": ("flashtrace_plugin.heta", "HETA"),
    }

    def __getitem__(self, name: str) -> type[Method]:
        module, cls = self._homes[name]
        return getattr(import_module(module), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


METHODS: Mapping[str, type[Method]] = _Methods()
"""Methods by name, as hosts and the command line choose them."""
