"""The three terms of HETA for one weighted set of target tokens, read from a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flashtrace_plugin.core.batches import Batches, out_of_memory
from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.hessian.curvature import (
    OVERSAMPLING,
    block_curvature,
    gradient_squared,
    low_rank_curvature,
    rademacher,
)
from flashtrace_plugin.core.hessian.derivatives import SECOND_DERIVATIVE_TOLERANCE, second_derivative_gap
from flashtrace_plugin.core.hessian.gate import flow_mass, normalised, per_head_mass
from flashtrace_plugin.core.hessian.information import information
from flashtrace_plugin.core.hessian.windows import Window, window_mean
from flashtrace_plugin.errors import InputError, UnsupportedModelError
from flashtrace_plugin.models.derive.blockwise import applies
from flashtrace_plugin.models.derive.memory import forward_bytes, graph_bytes, product_bytes
from flashtrace_plugin.models.derive.runner import Runner
from flashtrace_plugin.models.derive.tails import Tails, twice_differentiable
from flashtrace_plugin.models.read.recurrence import keeps_state

LARGEST_BATCH = {"cpu": 8}
"""Most items at once by device, 64 elsewhere. All of a batch run the tail of its first item, so large ones waste work
where small ones already keep the processor busy."""

KEPT_PATTERNS = {"cpu": 512}
"""Longest text by device whose patterns are kept for second derivatives if they fit; elsewhere memory alone decides.
On a CPU longer ones no longer stay in cache, and forming them again by blocks is faster."""

_CHECKED_TOKENS = 64
"""Tokens at the end of the text on which second derivatives are compared with finite differences."""

_BAR_DELAY = 5.0
"""Seconds before a progress bar appears."""


@dataclass(frozen=True)
class WeightedTarget:
    """g = sum_j w_j log P(x_j | x_<j), cut to what it depends on.

    input_ids: [1, N]  the sequence before the last weighted token
    weights:   [r]     of the last r of these positions, which predict the tokens
    next_ids:  [r]     the tokens they predict
    later_ids: [1, M]  the rest of the text, which changes nothing unless a hook counts from its end
    """

    input_ids: Tensor
    weights: Tensor
    next_ids: Tensor
    later_ids: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, weights: Tensor) -> WeightedTarget:
        """input_ids: [1, N]; weights: [N] on tokens, none on the first, at least one above 0"""
        chosen = weights.nonzero()[:, 0]
        first, last = int(chosen[0]), int(chosen[-1])
        inside = slice(first, last + 1)
        weights = weights[inside].to(input_ids.device)
        return cls(input_ids[:, :last], weights, input_ids[0, inside], input_ids[:, last:])

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def row_weights(self) -> Tensor:
        """The weights on all positions. result: [N]"""
        return torch.nn.functional.pad(self.weights, (self.length - len(self.weights), 0))

    def log_prob(self, log_probs: Tensor) -> Tensor:
        """The part of g that lies on the last rows. log_probs: [rows, V]; result: []"""
        rows = len(log_probs)
        chosen = log_probs.gather(1, self.next_ids[-rows:, None])[:, 0]
        return chosen @ self.weights[-rows:].to(chosen)


@dataclass
class Cost:
    """What a result took.

    forwards: sequences, or tails of them, run forward for the terms; not the gate's pass, the prefix and its check
    hvps:     Hessian-vector products
    halved:   how often a batch was halved because memory ran out
    """

    forwards: int = 0
    hvps: int = 0
    halved: int = 0


@dataclass(frozen=True)
class Gate:
    """M with where it comes from.

    M:      [n]     sums to 1, or is 1 everywhere without a gate
    heads:  [L, H]  share of each head in the flow; zeros where the gate reads no attention
    """

    M: Tensor
    heads: Tensor


def gate(kind: str | None, layers: Sequence[Layer], weights: Tensor, n: int, spans: list[Window]) -> Gate:
    """The gate over the first n positions; with windows normalised in each and averaged (Algorithm 1).

    weights: [recorded]  of the recorded positions, on those that predict the target
    """
    if kind is None or kind == "uniform":
        return Gate(
            torch.full((n,), 1.0 if kind is None else 1 / n, dtype=torch.float32),
            torch.zeros(0, 0, dtype=torch.float32),
        )
    read = flow_mass if kind == "flow" else per_head_mass
    mass = read(layers, weights)[..., :n]
    M = mass.sum((0, 1))
    return Gate(window_mean(n, spans, lambda a, b: normalised(M[a:b])), normalised(mass.sum(-1)))


@dataclass(frozen=True)
class Curvature:
    """How S is estimated; the fields are HETA's options of the same names."""

    kind: str
    probes: int
    rank: int
    seed: int


