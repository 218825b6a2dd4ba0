"""The result of the language model wrapper: Captum's, with the reasoning beside it and plots for long texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captum.attr import LLMAttributionResult
from torch import Tensor

from flashtrace_captum.errors import CaptumInputError
from flashtrace_plugin.attribution import Attribution, TokenScore

if TYPE_CHECKING:
    from captum.attr._utils.visualization import VisualizationDataRecord
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(init=False, eq=False, repr=False)
class LLMTraceAttributionResult(LLMAttributionResult):
    """What :meth:`flashtrace_captum.LLMTraceAttribution.attribute` returns. Tensors are float32.

    Captum's fields: ``input_tokens`` and ``output_tokens``, labelled as in the results of its own methods;
    ``seq_attr`` [features], ``token_attr`` [R, features] with NaN in the rows that the method did not compute, or
    None, ``output_probs`` [R], ``inp``.

    input_texts, output_texts: the same tokens as readable pieces of text, which plots show
    response_attr:    [R]                  importance that passed through each response token; 0 from the answer on
    hop_attr:         [hops+1, features]   hop by hop, before the hops are weighted; None from methods without hops
    unassigned_attr:  importance of prompt tokens that belong to no feature: skipped tokens, text between slots
    output_log_probs: [R]                  log P of each response token, in nats
    answer:           the part of ``output_tokens`` that is explained
    reasoning:        the part that importance was followed through, or None
    attribution:      the full result of flashtrace_plugin, with heads, layers and reports; None from other methods
    """

    input_texts: list[str]
    output_texts: list[str]
    response_attr: Tensor
    hop_attr: Tensor | None
    unassigned_attr: float
    output_log_probs: Tensor
    answer: slice
    reasoning: slice | None
    attribution: Attribution | None

    def __init__(
        self,
        *,
        input_tokens: list[str],
        output_tokens: list[str],
        input_texts: list[str],
        output_texts: list[str],
        seq_attr: Tensor,
        output_log_probs: Tensor,
        response_attr: Tensor,
        answer: slice,
        reasoning: slice | None = None,
        token_attr: Tensor | None = None,
        hop_attr: Tensor | None = None,
        unassigned_attr: float = 0.0,
        attribution: Attribution | None = None,
        inp: Any = None,
    ) -> None:
        super().__init__(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            seq_attr=seq_attr,
            token_attr=token_attr,
            output_probs=output_log_probs.exp(),
            inp=inp,
        )
        self.input_texts = input_texts
        self.output_texts = output_texts
        self.output_log_probs = output_log_probs
        self.response_attr = response_attr
        self.hop_attr = hop_attr
        self.unassigned_attr = unassigned_attr
        self.answer = answer
        self.reasoning = reasoning
        self.attribution = attribution

    @property
    def seq_attr_dict(self) -> dict[str, float]:
        """Score by label of the feature; features of the same label are added up, where Captum keeps the last."""
        total: Counter[str] = Counter()
        for token, score in zip(self.input_tokens, self.seq_attr.tolist(), strict=True):
            total[token] += score
        return dict(total)

    @property
    def answer_text(self) -> str:
        """The explained part of the response."""
        return "".join(self.output_texts[self.answer])

    def top(self, k: int = 10) -> list[TokenScore]:
        """The k highest-scoring features, best first; ties in the order of the text."""
        scores = self.seq_attr.detach()
        order = scores.argsort(descending=True, stable=True)[:k].tolist()
        return [TokenScore(i, self.input_texts[i], float(scores[i])) for i in order]

    def plot_seq_attr(self, show: bool = False) -> tuple[Figure, Axes] | None:
        """Bars over all features if they are few; else windows over the text above the largest scores."""
        from flashtrace_captum.plots import plot_scores, shown

        title = f"Attribution of {self.answer_text.strip()!r} to the prompt"
        return shown(plot_scores(self.seq_attr, self.input_texts, title), show)

    def plot_response_attr(self, show: bool = False) -> tuple[Figure, Axes] | None:
        """The same for the response: which steps of the reasoning the answer rests on."""
        from flashtrace_captum.plots import plot_scores, shown

        title = f"What passed through the response before {self.answer_text.strip()!r}"
        before = slice(0, self.answer.start)
        if self.answer.start == 0:
            raise CaptumInputError("the answer begins the response, so there is no reasoning to plot")
        return shown(plot_scores(self.response_attr[before], self.output_texts[before], title), show)

    def plot_token_attr(self, show: bool = False) -> tuple[Figure, Axes] | None:
        """A heat map of the computed rows; of long texts the largest columns, and windows of rows."""
        from flashtrace_captum.plots import plot_rows, shown

        if self.token_attr is None:
            raise CaptumInputError(
                "token_attr is None: the method explains the answer as a whole; use plot_seq_attr, plot_hop_attr, or "
                "a token-wise method such as IFR"
            )
        computed = ~self.token_attr.isnan().any(1)
        numbers = computed.nonzero()[:, 0].tolist()
        rows = [self.output_texts[i] for i in numbers]
        title = "Attribution of each answer token"
        return shown(plot_rows(self.token_attr[computed], rows, self.input_texts, title, numbers[0]), show)

    def plot_hop_attr(self, show: bool = False) -> tuple[Figure, Axes] | None:
        """A heat map of the hops: hop 0 from the answer, each further hop from the reasoning."""
        from flashtrace_captum.plots import plot_rows, shown

        if self.hop_attr is None:
            raise CaptumInputError("hop_attr is None: the method has no hops; use plot_seq_attr")
        rows = [f"hop {k}" for k in range(len(self.hop_attr))]
        return shown(plot_rows(self.hop_attr, rows, self.input_texts, "Attribution per hop"), show)

    def to_visualization_record(self, *, response: bool = False) -> VisualizationDataRecord:
        """A record for ``captum.attr.visualization.visualize_text``, which neither scales nor escapes by itself.

        response: the response before the answer follows the prompt, on the same scale
        """
        from flashtrace_captum.record import visualization_record

        return visualization_record(self, response)

    def _repr_html_(self) -> str:
        from flashtrace_plugin.report.displays import number, table, text

        rows = [(one.position, one.token, one.score) for one in self.top(10)]
        title = f"What “{self.answer_text.strip()}” rests on: the first of {len(self.input_tokens)} features"
        return table(title, {"feature": str, "text": text, "importance": number}, rows)

    def __repr__(self) -> str:
        best = ", ".join(f"{t.token.strip()!r} {t.score:.3f}" for t in self.top(5))
        return (
            f"{type(self).__name__}({len(self.input_tokens)} input features, {len(self.output_tokens)} output tokens, "
            f"answer {self.answer_text!r}; top: {best})"
        )
