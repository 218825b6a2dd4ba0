"""Embeddings as inputs, for the method that differentiates by them: what NoiseTunnel and the metrics perturb."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor, nn

from flashtrace_captum.base import Inputs, hugging_face, single
from flashtrace_captum.errors import CaptumInputError
from flashtrace_captum.methods import MethodAttribution
from flashtrace_captum.targets import Example, Target


class TakesEmbeddings(MethodAttribution):
    """A method whose ``attribute`` also takes embeddings."""

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        reasoning: Target = None,
        input_ids: Tensor | None = None,
        **options: Any,
    ) -> Inputs:
        r"""As :meth:`flashtrace_captum.TokenAttribution.attribute`, and on embeddings.

        Args:

            inputs (Tensor or tuple[Tensor]): token ids (batch, length), or the embeddings (batch, length, d) that
                the model's embedding module gives for them
            target (int, slice, list or Tensor, optional): token positions whose generation is explained.
                Default: None, the last token
            additional_forward_args (Tensor or tuple, optional): the attention mask (batch, length).
                Default: None
            reasoning (int, slice or list, optional): positions that importance is followed through. With embeddings a
                list may have one entry for each row of ``input_ids``, before NoiseTunnel repeated each.
                Default: None
            input_ids (Tensor, optional): the token ids of embeddings, (batch, length), (1, length) for all of them,
                or those of the examples before NoiseTunnel repeated each. Default: None
            **options: what the method takes at a call

        Returns:

            *Tensor* or *tuple[Tensor]* of **attributions**: shaped like ``inputs``. A token's score stands in equal
            parts on the dimensions of its embedding, so ``.sum(-1)`` gives the scores of tokens.

        Examples::

            >>> embeddings = model.get_input_embeddings()(ids)
            >>> NoiseTunnel(HETA(model)).attribute(embeddings, target=slice(90, 94), input_ids=ids).sum(-1)
        """
        values = single(inputs)
        if not values.is_floating_point():
            if input_ids is not None:
                raise CaptumInputError("inputs are token ids already; input_ids only goes with embeddings")
            return super().attribute(inputs, target, additional_forward_args, reasoning=reasoning, **options)
        model, ids = hugging_face(f"{self.get_name()} on embeddings", self.forward_func), _ids_of(values, input_ids)
        if input_ids is not None:
            reasoning = _repeated(reasoning, len(input_ids), len(ids) // len(input_ids))

        def score(row: int, example: Example) -> Tensor:
            with _embedded(model, ids[row, example.kept.slice], values[row, example.kept.slice]):
                return self.example_scores(ids[row], example, **options).scores

        scores = self._each(values, target, additional_forward_args, reasoning, score)
        spread = (single(scores) / values.shape[-1])[..., None].expand(*values.shape).clone()
        return (spread,) if isinstance(inputs, tuple) else spread


def _ids_of(embeddings: Tensor, input_ids: Tensor | None) -> Tensor:
    """One row of ids for each row of embeddings, [batch, length]."""
    if embeddings.dim() != 3:
        raise CaptumInputError(f"embeddings must be (batch, length, d), got {list(embeddings.shape)}")
    if input_ids is None:
        raise CaptumInputError(
            "embeddings do not say which tokens are to be predicted; pass their ids as well, input_ids=ids"
        )
    batch, length = embeddings.shape[:2]
    if input_ids.dim() != 2 or input_ids.shape[1] != length or batch % input_ids.shape[0]:
        raise CaptumInputError(
            f"input_ids of shape {list(input_ids.shape)} do not fit embeddings {list(embeddings.shape)}; "
            "they must be (batch, length) or (1, length)"
        )
    return input_ids.repeat_interleave(batch // input_ids.shape[0], dim=0)


def _repeated(reasoning: Target, examples: int, times: int) -> Target:
    """One entry for each row of a repeated batch. Captum repeats the target, but no argument that it does not know."""
    if isinstance(reasoning, list) and len(reasoning) == examples:
        return [entry for entry in reasoning for _ in range(times)]
    if isinstance(reasoning, Tensor) and reasoning.shape == (examples,):
        return reasoning.repeat_interleave(times)
    return reasoning


@contextmanager
def _embedded(model: Any, ids: Tensor, embeddings: Tensor) -> Iterator[None]:
    """While inside, the model's embedding module gives these vectors for this text and for its beginnings.

    ids: [n]; embeddings: [n, d]. Look-ups of single tokens, such as a mask's, are left alone.
    """

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        asked = args[0]
        if asked.dim() != 2 or asked.shape[0] != 1 or not torch.equal(asked[0].cpu(), ids[: asked.shape[1]].cpu()):
            return None
        return embeddings[None, : asked.shape[1]].detach().to(output)

    module = model.get_input_embeddings()
    width = module.weight.shape[1]
    if embeddings.shape[1] != width:
        raise CaptumInputError(f"embeddings have {embeddings.shape[1]} dimensions, the model's have {width}")
    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
