"""The one method that Inseq's users expect to explain generated tokens: HETA, per token or for a span as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from inseq.utils import Registry
from tqdm.auto import tqdm

from flashtrace_inseq import outputs
from flashtrace_inseq.inputs import Wanted
from flashtrace_inseq.methods import Outcome, PluginAttribution, Read, is_error
from flashtrace_inseq.outputs import FlashTraceSequenceOutput
from flashtrace_plugin.errors import ReasoningWarning
from flashtrace_plugin.methods.batch import caught
from flashtrace_plugin.methods.heta import HETA
from flashtrace_plugin.methods.heta.options import PRESETS
from flashtrace_plugin.positions import Positions
from flashtrace_plugin.text import TokenizedText


class TokenByToken(PluginAttribution, Registry):
    """HETA in Inseq: without a target every generated token has a column of its own, and presets have names."""

    core: ClassVar[type[HETA]]
    explains = "log_probability"
    default_target = (
        "every generated token by itself, one column each; attr_pos_start and attr_pos_end choose which. A target is "
        "explained as a whole, by its joint log-probability"
    )

    @classmethod
    def arguments(cls) -> dict[str, str]:
        """Those of the core method and the name of a preset; Inseq's ``show_progress`` replaces ``progress``."""
        known = super().arguments()
        del known["progress"]
        names = ", ".join(map(repr, PRESETS))
        return known | {
            "preset": f"preset: a variant of the paper, whose settings further options override ({names}); "
            "default: 'full'"
        }

    def build(self, options: dict[str, Any], progress: bool) -> HETA:
        """The preset with the user's options."""
        host, rest = self.attribution_model, dict(options)
        preset = rest.pop("preset", "full")
        return self.core.preset(host.model, host.tokenizer, preset, **rest, progress=progress)

    def explain(
        self, method: Any, texts: Sequence[Read], where: Sequence[Wanted], progress: bool, clean: bool
    ) -> list[Outcome]:
        """The result for every input: a column for its target, or one for each generated token."""
        if any(one.target is not None for one in where):
            return super().explain(method, texts, where, progress, clean)
        rows = tqdm(zip(texts, where, strict=True), self.method_name, len(texts), disable=not progress)
        return [one if is_error(one) else caught(partial(self._each, method, one, w, clean)) for one, w in rows]

    def _each(self, method: Any, text: TokenizedText, where: Wanted, clean: bool) -> FlashTraceSequenceOutput:
        """A column for each generated token of one input."""
        span = where.between(text)
        ignored = method.ignored(text.input_ids)
        # If all are ignored, the first is refused by the method, in its words.
        positions = [i for i in span if not ignored[i]] or list(span)
        quiet = copy(method)
        quiet.options = replace(method.options, progress=False)
        bar = tqdm(positions, self.method_name, disable=not method.options.progress)
        with warnings.catch_warnings():
            if _follows(method, text, where.reasoning, positions[-1]):
                # Tokens before the reasoning's end have none to follow, which is as it should be.
                warnings.simplefilter("ignore", ReasoningWarning)
            found = [quiet.attribute_text(text, target=i, reasoning=_before(text, where.reasoning, i)) for i in bar]
        return outputs.columns(self.labels(text.input_ids.tolist(), clean), span, found)


def _before(text: TokenizedText, reasoning: Positions | str | None, position: int) -> Positions | str | None:
    """Reasoning that was chosen for the answer does not yet exist for a token before its end."""
    if reasoning is None or text.span("reasoning", reasoning).stop > position:
        return None
    return reasoning


def _follows(method: HETA, text: TokenizedText, reasoning: Positions | str | None, last: int) -> bool:
    """Whether the last token has reasoning to follow."""
    return text.parts(last, _before(text, reasoning, last), method.driving.format).reasoning is not None
