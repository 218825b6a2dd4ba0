"""How an Attribution looks as Inseq's result for one sequence.

A span is one thing to explain and gets one column: its tokens are merged into one, with id -1, as Inseq's own
``aggregate("spans")`` does. Rows are the tokens before the span; its own row is NaN, as always in Inseq for what a
token is not attributed to. The third dimension, if there is one, holds the parts of the score, "total" first: where
reasoning was followed it is that of the prompt, and the part "everywhere" has what was left on the generation as well,
as on the markers of the thinking. Reasoning itself has 0 in both, because its mass counts on what it came from.

Saved files name this module and the class below, so both names are part of the file format.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from inseq.data import CoarseFeatureAttributionSequenceOutput, FeatureAttributionOutput, list_aggregation_functions
from inseq.data.attribution import FeatureAttributionSequenceOutput
from inseq.utils import isnotebook
from inseq.utils.typing import TokenWithId
from torch import Tensor
from treescope.repr_lib import render_object_constructor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.spans import Span

TOTAL = "total"
EVERYWHERE = "everywhere"
_NUMPY_NUMBER = re.compile(r"np\.float64\(([^)]*)\)")
_DIMENSIONS = ("Input Tokens", "Generated Tokens", "Part")


@dataclass(eq=False, repr=False)
class FlashTraceSequenceOutput(FeatureAttributionSequenceOutput):
    """Raw output of one sequence: scores by part, and the attributions they were taken from.

    target_attributions: [rows, columns] or [rows, columns, parts]
    _parts:              names of the parts: "total", "hop 0", "hop 1", … and the components of the method
    _attributions:       one for every thing explained: a span, or each token of it

    Shown and aggregated by its total. Scores are shares of mass, so those of merged tokens are summed.
    """

    _parts: list[str] | None = None
    _attributions: list[Attribution] | None = None

    def __post_init__(self) -> None:
        # Inseq's defaults are tables of the process that every method writes into; ours stay with the object.
        self._dict_aggregate_fn = self._attribution_dim_names = None
        super().__post_init__()
        # While a file is written or read, the scores are bytes for a moment.
        ready = isinstance(self.target_attributions, Tensor)
        self._num_dimensions = self.target_attributions.ndim if ready else 0
        self._attribution_dim_names = {"target_attributions": dict(enumerate(_DIMENSIONS[: self._num_dimensions]))}
        self._dict_aggregate_fn = {"target_attributions": {"spans": "sum"}}
        self._aggregator = "hops" if self._num_dimensions == 3 else []

    def _recover_from_safetensors(self) -> FlashTraceSequenceOutput:
        super()._recover_from_safetensors()
        self.__post_init__()
        return self

    def __json_encode__(self) -> dict[str, Any]:
        records = [_encode(a) for a in self._attributions or []]
        return super().__json_encode__() | {"_parts": self._parts, "_attributions": records}

    def __json_decode__(self, **fields: Any) -> None:
        fields["_attributions"] = [Attribution.from_dict(record) for record in fields["_attributions"]]
        super().__json_decode__(**fields)

    def aggregate(self, aggregator: Any = None, aggregate_fn: Any = None, **options: Any) -> FlashTraceSequenceOutput:
        """As in Inseq. Raises InputError for options that nothing takes, and for means over the parts of a score."""
        names = _names(self._aggregator if aggregator is None else aggregator)
        self._check_options(names, options | ({} if aggregate_fn is None else {"aggregate_fn": aggregate_fn}))
        self._check_parts(names, options)
        return super().aggregate(aggregator, aggregate_fn, **options)

    def _check_options(self, names: list[str], options: dict[str, Any]) -> None:
        ours = set(names) <= _CHOOSE
        unknown = sorted(
            set(options) - _CHOOSE_BY if ours else {"hops"} & set(options) if _RECURSIVE not in names else []
        )
        if unknown:
            raise InputError(
                f"{', '.join(names) or 'a result without parts'} has no option {', '.join(unknown)}; a part of the "
                "score is chosen by hop=…, part=… or select_idx=…, and hops belongs to attribute()"
            )
        chosen = next((f"hop {v}" if k == "hop" else v for k, v in options.items() if k in ("hop", "part")), None)
        if not names and chosen is not None:
            raise no_parts(chosen)

    def _check_parts(self, names: list[str], options: dict[str, Any]) -> None:
        """Inseq's functions work over the last dimension, in which the total stands beside its own hops."""
        folds = [name for name in names if name == "scores" or name in list_aggregation_functions()]
        if not folds or isinstance(options.get("select_idx"), int):
            return
        if self._num_dimensions < 3 or _CHOOSE & set(names[: names.index(folds[0])]):
            raise InputError(
                f"{folds[0]!r} has nothing to work on: there is one number for each pair of tokens; leave it out"
            )
        raise InputError(
            f"{folds[0]!r} would mix the parts of the score, which are {', '.join(self._parts or [])} and not "
            "independent; choose one: hop=… or part=…"
        )

    def show(self, *args: Any, display: bool = True, return_html: bool = False, **kwargs: Any) -> Any:
        """As in Inseq, with what its table needs today: colours that are CSS, and a display that notebooks have.

        Inseq writes the numbers of a colour as numpy 2 prints them, and calls a function that IPython 9 has removed.
        """
        if kwargs.get("return_figure"):
            return super().show(*args, display=display, return_html=return_html, **kwargs)
        here = display and isnotebook()
        page = super().show(*args, display=display and not here, return_html=True, **kwargs)
        page = _NUMPY_NUMBER.sub(r"\1", page)
        if here:
            from IPython import display as notebook

            notebook.display(notebook.HTML(page))
        return page if return_html else None

    def weight_attributions(self, step_fn_id: str) -> FlashTraceSequenceOutput:
        """Raises InputError: there are no steps, and so no step scores to weigh them by."""
        raise InputError(
            f"a span is explained in one go and has no step score {step_fn_id!r}; compute step scores with "
            "method='dummy' and multiply the columns of a method that has one for each token, such as 'ifr'"
        )

    def __treescope_repr__(self, path: str, subtree_renderer: Any) -> Any:
        # As arrays, because treescope 0.1.10 cannot draw the tensors of torch 2.13.
        shown = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in self.to_dict().items()}
        return render_object_constructor(
            object_type=type(self), attributes=shown, path=path, subtree_renderer=subtree_renderer
        )

    def decode_tokens(self, tokenizer: Any) -> FlashTraceSequenceOutput:
        """Readable labels in place, the merged token included."""
        super().decode_tokens(tokenizer)
        for a in self._attributions or []:
            ids = list(a.token_ids[a.target.slice])
            label = "".join(tokenizer.convert_ids_to_tokens(ids))
            for token in self.target:
                if token.id < 0 and token.token == label:
                    token.token = tokenizer.decode(ids)
        return self


