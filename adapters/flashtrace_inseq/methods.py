"""FlashTrace, IFR and the exhaustive recursion as feature attribution methods of Inseq.

They hold no maths: each runs its namesake of ``flashtrace_plugin`` on token ids. Inputs go one by one, because
Inseq's padded batches give decoder-only models wrong positions, and no hook stays on the model between calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar

from inseq.attr import FeatureAttribution
from inseq.data import FeatureAttributionOutput
from inseq.utils import Registry
from tqdm.auto import tqdm

from flashtrace_inseq import aggregators, outputs  # noqa: F401  (defining an aggregator registers it)
from flashtrace_inseq.inputs import Input, Where, encode, plain, split_options
from flashtrace_inseq.outputs import FlashTraceSequenceOutput
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.flashtrace import IFR, FlashTrace, RecursiveAttribution


# Registry is a base once more, because Inseq takes every other subclass for a method with a name.
class PluginAttribution(FeatureAttribution, Registry):
    """What the methods of this package share: texts in, one sequence output for each."""

    core: ClassVar[type[Method]]

    def __init__(self, attribution_model: Any, hook_to_model: bool = True, **kwargs: Any) -> None:
        given = sorted(self.options() & kwargs.keys())
        if given:
            raise InputError(f"{', '.join(given)}: pass options to attribute(), where they belong to one result")
        super().__init__(attribution_model, hook_to_model)
        # These two make Inseq refuse step scores, and warn that an attributed function has no influence.
        self.is_final_step_method = True
        self.use_predicted_target = False
        self.build({}, progress=False)

    @classmethod
    def options(cls) -> set[str]:
        """Names of the arguments that ``attribute`` takes for this method."""
        parameters = inspect.signature(cls.core.__init__).parameters.values()
        return {"target", "reasoning"} | {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}

    def get_attribution_args(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits the arguments of ``attribute`` into those of the method and the rest, which Inseq warns about."""
        mine = self.options()
        rest = {key: value for key, value in kwargs.items() if key not in mine and key != "skip_special_tokens"}
        return {key: plain(value) for key, value in kwargs.items() if key in mine}, rest

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
        **kwargs: Any,
    ) -> list[FeatureAttributionOutput]:
        """Attributes texts one by one; called by ``attribute`` of Inseq's model, whose arguments these are.

        sources, targets: prompts, and prompts with their generations
        batch_size:       without effect
        kwargs:           further arguments of Inseq, noted in the result's ``info``
        """
        begin = datetime.now()
        self._check_steps(step_scores, output_step_attributions)
        function = self.attribution_model.get_attributed_fn(attributed_fn)
        self._run_compatibility_checks(function)
        prompts, texts = ([t] if isinstance(t, str) else t for t in (sources, targets))
        options = self._check_options(attribution_args or {})
        info = kwargs | {"attributed_fn": function.__name__, "attribution_args": dict(options)}
        wanted = split_options(options, len(texts), attr_pos_start, attr_pos_end)
        method = self.build(options, show_progress)
        rows = zip(prompts, texts, wanted, strict=True)
        bar = tqdm(rows, self.method_name, len(texts), disable=not show_progress or len(texts) == 1)
        how = {"special": not skip_special_tokens, "clean": clean_special_chars}
        found = [self.explain(method, encode(self.attribution_model, p, t, **how), where) for p, t, where in bar]
        return [self._output(found, info | {"exec_time": (datetime.now() - begin).total_seconds()})]

    def build(self, options: dict[str, Any], progress: bool) -> Method:
        """The method that does the work."""
        return self.core(self.attribution_model.model, self.attribution_model.tokenizer, **options)

    def explain(self, method: Any, read: Input, where: Where) -> FlashTraceSequenceOutput:
        """The result for one input."""
        return outputs.merged(read.tokens, read.attribute(method, *read.locate(where)))

    def _check_steps(self, step_scores: list[str] | None, output_step_attributions: bool) -> None:
        if step_scores or output_step_attributions:
            raise InputError(
                f"{self.method_name!r} explains a span in one go, so there are no steps for step_scores or "
                "output_step_attributions; leave them out, or compute step scores with method='dummy'"
            )

    def _check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(options.keys() - self.options())
        if unknown:
            raise InputError(
                f"{self.method_name!r} has no option {', '.join(unknown)}; "
                f"it takes {', '.join(sorted(self.options()))}"
            )
        return plain(options)

    def _output(self, found: list[FlashTraceSequenceOutput], info: dict[str, Any]) -> FeatureAttributionOutput:
        common = {
            "attribution_method": self.method_name,
            "attr_pos_start": min(item.attr_pos_start for item in found),
            "attr_pos_end": max(item.attr_pos_end for item in found),
            "output_step_attributions": False,
            "step_scores": [],
        }
        return FeatureAttributionOutput(sequence_attributions=found, info=common | info | self.attribution_model.info)


