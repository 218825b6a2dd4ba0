"""Convergence deltas, for methods whose relevance adds up to what they explain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor

from flashtrace_captum.base import Inputs, TokenScores
from flashtrace_captum.errors import CaptumInputError
from flashtrace_captum.methods import MethodAttribution
from flashtrace_captum.targets import Example, Target


class TellsDelta(MethodAttribution):
    """A method that declares :attr:`flashtrace_plugin.Method.conserves`, at least with some of its options."""

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        reasoning: Target = None,
        return_convergence_delta: bool = False,
        **options: Any,
    ) -> Inputs | tuple[Inputs, Tensor]:
        r"""As :meth:`flashtrace_captum.TokenAttribution.attribute`, with the convergence delta on request.

        Args:

            inputs (Tensor or tuple[Tensor]): token ids of shape (batch, length), prompt and generation together.
            target (int, slice, list or Tensor, optional): token positions in ``inputs`` whose generation is
                explained, half-open; a list or 1-D tensor has one entry per example.
                Default: None, the last token
            additional_forward_args (Tensor or tuple, optional): the attention mask (batch, length).
                Default: None
            reasoning (int, slice or list, optional): positions that importance is followed through.
                Default: None
            return_convergence_delta (bool, optional): whether to return the convergence delta as well; only where
                :meth:`has_convergence_delta` is True. Default: False
            **options: what the method takes at a call

        Returns:

            *Tensor* or *tuple[Tensor]* of **attributions**, or 2-element tuple of **attributions**, **delta**:
            - **attributions**: float32, of the shape and on the device of ``inputs``: magnitudes, all hops together.
            - **delta** (Tensor, returned if ``return_convergence_delta=True``): one number per example: the signed
            relevance that the attributions of the target's own hop are made of, summed, with the shares of biases and
            learned positions, less the objective. 0 up to rounding, in the unit of the objective (logits).
        """
        if not return_convergence_delta:
            return super().attribute(inputs, target, additional_forward_args, reasoning=reasoning, **options)
        if not self.has_convergence_delta():
            raise CaptumInputError(
                f"{self.get_name()} with these options conserves nothing, so it has no convergence delta; ask "
                "has_convergence_delta() first"
            )
        ids, found = self._ids(inputs), list[TokenScores]()

        def score(row: int, example: Example) -> Tensor:
            found.append(self.example_scores(ids[row], example, **options))
            return found[-1].scores

        attributions = self._each(inputs, target, additional_forward_args, reasoning, score)
        return attributions, self.compute_convergence_delta(found).to(ids.device)

    def has_convergence_delta(self) -> bool:
        """Whether the method conserves what it propagates with the options that it has here."""
        return self._made({}).conserves

    def compute_convergence_delta(self, found: Sequence[TokenScores]) -> Tensor:
        """What is gained or lost in each example, [batch], float32.

        found: what :meth:`token_scores` gave, with the attribution of each

        Raises CaptumInputError for scores that a subclass made without one.
        """
        attributions = [one.attribution for one in found if one.attribution is not None]
        if len(attributions) < len(found):
            raise CaptumInputError(
                f"{type(self).__name__}.token_scores gave scores without the attribution that they are from, so "
                "there is no convergence delta; leave out return_convergence_delta"
            )
        core = self._made({})
        return torch.tensor([core.conservation_delta(one) for one in attributions], dtype=torch.float32)
