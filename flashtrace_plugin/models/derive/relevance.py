"""Relevance of every token for a weighted span of outputs, on the model's own linearised computation.

One forward pass of the untouched model under :class:`~flashtrace_plugin.core.relevance.rules.Rules`, then one backward
sweep per objective::

    g = sum_j w_j s_j          s_j: logit (or log-probability, ...) of token j at position j - 1
    R_i = < dg/dE_i , E_i >    E: the token embeddings

Every call proves itself: the logits are compared with those of the untouched model, and under rule "cp" relevance,
the share of learned positions and that of all biases, which are counted by themselves, add up to g.

Sources: Ali et al. 2022 ("XAI for Transformers"); Achtibat et al. 2024 ("AttnLRP").
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashtrace_plugin.core.relevance.objective import Head, Objective, Pull
from flashtrace_plugin.core.relevance.rules import AttentionRule, HeadCall, Rules
from flashtrace_plugin.errors import ClosureError, InputError, UnsupportedModelError
from flashtrace_plugin.models.derive.runner import HuggingFace as HuggingFace
from flashtrace_plugin.models.derive.runner import Runner
from flashtrace_plugin.models.derive.sweep import Sweep
from flashtrace_plugin.models.modes import check_differentiable, check_layer_by_layer
from flashtrace_plugin.models.read.recurrence import frozen_recurrences
from flashtrace_plugin.models.user_hooks import original_of

_CHECKED_TOKENS = 128
"""The logits of so many first tokens are compared with those of the untouched model, in every call."""

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Largest gap that rounding explains, relative; half precision: 0.05."""

MEMORY_BUDGET = 2 << 30
"""Bytes that the linearisation may keep for more than one backward pass."""


@dataclass(frozen=True)
class Relevance:
    """Relevance of one objective. All numbers are in the objective's unit, and signed.

    tokens:    [N]     float32 (double for a double model)
    layers:    [L, N]  relevance at the residual stream that enters every block, if asked for
    positions: share of learned position embeddings
    biases:    share of all biases, counted where each is added
    objective: g
    gap:       |g - tokens - positions - biases| / max(|g|, sum of their absolute values); for rule "attn", which does
               not conserve relevance, that of the same model under "cp" on its first tokens
    """

    tokens: Tensor
    layers: Tensor | None
    positions: float
    biases: float
    objective: float
    gap: float


