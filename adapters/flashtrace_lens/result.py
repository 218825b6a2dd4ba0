"""What a method found on a bridge, under TransformerLens' labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.options import one_of

_LACKING = {"head": "measures no heads", "component": "divides no residual stream"}
"""Units that not every method tells, and what it says of one that does not."""


@dataclass(frozen=True)
class FlashTraceResult:
    """Result of a function of :mod:`flashtrace_lens`; tensors are float32, on the CPU and detached.

    A method that tells nothing of heads or components has empty tensors and labels for them, and refuses to rank them.

    Attributes:
        scores:           [prompt_pos]              importance of each prompt token, all hops together (Eq. 12)
        hop_scores:       [hop, pos]                importance of every token, hop by hop
        heads:            [hop, layer, head]        share of each head in its layer's stream (Eq. 19);
                                                    HETA: in the flow of its gate
        components:       [hop, 1 + 2 layers]       who wrote the span's final stream, see below; sums to 1. Where
                          [hop, 1 + 3 layers]       hooks changed the stream between layers, these are components too
        reasoning_mass:   [hop]                     share of each hop's importance that lies on the reasoning (Eq. 11)
        token_labels:     "text_position" of every token
        head_labels:      "L0H0", ..., as ``heads[hop].flatten()``
        component_labels: "embed", "0_attn_out", "0_mlp_out", ("0_edit",) ..., as ``components[hop]``
        closure_error:    largest relative gap between the parts and the whole, over layers
        attribution:      the same as the package's own record, to save or to show as HTML

    Components divide the final stream from the last layer down: the MLP takes its share (Eq. 21), attention its share
    of the rest (Eq. 19), what bypasses both comes from the layer below, and what bypasses all layers is "embed" (token
    and position embeddings together). What hooks at ``hook_resid_post`` or ``hook_resid_pre`` put into the stream is
    "0_edit" and so on, a share of the layer's output beside the MLP's.
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
        """A result of any method of flashtrace_plugin under TransformerLens' labels, as far as it tells of them.

        ``FlashTrace(bridge).attribute(prompt, generation)`` takes texts and finds the answer and its thinking in them;
        this labels what it gives.
        """
        components = found.stream_shares
        _, n_layers, n_heads = found.head_scores.shape
        written = ["attn_out", "mlp_out", *(["edit"] if "edit_shares" in found.components else [])]
        sublayers = [f"{layer}_{part}" for layer in range(found.mlp_shares.shape[1]) for part in written]
        return cls(
            scores=found.scores,
            hop_scores=found.hop_scores,
            heads=found.head_scores,
            components=components,
            reasoning_mass=found.reasoning_mass,
            token_labels=[f"{token}_{i}" for i, token in enumerate(found.tokens)],
            head_labels=[f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)],
            component_labels=["embed", *sublayers] if components.numel() else [],
            closure_error=found.closure_error,
            attribution=found,
        )

    @property
    def units(self) -> list[str]:
        """What this result can rank: "token", and "head" and "component" where the method tells of them."""
        told = {"head": self.heads, "component": self.components}
        return ["token", *(unit for unit, values in told.items() if values.numel())]

    def values(self, unit: str = "token", *, hop: int | None = None) -> Tensor:
        """One number per prompt token, head or component, aligned with :meth:`labels`.

        hop: one hop by itself (0: the target's own), or None: all hops, each weighted by the importance that
             reached it, ``prod_{m<k} rho_m`` (Eq. 12). After ``hops=inf`` heads and components are those of hop 0,
             the only one that is run by itself

        Raises InputError for a unit that the method tells nothing of.
        """
        self._check_unit(unit)
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
        self._check_unit(unit)
        prompt = self.token_labels[: len(self.scores)]
        return {"token": prompt, "head": self.head_labels, "component": self.component_labels}[unit]

    def top(self, k: int = 5, *, unit: str = "token", hop: int | None = None) -> list[tuple[str, float]]:
        """The k largest ``(label, value)`` pairs, best first."""
        values, labels = self.values(unit, hop=hop), self.labels(unit)
        order = values.argsort(descending=True, stable=True)[:k].tolist()
        return [(labels[i], float(values[i])) for i in order]

    def _repr_html_(self) -> str:
        from flashtrace_plugin.report.displays import number, table, text

        found = self.attribution
        title = f"What “{found.text(found.target).strip()}” rests on, by {found.method}"
        rows = [(unit, label, value) for unit in self.units for label, value in self.top(5, unit=unit)]
        return table(title, {"unit": text, "label": text, "importance": number}, rows)

    def _check_unit(self, unit: str) -> None:
        one_of("unit", unit, ("token", *_LACKING))
        if unit not in self.units:
            own = ", ".join(self.attribution.components)
            raise InputError(
                f"{self.attribution.method} {_LACKING[unit]}, so it has no {unit}s; this result has "
                f"{', '.join(map(repr, self.units))}{f', and {own} in attribution.components' if own else ''}"
            )
