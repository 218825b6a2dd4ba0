"""What a method of Inseq says about every generated token, as one matrix: computed here, or from a stored result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from inseq.attr import FeatureAttribution
from inseq.data import BatchEncoding
from inseq.data.attribution import FeatureAttributionSequenceOutput
from torch import Tensor

from flashtrace_inseq.kernels import same_kernel
from flashtrace_plugin.errors import InputError


def matrix_of(item: FeatureAttributionSequenceOutput) -> Tensor:
    """Scores of a decoder-only method, rows the generated tokens, columns what they rest on, 0 from its own token on.

    One number for each pair of tokens, as Inseq makes it by default: the L2 norm over the embedding of gradient
    methods, the mean over heads and layers of attention, normalised; a matrix that is aggregated is taken as it is.

    result: [M, N] for N tokens up to the last of the M attributed ones

    Raises InputError for a result without scores over the tokens before each generated one, and for scores that are
    not finite.
    """
    name = type(item).__name__
    if item.source_attributions is not None:
        raise InputError(
            f"{name} is of an encoder-decoder, whose generated tokens rest on a source; recursion needs a "
            "decoder-only model, which reads its own reasoning"
        )
    if item.target_attributions is None:
        raise InputError(f"{name} holds no scores of tokens; use a method that scores the tokens before each other")
    scores = item.target_attributions
    scores = (item.aggregate().target_attributions if scores.ndim > 2 else scores).float()
    start, stop = item.attr_pos_start, int(item.attr_pos_end or len(item.target))
    if scores.ndim != 2 or scores.shape[1] != stop - start or len(scores) < stop:
        raise InputError(
            f"{name} has scores {list(scores.shape)} for the tokens {start}:{stop}; recursion needs one number for "
            "each of them and every token before; aggregate over all other dimensions first"
        )
    return _checked(scores[:stop].T.contiguous(), start, item)


def _checked(matrix: Tensor, start: int, item: FeatureAttributionSequenceOutput) -> Tensor:
    """The matrix with 0 for the NaN that Inseq writes from each row's own token on. [M, N]"""
    late = torch.ones_like(matrix, dtype=torch.bool).triu(start)
    bad = (~matrix.isfinite() & ~late).any(1).nonzero()[:, 0]
    if len(bad):
        token = start + int(bad[0])
        raise InputError(
            f"the scores of token {token} ({item.target[token].token!r}) are not finite, so nothing can be followed "
            "through it; half precision may overflow: use bfloat16 or float32"
        )
    return matrix.masked_fill(late & matrix.isnan(), 0.0)


class BaseMatrix:
    """A method of Inseq that is run for single tokens: ``rows(input_ids [N], positions [r])`` gives [r, N].

    host:      Inseq's model
    name:      of the method;  args: its own arguments of ``attribute``
    function:  what is attributed, see ``attributed_fn`` of Inseq
    given:     further arguments of Inseq's ``attribute``
    """

    def __init__(
        self, host: Any, name: str, args: Mapping[str, Any], function: Callable[..., Any], given: Mapping[str, Any]
    ) -> None:
        self.host, self.name, self.args, self.function, self.given = host, name, args, function, given

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        start, stop = int(positions[0]), int(positions[-1]) + 1
        if "contrast_targets" in (self.given.get("attributed_fn_args") or {}):
            stop = len(input_ids)  # Inseq aligns a contrast from the last attributed token backwards
        with on_model(self.host, self.name) as base:
            found = self._run(base, input_ids, start, stop)
        matrix = matrix_of(found)[positions.cpu() - start]
        return torch.nn.functional.pad(matrix, (0, len(input_ids) - matrix.shape[1]))

    def _run(self, base: Any, ids: Tensor, start: int, stop: int) -> FeatureAttributionSequenceOutput:
        batch = self.host.formatter.prepare_inputs_for_attribution(
            self.host, self._encoding(ids), self.given.get("include_eos_baseline", False)
        )
        found = base.attribute(
            batch,
            attributed_fn=self.function,
            attr_pos_start=start,
            attr_pos_end=stop,
            show_progress=False,
            pretty_progress=False,
            attribution_args=base_arguments(base, self.args),
            attributed_fn_args=dict(self.given.get("attributed_fn_args") or {}),
        )
        return found.sequence_attributions[0]

    def _encoding(self, ids: Tensor) -> BatchEncoding:
        """As Inseq encodes a text, for ids that are known: the unknown token is the baseline, end tokens stay."""
        ids = ids[None]
        baseline = torch.full_like(ids, self.host.tokenizer.unk_token_id)
        if not self.given.get("include_eos_baseline"):
            baseline = torch.where(ids == self.host.eos_token_id, ids, baseline)
        tokens = self.host.convert_ids_to_tokens(ids[0].cpu(), skip_special_tokens=False)
        return BatchEncoding(ids, torch.ones_like(ids), [tokens], baseline)


def base_arguments(base: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the base takes them. Raises InputError for others."""
    mine, rest = base.get_attribution_args(**args)
    if rest:
        raise InputError(f"the base {base.method_name!r} takes no argument {', '.join(sorted(rest))}")
    return dict(mine)


@contextmanager
def on_model(host: Any, name: str) -> Iterator[Any]:
    """The method of Inseq on the model while inside; afterwards the model is hooked, and attends, as before."""
    model, before = host.model, (host.is_hooked, host.config)
    with same_kernel(model), _same_hooks(model):
        base = FeatureAttribution.load(name, attribution_model=host)
        try:
            if base.use_attention_weights:  # which other kernels do not give
                model.set_attn_implementation("eager")
            yield base
        finally:
            base.unhook()
            host.is_hooked, host.config = before


@contextmanager
def _same_hooks(model: Any) -> Iterator[None]:
    """Hooks that are added inside are gone afterwards: Inseq's value zeroing leaves its own after an error.

    Those of transformers stay: it adds them once, when outputs are first asked for, and counts on them from then on.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    before = [(getattr(module, kind), set(getattr(module, kind))) for module in model.modules() for kind in kinds]
    try:
        yield
    finally:
        for hooks, known in before:
            for key in [key for key in hooks if key not in known and not _of_transformers(hooks[key])]:
                del hooks[key]


def _of_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "transformers"
