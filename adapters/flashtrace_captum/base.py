"""What every method of this adapter is: a ``captum.attr.Attribution`` over token ids."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, Union

import torch
from captum.attr import Attribution as CaptumAttribution
from captum.log import log_usage
from torch import Tensor
from transformers import PreTrainedModel

from flashtrace_captum.errors import CaptumInputError
from flashtrace_captum.targets import Example, Target, read_examples
from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import UnsupportedModelError
from flashtrace_plugin.formats import FormatChoice
from flashtrace_plugin.models.guard import check_model
from flashtrace_plugin.positions import Positions
from flashtrace_plugin.spans import Span, check_spans
from flashtrace_plugin.text import Located, TokenizedText

Inputs = Union[Tensor, tuple[Tensor]]

_WHERE = ("input_ids", "prompt_length", "target", "reasoning")
"""What every ``token_scores`` takes; anything beyond is an option."""


@dataclass(frozen=True)
class TokenScores:
    """What a method finds for one sequence of N tokens.

    scores:      [N]      importance of every position for the target; only those before the target are used
    per_token:   [M, N]   the same for each of the M target tokens, if the method computes it; their mean is
                          proportional to ``scores``
    attribution:          everything else that a method of flashtrace_plugin finds
    """

    scores: Tensor
    per_token: Tensor | None = None
    attribution: Attribution | None = None

    def _repr_html_(self) -> str:
        from flashtrace_plugin.report.displays import number, table, text

        best = self.scores.argsort(descending=True, stable=True)[:10].tolist()
        tokens = [""] * len(self.scores) if self.attribution is None else self.attribution.tokens
        rows = [(i, tokens[i], float(self.scores[i])) for i in best]
        title = f"The first {len(rows)} of {len(self.scores)} positions"
        return table(title, {"position": str, "text": text, "importance": number}, rows)


class TokenAttribution(CaptumAttribution, ABC):
    """Base of the methods that :class:`flashtrace_captum.LLMTraceAttribution` accepts.

    A method of your own overrides :meth:`token_scores`; :meth:`attribute`, batches, padding, spans and the language
    model wrapper come with it.

    forward_func: the model itself, which keeps its ``generate`` and its parameters within reach
    format:       the reasoning format that texts are searched for, by name or as its two markers; None for all
    """

    format: FormatChoice = None

    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func)

    @abstractmethod
    def token_scores(
        self, input_ids: Tensor, *, prompt_length: int, target: Span, reasoning: Span | None = None
    ) -> TokenScores:
        """Scores of one sequence.

        input_ids:     [N] on the model's device or not, without padding
        prompt_length: number of tokens before the reasoning, or before the target if there is none
        target:        positions to explain
        reasoning:     positions to follow importance through
        """

    def text_scores(
        self,
        text: TokenizedText,
        target: Positions | str | None = None,
        reasoning: Positions | str | None = None,
        **options: Any,
    ) -> tuple[Located, TokenScores]:
        """Scores of a tokenized text, with the spans they are of, which are found in it unless they are given."""
        where = text.parts(target, reasoning, self.format)
        check_spans(len(text.input_ids), text.prompt_length, where.target, where.reasoning, str(where))
        found = self.checked_scores(
            text.input_ids,
            prompt_length=text.prompt_length,
            target=where.target,
            reasoning=where.reasoning,
            **options,
        )
        return where, found

    def checked_scores(self, input_ids: Tensor, **where: Any) -> TokenScores:
        """What :meth:`token_scores` finds. Raises CaptumInputError unless there is one score for each token."""
        parameters = inspect.signature(self.token_scores).parameters.values()
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters):
            takes = [one.name for one in parameters if one.name not in _WHERE]
            refuse_unknown(type(self).__name__, set(where).difference(_WHERE), takes)
        found = self.token_scores(input_ids, **where)
        if found.scores.shape != input_ids.shape:
            raise CaptumInputError(
                f"{type(self).__name__}.token_scores gave scores {list(found.scores.shape)} for ids "
                f"{list(input_ids.shape)}; it must give one for each position, prompt and generation"
            )
        return found

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        reasoning: Target = None,
        **options: Any,
    ) -> Inputs:
        r"""Importance of each token for the generation of others.

        Args:

            inputs (Tensor or tuple[Tensor]): token ids of shape (batch, length), prompt and generation together.
            target (int, slice, list or Tensor, optional): token positions in ``inputs`` whose generation is
                explained, half-open; a list or 1-D tensor has one entry per example. The scores of a target at
                position t rest on what precedes it, as its logits do, which are those of position t - 1.
                Default: None, the last token
            additional_forward_args (Tensor or tuple, optional): the attention mask (batch, length). Padding at the
                ends is cut off before the model runs, so positions count from the first real token.
                Default: None
            reasoning (int, slice or list, optional): positions that importance is followed through.
                Default: None
            **options: what :meth:`token_scores` takes beyond the above; anything else is a TypeError

        Returns:

            *Tensor* or *tuple[Tensor]* of **attributions**: float32, of the shape and on the device of ``inputs``.
            The prompt, which is all before the reasoning, has its scores; between prompt and target is the
            importance that passed through each token; from the target on, and on padding, it is 0.
        """
        ids = self._ids(inputs)

        def score(row: int, example: Example) -> Tensor:
            return self.example_scores(ids[row], example, **options).scores

        return self._each(inputs, target, additional_forward_args, reasoning, score)

    def _ids(self, inputs: Inputs) -> Tensor:
        """The token ids [batch, length] of the inputs. Raises CaptumInputError for anything else."""
        ids = single(inputs)
        if ids.is_floating_point():
            raise CaptumInputError(
                f"{self.get_name()} attributes token ids, got {ids.dtype}: it decomposes the whole model and has no "
                "embeddings to perturb, so it does not work in NoiseTunnel; pass input_ids"
            )
        if ids.dim() != 2:
            raise CaptumInputError(f"token ids must be (batch, length), got {list(ids.shape)}")
        return ids

    def example_scores(self, ids: Tensor, example: Example, **options: Any) -> TokenScores:
        """What is found for one row of a batch, without its padding. ids: [length]"""
        return self.checked_scores(
            ids[example.kept.slice],
            prompt_length=example.prompt_length,
            target=example.target,
            reasoning=example.reasoning,
            **options,
        )

    def _each(
        self,
        inputs: Inputs,
        target: Target,
        additional_forward_args: Any,
        reasoning: Target,
        score: Callable[[int, Example], Tensor],
    ) -> Inputs:
        """Scores [batch, length] of a batch, one example after the other, in the format of the inputs."""
        values = single(inputs)
        examples = read_examples(values.shape[0], values.shape[1], target, additional_forward_args, reasoning)
        found = torch.zeros(values.shape[:2], dtype=torch.float32, device=values.device)
        for row, example in enumerate(examples):
            before = slice(example.kept.start, example.kept.start + example.target.start)
            found[row, before] = score(row, example)[: example.target.start].to(found)
        return (found,) if isinstance(inputs, tuple) else found

    def attribute_future(self) -> NoReturn:
        """Not available, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def has_convergence_delta(self) -> bool:
        """False: the scores are shares, which add up to nothing of the model's; see :mod:`flashtrace_captum.delta`."""
        return False