class Terms:
    """Curvature and information of one weighted target.

    runner: the model, and whether hooks that are not ours are on it
    n:      positions 0..n are scored
    budget: bytes of working memory to aim for
    """

    def __init__(
        self,
        runner: Runner,
        target: WeightedTarget,
        n: int,
        *,
        last_layers: int | None,
        budget: int,
        progress: bool,
        cost: Cost,
    ) -> None:
        self.runner, self.target, self.n = runner, target, n
        self.model: PreTrainedModel = runner.model
        self.budget, self.progress, self.cost = budget, progress, cost
        after = target.later_ids if runner.hooked or runner.whole else None
        if after is None and keeps_state(self.model):
            after = target.input_ids[:, :0]
        self.tails = Tails(self.model, target.input_ids, len(target.weights), last_layers=last_layers, after=after)
        self.X = self.tails.embeddings if self.tails.hidden is None else self.tails.hidden

    def curvature(self, how: Curvature, spans: list[Window]) -> Tensor:
        """S over the first n positions. result: [n], float32"""
        k = how.rank + OVERSAMPLING
        products = {
            "full": self.n * how.probes,
            "low_rank": sum(2 * min(k, (b - a) * self.X.shape[1]) for a, b in spans),
            "gradient_squared": 0,
        }[how.kind]
        blockwise = self._blockwise()
        size = 1 if blockwise else self.budget // product_bytes(self.model, len(self.X), len(self.target.weights))
        with self._batches("curvature", size, products) as batches:
            if products:
                self._check_second_derivative()
            with _differentiable(self.model, blockwise=blockwise):
                self._check_same_function()
                S = self._estimate(how, spans, batches)
        self.cost.hvps += batches.done
        return self._finite(S, "curvature")

    def _estimate(self, how: Curvature, spans: list[Window], batches: Batches) -> Tensor:
        """A token's own block of H, and its gradient, do not depend on the window; a low-rank Hessian does."""
        X, generator = self.X, torch.Generator().manual_seed(how.seed)

        def within(a: int, b: int) -> Tensor:
            size, width = b - a, X.shape[1]
            k = min(how.rank + OVERSAMPLING, size * width)
            omega = torch.randn(k, size, width, generator=generator, dtype=torch.float32)
            probes = rademacher(how.probes, size, width, generator=generator)
            return low_rank_curvature(self._g, X, omega, probes, start=a, batches=batches)

        if how.kind == "gradient_squared":
            return gradient_squared(self._g, X)[: self.n]
        if how.kind == "low_rank":
            return window_mean(self.n, spans, within)
        probes = rademacher(how.probes, self.n, X.shape[1], generator=generator)
        return block_curvature(self._g, X, probes, batches=batches)

    def _blockwise(self) -> bool:
        """Whether patterns are formed again by blocks of queries instead of kept: too large, or slower to read."""
        if not self.runner.own_kernel:
            return False
        longest = KEPT_PATTERNS.get(self.X.device.type, len(self.X))
        too_long = len(self.X) > longest and applies(self.model)
        return too_long or graph_bytes(self.model, len(self.X)) > self.budget

    def information(self, replacement: Tensor) -> Tensor:
        """I over the first n positions, in nats. replacement: [d]; result: [n], float32"""
        tails, rows = self.tails, len(self.target.weights)
        # A hook may name one sequence of a batch, so under hooks there is one.
        size = 1 if self.runner.hooked else self.budget // forward_bytes(self.model, self.target.length, rows)
        with torch.no_grad(), self._batches("information", size, self.n) as batches:
            values = information(
                tails.log_probs,
                tails.embeddings,
                replacement,
                self.target.weights,
                length=self.n,
                batches=batches,
            )
        return self._finite(values, "information")

    def _check_second_derivative(self) -> None:
        """On the last tokens only, which go through the same functions as all."""
        start = max(0, len(self.X) - _CHECKED_TOKENS)
        with _differentiable(self.model):
            gap = second_derivative_gap(lambda tail, begin: self._g(tail, start + begin), self.X[start:])
        if gap > SECOND_DERIVATIVE_TOLERANCE:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be differentiated twice: products with the Hessian miss the "
                f"change of the gradient by {gap:.0%} (bound {SECOND_DERIVATIVE_TOLERANCE:.0%}), so one of its own "
                "autograd functions has no second derivative. Use curvature=None, or replace that kernel"
            )

    def _check_same_function(self) -> None:
        """Under the kernel that is differentiated; the other terms run the model's own."""
        gap = self.tails.gap()
        if not gap <= self.tails.tolerance:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} computes other log-probabilities with eager attention, which second "
                f"derivatives need, than with its own kernel (largest difference {gap:.1e}, bound "
                f"{self.tails.tolerance:.0e}); load it with attn_implementation='eager', or use curvature=None"
            )

    def _g(self, tail: Tensor, start: int) -> Tensor:
        run = self.tails.log_probs if self.tails.hidden is None else self.tails.log_probs_from_hidden
        return self.target.log_prob(run(tail[None], start)[0])

    @contextmanager
    def _batches(self, name: str, size: int, total: int) -> Iterator[Batches]:
        before = self.tails.forwards
        with tqdm(total=total, desc=f"heta {name}", delay=_BAR_DELAY, disable=not self.progress, leave=False) as bar:
            largest = LARGEST_BATCH.get(self.tails.embeddings.device.type, 64)
            batches = Batches(max(1, min(size, largest)), bar.update, _make_room)
            with _fits_in_memory():
                yield batches
        self.cost.forwards += self.tails.forwards - before
        self.cost.halved += batches.halved

    def _finite(self, values: Tensor, name: str) -> Tensor:
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                f"HETA's {name} overflows in {self.model.dtype}: log-probabilities, probes and sums are float32, but "
                "weights, activations and gradients keep the model's own type; load it in bfloat16 or float32"
            )
        return values.float().cpu()


