"""FlashTrace as a TransformerLens analysis: one function, the model first, options by keyword.

FlashTrace (arXiv 2602.01914) asks which earlier tokens a span of tokens was made of. The span's positions are summed
into one vector, every layer's heads and its residual bypass are measured by how much of that vector disappears without
them, and the importance found on the reasoning is followed back in further hops. Unlike direct logit attribution,
nothing is projected on the unembedding: shares are of the residual stream itself, never negative, and need no answer
token.

A bridge makes attention patterns whole for a moment, H N² numbers per layer; none outlives its layer.

Example::

    from transformer_lens import TransformerBridge
    from flashtrace_lens import flashtrace

    bridge = TransformerBridge.boot_transformers("Qwen/Qwen3-0.6B")
    tokens = bridge.to_tokens(prompt + generation)
    result = flashtrace(bridge, tokens, target=(120, 124), reasoning=(31, 118))
    result.top(5)                    # tokens of the prompt
    result.top(5, unit="head")       # [('L11H3', 0.061), ...]

Every registered method is such a function, made from what it declares: ``flashtrace_lens.ifr``, ``.heta``, and that
of ``register_method`` under its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as cached
from typing import Any

from torch import Tensor

from flashtrace_lens.result import FlashTraceResult
from flashtrace_lens.sources import as_ids, checked_bridge, padding
from flashtrace_plugin.errors import InputError, MethodError, SpanError
from flashtrace_plugin.methods.base import Method, options_of
from flashtrace_plugin.methods.flashtrace import FlashTrace
from flashtrace_plugin.positions import Positions, as_span, prompt_before
from flashtrace_plugin.spans import Span

_DOC = """{about}

Args:
    bridge: A ``TransformerBridge`` whose weights have not been processed.
    tokens: Prompt and generation: a text, or token ids [pos] or [1, pos]. Padding at the beginning, where it is
        unmistakable, is left out; positions count in what is given, the result's in the text without it.
    target: What to explain: positions, or a piece of the generation. By default the answer, which needs
        ``prompt_length`` and the bridge's tokenizer.
    reasoning: What to follow importance through, between prompt and target; by default the thinking before the
        target, where prompt_length says where the generation begins.
    prompt_length: Number of prompt tokens; by default all that come before reasoning and target.
    cache: An ``ActivationCache`` of these tokens, used instead of running the model. It must hold what
        ``names_filter`` of this package selects, the whole patterns among it.
{options}

Returns:
    A :class:`FlashTraceResult`.

Raises:
    SpanError, InputError: For positions, ids or a cache that do not fit; a missing hook is named.
    UnsupportedModelError: For processed weights, or layers without softmax attention.
    ClosureError: If the parts do not add up, or the bridge's logits are not its Hugging Face model's.
"""


@cached
def analysis_of(method: type[Method]) -> Callable[..., FlashTraceResult]:
    """A method as a function of a bridge, its options as keywords. Raises MethodError for options that clash."""

    def analysis(
        bridge: Any,
        tokens: str | Tensor,
        *,
        target: Positions | str | None = None,
        reasoning: Positions | str | None = None,
        prompt_length: int | None = None,
        cache: Any = None,
        **options: Any,
    ) -> FlashTraceResult:
        run = method(_readable(bridge, cache), **options)
        given = as_ids(bridge, tokens).flatten()
        padded = padding(bridge, given)
        ids = run.source.check_ids(given[padded:])[0]
        if padded:
            target = _behind(padded, "target", target, len(given))
            reasoning = _behind(padded, "reasoning", reasoning, len(given))
            prompt_length = None if prompt_length is None else prompt_length - padded
        if prompt_length is None:
            prompt_length = _prompt_before(target, reasoning, len(ids))
        text = run.read_ids(ids, prompt_length)
        return FlashTraceResult.of(run.attribute_text(text, target=target, reasoning=reasoning))

    analysis.__signature__ = _explicit(method, analysis)  # type: ignore[attr-defined]
    analysis.__doc__ = _documentation(method)
    analysis.__name__ = analysis.__qualname__ = method.name
    analysis.__module__ = "flashtrace_lens"
    return analysis


def _readable(bridge: Any, cache: Any) -> Any:
    """What the method reads: the bridge, or the cache where there is one, which must be the bridge's own."""
    checked_bridge(bridge)
    if cache is not None and getattr(cache, "model", None) is not bridge:
        raise InputError("cache must be the ActivationCache of this very bridge, as bridge.run_with_cache returns it")
    return bridge if cache is None else cache


def _behind(padded: int, name: str, where: Any, length: int) -> Any:
    """Positions of the padded ids as those of the text without padding; all else is looked for in the text anyway."""
    if not isinstance(where, (int, tuple, list, slice, Span, Tensor)):
        return where
    span = as_span(name, where, length)
    if span.start < padded:
        raise SpanError(f"{name} {span} begins on the padding, which ends before position {padded} of {length}")
    return Span(span.start - padded, span.stop - padded)


def _prompt_before(target: Positions | str | None, reasoning: Positions | str | None, length: int) -> int:
    """Number of prompt tokens where only positions are given."""
    if target is None or isinstance(target, str) or isinstance(reasoning, str):
        raise InputError(
            "target and reasoning are looked for in the generation, so say where it begins: pass prompt_length=..., "
            "the number of prompt tokens, or give them as positions"
        )
    where = as_span("target", target, length)
    return prompt_before(where, None if reasoning is None else as_span("reasoning", reasoning, length))


def _explicit(method: type[Method], analysis: Callable[..., Any]) -> inspect.Signature:
    """That of the function, with the method's options in place of ``**options``."""
    shared = inspect.signature(analysis)
    *own, _ = shared.parameters.values()
    taken = [one.name for one in options_of(method) if one.name in shared.parameters]
    if taken:
        raise MethodError(
            f"the method {method.name!r} declares the option {', '.join(taken)}, which every function on a bridge has "
            "already; name it otherwise"
        )
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(o.name, keyword, default=o.default, annotation=o.type) for o in options_of(method)]
    return shared.replace(parameters=[*own, *options])


def _documentation(method: type[Method]) -> str:
    about = (method.__doc__ or "").partition("\nOptions:\n")[0].strip()  # which stand under Args here
    return _DOC.format(about=about, options="\n".join(f"    {one.shown()}" for one in options_of(method)))


flashtrace = analysis_of(FlashTrace)