class Linearised:
    """A model linearised at one text; opened by :func:`linearised`, and good for any number of objectives.

    rows:      [r]     positions whose logits can carry weight, increasing
    logits:    [r, V]  at these rows, without graph
    logit_gap: largest difference to the untouched model's logits, relative to the largest logit
    """

    def __init__(self, runner: Runner, ids: Tensor, rows: Tensor, rule: AttentionRule, memory_budget: float) -> None:
        check_differentiable(runner.model, runner.name)
        check_layer_by_layer(runner.model, "relevance cannot be handed down layer by layer")
        self.runner, self.ids, self.rows, self.rule = runner, ids, rows, rule
        # What comes after the last row cannot matter to it.
        self.length, self._stop = ids.shape[1], ids.shape[1] if runner.whole else int(rows[-1]) + 1
        self.rules = Rules(rule, runner.table, runner.head)
        self.sweep = Sweep(runner.blocks, self.rules, memory_budget)
        self._checked = self._stop if runner.whole else min(self._stop, _CHECKED_TOKENS)
        self._forward()

    def _forward(self) -> None:
        ids, checked = self.ids[:, : self._stop], self._checked
        with torch.no_grad():
            self.embeddings = self.runner.embed(ids).detach().requires_grad_()
        keep = torch.cat([self.rows, self.rows.new_tensor([checked - 1])]).unique()
        with _refusing(self.rules, self.runner), self.sweep.watching():
            entering = self.embeddings.clone()
            with self.rules:
                logits = self.runner.logits(entering, keep)
        if not bool(torch.isfinite(logits).all()):
            raise InputError(
                f"the logits of {self.runner.name} are not finite in {logits.dtype}; check the weights, or load the "
                "model in bfloat16 or float32"
            )
        self._at = torch.searchsorted(keep, self.rows)
        self.head = self._head(logits, len(keep))
        self.logit_gap = self._logit_gap(ids[:, :checked], keep)

    def _head(self, logits: Tensor, rows: int) -> Head:
        """The head's call, if it was seen and is cut from the graph; else the logits themselves with their graph."""
        if len(self.rules.heads) != 1:
            if self.rules.heads:
                raise UnsupportedModelError(f"{self.runner.name} calls its language-model head more than once")
            self.top, hidden = logits, logits
            return Head(hidden, logits.detach(), None, None, True)
        if logits.requires_grad:
            raise UnsupportedModelError(f"{self.runner.name} computes logits beside its language-model head, too")
        call = self.rules.heads.pop()
        self.top = call.hidden
        hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
        if len(hidden) != rows:
            raise UnsupportedModelError(
                f"{self.runner.name} gives {rows} rows of logits from {len(hidden)} rows of hidden states"
            )
        return Head(hidden, logits.detach(), call.weight, call.bias, _same(call, logits))

    @property
    def logits(self) -> Tensor:
        return self.head.logits[self._at]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept: graphs, what enters and leaves every block, and logits."""
        streams = sum(t.nbytes for run in self.sweep.runs for t in (run.x, run.out) if t is not None)
        return int(self.sweep.kept) + streams + self.head.logits.nbytes

    def _logit_gap(self, ids: Tensor, keep: Tensor) -> float:
        seen = keep[keep < ids.shape[1]]
        with torch.no_grad():
            plain = self.runner.plain(ids, seen)
        gap = float((plain - self.head.logits[: len(seen)]).abs().max() / plain.abs().max())
        _check(gap, self.embeddings.dtype, f"{self.runner.name} gives other logits while it is linearised")
        return gap

    def relevance(
        self,
        weights: Tensor,
        *,
        objective: Objective = "logit",
        targets: Tensor | None = None,
        foils: Tensor | int | None = None,
        layers: bool = False,
    ) -> Relevance:
        """Relevance for ``g = sum_j w_j s_j``, by one backward sweep.

        weights:   [N]  on tokens; token j is predicted at position j - 1, which must be one of ``rows``
        objective: s_j is the "logit" of token j, the same "centered" by the mean logit, its "log_probability"
                   (linearised: logit less the expected logit), or its "contrast", the logit less that of its foil
        targets:   [N]  ids that stand for the tokens; None: the text's own
        foils:     [N]  ids to contrast with, or one for all
        layers:    relevance at every block's input, too

        Raises InputError for weights that no row can carry, foils that are no contrast and gradients that are not
        finite, UnsupportedModelError for a kernel without a backward pass, ClosureError if relevance is lost.
        """
        tokens = weights.nonzero()[:, 0].to(self.ids.device)
        rows, ids = self._carriers(tokens), self._ids(targets, tokens)
        foil = None if objective != "contrast" else self._foils(foils, tokens, ids)
        weight = weights.to(self.ids.device)[tokens]
        return self._backward(rows, self.head.pull(rows, weight, ids, objective, foil), layers)

    def relevance_of(self, seed: Tensor, *, layers: bool = False) -> Relevance:
        """Relevance for ``g = <seed, logits>``. seed: [r, V]"""
        if seed.shape != (len(self.rows), self.head.logits.shape[1]):
            raise InputError(
                f"the seed must be {list(self.logits.shape)}, one number per logit, got {list(seed.shape)}"
            )
        seed = seed.to(self.ids.device)
        return self._backward(self._at, self.head.dense(self._at, lambda part: seed[part]), layers)

    def _carriers(self, tokens: Tensor) -> Tensor:
        """Indices into the head's rows of the positions that predict the tokens."""
        known = torch.isin(tokens - 1, self.rows)
        if not len(tokens) or not bool(known.all()):
            token = int(tokens[~known][0]) if len(tokens) else None
            raise InputError(
                "weights must be on tokens that a row predicts: token j needs row j - 1; "
                + ("there is no weight at all" if token is None else f"token {token} has none")
            )
        return self._at[torch.searchsorted(self.rows, tokens - 1)]

    def _ids(self, given: Tensor | None, tokens: Tensor) -> Tensor:
        ids = self.ids[0, tokens] if given is None else given.to(self.ids.device)[tokens]
        vocabulary = self.head.logits.shape[1]
        bad = ids[(ids < 0) | (ids >= vocabulary)]
        if len(bad):
            raise InputError(f"token id {int(bad[0])} is outside the vocabulary 0..{vocabulary - 1}")
        return ids

    def _foils(self, foils: Tensor | int | None, tokens: Tensor, ids: Tensor) -> Tensor:
        if foils is None:
            raise InputError("objective='contrast' needs foils=, the token ids to contrast with")
        given = torch.full_like(self.ids[0], foils) if isinstance(foils, int) else foils
        foil = self._ids(given, tokens)
        same = tokens[foil == ids]
        if len(same):
            raise InputError(f"token {int(same[0])} is contrasted with itself (id {int(foil[foil == ids][0])})")
        return foil

    def _backward(self, rows: Tensor, pull: Pull, layers: bool) -> Relevance:
        cotangent = torch.zeros_like(self.head.hidden, dtype=pull.cotangent.dtype)
        cotangent.index_add_(0, rows, pull.cotangent)
        self.rules.constants.take()
        known = len(self.rules.positions)
        by_layer = [self._share(self.embeddings, None)] * len(self.sweep.runs) if layers else []

        def see(i: int, x: Tensor, gradient: Tensor) -> None:
            if layers:
                by_layer[i] = self._share(x, gradient)

        with _refusing(self.rules, self.runner):
            sources = [self.embeddings, *self.rules.positions]
            gradients = self.sweep.backward(self.top, cotangent.view_as(self.top), sources, see)
        self._refuse_severed()
        tokens, *rest = (self._share(leaf, gradients.pop(leaf)) for leaf in (self.embeddings, *self.rules.positions))
        del self.rules.positions[known:]  # what blocks that are run again have looked up
        positions, biases = sum(float(p.sum()) for p in rest), pull.bias + self.rules.constants.take()
        gap = self._gap(pull.value, tokens, positions, biases)
        return Relevance(tokens, torch.stack(by_layer) if by_layer else None, positions, biases, pull.value, gap)

    def _refuse_severed(self) -> None:
        if self.rules.severed:
            raise UnsupportedModelError(
                f"{self.runner.name} computes a part of its output without gradients "
                f"({', '.join(sorted(self.rules.severed))}), so that relevance cannot reach what it read; load it "
                "unquantised, with attn_implementation='sdpa' or 'eager'"
            )

    def _share(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        """<gradient, x> per position, zero after the last row. x, gradient: [1, n, d]; result: [N]"""
        wide = torch.promote_types(x.dtype, torch.float32)
        result = torch.zeros(self.length, dtype=wide, device=self.ids.device)
        if gradient is None:
            return result
        found = (gradient.to(wide) * x.detach().to(wide)).sum(-1).reshape(-1)
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"gradients are not finite in {x.dtype}; load the model in bfloat16 or float32")
        result[: len(found)] = found
        return result

    def _gap(self, value: float, tokens: Tensor, positions: float, biases: float) -> float:
        if self.rule == "attn":
            return conservation(self.runner, self.ids[:, : self._checked])
        scale = max(abs(value), float(tokens.abs().sum()) + abs(positions) + abs(biases), 1e-30)
        gap = abs(value - float(tokens.sum()) - positions - biases) / scale
        what = f"{self.runner.name} loses relevance while it is propagated{_own(self.rules)}"
        _check(gap, self.embeddings.dtype, what)
        return gap


