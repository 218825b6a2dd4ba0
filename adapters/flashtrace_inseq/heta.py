"""HETA as a feature attribution method of Inseq: per generated token, or for a span as a whole."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from tqdm.auto import tqdm

from flashtrace_inseq import outputs
from flashtrace_inseq.inputs import Input, Where
from flashtrace_inseq.methods import PluginAttribution
from flashtrace_inseq.outputs import FlashTraceSequenceOutput
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.heta import HETA
from flashtrace_plugin.spans import Span


class HETAAttribution(PluginAttribution):
    """Hessian-enhanced token attribution: an attention gate times curvature and information of the log-probability.

    By default every generated token is explained by itself, one column each. A ``target`` is explained as a whole,
    by its joint log-probability, in one column. ``out.show()`` gives the scores of the tokens before,
    ``out.show(part="gate")``, ``part="curvature"`` and ``part="information"`` what they are made of.

    Reference: `Can Linear Attributions Explain Nonlinear LLMs?`, Eq. 3 to 5; masks, windows and variants as there.

    Args (of ``attribute``):
        target, reasoning: As for ``"flashtrace"``, but there is no default target. ``attr_pos_start`` and
            ``attr_pos_end`` choose the generated tokens that get a column.
        preset (:obj:`str`, `optional`): A variant of the paper, ``"full"``, ``"LR"``, ``"LS"``, ``"WIN"``,
            ``"LR+WIN"``, ``"LS+WIN"`` or ``"GS"``; further options override its settings. Default: ``"full"``.
        beta, gamma (:obj:`float`, `optional`): Weights of curvature and information. Default: ``0.5`` each.
        gate (:obj:`str`, `optional`): ``"flow"``, ``"per_head"``, ``"uniform"`` or ``None``. Default: ``"flow"``.
        curvature (:obj:`str`, `optional`): ``"full"``, ``"low_rank"``, ``"gradient_squared"`` or ``None``, which
            leaves it out. Default: ``"full"``.
        probes (:obj:`int`, `optional`): Random sign vectors for each token. Default: ``8``.
        rank (:obj:`int`, `optional`): Rank of ``curvature="low_rank"``. Default: ``64``.
        last_layers (:obj:`int`, `optional`): Differentiate by what enters the last so many layers instead of the
            embeddings. Default: embeddings.
        mask (:obj:`str`, `optional`): What a masked token becomes: ``"zero"``, ``"mean"``, ``"pad"``, ``"token"``;
            ``None`` leaves information out. Default: ``"zero"``.
        mask_token (:obj:`int` or :obj:`str`, `optional`): The token of ``mask="token"``.
        window (:obj:`int`, `optional`), overlap (:obj:`float`, `optional`): Tokens in a window, and the share of it
            that the next one repeats. Default: one window, ``0.5``.
        rescale (:obj:`str`, `optional`): ``"max"`` divides each term by its maximum first. Default: no rescaling.
        hops (:obj:`int`, `optional`): How many times importance is followed through the reasoning. Default: ``0``.
        seed (:obj:`int`, `optional`): Of the random vectors. Default: ``0``.
        memory_budget (:obj:`int`, `optional`): Bytes to aim for in batches. Default: 2 GiB.
    """

    method_name = "heta"
    core = HETA

    @classmethod
    def options(cls) -> set[str]:
        """Those of the core method and the name of a preset; Inseq's ``show_progress`` replaces ``progress``."""
        return super().options() - {"progress"} | {"preset"}

    def build(self, options: dict[str, Any], progress: bool) -> HETA:
        """The preset with the user's options."""
        host = self.attribution_model
        return HETA.preset(
            host.model, host.tokenizer, options.get("preset", "full"),
            **{name: value for name, value in options.items() if name != "preset"}, progress=progress,
        )  # fmt: skip

    def explain(self, method: Any, read: Input, where: Where) -> FlashTraceSequenceOutput:
        """The result for one input: a column for the target, or one for each generated token."""
        if where.target is not None:
            return super().explain(method, read, where)
        span = read.between(where.start, where.stop)
        single = copy(method)
        single.progress = False
        found = []
        for position in tqdm(span, self.method_name, disable=not method.progress):
            target, reasoning = read.locate(Where(Span(position, position + 1), where.reasoning))
            # Reasoning that was chosen for the answer does not yet exist for a token before its end.
            before = reasoning if reasoning and reasoning.stop <= position else None
            found.append(read.attribute(single, target, before))
        return outputs.columns(read.tokens, found)

    def _run_compatibility_checks(self, attributed_fn: Callable[..., Any]) -> None:
        if attributed_fn is not self.attribution_model.get_attributed_fn(None):
            raise InputError(
                f"attributed_fn={attributed_fn.__name__}: 'heta' explains the log-probability of the target; "
                "leave attributed_fn out, or use another method"
            )
