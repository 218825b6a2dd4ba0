"""Recursion for Captum's own methods: each generated token is explained by itself, then followed further."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, Union

import torch
from captum.attr import Attribution as CaptumAttribution
from captum.attr import GradientAttribution, LayerAttribution, PerturbationAttribution
from captum.attr._core.llm_attr import BaseLLMAttribution
from torch import Tensor

from flashtrace_captum.base import TokenAttribution, TokenScores, hugging_face, refuse_unknown
from flashtrace_captum.errors import CaptumInputError
from flashtrace_plugin.errors import ReasoningWarning
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.methods.options import Hops
from flashtrace_plugin.methods.recursive import RecursiveRows
from flashtrace_plugin.spans import Span

_TokenBase = Callable[..., Tensor]
"""``base(input_ids [N], position, **options)``: scores [position] of the tokens before the one at ``position``."""


def recursive(
    attr_method: CaptumAttribution | _TokenBase,
    tokenizer: Any = None,
    *,
    model: Any = None,
    hops: Hops = "auto",
    recursion: str = "reasoning",
    mass: str = "absolute",
) -> RecursiveTokens:
    r"""The recursive form of a method of Captum, which runs once for each token of reasoning and target.

    Args:

        attr_method (Attribution or Callable): a method of Captum made with the language model itself, as for
            ``captum.attr.LLMAttribution``: ``Saliency(model)``, ``FeatureAblation(model)``,
            ``LayerIntegratedGradients(model, model.get_input_embeddings())``; a TokenAttribution of this package; or
            a callable ``(input_ids [N], position) -> scores [position]``
        tokenizer (optional): the model's tokenizer, which finds spans and names tokens. Default: None
        model (Module, optional): the language model, only for a callable. Default: None
        hops (int or str, optional): how often importance is followed; "auto"; or infinity, all at once.
            Default: "auto"
        recursion (str, optional): what is followed: "reasoning", "generation" or "prompt". Default: "reasoning"
        mass (str, optional): importance is the "absolute" value of a score, or its "positive" part.
            Default: "absolute"

    Returns:

        RecursiveTokens: with ``attribute(ids, target=…, reasoning=…)``; also for ``LLMTraceAttribution``

    Raises CaptumInputError for a method that does not score the tokens before each generated one.

    Examples::

        >>> recursive(InputXGradient(model)).attribute(ids, target=slice(90, 94), reasoning=slice(60, 88))
        >>> ablation = recursive(FeatureAblation(model), tokenizer, hops=float("inf"))
        >>> ablation.attribute(ids, target=93, reasoning=slice(60, 88), perturbations_per_eval=64)
    """
    model = getattr(attr_method, "forward_func", None) if model is None else model
    return RecursiveTokens(model, _base_of(attr_method), tokenizer, hops=hops, recursion=recursion, mass=mass)


class RecursiveTokens(TokenAttribution):
    """Recursion over the rows that a base gives; made by :func:`recursive`.

    Options of ``attribute`` go to the base: ``n_steps=20``, ``perturbations_per_eval=64``. A number as ``baselines``
    is a token id; the default is the model's pad or end token where tokens are replaced, and Captum's own, zeros, on
    embeddings.
    """

    def __init__(self, forward_func: Any, base: _TokenBase, tokenizer: Any = None, **driving: Any) -> None:
        super().__init__(hugging_face("recursive", forward_func))
        self.base, self.tokenizer, self.driving = base, tokenizer, driving
        self._method({})  # refuses options now

    def token_scores(
        self, input_ids: Tensor, *, prompt_length: int, target: Span, reasoning: Span | None = None, **options: Any
    ) -> TokenScores:
        """Scores of one sequence, see :meth:`TokenAttribution.token_scores`."""
        found = self._method(options).attribute_ids(
            input_ids, prompt_length=prompt_length, target=target, reasoning=reasoning
        )
        return TokenScores(found.totals, attribution=found)

    def rows(self, input_ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
        """The base's scores before recursion, one row for each of the positions. input_ids: [N]; result: [r, N]

        Raises CaptumInputError for a base that gives anything but a score for each token before a position.
        """
        return torch.stack([self._row(input_ids, position, options) for position in positions.tolist()])

    def _row(self, ids: Tensor, position: int, options: dict[str, Any]) -> Tensor:
        scores = self.base(ids, position, **options)
        if not isinstance(scores, Tensor) or scores.shape != (position,):
            seen = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise CaptumInputError(
                f"the base gave {seen} for the token at position {position}; it must give a tensor with one score for "
                f"each of the {position} tokens before it"
            )
        return torch.nn.functional.pad(scores.detach().float().cpu(), (0, len(ids) - position))

    def _method(self, options: dict[str, Any]) -> RecursiveRows:
        own = sorted(self.driving.keys() & options.keys())
        if own:
            made = f"recursive({_name(self.base)}(model), ...)"
            raise TypeError(f"{', '.join(own)} cannot be changed in attribute; pass it to {made}")
        rows = partial(self.rows, **options)
        return RecursiveRows(self.forward_func, self.tokenizer, rows, noted={"base": _name(self.base)}, **self.driving)


def _name(base: Any) -> str:
    return str(getattr(base, "__name__", type(base).__name__))


def _base_of(attr_method: Any) -> _TokenBase:
    """What gives a row. Raises CaptumInputError for methods of which none can be had."""
    kind = type(attr_method).__name__
    if isinstance(attr_method, BaseLLMAttribution):
        raise CaptumInputError(
            f"{kind} scores the prompt only: its token_attr has no column for generated tokens, so nothing can be "
            "followed through the reasoning; pass the method inside it, such as recursive(FeatureAblation(model))"
        )
    if isinstance(attr_method, TokenAttribution):
        return _OneToken(attr_method)
    if hasattr(attr_method, "model"):
        raise CaptumInputError(
            f"{kind} puts hooks on the modules of its network and needs it as its forward function; pass a callable "
            "(input_ids, position) -> scores, or Captum's gradient methods without such rules"
        )
    if isinstance(attr_method, (LayerAttribution, PerturbationAttribution)):
        return _OnTokens(attr_method)
    if isinstance(attr_method, GradientAttribution):
        return _OnEmbeddings(attr_method)
    if isinstance(attr_method, CaptumAttribution) or not callable(attr_method):
        raise CaptumInputError(
            f"{kind} is not known to score tokens; recursive takes Captum's gradient, layer and perturbation methods "
            "made with the model itself, a TokenAttribution, or a callable (input_ids, position) -> scores"
        )
    return attr_method


class _OneToken:
    """A TokenAttribution asked about single tokens."""

    def __init__(self, method: TokenAttribution) -> None:
        self.method, self.__name__ = method, type(method).__name__

    def __call__(self, input_ids: Tensor, position: int, **options: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReasoningWarning)  # a single token has none, which is as it should be
            found = self.method.checked_scores(
                input_ids, prompt_length=position, target=Span(position, position + 1), **options
            )
        return found.scores[:position]


_SET = ("inputs", "target", "additional_forward_args")
"""Arguments of a method of Captum that are not the user's to give."""