def refuse_unknown(
    owner: str, given: Iterable[str], takes: Collection[str], elsewhere: Collection[str] = (), *, call: bool = True
) -> None:
    """Raises TypeError for options that the class does not take.

    owner:     name of the class, which is what the user made, whatever calls it
    takes:     options of its ``attribute`` (``call``), or of its constructor
    elsewhere: those of the other
    """
    unknown = sorted(set(given).difference(takes))
    if not unknown:
        return
    here, there = (" of attribute", f"{owner}(model, ...)") if call else ("", "attribute")
    moved = [name for name in unknown if name in elsewhere]
    raise TypeError(
        f"{owner} has no option {', '.join(unknown)}{here}; it takes {', '.join(takes) or 'none'}"
        + (f"; {there} takes {', '.join(moved)}" if moved else "")
    )


def hugging_face(what: str, model: Any) -> PreTrainedModel:
    """The model, for what runs it by itself. Raises UnsupportedModelError, which names the way for a bridge."""
    if any(cls.__module__.partition(".")[0] == "transformer_lens" for cls in type(model).__mro__):
        raise UnsupportedModelError(
            f"{what} runs a Hugging Face model by itself, got a {type(model).__name__}; pass the model that the "
            "bridge was made from, or attribute through the bridge: flashtrace_lens.flashtrace(bridge, tokens, …), "
            "or FlashTrace(bridge).attribute(ids, target=...)"
        )
    return check_model(model)


def single(inputs: Inputs) -> Tensor:
    """The one tensor of the inputs, [batch, length] or [batch, length, d]."""
    values = inputs if isinstance(inputs, tuple) else (inputs,)
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise CaptumInputError(f"inputs must be one tensor of token ids, got {[type(v).__name__ for v in values]}")
    if values[0].dim() < 2 or values[0].numel() == 0:
        raise CaptumInputError(
            f"inputs must be (batch, length) and not empty, got {list(values[0].shape)}; one sequence is ids[None]"
        )
    return values[0]