class FlashTraceAttribution(PluginAttribution):
    """FlashTrace: explains a whole answer by the prompt, through the reasoning in between, in one forward pass.

    The answer is one column, its tokens merged. ``out.show()`` gives the total over hops, in which reasoning that was
    followed has 0, because its mass counts on the tokens that it came from. ``out.show(hop=k)`` gives hop k, on all
    tokens, ``flashtrace_inseq.attributions(out)`` all numbers.

    Reference: `Towards Long-Horizon Interpretability: Efficient and Faithful Multi-Token Attribution for
    Reasoning LLMs <https://arxiv.org/abs/2602.01914>`__.

    Args (of ``attribute``):
        target (:obj:`list` of :obj:`int` or :obj:`str`, `optional`): What to explain: ``[start, stop]`` in token
            positions from the start of the prompt, or a piece of the generated text; for several inputs also a list
            with one for each. ``attr_pos_start`` and ``attr_pos_end`` are another way to give it. Default: the
            answer, which is what follows ``</think>``, narrowed by ``<answer>`` or ``\\boxed{}``; without these,
            all that was generated.
        reasoning (:obj:`list` of :obj:`int` or :obj:`str`, `optional`): What to follow importance through, given in
            the same ways. Default: the thinking before the target.
        hops (:obj:`int`, `optional`): How many times importance is followed through the reasoning. Default: ``1``.
        recursion (:obj:`str`, `optional`): ``"reasoning"`` follows the mass on the reasoning, as in the paper,
            ``"generation"`` that on reasoning and target. Default: ``"reasoning"``.
        positions (:obj:`str`, `optional`): ``"token"``, a token's own position stands for it, as in the paper, or
            ``"predicting"``, the position before it, whose output it is. Default: ``"token"``.
        ignore (:obj:`list` of :obj:`str` or :obj:`int`, `optional`): Tokens left out of targets and scores, as texts
            without surrounding space or as ids. Default: none.
    """

    method_name = "flashtrace"
    core = FlashTrace


class IFRAttribution(PluginAttribution):
    """Information flow routes: every generated token is explained by itself, one column each.

    A column holds the sum over layers of the token's normalised sources; what stays on the token itself is left
    out. ``flashtrace_inseq.attributions(out)`` holds the mean over the target, on the prompt.

    Reference: `Information Flow Routes: Automatically Interpreting Language Models at Scale
    <https://arxiv.org/abs/2403.00824>`__, as in Eq. 30 and 31 of `FlashTrace <https://arxiv.org/abs/2602.01914>`__.

    Args (of ``attribute``):
        target, reasoning: As for ``"flashtrace"``; see ``inseq.explain("flashtrace")``.
    """

    method_name = "ifr"
    core = IFR

    def explain(self, method: Any, read: Input, where: Where) -> FlashTraceSequenceOutput:
        """The result for one input, a column for every token of the target."""
        return outputs.per_token(read.tokens, read.attribute(method, *read.locate(where)))


class RecursiveTokenAttribution(PluginAttribution):
    """The exhaustive recursion that FlashTrace replaces: every token of reasoning and target is traced by itself.

    Costs as many times more as reasoning and target have tokens. The result is laid out as that of ``"flashtrace"``.

    Reference: Appendix D.3 of `FlashTrace <https://arxiv.org/abs/2602.01914>`__.

    Args (of ``attribute``):
        target, reasoning, hops: As for ``"flashtrace"``; see ``inseq.explain("flashtrace")``.
    """

    method_name = "recursive"
    core = RecursiveAttribution