@contextmanager
def linearised(
    runner: Runner,
    input_ids: Tensor,
    rows: Tensor,
    *,
    rule: AttentionRule = "cp",
    memory_budget: float = MEMORY_BUDGET,
) -> Iterator[Linearised]:
    """Linearises a model at a text, for as long as the context is open.

    input_ids:     [1, N]
    rows:          [r]  positions whose logits can carry weight, increasing; the text after the last is not read
    rule:          "cp" (the attention pattern is frozen) or "attn" (relevance goes through queries and keys as well)
    memory_budget: bytes that may be kept for backward passes; what does not fit is computed again in each of them

    No parameter gets a gradient.
    """
    with differentiating(runner):
        yield Linearised(runner, input_ids.clone(), rows.to(input_ids.device).clone(), rule, memory_budget)


@contextmanager
def differentiating(runner: Runner) -> Iterator[None]:
    """The state in which a :class:`Linearised` is made and asked, whatever the caller's is."""
    with torch.inference_mode(False), torch.enable_grad(), frozen_recurrences(runner.model):
        yield


_conserving: weakref.WeakKeyDictionary[nn.Module, tuple[Any, float]] = weakref.WeakKeyDictionary()


def conservation(runner: Runner, ids: Tensor) -> float:
    """Gap of the model under rule "cp" on a short text, for the likeliest next token. Kept until the model changes."""
    model = original_of(runner.model)
    mark, known = state_mark(model), _conserving.get(model)
    if known is None or known[0] != mark:
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        probe = Linearised(runner, ids, last, "cp", MEMORY_BUDGET)
        seed = torch.zeros_like(probe.logits).scatter_(1, probe.logits.argmax(-1, keepdim=True), 1.0)
        known = _conserving[model] = mark, probe.relevance_of(seed).gap
    return known[1]


