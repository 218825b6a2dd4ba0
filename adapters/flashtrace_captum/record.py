"""A result as a record of Captum's text visualizer."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import torch
from captum.attr import visualization
from torch import Tensor

if TYPE_CHECKING:
    from flashtrace_captum.result import LLMTraceAttributionResult


def visualization_record(result: LLMTraceAttributionResult, response: bool) -> visualization.VisualizationDataRecord:
    """Scores scaled to [-1, 1] and texts escaped, because the visualizer colours raw values and inserts raw text.

    The columns are made for classifiers: "Predicted Label" is the answer with its probability, "Attribution Score"
    the sum of the scores, and "True Label" is left open.
    """
    before = slice(0, result.answer.start)
    scores = torch.cat([result.seq_attr, result.response_attr[before]]) if response else result.seq_attr
    words = result.input_texts + (result.output_texts[before] if response else [])
    answer = _escaped(result.answer_text.strip())
    return visualization.VisualizationDataRecord(
        word_attributions=_scaled(scores),
        pred_prob=float(result.output_log_probs[result.answer].sum().exp()),
        pred_class=answer,
        true_class="–",
        attr_class=answer,
        attr_score=float(result.seq_attr.detach().sum()),
        raw_input_ids=[_escaped(word) for word in words],
        convergence_score=result.attribution.closure_error if result.attribution else 0.0,
    )


def _scaled(scores: Tensor) -> Tensor:
    """Scores divided by their largest magnitude, on the CPU."""
    values = scores.detach().float().cpu()
    top = values.abs().max()
    return values / top if top > 0 else values


def _escaped(text: str) -> str:
    """Text that shows itself in HTML; line breaks are marked and kept."""
    return html.escape(text).replace("\n", "↵<br>")
