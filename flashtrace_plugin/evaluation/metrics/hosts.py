"""Scores over the prompt from the results of Inseq and Captum, which are known by their classes and never imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtrace_plugin.errors import InputError


def scores_of_host(found: Any) -> Tensor | None:
    """The scores in a result of Inseq or Captum, None for anything else. result: [prompt_length]

    Of Inseq: the mean over the generated tokens of their scores on the prompt (FlashTrace, Eq. 30), with Inseq's own
    aggregation of what has more dimensions. Of Captum's language model wrapper: ``seq_attr``, which sums over them.

    Raises InputError for several sequences, for an encoder-decoder, and for a result without scores of tokens.
    """
    names = {cls.__name__ for cls in type(found).__mro__}
    if "FeatureAttributionOutput" in names:
        if len(found.sequence_attributions) != 1:
            raise InputError(
                f"the result of Inseq holds {len(found.sequence_attributions)} sequences; pass one of its "
                "sequence_attributions"
            )
        return _of_sequence(found.sequence_attributions[0])
    if "FeatureAttributionSequenceOutput" in names:
        return _of_sequence(found)
    return torch.as_tensor(found.seq_attr).reshape(-1) if "LLMAttributionResult" in names else None


def _of_sequence(found: Any) -> Tensor:
    if found.target_attributions is None or found.source_attributions is not None:
        raise InputError(
            f"{type(found).__name__} has no scores of the tokens before each generated one; use a decoder-only model "
            "and a method that scores tokens"
        )
    scores = found.target_attributions
    scores = found.aggregate().target_attributions if scores.ndim > 2 else scores
    return torch.as_tensor(scores)[: found.attr_pos_start].nanmean(1)
