"""FlashTrace as a TransformerLens analysis: one function, the model first, options by keyword.

FlashTrace (arXiv 2602.01914) asks which earlier tokens a span of tokens was made of. The span's positions are summed
into one vector, every layer's heads and its residual bypass are measured by how much of that vector disappears without
them, and the importance found on the reasoning is followed back in further hops. Unlike direct logit attribution,
nothing is projected on the unembedding: shares are of the residual stream itself, never negative, and need no answer
token.

A bridge makes attention patterns whole for a moment, H N² numbers per layer; none outlives its layer.

Example::

    from transformer_lens import TransformerBridge
    from flashtrace_lens import flashtrace

    bridge = TransformerBridge.boot_transformers("Qwen/Qwen3-0.6B")
    tokens = bridge.to_tokens(prompt + generation)
    result = flashtrace(bridge, tokens, target=(120, 124), reasoning=(31, 118))
    result.top(5)                    # tokens of the prompt
    result.top(5, unit="head")       # [('L11H3', 0.061), ...]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashtrace_lens.sources import as_ids, checked_bridge
from flashtrace_plugin import Attribution, FlashTrace, Span
from flashtrace_plugin.errors import InputError, SpanError
from flashtrace_plugin.methods.base import one_of

UNITS = ("token", "head", "component")

Positions = int | tuple[int, int] | slice | Span
"""Positions as TransformerLens takes them: one index, (start, stop), a slice; or a Span. -1 is the last token."""


@dataclass(frozen=True)
class FlashTraceResult:
    """Result of :func:`flashtrace`; tensors are float32, on the CPU and detached.

    Attributes:
        scores:           [prompt_pos]              importance of each prompt token, all hops together (Eq. 12)
        hop_scores:       [hop, pos]                importance of every token, hop by hop
        heads:            [hop, layer, head]        share of each head in its layer's stream (Eq. 19)
        components:       [hop, 1 + 2 layers]       who wrote the final stream, see :func:`flashtrace`; sums to 1
        reasoning_mass:   [hop]                     share of each hop's importance that lies on the reasoning (Eq. 11)
        token_labels:     "text_position" of every token
        head_labels:      "L0H0", ..., as ``heads[hop].flatten()``
        component_labels: "embed", "0_attn_out", "0_mlp_out", ..., as ``components[hop]``
        closure_error:    largest relative gap between the parts and the whole, over layers
        attribution:      the same as the package's own record, to save or to show as HTML
    """

    scores: Tensor
    hop_scores: Tensor
    heads: Tensor
    components: Tensor
    reasoning_mass: Tensor
    token_labels: list[str]
    head_labels: list[str]
    component_labels: list[str]
    closure_error: float
    attribution: Attribution

    @classmethod
    def of(cls, found: Attribution) -> FlashTraceResult:
        """A result of flashtrace_plugin under TransformerLens' labels.

        ``FlashTrace(bridge).attribute(prompt, generation)`` takes texts and finds the answer and its thinking in them;
        this labels what it gives.

        Raises:
            InputError: For HETA, which has no shares of the residual stream.
        """
        if found.method == "heta":
            raise InputError(
                "HETA divides no residual stream, so it has no components; read attribution.components for its terms"
            )
        _, n_layers, n_heads = found.head_scores.shape
        sublayers = (f"{layer}_{part}" for layer in range(n_layers) for part in ("attn_out", "mlp_out"))
        return cls(
            scores=found.scores,
            hop_scores=found.hop_scores,
            heads=found.head_scores,
            # A hop that nothing reached was not run; its shares are all zero and divide nothing.
            components=divide(found.residual_shares, found.mlp_shares) * (found.hop_weights > 0)[:, None],
            reasoning_mass=found.reasoning_mass,
            token_labels=[f"{token}_{i}" for i, token in enumerate(found.tokens)],
            head_labels=[f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)],
            component_labels=["embed", *sublayers],
            closure_error=found.closure_error,
            attribution=found,
        )

    def values(self, unit: str = "token", *, hop: int | None = None) -> Tensor:
        """One number per prompt token, head or component, aligned with :meth:`labels`.

        hop: one hop by itself (0: the target's own), or None: all hops, each weighted by the importance that
             reached it, ``prod_{m<k} rho_m`` (Eq. 12)
        """
        one_of("unit", unit, UNITS)
        if unit == "token" and hop is None:
            return self.scores
        per_hop = {"token": self.hop_scores[:, : len(self.scores)], "head": self.heads, "component": self.components}
        values = per_hop[unit].flatten(1)
        if hop is None:
            return self.attribution.hop_weights @ values
        if not -len(values) <= hop < len(values):
            raise InputError(f"hop {hop} does not exist; this result has hops 0 to {len(values) - 1}")
        return values[hop]

    def labels(self, unit: str = "token") -> list[str]:
        """Labels of the prompt's tokens, of the heads or of the components."""
        one_of("unit", unit, UNITS)
        prompt = self.token_labels[: len(self.scores)]
        return {"token": prompt, "head": self.head_labels, "component": self.component_labels}[unit]

    def top(self, k: int = 5, *, unit: str = "token", hop: int | None = None) -> list[tuple[str, float]]:
        """The k largest ``(label, value)`` pairs, best first."""
        values, labels = self.values(unit, hop=hop), self.labels(unit)
        order = values.argsort(descending=True, stable=True)[:k].tolist()
        return [(labels[i], float(values[i])) for i in order]


def flashtrace(
    bridge: Any,
    tokens: str | Tensor,
    *,
    target: Positions,
    reasoning: Positions | None = None,
    prompt_length: int | None = None,
    hops: int = 1,
    recursion: str = "reasoning",
    positions: str = "token",
    cache: Any = None,
) -> FlashTraceResult:
    """Attributes a span of tokens to the tokens, heads and components before it.

    Args:
        bridge: A ``TransformerBridge`` whose weights have not been processed.
        tokens: Prompt and generation: a text, or token ids [pos] or [1, pos].
        target: Positions to explain.
        reasoning: Positions to follow importance through; they lie between prompt and target.
        prompt_length: Number of prompt tokens; by default all that come before reasoning and target.
        hops: How often importance is followed through the reasoning.
        recursion: "reasoning", or "generation" for reasoning and target.
        positions: "token", a token's own position stands for it, or "predicting", the one to its left.
        cache: An ``ActivationCache`` of these tokens, used instead of running the model. It must hold what
            ``names_filter`` of this package selects, the whole patterns among it.

    Returns:
        A :class:`FlashTraceResult`. ``components`` divides the span's final residual stream between what wrote it,
        walking down from the last layer: the MLP takes its share (Eq. 21), attention takes its share of the rest
        (Eq. 19), what bypasses both comes from the layer below, and what bypasses all layers is ``embed`` (token
        and position embeddings together).

    Raises:
        SpanError, InputError: For positions, ids or a cache that do not fit; a missing hook is named.
        UnsupportedModelError: For processed weights, or layers without softmax attention.
        ClosureError: If the parts do not add up, or the bridge's logits are not its Hugging Face model's.
    """
    checked_bridge(bridge)
    if cache is not None and getattr(cache, "model", None) is not bridge:
        raise InputError("cache must be the ActivationCache of this very bridge, as bridge.run_with_cache returns it")
    ids = as_ids(bridge, tokens)
    where = as_span("target", target, len(ids))
    through = None if reasoning is None else as_span("reasoning", reasoning, len(ids))
    if prompt_length is None:
        prompt_length = min(where.start, through.start if through else where.start)
    method = FlashTrace(bridge if cache is None else cache, hops=hops, recursion=recursion, positions=positions)
    found = method.attribute_ids(ids, prompt_length=prompt_length, target=where, reasoning=through)
    return FlashTraceResult.of(found)


def as_span(name: str, positions: Positions, length: int) -> Span:
    """Positions as a span inside ``length`` tokens; negative ones count from the end. Raises SpanError."""
    span = positions if isinstance(positions, Span) else Span(*_edges(name, positions, length))
    if span.stop > length:
        raise SpanError(f"{name} {span} ends after the last of {length} tokens; positions count from 0")
    return span


def _edges(name: str, positions: Positions, length: int) -> tuple[int, int]:
    chosen = (positions, positions + 1 or None) if isinstance(positions, int) else positions
    chosen = slice(*chosen) if isinstance(chosen, tuple) and len(chosen) == 2 else chosen
    if not isinstance(chosen, slice) or chosen.step not in (None, 1):
        raise SpanError(f"{name} must be a position, (start, stop), a slice without step or a Span, got {positions!r}")
    start = 0 if chosen.start is None else chosen.start
    stop = length if chosen.stop is None else chosen.stop
    return start + length * (start < 0), stop + length * (stop < 0)


def divide(residual_shares: Tensor, mlp_shares: Tensor) -> Tensor:
    """Shares of the final residual stream by the component that wrote it.

    residual_shares, mlp_shares: [hops, L];  result: [hops, 1 + 2 L]: embed, then attention and MLP by layer

    With p the residual and f the MLP share of a layer, ``b = p (1 - f)`` bypasses it, attention wrote
    ``(1 - p) (1 - f)`` and the MLP ``f``; a layer's part of the final stream is that times the b of all layers above.
    """
    bypass = residual_shares * (1 - mlp_shares)
    above = torch.cat([torch.ones_like(bypass[:, :1]), bypass.flip(1).cumprod(1)], 1).flip(1)  # [hops, L+1]
    attn = (1 - residual_shares) * (1 - mlp_shares) * above[:, 1:]
    mlp = mlp_shares * above[:, 1:]
    return torch.cat([above[:, :1], torch.stack([attn, mlp], -1).flatten(1)], 1)
