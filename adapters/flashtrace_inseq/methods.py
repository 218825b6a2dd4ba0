"""What every method of ``flashtrace_plugin`` is in Inseq; the classes themselves are made from the registry.

They hold no maths: each runs its namesake of ``flashtrace_plugin`` on token ids. Inseq's own batches are not used:
they are padded at the left, which gives some decoders other positions. No hook stays on the model between calls.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from textwrap import TextWrapper
from typing import Any, ClassVar

from inseq.attr import STEP_SCORES_MAP, FeatureAttribution
from inseq.data import FeatureAttributionOutput
from inseq.utils import Registry
from inseq.utils.typing import TokenWithId

from flashtrace_inseq import outputs
from flashtrace_inseq.inputs import Wanted, checked_texts, encode, labelled, wanted
from flashtrace_inseq.kernels import without_stored_patterns
from flashtrace_inseq.outputs import FlashTraceSequenceOutput
from flashtrace_plugin.attribution import plain
from flashtrace_plugin.errors import FlashTraceError, InputError
from flashtrace_plugin.methods.base import Method, options_of
from flashtrace_plugin.methods.batch import caught
from flashtrace_plugin.text import TokenizedText

_GIVEN = (
    "a piece of the generated text, or token positions from the start of the prompt, negative ones from the end: "
    "[start, stop], a slice, or one position; for several inputs also a list with one for each"
)


Read = Any
"""A TokenizedText, or the FlashTraceError of an input that could not be read."""
Outcome = Any
"""A FlashTraceSequenceOutput, or the FlashTraceError of an input that could not be explained."""


def is_error(one: Any) -> bool:
    """Whether it stands for an input that failed."""
    return isinstance(one, FlashTraceError)


# Registry is a base once more, because Inseq takes every other subclass for a method with a name.
class PluginAttribution(FeatureAttribution, Registry):
    """What the methods of this package share: texts in, one sequence output for each.

    core:           the method of ``flashtrace_plugin`` that it runs
    default_target: what is explained where no target is given, in words
    explains:       the objective that it has by nature, as LRP names it; None for what follows the model's flow
    """

    core: ClassVar[type[Method]]
    explains: ClassVar[str | None] = None
    default_target: ClassVar[str] = (
        "the answer, which is what follows the reasoning, narrowed by <answer> or \\boxed{}; all that was generated "
        "where there is neither"
    )

    def __init__(self, attribution_model: Any, hook_to_model: bool = True, **kwargs: Any) -> None:
        if kwargs:
            raise InputError(
                f"{', '.join(sorted(kwargs))}: pass options to attribute(), where they belong to one result; "
                "load_model takes those of the model (model_kwargs) and of the tokenizer (tokenizer_kwargs)"
            )
        super().__init__(attribution_model, hook_to_model)
        self.is_final_step_method = True  # makes Inseq refuse step scores
        self.build({}, progress=False)

    @classmethod
    def arguments(cls) -> dict[str, str]:
        """What ``attribute`` takes for this method: names with a line of help."""
        spans = {
            "target": f"target: what to explain: {_GIVEN}; default: {cls.default_target}",
            "reasoning": "reasoning: what to follow importance through, given in the same ways; default: the thinking "
            "before the target",
        }
        return spans | {one.name: one.shown() for one in options_of(cls.core)}

    @classmethod
    def options(cls) -> set[str]:
        """Names of the arguments that ``attribute`` takes for this method."""
        return set(cls.arguments())

    @classmethod
    def explanation(cls) -> str:
        """What :func:`inseq.explain` prints: what the method is, how its result is laid out, and its arguments."""
        about = (cls.core.__doc__ or "").partition("\nOptions:\n")[0].strip()
        lines = [_WRAPPED.fill(line) for line in cls.arguments().values()]
        return "\n".join([about, "", _LAYOUT, "", "Args (of ``attribute``):", "", *lines, ""])

    def get_attribution_args(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """All arguments of ``attribute`` as the method's, and none that Inseq would merely warn about."""
        return {key: value for key, value in kwargs.items() if key != "skip_special_tokens"}, {}

    def prepare_and_attribute(
        self,
        sources: str | list[str],
        targets: str | list[str],
        *,
        batch_size: int | None = None,
        attr_pos_start: int | None = None,
        attr_pos_end: int | None = None,
        show_progress: bool = True,
        output_step_attributions: bool = False,
        step_scores: list[str] | None = None,
        skip_special_tokens: bool = False,
        clean_special_chars: bool = False,
        attributed_fn: str | Callable[..., Any] | None = None,
        attribution_args: dict[str, Any] | None = None,
        attributed_fn_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[FeatureAttributionOutput]:
        """Attributes texts one by one; called by ``attribute`` of Inseq's model, whose arguments these are.

        sources, targets: prompts, and prompts with their generations
        batch_size:       without effect, which is said where there are several texts
        kwargs:           further arguments of Inseq, noted in the result's ``info``
        """
        begin = datetime.now()
        self._check_steps(step_scores, output_step_attributions)
        prompts, texts = checked_texts(sources, targets)
        function, function_args = self.attribution_model.get_attributed_fn(attributed_fn), attributed_fn_args or {}
        options = self._check_options(attribution_args or {}, function_args)
        if function is STEP_SCORES_MAP["contrast_logits_diff"] and "against" in self.options():
            options |= self._contrasted(options, function_args, prompts, texts)
        else:
            options = self._attributed(function, function_args, options)
        self._warn_unused(options, kwargs | {"batch_size": batch_size if len(texts) > 1 else None})
        info = kwargs | {
            "attributed_fn": function.__name__,
            "attributed_fn_args": function_args,
            "attribution_args": plain(options),
        }
        target, reasoning = (options.pop(name, None) for name in ("target", "reasoning"))
        method = self.build(options, show_progress)
        where = wanted(target, reasoning, len(texts), attr_pos_start, attr_pos_end)
        read = [
            caught(partial(self._read, method, *pair, special=not skip_special_tokens))
            for pair in zip(prompts, texts, strict=True)
        ]
        with without_stored_patterns(self.attribution_model.model):
            found = self.explain(method, read, where, show_progress and len(texts) > 1, clean_special_chars)
        items = self._in_place(found, texts)
        return [self._output(items, info | {"exec_time": (datetime.now() - begin).total_seconds()})]

    def build(self, options: dict[str, Any], progress: bool) -> Method:
        """The method that does the work."""
        return self.core(self.attribution_model.model, self.attribution_model.tokenizer, **options)

    def explain(
        self, method: Any, texts: Sequence[Read], where: Sequence[Wanted], progress: bool, clean: bool
    ) -> list[Outcome]:
        """The result for every input, or its error.

        texts: the inputs, with errors in the places of those that could not be read
        clean: whether labels are without the tokenizer's marks
        """
        chosen = [
            one if is_error(one) else caught(partial(w.chosen, one)) for one, w in zip(texts, where, strict=True)
        ]
        found = method.attribute_texts(
            [target if is_error(target) else one for one, target in zip(texts, chosen, strict=True)],
            targets=chosen,
            reasonings=[one.reasoning for one in where],
            progress=progress,
            errors="return",
        )
        return [one if is_error(one) else outputs.laid_out(self.labels(one.token_ids, clean), one) for one in found]

    def labels(self, ids: Iterable[int], clean: bool) -> list[TokenWithId]:
        """The tokens as Inseq shows them."""
        return labelled(self.attribution_model, ids, clean)

    def _read(self, method: Method, prompt: str, text: str, special: bool) -> TokenizedText:
        return method.read_ids(*encode(self.attribution_model, prompt, text, special))

    def _in_place(self, found: Sequence[Outcome], texts: Sequence[str]) -> list[FlashTraceSequenceOutput]:
        """What was found, with the reason in the place of an input that failed. Raises its error if all did."""
        bad = {i: str(one) for i, one in enumerate(found) if is_error(one)}
        if len(bad) == len(found):
            raise found[0]
        if bad:
            first = next(iter(bad))
            warnings.warn(
                f"{self.method_name!r} could not explain {len(bad)} of {len(found)} inputs; their places hold the "
                f"reason, and flashtrace_inseq.failures(out) lists them. Input {first}: {bad[first]}",
                stacklevel=4,
            )
        return [outputs.not_explained(texts[i], bad[i]) if i in bad else one for i, one in enumerate(found)]

    def _check_steps(self, step_scores: list[str] | None, output_step_attributions: bool) -> None:
        if step_scores or output_step_attributions:
            raise InputError(
                f"{self.method_name!r} explains a span in one go, so there are no steps for step_scores or "
                "output_step_attributions; leave them out, or compute step scores with method='dummy'"
            )

    def _check_options(self, options: dict[str, Any], elsewhere: dict[str, Any]) -> dict[str, Any]:
        """The method's options; those in ``elsewhere`` are the attributed function's."""
        options = {name: value for name, value in options.items() if name in self.options() or name not in elsewhere}
        unknown = sorted(options.keys() - self.options())
        if unknown:
            raise InputError(
                f"{self.method_name!r} has no option {', '.join(unknown)}; "
                f"it takes {', '.join(sorted(self.options()))}"
            )
        return {name: list(value) if isinstance(value, Iterator) else value for name, value in options.items()}

    def _attributed(
        self, function: Callable[..., Any], args: dict[str, Any], options: dict[str, Any]
    ) -> dict[str, Any]:
        """The options by which the method explains what Inseq is told to attribute. Raises InputError if it cannot."""
        args = {name: value for name, value in args.items() if value != _default(function, name)}
        if not args and function is self.attribution_model.get_attributed_fn(None):
            return options
        told = f"attributed_fn={function.__name__}" + (f" with {', '.join(sorted(args))}" if args else "")
        objective = _objective(function, args)
        if "objective" not in self.options():
            if objective is not None and objective == self.explains:
                return options
            raise InputError(f"{told}: {self.method_name!r} explains {_EXPLAINED[self.explains]}; {_LEAVE_OUT}")
        if objective is None:
            raise InputError(
                f"{told}: {self.method_name!r} explains an objective of its own; {_LEAVE_OUT}: objective='logit', "
                "objective='log_probability', or objective='contrast' with against='…'. Of Inseq's it takes logit, "
                "probability with logprob=True, and contrast_logits_diff with contrast_targets"
            )
        if options.get("objective", objective) != objective:
            raise InputError(f"{told} and objective={options['objective']!r} are two objectives; use one")
        return options | {"objective": objective}

    def _contrasted(
        self, options: dict[str, Any], args: dict[str, Any], prompts: list[str], texts: list[str]
    ) -> dict[str, Any]:
        """The options that explain a token against that of another text, where the two first differ.

        Raises InputError for contrasts that are no such text.
        """
        other = args.get("contrast_targets")
        others = [other] if isinstance(other, str) else other
        if set(args) != {"contrast_targets"} or not isinstance(others, list) or list(map(type, others)) != [str]:
            raise InputError(
                f"contrast_logits_diff with {', '.join(sorted(args)) or 'nothing'}: {self.method_name!r} contrasts "
                "one text with another: pass contrast_targets, a prompt and what might have followed it, alone"
            )
        if len(texts) > 1:
            raise InputError(
                f"one contrast for {len(texts)} inputs; attribute them one by one, each with its contrast"
            )
        (ids, _), (foils, _) = (encode(self.attribution_model, prompts[0], text) for text in (texts[0], others[0]))
        first = next((i for i, (a, b) in enumerate(zip(ids, foils, strict=False)) if a != b), None)
        if first is None:
            raise InputError("the text and contrast_targets are one, or one begins like the other; nothing differs")
        wanted = {"objective": "contrast", "against": foils[first], "target": first}
        clash = [name for name in wanted if options.get(name) not in (None, wanted[name])]
        if clash:
            raise InputError(
                f"contrast_targets first differs at token {first}, which is what is explained; leave out "
                f"{', '.join(clash)}"
            )
        return wanted

    def _warn_unused(self, options: dict[str, Any], given: dict[str, Any]) -> None:
        """One warning for all that was given and changes nothing."""
        names = {"batch_size": (None, 1), "include_eos_baseline": (None, False)}
        unused = [
            name for name, usual in names.items() if given.get(name) not in usual and name not in self.uses(options)
        ]
        if unused:
            warnings.warn(
                f"{self.method_name!r} makes no use of {', '.join(unused)}: which texts run together is found by "
                "their lengths, and there are no baselines",
                stacklevel=4,
            )

    def uses(self, options: dict[str, Any]) -> set[str]:
        """Names of further arguments of Inseq's ``attribute`` that the method makes use of."""
        return set()

    def _output(self, found: list[FlashTraceSequenceOutput], info: dict[str, Any]) -> FeatureAttributionOutput:
        common = {
            "attribution_method": self.method_name,
            "attr_pos_start": min(item.attr_pos_start for item in found if item.target),
            "attr_pos_end": max(item.attr_pos_end for item in found if item.target),
            "output_step_attributions": False,
            "step_scores": [],
        }
        return FeatureAttributionOutput(sequence_attributions=found, info=common | info | self.attribution_model.info)


_LEAVE_OUT = "leave attributed_fn out, or use another method"
_EXPLAINED = {
    None: "the flow that the model computed, whatever is asked of its output",
    "log_probability": "the log-probability of the target",
}


def _default(function: Callable[..., Any], name: str) -> Any:
    """What an argument of an attributed function is unless it is given."""
    return inspect.signature(function).parameters[name].default


def _objective(function: Callable[..., Any], args: dict[str, Any]) -> str | None:
    """The objective of a step function of Inseq, where methods of this package have it."""
    if function is STEP_SCORES_MAP["logit"]:
        return "logit"
    logarithm = function is STEP_SCORES_MAP["probability"] and args == {"logprob": True}
    return "log_probability" if logarithm else None


_WRAPPED = TextWrapper(width=118, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)

_LAYOUT = """\
A target that is explained as a whole is one column, its tokens merged; where every token is explained by itself, each
has a column. ``out.show()`` gives the total over hops, in which reasoning that was followed has 0, because its mass
counts on the tokens that it came from. ``out.show(hop=k)`` gives hop k on all tokens, ``out.show(part="...")`` a
component of the score by its name, ``flashtrace_inseq.attributions(out)`` all numbers."""
