"""What users get by default: the setting that found the evidence best, on halves that it was not chosen on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.methods.lrp import LRP, LRPOptions
from flashtrace_plugin.methods.options import driven, option
from flashtrace_plugin.text import Prompt, Where


@dataclass(frozen=True)
class _RecommendedOptions(LRPOptions):
    """LRP's options with other defaults."""

    rule: str = option("attn", "as for lrp", choices=("cp", "attn"))
    reading: str = option("product", "as for lrp", choices=("embeddings", "layers", "product"))
    context: str = option("generation", "as for lrp", choices=("target", "generation"))


class Recommended(LRP):
    """The recommended setting of LRP: what the target asks for, among what the generation rests on, all the way up.

    Importance is the product of four readings of one linearised pass (rule "attn"): relevance at the embeddings and
    along all layers, for the target through one hop of reasoning and for the whole generation. Positions that draw
    mass whatever the target are told (``sinks``, and ``settings["sink_share"]`` of the mass) and not shown by ``top``
    and reports; deletion and insertion need them, for without them many models write nothing. docs/recommended.md
    shows how it was chosen and where it is worse. The setting may change between versions; results note all of it.
    """

    name = "recommended"
    Options = _RecommendedOptions
    drives = driven(hops=1, recursion="reasoning", ignore=(), sinks="report")


def explain(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    generation: str,
    *,
    target: Where | None = None,
    reasoning: Where | None = None,
    **options: Any,
) -> Attribution:
    """Explains a generated text by its prompt, with the recommended method and settings.

    model, tokenizer: as for every method
    prompt, generation, target, reasoning: as for :meth:`flashtrace_plugin.Method.attribute`
    options:          settings of :class:`Recommended` to change, such as ``hops=0``

    It costs one forward pass and, as backward passes cost about 1.2 to 1.9 forward passes, some 3 to 7 in all. Raises
    what :meth:`~flashtrace_plugin.Method.attribute` raises.
    """
    method = Recommended(model, tokenizer, **options)
    return method.attribute(prompt, generation, target=target, reasoning=reasoning)
