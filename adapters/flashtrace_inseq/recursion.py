"""Recursion for any method of Inseq: as it runs (``base=``), and for what it gave (``aggregate("recursive")``)."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from inseq.attr import FeatureAttribution
from inseq.data import FeatureAttributionOutput
from inseq.data.attribution import FeatureAttributionSequenceOutput
from inseq.utils import Registry

from flashtrace_inseq import outputs
from flashtrace_inseq.inputs import wanted
from flashtrace_inseq.matrices import BaseMatrix, base_arguments, matrix_of, on_model
from flashtrace_inseq.methods import PluginAttribution
from flashtrace_inseq.outputs import FlashTraceSequenceOutput
from flashtrace_plugin.attribution import plain
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.options import Hops
from flashtrace_plugin.methods.recursive import Recursive, RecursiveRows
from flashtrace_plugin.positions import Positions
from flashtrace_plugin.text import Located, TokenizedText, end_ids, from_ids


class WithBase(PluginAttribution, Registry):
    """The exhaustive recursion, or with ``base`` the recursion of any method that scores the tokens before each."""

    @classmethod
    def arguments(cls) -> dict[str, str]:
        """Those of the core method, and the base with its arguments."""
        return super().arguments() | {
            "base": "base: name of a method of Inseq, or of this package, that is recursed instead: 'saliency', "
            "'input_x_gradient', 'integrated_gradients', 'attention', 'occlusion', … It is run for every token of "
            "reasoning and target, and aggregated to one number per pair of tokens as Inseq does by default (gradient "
            "methods: L2 norm over the embedding, attention: mean of heads and layers). hops is then 'auto' unless "
            "given, and positions belong to the base; default: None. "
            "out.aggregate('recursive', target=…, reasoning=…) does the same with a result of that method",
            "base_args": "base_args: what the base takes in attribute(), by name; default: none",
        }

    def prepare_and_attribute(self, sources: Any, targets: Any, **kwargs: Any) -> list[FeatureAttributionOutput]:
        """As for every method; what Inseq is told to attribute is kept for the base."""
        self._function = self.attribution_model.get_attributed_fn(kwargs.get("attributed_fn"))
        self._given = {name: kwargs.get(name) for name in ("attributed_fn_args", "include_eos_baseline")}
        contrast = (self._given["attributed_fn_args"] or {}).get("contrast_targets")
        if isinstance(contrast, (list, tuple)) and len(contrast) > 1:
            raise InputError(
                f"contrast_targets lists {len(contrast)} texts, but a base runs for one text at a time; attribute the "
                "inputs one by one, each with its contrast"
            )
        try:
            return super().prepare_and_attribute(sources, targets, **kwargs)
        finally:
            del self._function, self._given

    def build(self, options: dict[str, Any], progress: bool) -> Method:
        """The exhaustive recursion, the recursion of a method of this package, or of one of Inseq."""
        rest = dict(options)
        name, args = rest.pop("base", None), dict(rest.pop("base_args", None) or {})
        if name is None:
            if args:
                raise InputError(f"base_args {', '.join(args)} go with base=…, the name of a method; it was not given")
            return super().build(rest, progress)
        base = _known(name)
        driving = {"hops": "auto", "recursion": "reasoning"} | rest
        if issubclass(base, PluginAttribution):
            return self._of_ours(base, args, driving, progress)
        return self._of_inseq(name, args, driving)

    def uses(self, options: dict[str, Any]) -> set[str]:
        """A base of Inseq's may have baselines."""
        return {"include_eos_baseline"} if self._runs_inseq(options) else set()

    def _attributed(
        self, function: Callable[..., Any], args: dict[str, Any], options: dict[str, Any]
    ) -> dict[str, Any]:
        """A base of Inseq's attributes what Inseq is told to."""
        return options if self._runs_inseq(options) else super()._attributed(function, args, options)

    def _runs_inseq(self, options: dict[str, Any]) -> bool:
        name = options.get("base")
        return name is not None and not issubclass(_known(name), PluginAttribution)

    def _of_ours(
        self, base: type[PluginAttribution], args: dict[str, Any], driving: dict[str, Any], progress: bool
    ) -> Method:
        if "hops" in args:
            raise InputError("hops is an option of attribute() itself, not of base_args")
        made = base(self.attribution_model, hook_to_model=False).build(args, progress)
        positions = driving.pop("positions", None)
        if positions is not None:
            raise InputError(f"positions belongs to the base: base_args={{'positions': {positions!r}}}")
        return Recursive(made, **driving)

    def _of_inseq(self, name: str, args: dict[str, Any], driving: dict[str, Any]) -> Method:
        host = self.attribution_model
        if "positions" in driving:
            raise InputError(f"positions has no meaning for the base {name!r}, whose rows are those of the tokens")
        with on_model(host, name) as base:
            base_arguments(base, args)  # refuses arguments before anything is computed
        rows = BaseMatrix(host, name, args, self._function, self._given)
        noted = {"base": name, "base_args": plain(args)}
        return RecursiveRows(host.model, host.tokenizer, rows, noted=noted, **driving)