def _make_room(tried: int) -> None:
    """Says that memory ran out, and hands back what the failed batch had reserved."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warnings.warn(f"out of memory with {tried} items in a batch; going on with {tried // 2}", stacklevel=4)


@contextmanager
def _differentiable(model: PreTrainedModel, *, blockwise: bool = False) -> Iterator[None]:
    """Eager attention and frozen parameters; what cannot be differentiated twice is named."""
    try:
        with twice_differentiable(model, blockwise=blockwise):
            yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be differentiated twice, even with eager attention: {error}. "
            "Use curvature=None, or replace the kernel that has no second derivative"
        ) from error


@contextmanager
def _fits_in_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            "HETA runs out of memory even with one item in a batch; shorten the text, use last_layers=... or "
            "curvature='gradient_squared', or free memory"
        ) from error


def mask_vector(runner: Runner, kind: str, token: int | None, device: torch.device) -> Tensor:
    """What a masked token becomes: zero, the mean over the vocabulary, or the embedding of a token. result: [d]

    device: of token ids
    """
    with torch.no_grad():
        one = runner.vectors(torch.tensor([token or 0], device=device))[0]
        if kind == "zero":
            return torch.zeros_like(one)
        if kind != "mean":
            return one
        # Through the module, because some multiply by a factor, and in parts, because the table is large.
        parts = torch.arange(len(runner.table), device=device).split(4096)
        total = torch.stack([runner.vectors(part).double().sum(0) for part in parts]).sum(0)
        return (total / len(runner.table)).to(one)