class _Single:
    """A method of Captum for the log-probability of one token, given those before it."""

    def __init__(self, method: Any) -> None:
        self.model, self.__name__ = hugging_face("recursive", method.forward_func), type(method).__name__
        self.method = copy(method)
        self.method.forward_func = self.log_probabilities
        parameters = inspect.signature(method.attribute).parameters.values()
        self.takes = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD and one.name not in _SET]

    def __call__(self, input_ids: Tensor, position: int, **options: Any) -> Any:
        """Scores [position] of the tokens before the one at ``position``."""
        refuse_unknown(self.__name__, options, self.takes)
        return self._scores(input_ids, position, options)

    def _scores(self, input_ids: Tensor, position: int, options: dict[str, Any]) -> Any:
        raise NotImplementedError

    def log_probabilities(self, inputs: Tensor) -> Tensor:
        """Of every token that may come next. result: [batch, vocabulary]"""
        raise NotImplementedError

    def _next(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, use_cache=False).logits[:, -1].float().log_softmax(-1)


class _OnTokens(_Single):
    """A perturbation or layer method, whose inputs are token ids; scores over a layer's width are summed."""

    def log_probabilities(self, inputs: Tensor) -> Tensor:
        return self._next(input_ids=inputs.long())

    def _scores(self, input_ids: Tensor, position: int, options: dict[str, Any]) -> Any:
        defaults: dict[str, Callable[[], Any]] = {
            "baselines": partial(replacement_token, self.model),
            "sliding_window_shapes": lambda: (1,),
        }
        filled = {name: make() for name, make in defaults.items() if name in self.takes and name not in options}
        ids = input_ids[None]
        return _summed(self.method.attribute(ids[:, :position], target=int(ids[0, position]), **filled, **options))


class _OnEmbeddings(_Single):
    """A gradient method, whose inputs are the embeddings; scores are summed over their width."""

    def log_probabilities(self, inputs: Tensor) -> Tensor:
        return self._next(inputs_embeds=inputs)

    def _scores(self, input_ids: Tensor, position: int, options: dict[str, Any]) -> Any:
        embed = self.model.get_input_embeddings()
        before = input_ids[None, :position]
        if isinstance(options.get("baselines"), int):
            options["baselines"] = embed(torch.full_like(before, options["baselines"])).detach()
        inputs = embed(before).detach()
        return _summed(self.method.attribute(inputs, target=int(input_ids[position]), **options))


def _summed(found: Union[Tensor, tuple[Tensor]]) -> Any:
    """One score for each token, [position]; what has another form is left for the check of rows."""
    values = found[0] if isinstance(found, tuple) and len(found) == 1 else found
    if not isinstance(values, Tensor):
        return values
    return values[0].flatten(1).sum(1) if values.dim() > 2 else values[0]