def state_mark(model: nn.Module) -> Any:
    """Changes with the modules, the hooks, the weights, the type and the kernels of a model."""
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if isinstance(m, PreTrainedModel)}
    kernels = [
        getattr(c, n, None) for c in configs.values() for n in ("_attn_implementation", "_experts_implementation")
    ]
    hooks = [number for m in modules for number in (*m._forward_pre_hooks, *m._forward_hooks)]
    weights = [(p.data_ptr(), p._version, p.dtype) for p in model.parameters()]
    return hash((*weights, *kernels, *hooks)), tuple(map(weakref.ref, modules))


def _same(call: HeadCall, logits: Tensor) -> bool:
    z = call.z
    return z is not None and z.numel() == logits.numel() and torch.equal(z.reshape(logits.shape).to(logits), logits)


def _check(gap: float, dtype: torch.dtype, what: str) -> None:
    bound = _TOLERANCE.get(dtype, 0.05)
    if not gap <= bound:
        raise ClosureError(
            f"{what}: relative gap {gap:.1e}, bound {bound:.0e}. The model computes something that no rule is known "
            "for (load it with attn_implementation='eager' or 'sdpa', in float32), or a hook puts in what no token "
            "brought"
        )


def _own(rules: Rules) -> str:
    return f" (it has autograd functions of its own: {', '.join(sorted(rules.custom))})" if rules.custom else ""


@contextmanager
def _refusing(rules: Rules, runner: Runner) -> Iterator[None]:
    """Errors of a kernel without a derivative, in the user's words."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if error.__context__ is not None and not isinstance(error.__context__, Exception):
            raise error.__context__ from None  # an interrupt, on whose way out torch stumbled
        if "memory" in str(error):
            raise
        raise UnsupportedModelError(
            f"{runner.name} has a step without a backward pass ({error}){_own(rules)}; load it unquantised, with "
            "attn_implementation='sdpa' or 'eager'"
        ) from error