def _known(name: Any) -> type[FeatureAttribution]:
    """The class of a method of Inseq. Raises InputError for an unknown one."""
    known = FeatureAttribution.available_classes()
    if name not in known:
        raise InputError(f"base is {name!r}, which is no method of Inseq; there are {', '.join(sorted(known))}")
    return known[name]


def recursive_sequence(
    item: FeatureAttributionSequenceOutput,
    *,
    hops: Hops = "auto",
    target: Positions | str | None = None,
    reasoning: Positions | str | None = None,
    tokenizer: Any = None,
    prompt_length: int | None = None,
    **options: Any,
) -> FlashTraceSequenceOutput:
    """The recursive form of one sequence; the arguments are the aggregator's."""
    if tokenizer is None and (target is None or (reasoning is None and hops)):
        raise InputError(
            "without a tokenizer nothing can be found in the text: pass target=… and reasoning=… as positions, or "
            "tokenizer=model.tokenizer"
        )
    matrix = matrix_of(item)
    text = _text(item, matrix.shape[1], item.attr_pos_start if prompt_length is None else prompt_length, tokenizer)
    method = Recursive(matrix, tokenizer, hops=hops, **options)
    where = text.parts(target, reasoning, method.driving.format)
    if hops and method.driving.recursion == "reasoning":
        _check_followed(where, item.attr_pos_start)
    found = method.attribute_text(text, target=where.target, reasoning=where.reasoning)
    return outputs.laid_out(item.target[: matrix.shape[1]], found)


def _check_followed(where: Located, start: int) -> None:
    """Raises InputError unless there is reasoning, and all of it has scores, which begin at a token."""
    if where.reasoning is None:
        raise InputError(
            f"no reasoning was found from token {start}, where attribution began, to the target {where.target}, so "
            "there is nothing to follow; attribute all that was generated (leave attr_pos_start out), pass "
            "reasoning=…, or use hops=0"
        )
    if where.reasoning.start < start:
        raise InputError(
            f"the reasoning {where.reasoning} has no scores before token {start}, where attribution began; attribute "
            "all that was generated: leave attr_pos_start out"
        )


def _text(item: FeatureAttributionSequenceOutput, length: int, prompt_length: int, tokenizer: Any) -> TokenizedText:
    """The first tokens of a result as a text; without a tokenizer only their labels are known."""
    tokens = item.target[:length]
    ids = torch.tensor([token.id for token in tokens])
    if tokenizer is None:
        return TokenizedText(ids, prompt_length, tuple(token.token for token in tokens), "", ())
    if bool((ids < 0).any()):
        raise InputError("the result's tokens are merged, so a tokenizer does not know them; leave tokenizer out")
    return from_ids(tokenizer, ids, prompt_length, end_ids(tokenizer))


def recursive(
    out: FeatureAttributionOutput,
    tokenizer: Any = None,
    *,
    hops: Hops = "auto",
    target: Positions | str | list[Any] | None = None,
    reasoning: Positions | str | list[Any] | None = None,
    **options: Any,
) -> FeatureAttributionOutput:
    """The recursive form of a result of any decoder-only method that scored every generated token.

    out:       from ``model.attribute(prompt, text, method="saliency")``, or loaded from a file
    tokenizer: the model's tokenizer; finds target and reasoning, and reads pieces of text
    hops:      how many; "auto"; or infinity, all at once
    target, reasoning: as for ``attribute``: positions, pieces of text, or a list with one for each input
    options:   further ones of the aggregator: recursion, mass, ignore, format, prompt_length

    Raises InputError for a result that lacks what the recursion needs: scores over the tokens before each generated
    one, for every token of reasoning and target.
    """
    made = deepcopy(out)
    where = wanted(target, reasoning, len(out.sequence_attributions), None, None)
    given = {"hops": hops, "tokenizer": tokenizer} | options
    made.sequence_attributions = [
        recursive_sequence(item, target=one.target, reasoning=one.reasoning, **given)
        for item, one in zip(out.sequence_attributions, where, strict=True)
    ]
    made.step_attributions = None
    made.info["recursive"] = plain({"hops": str(hops) if hops == float("inf") else hops} | options)
    return made
