"""FlashTrace, IFR and the exhaustive recursion as methods of Captum. The numbers are those of flashtrace_plugin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from captum.log import log_usage
from torch import Tensor

import flashtrace_plugin
from flashtrace_captum.base import Inputs, TokenAttribution, TokenScores
from flashtrace_captum.targets import Target
from flashtrace_plugin import Attribution, Span


class FlashTrace(TokenAttribution):
    r"""Importance of the prompt for a span of tokens, followed through the reasoning between them.

    One forward pass and one pass over the recorded layers per hop, however long the target is. The scores are the
    model's own information flow (arXiv 2602.01914, Eq. 12/24): non-negative, without baselines.

    Args:

        forward_func (Module): a causal language model of transformers
        tokenizer (optional): only for ``ignore`` given as texts
        recursion (str): "reasoning" follows the mass on the reasoning, "generation" that on reasoning and target.
            Default: "reasoning"
        positions (str): "token", a token's own position stands for it; "predicting", the one to its left, whose
            logits produced it. Default: "token"
        ignore (list of int or str): tokens left out of targets and scores. Default: none

    Examples::

        >>> attribution = FlashTrace(model).attribute(ids, target=slice(90, 94), reasoning=slice(30, 88))
        >>> attribution[0, :30]  # the prompt's scores
    """

    def __init__(
        self,
        forward_func: Any,
        tokenizer: Any = None,
        *,
        recursion: str = "reasoning",
        positions: str = "token",
        ignore: Iterable[str | int] = (),
    ) -> None:
        super().__init__(forward_func)
        self.tokenizer = tokenizer
        self.settings: dict[str, Any] = {"recursion": recursion, "positions": positions, "ignore": tuple(ignore)}
        self._method(hops=1)  # refuses a model or an option now, not at the first call

    @classmethod
    def get_name(cls) -> str:
        return "FlashTrace"

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        reasoning: Target = None,
        hops: int = 1,
    ) -> Inputs:
        r"""As :meth:`TokenAttribution.attribute`; ``hops`` is how often importance is followed through the reasoning.

        Default: 1
        """
        return super().attribute(inputs, target, additional_forward_args, reasoning=reasoning, hops=hops)

    def token_scores(
        self, input_ids: Tensor, *, prompt_length: int, target: Span, reasoning: Span | None = None, hops: int = 1
    ) -> TokenScores:
        """Scores of one sequence, see :meth:`TokenAttribution.token_scores`."""
        found = self._method(hops).attribute_ids(
            input_ids, prompt_length=prompt_length, target=target, reasoning=reasoning
        )
        return as_token_scores(found)

    def _method(self, hops: int) -> flashtrace_plugin.FlashTrace:
        return flashtrace_plugin.FlashTrace(self.forward_func, self.tokenizer, hops=hops, **self.settings)


class RecursiveAttribution(TokenAttribution):
    r"""The exhaustive token-level recursion that FlashTrace aggregates away (arXiv 2602.01914, App. D.3).

    Every token of reasoning and target is attributed by itself, at as many times the cost.

    Args:

        forward_func (Module): a causal language model of transformers
    """

    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func)
        flashtrace_plugin.RecursiveAttribution(forward_func)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        reasoning: Target = None,
        hops: int = 1,
    ) -> Inputs:
        r"""As :meth:`TokenAttribution.attribute`; ``hops`` is how often importance is followed through the reasoning.

        Default: 1
        """
        return super().attribute(inputs, target, additional_forward_args, reasoning=reasoning, hops=hops)

    def token_scores(
        self, input_ids: Tensor, *, prompt_length: int, target: Span, reasoning: Span | None = None, hops: int = 1
    ) -> TokenScores:
        """Scores of one sequence, see :meth:`TokenAttribution.token_scores`."""
        method = flashtrace_plugin.RecursiveAttribution(self.forward_func, hops=hops)
        return as_token_scores(
            method.attribute_ids(input_ids, prompt_length=prompt_length, target=target, reasoning=reasoning)
        )


class IFR(TokenAttribution):
    r"""Information flow routes, one target token at a time, averaged (Ferrando & Voita 2024).

    It follows no reasoning: a ``reasoning`` span only ends the prompt.

    Args:

        forward_func (Module): a causal language model of transformers
    """

    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func)
        flashtrace_plugin.IFR(forward_func)

    @classmethod
    def get_name(cls) -> str:
        return "IFR"

    def token_scores(
        self, input_ids: Tensor, *, prompt_length: int, target: Span, reasoning: Span | None = None
    ) -> TokenScores:
        """Scores of one sequence, see :meth:`TokenAttribution.token_scores`."""
        method = flashtrace_plugin.IFR(self.forward_func)
        return as_token_scores(
            method.attribute_ids(input_ids, prompt_length=prompt_length, target=target, reasoning=reasoning)
        )


def as_token_scores(found: Attribution) -> TokenScores:
    """What the language model wrapper needs of an attribution."""
    return TokenScores(found.totals, found.components.get("per_token"), found)
