"""The methods users call: FlashTrace, IFR and the exhaustive token-level recursion; and all methods by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.hop import Hop
from flashtrace_plugin.core.recursion import Recursion, recurse
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.base import LayerMethod, Method, Task, checked_hops, one_of

POSITIONS = {"token": 0, "predicting": 1}
RECURSIONS = ("reasoning", "generation")


class FlashTrace(LayerMethod):
    """Span-wise, recursive attribution (arXiv 2602.01914): one forward pass, one pass per hop, any span length.

    hops:      how many times importance is followed through the reasoning (K; the paper's default is 1)
    recursion: "reasoning" follows the mass on the reasoning, as in the paper; "generation" that on reasoning and
               target, as the authors' facade does
    positions: "token", a token's own position stands for it, as in the paper; "predicting", the position to the
               left, whose logits produced it
    ignore:    tokens left out of targets and scores, as ids or as a token's text, with or without space around
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
        self.ignore = checked_ignore(ignore)

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
            ignored |= torch.tensor([text in words or text.strip() in words for text in texts])
        return ignored


def checked_ignore(ignore: Iterable[str | int]) -> tuple[str | int, ...]:
    """Raises InputError unless it is a collection of texts and ids."""
    tokens = () if isinstance(ignore, str) or not isinstance(ignore, Iterable) else tuple(ignore)
    if (not tokens and ignore) or not all(isinstance(t, (str, int)) for t in tokens):
        raise InputError(
            f"ignore must be a list of tokens, as texts or ids, got {ignore!r}; for one token use [token]"
        )
    return tokens


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


class _Methods(Mapping[str, type[Method]]):
    """Looks classes up by name and imports their module when they are asked for."""

    _homes: ClassVar[dict[str, tuple[str, str]]] = {
        "flashtrace": (__name__, "FlashTrace"),
        "ifr": (__name__, "IFR"),
        "recursive": (__name__, "RecursiveAttribution"),
        "heta": ("flashtrace_plugin.methods.heta", "HETA"),
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
