"""Where the mass lies, hop by hop: on the prompt, the reasoning, the target and what is between them."""

from __future__ import annotations

from torch import Tensor

from flashtrace_plugin.attribution import Attribution

SEGMENTS = ("prompt", "reasoning", "target", "rest")


def mass_by_hop(found: Attribution) -> list[dict[str, float]]:
    """Share of each hop's mass by segment (FlashTrace, Fig. 1 and 7); those of a hop add up to 1.

    A hop that nothing reached has shares of 0. Signed hops count by size.
    """
    return [_shares(found, hop.abs()) for hop in found.hop_scores]


def _shares(found: Attribution, hop: Tensor) -> dict[str, float]:
    total = float(hop.sum())
    spans = {"prompt": found.prompt, "reasoning": found.reasoning, "target": found.target}
    on = {name: float(hop[span.slice].sum()) if span is not None else 0.0 for name, span in spans.items()}
    on["rest"] = max(0.0, total - sum(on.values()))
    return {name: on[name] / total if total > 0 else 0.0 for name in SEGMENTS}
