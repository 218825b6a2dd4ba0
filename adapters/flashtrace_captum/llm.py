"""The wrapper for language models: Captum's inputs in, Captum's result out, through the reasoning in the response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, Union

import torch
from captum.attr import Attribution as CaptumAttribution
from captum.attr import TextTemplateInput, TextTokenInput
from captum.attr._core.llm_attr import DEFAULT_GEN_ARGS, BaseLLMAttribution
from torch import Tensor

from flashtrace_captum.base import TokenAttribution, TokenScores, hugging_face
from flashtrace_captum.errors import CaptumInputError
from flashtrace_captum.features import Features, TextInput, encode_prompt, features_of
from flashtrace_captum.labels import output_labels
from flashtrace_captum.result import LLMTraceAttributionResult
from flashtrace_captum.tokenizers import reader, require
from flashtrace_plugin.attribution import generation_rows
from flashtrace_plugin.errors import SpanError
from flashtrace_plugin.evaluation.metrics.likelihood import generation_logits, log_likelihood
from flashtrace_plugin.models.guard import evaluating
from flashtrace_plugin.models.read.source import source_for
from flashtrace_plugin.positions import as_span
from flashtrace_plugin.spans import Span
from flashtrace_plugin.text import Located, TokenizedText, end_ids, from_ids, with_messages

Part = Union[None, str, slice, Span]
"""A part of the response: a piece of its text, a slice of its tokens, or a Span of the whole sequence."""

_ROWS = 256
"""Response tokens whose logits are in float32 at a time; a vocabulary of 150,000 makes 150 MB of them."""


class LLMTraceAttribution(BaseLLMAttribution):
    """Attributes the answer of a response to the prompt, through the reasoning before it, in one call.

    Captum's own wrappers explain a response as one sequence or token by token, and drop what reaches a token
    through earlier ones. This one takes any :class:`flashtrace_captum.TokenAttribution`.

    Args:

        attr_method (TokenAttribution): the class of a registered method, such as FlashTrace, or a subclass of your
            own, created with the model itself
        tokenizer (Tokenizer): the model's tokenizer; of Captum's ``TokenizerLike`` it needs ``encode``, ``decode`` and
            ``convert_ids_to_tokens``

    Examples::

        >>> llm_attr = LLMTraceAttribution(FlashTrace(model), tokenizer)
        >>> inp = TokenIdsInput.from_messages([{"role": "user", "content": question}], tokenizer)
        >>> result = llm_attr.attribute(inp, gen_args={"max_new_tokens": 2000})
        >>> result.plot_seq_attr(show=True)
    """

    SUPPORTED_METHODS: tuple[type[CaptumAttribution], ...] = (TokenAttribution,)
    SUPPORTED_INPUTS = (TextTokenInput, TextTemplateInput)

    def __init__(self, attr_method: TokenAttribution, tokenizer: Any) -> None:
        if not isinstance(attr_method, self.SUPPORTED_METHODS):
            raise CaptumInputError(
                f"{type(self).__name__} takes a TokenAttribution such as FlashTrace(model), got "
                f"{type(attr_method).__name__}; Captum's own methods go into captum.attr.LLMAttribution"
            )
        hugging_face(type(self).__name__, attr_method.forward_func)
        require(tokenizer, "encode", "decode", "convert_ids_to_tokens")
        super().__init__(attr_method, tokenizer)
        self.attr_method = attr_method

    def attribute(
        self,
        inp: TextInput,
        target: str | Tensor | None = None,
        gen_args: dict[str, Any] | None = None,
        *,
        answer: Part = None,
        reasoning: Part = None,
        **kwargs: Any,
    ) -> LLMTraceAttributionResult:
        r"""Attributes a part of the response to the features of the prompt.

        Args:

            inp (TextTokenInput or TextTemplateInput): the prompt and its features
            target (str or Tensor, optional): the whole response, reasoning included, as text or ids.
                Default: None, the model generates it
            gen_args (dict, optional): arguments of ``model.generate``, only without a target.
                Default: None, which is Captum's: greedy, 25 new tokens
            answer (str, slice or Span, optional): the part of the response to explain: a piece of its text, a slice
                of its tokens, or positions of the whole sequence.
                Default: None, what follows ``</think>``, narrowed by ``<answer>`` or ``\boxed{}``
            reasoning (str, slice or Span, optional): the part that importance is followed through.
                Default: None, the thinking before the answer
            **kwargs: passed to the method, for example ``hops=2``; one that it does not know is a TypeError

        Returns:

            LLMTraceAttributionResult: ``seq_attr`` over the features; ``token_attr`` only from a token-wise method

        Raises CaptumInputError, TemplateError and SpanError for what does not fit. The model is left as it was.
        """
        features = features_of(inp, self.tokenizer)
        response = self._response(features.prompt_ids, target, gen_args)
        ids = torch.cat([features.prompt_ids, response])
        text = from_ids(reader(self.tokenizer), ids, len(features.prompt_ids), self._end_ids())
        messages = getattr(inp, "messages", None)
        text = text if messages is None else with_messages(self.tokenizer, messages, text)
        where, found = self._explained(text, answer, reasoning, kwargs)
        return self._result(inp, features, text, where, found)

    def presence_function(self, inp: TextInput, target: str | Tensor) -> Callable[[Tensor], Tensor]:
        """log P(response) as a function of which features are present, for ``captum.metrics.infidelity``.

        The function takes masks [b, features] of 1 and 0, replaces absent features by the baselines of ``inp``, and
        gives [b] in nats, as ``captum.attr.LLMAttribution`` does internally.
        """
        response = self._response(features_of(inp, self.tokenizer).prompt_ids, target, None)

        def log_p(presence: Tensor) -> Tensor:
            rows = [self._presence_row(inp, row[None], response) for row in presence]
            return torch.cat(rows).to(presence)

        return log_p

    def _presence_row(self, inp: TextInput, presence: Tensor, response: Tensor) -> Tensor:
        given = inp.to_model_input(presence.cpu())
        prompt = encode_prompt(self.tokenizer, given)["input_ids"] if isinstance(given, str) else given[0].tolist()
        ids = torch.cat([torch.tensor(prompt), response])
        return log_likelihood(self.model, ids[None], generation=Span(len(prompt), len(ids)))

    def attribute_future(self) -> NoReturn:
        """Not available, as in Captum's wrappers."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _response(self, prompt_ids: Tensor, target: str | Tensor | None, gen_args: dict[str, Any] | None) -> Tensor:
        """Token ids of the response, [R]."""
        if target is None:
            return self._generate(prompt_ids, gen_args or DEFAULT_GEN_ARGS)
        if gen_args is not None:
            raise CaptumInputError("gen_args only matter when the response is generated; leave out gen_args or target")
        response = self._encode(prompt_ids, target) if isinstance(target, str) else _ids(target)
        if not len(response):
            raise CaptumInputError(f"the response {target!r} has no token; there is nothing to explain")
        return response

    def _encode(self, prompt_ids: Tensor, response: str) -> Tensor:
        """The tokens of a text after the prompt: as in the joint text if that begins with the prompt's tokens."""
        prompt = prompt_ids.tolist()
        joint = self.tokenizer.encode(self.tokenizer.decode(prompt_ids) + response, add_special_tokens=False)
        if joint[: len(prompt)] == prompt:
            return torch.tensor(joint[len(prompt) :], dtype=torch.long)
        return torch.tensor(self.tokenizer.encode(response, add_special_tokens=False), dtype=torch.long)

    def _generate(self, prompt_ids: Tensor, gen_args: dict[str, Any]) -> Tensor:
        given = prompt_ids[None].to(self.device)
        defaults: dict[str, Any] = {"attention_mask": torch.ones_like(given)}
        if getattr(self.tokenizer, "pad_token_id", None) is not None:
            defaults["pad_token_id"] = self.tokenizer.pad_token_id
        with evaluating(self.model), torch.no_grad():
            written = self.model.generate(given, **(defaults | gen_args))
        written = getattr(written, "sequences", written)  # with return_dict_in_generate
        if len(written) > 1:
            raise CaptumInputError(
                f"num_return_sequences: generate wrote {len(written)} responses, one result explains one; generate "
                "them by model.generate and pass each as target"
            )
        response = written[0, len(prompt_ids) :].cpu()
        if not len(response):
            raise CaptumInputError(f"the model generated nothing with {gen_args}; allow it new tokens")
        return response

    def _end_ids(self) -> frozenset[int]:
        return end_ids(self.tokenizer, *source_for(self.model).configs())

    def _explained(
        self, text: TokenizedText, answer: Part, reasoning: Part, options: dict[str, Any]
    ) -> tuple[Located, TokenScores]:
        """What the method finds for the answer, and where the answer is."""
        try:
            where = [_part(name, part, text) for name, part in (("answer", answer), ("reasoning", reasoning))]
            return self.attr_method.text_scores(text, *where, **options)
        except SpanError as error:
            raise SpanError(
                f"{error}. In this wrapper target is the whole response: choose its part with answer=... and "
                "reasoning=..., and let it generate more with gen_args={'max_new_tokens': ...}"
            ) from error

    def _result(
        self, inp: TextInput, features: Features, text: TokenizedText, where: Located, found: TokenScores
    ) -> LLMTraceAttributionResult:
        start = text.prompt_length
        scores = found.scores.detach().float().cpu()
        prompt, after = scores[:start], scores[start:].clone()
        after[where.target.start - start :] = 0
        detail = None if found.attribution is None else replace(found.attribution, tokens=text.tokens)
        rows = None if found.per_token is None else generation_rows(found.per_token.cpu(), where.target, prompt)
        return LLMTraceAttributionResult(
            input_tokens=features.names,
            output_tokens=output_labels(self.tokenizer, text.input_ids[start:], text.tokens[start:]),
            input_texts=features.texts,
            output_texts=list(text.tokens[start:]),
            seq_attr=features.collect(prompt).to(self.device),
            token_attr=None if rows is None else features.collect(rows).to(self.device),
            output_log_probs=self._log_probs(text.input_ids, start),
            inp=inp,
            response_attr=after.to(self.device),
            hop_attr=None if detail is None else features.collect(detail.hop_scores[:, :start]).to(self.device),
            unassigned_attr=float((prompt * (1 - features.covered)).sum()),
            answer=_in_response(where.target, start),
            reasoning=None if where.reasoning is None else _in_response(where.reasoning, start),
            attribution=detail,
        )

    def _log_probs(self, ids: Tensor, start: int) -> Tensor:
        """log P of each response token, [R], in nats and float32."""
        with evaluating(self.model), torch.no_grad():
            logits = generation_logits(self.model, Span(start, len(ids)), input_ids=ids[None, :-1].to(self.device))[0]
        parts = zip(logits.split(_ROWS), ids[start:, None].to(logits.device).split(_ROWS), strict=True)
        found = [rows.float().log_softmax(-1).gather(-1, wanted)[:, 0] for rows, wanted in parts]
        return torch.cat(found).to(self.device)


def _ids(target: Tensor) -> Tensor:
    """A response given as ids, [R] or [1, R]."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.numel() != target.shape[-1]:
        shape = f"{target.dtype} {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise CaptumInputError(f"target must be the response as a text or as token ids [R], got {shape}")
    return target.detach().reshape(-1).long().cpu()


def _part(name: str, where: Part, text: TokenizedText) -> str | Span | None:
    """A slice of response tokens as a span of the sequence; a text or a span as it is."""
    if where is None or isinstance(where, (str, Span)):
        return where
    if not isinstance(where, slice):
        raise CaptumInputError(
            f"{name} must be a piece of the response, a slice of its tokens or a Span, got {where!r}"
        )
    return as_span(name, where, len(text.input_ids), first=text.prompt_length)


def _in_response(span: Span, start: int) -> slice:
    return slice(span.start - start, span.stop - start)
