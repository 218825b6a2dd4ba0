"""Simple explanations that a method has to beat, by name, and the answer key that none can know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.pattern import weighted_flow
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood
from flashtrace_plugin.models.read.source import source_for

if TYPE_CHECKING:
    from flashtrace_plugin.evaluation.cases import Case

_Baseline = Callable[[Any, "Case"], Tensor]
"""``baseline(model, case)``: scores [prompt_length], higher for what matters more."""


def _random(model: Any, case: Case) -> Tensor:
    """Uniform noise, the floor of every metric; the same for the same tokens."""
    seed = crc32(repr(case.input_ids.tolist()).encode())
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(case.prompt_length, generator=generator, dtype=torch.float32)


def _mean_attention(model: Any, case: Case) -> Tensor:
    """Mean over layers and heads of the attention of the positions that predict the target."""
    source = source_for(model)
    rows = torch.arange(case.target.start - 1, case.target.stop - 1)
    with torch.no_grad():
        layers = source.layers(source.check_ids(case.input_ids), rows)
        weights = torch.ones(len(rows), dtype=torch.float32, device=layers[0].v.device)
        flows = [weighted_flow(layer.pattern, weights, len(case.input_ids)).mean(0).cpu() for layer in layers]
    return torch.stack(flows).mean(0)[: case.prompt_length]


def _gradient_input(model: Any, case: Case) -> Tensor:
    """| gradient · embedding | of the target's log-probability."""
    ids = case.input_ids.to(model.device)
    embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits[0, case.target.start - 1 : case.target.stop - 1].float()
    wanted = ids[case.target.slice, None]
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1).gather(-1, wanted).sum(), embedded)
    return (gradient * embedded).sum(-1).abs().detach()[0, : case.prompt_length].float().cpu()


def _leave_one_out(model: Any, case: Case) -> Tensor:
    """Fall of log P(generation) when one token is replaced, 0 where it rises: one forward pass per prompt token."""
    rows = case.input_ids.repeat(case.prompt_length + 1, 1)
    places = torch.arange(case.prompt_length)
    rows[places + 1, places] = replacement_token(model)
    found = log_likelihood(model, rows, generation=case.generation, batch_size=32)
    return (found[0] - found[1:]).clamp(min=0)


def _answer_key(model: Any, case: Case) -> Tensor:
    """1 on the evidence and on the question, 0 elsewhere: what nobody can know, not a method."""
    scores = torch.zeros(case.prompt_length, dtype=torch.float32)
    return scores.index_fill(0, torch.tensor([*case.gold, *case.question]), 1.0)


BASELINES: dict[str, _Baseline] = {
    "random": _random,
    "attention, mean of layers and heads": _mean_attention,
    "gradient x input": _gradient_input,
    "leave one out": _leave_one_out,
    "answer key": _answer_key,
}
"""The baselines by the name of their row in tables."""