@dataclass(eq=False, repr=False)
class FailedSequenceOutput(FlashTraceSequenceOutput):
    """What stands in the place of an input that could not be explained: no tokens, no scores, and the reason.

    It is aggregated to itself, and shown as its text and reason.
    """

    _text: str = ""
    _reason: str = ""

    def __json_encode__(self) -> dict[str, Any]:
        return super().__json_encode__() | {"_text": self._text, "_reason": self._reason}

    def aggregate(self, aggregator: Any = None, aggregate_fn: Any = None, **options: Any) -> FlashTraceSequenceOutput:
        """Itself, so that the others of its batch can be aggregated."""
        return self

    def show(self, *args: Any, display: bool = True, return_html: bool = False, **kwargs: Any) -> Any:
        """The text and the reason, in the way the others show their table."""
        told = f"{self._text!r} could not be explained: {self._reason}"
        if display:
            print(told)
        return f"<p>{html.escape(told)}</p>" if return_html else None

    show_granular = show_tokens = show

    def get_scores_dicts(self, *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
        """No scores."""
        return {"source_attributions": {}, "target_attributions": {}, "step_scores": {}}


def not_explained(text: str, reason: str) -> FailedSequenceOutput:
    """What stands in the place of a text that could not be explained."""
    nothing = torch.zeros(0, 0, dtype=torch.float32)
    empty: dict[str, Any] = {"source": [], "target": [], "step_scores": {}, "sequence_scores": {}, "_attributions": []}
    return FailedSequenceOutput(target_attributions=nothing, attr_pos_end=0, _text=text, _reason=reason, **empty)


def failures(out: FeatureAttributionOutput) -> dict[int, str]:
    """Why inputs could not be explained, by their place among the inputs."""
    found = enumerate(out.sequence_attributions)
    return {i: item._reason for i, item in found if isinstance(item, FailedSequenceOutput)}


_CHOOSE = {"hops", "parts"}
"""Names of the aggregators that choose a part of the score."""
_CHOOSE_BY = {
    *("hop", "part", "select_idx", "normalize", "rescale"),
    *("do_pre_aggregation_checks", "do_post_aggregation_checks"),
}
_RECURSIVE = "recursive"


def _names(aggregator: Any) -> list[str]:
    """The names of the steps of whatever Inseq takes for an aggregator."""
    steps = getattr(aggregator, "aggregators", aggregator)
    steps = steps if isinstance(steps, (list, tuple)) else [steps]
    steps = [step[0] if isinstance(step, tuple) else step for step in steps]
    return [str(getattr(step, "aggregator_name", step)) for step in steps]


def no_parts(part: str) -> InputError:
    """The error where a part is chosen and there are none."""
    return InputError(
        f"there are no parts to choose {part!r} from: the scores are aggregated already, or come from a method "
        "without parts; aggregate the result of attribute() itself"
    )


def _encode(attribution: Attribution) -> dict[str, Any]:
    """For Inseq's writer: the dictionary of the attribution, with arrays, which it stores compactly."""
    return {key: _arrays(getattr(attribution, key, value), value) for key, value in attribution.to_dict().items()}


def _arrays(value: Any, otherwise: Any) -> Any:
    if isinstance(value, Tensor):
        return np.ascontiguousarray(value.numpy())
    if isinstance(otherwise, dict):
        return {name: _arrays(value[name], item) for name, item in otherwise.items()}
    return otherwise


def laid_out(tokens: Sequence[TokenWithId], attribution: Attribution) -> FlashTraceSequenceOutput:
    """A column for every target token where the attribution has them, ``components["per_token"]`` [M, N]; else one."""
    each = attribution.components.get("per_token")
    if each is not None and each.shape == (len(attribution.target), len(tokens)):
        return per_token(tokens, attribution, each)
    return merged(tokens, attribution)


def merged(tokens: Sequence[TokenWithId], attribution: Attribution) -> FlashTraceSequenceOutput:
    """One column for the whole target."""
    target = attribution.target
    scores, parts = _column(attribution, target.start + 1)
    return sequence([*tokens[: target.start], _joined(tokens[target.slice])], scores[:, None], [attribution], parts)


def columns(tokens: Sequence[TokenWithId], span: Span, attributions: list[Attribution]) -> FlashTraceSequenceOutput:
    """One column for each token of a span, from attributions of single tokens; 0 for a token that has none."""
    found = {a.target.start: _column(a, span.stop) for a in attributions}
    some, parts = found[attributions[0].target.start]
    scores = torch.stack([found[i][0] if i in found else torch.zeros_like(some) for i in span], dim=1)
    return sequence(tokens[: span.stop], _before_each(scores), attributions, parts)


def per_token(tokens: Sequence[TokenWithId], attribution: Attribution, each: Tensor) -> FlashTraceSequenceOutput:
    """One column for every target token. each: [M, N]"""
    stop = attribution.target.stop
    return sequence(tokens[:stop], _before_each(each[:, :stop].T), [attribution])


def _before_each(scores: Tensor) -> Tensor:
    """Scores [rows, columns, ...] whose last rows are the columns' tokens, NaN from its own token on in each."""
    rows, columns = scores.shape[:2]
    late = torch.arange(rows)[:, None] >= torch.arange(rows - columns, rows)
    scores = scores.clone()
    scores[late] = torch.nan
    return scores


def _column(a: Attribution, rows: int) -> tuple[Tensor, list[str]]:
    """Scores [rows, parts] by part, NaN from the target on, and the names of the parts.

    A component is a part if it has a number for every token before the target.
    """
    start = a.target.start
    over_tokens = {name: c for name, c in a.components.items() if c.ndim == 1 and len(c) >= start}
    everywhere = a.source_totals
    parts = {TOTAL: everywhere} | {f"hop {k}": hop for k, hop in enumerate(a.hop_scores)} | over_tokens
    if a.hops:
        parts[EVERYWHERE] = everywhere
        if a.reasoning is not None:
            parts[TOTAL] = everywhere * (torch.arange(len(everywhere)) < a.prompt.stop)
    before = torch.stack([scores[:start] for scores in parts.values()], dim=1)
    return torch.cat([before, torch.full((rows - start, len(parts)), torch.nan, dtype=before.dtype)]), list(parts)


def _joined(tokens: Sequence[TokenWithId]) -> TokenWithId:
    """One token is itself; several become one without an id, as in Inseq's aggregation."""
    return tokens[0] if len(tokens) == 1 else TokenWithId("".join(token.token for token in tokens), -1)


def sequence(
    tokens: Sequence[TokenWithId], scores: Tensor, attributions: list[Attribution], parts: list[str] | None = None
) -> FlashTraceSequenceOutput:
    """Inseq's result for one sequence.

    tokens: labels of the rows, the last of which are those of the columns
    scores: [rows, columns] or [rows, columns, parts]
    """
    start = len(tokens) - scores.shape[1]
    return FlashTraceSequenceOutput(
        source=[TokenWithId(t.token, t.id) for t in tokens[:start]],
        target=list(tokens),
        target_attributions=scores,
        step_scores={},
        sequence_scores={},
        attr_pos_start=start,
        attr_pos_end=len(tokens),
        _parts=parts,
        _attributions=attributions,
    )


def attributions(out: FeatureAttributionOutput) -> list[Attribution]:
    """The attributions behind a result: one for each span that was explained, in the order of the inputs.

    Inputs that could not be explained have none; :func:`failures` names them.
    They hold what a table of tokens cannot: hops over all positions, the mass on the reasoning, shares of heads and
    MLPs. Aggregating, merging, saving and loading keep them. Raises InputError for a result of another method.
    """
    explained = (item for item in out.sequence_attributions if not isinstance(item, FailedSequenceOutput))
    return [found for item in explained for found in attributions_of(item)]


def attributions_of(item: FeatureAttributionSequenceOutput) -> list[Attribution]:
    """Those of one input. Raises InputError for a result of another method."""
    if not getattr(item, "_attributions", None):
        raise InputError(
            f"a {type(item).__name__} holds no attributions; use a result of one of this package's methods "
            "that portable() has not stripped"
        )
    return list(item._attributions)


def portable(out: FeatureAttributionOutput, **select: Any) -> FeatureAttributionOutput:
    """The same result in a class of Inseq, for files that are to be loaded where this package is not installed.

    select: what to keep, as for ``aggregate``: ``hop=1``, or ``part="…"``; by default the total

    The spans go into ``info["spans"]``, the reasons of inputs that could not be explained into ``info["failures"]``;
    hops and attributions stay behind.
    """
    spans = [{name: getattr(a, name) for name in ("prompt", "reasoning", "target")} for a in attributions(out)]
    chosen = out.aggregate(**select)
    chosen.sequence_attributions = [
        CoarseFeatureAttributionSequenceOutput(**item.to_dict()) for item in chosen.sequence_attributions
    ]
    chosen.info["spans"] = [
        {name: None if span is None else [span.start, span.stop] for name, span in item.items()} for item in spans
    ]
    told = {str(i): reason for i, reason in failures(out).items()}
    chosen.info |= {"failures": told} if told else {}
    return chosen
