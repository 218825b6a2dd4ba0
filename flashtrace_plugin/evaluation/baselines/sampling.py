"""Explanations from many random changes of the prompt: ContextCite's regression and ReAGent's updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrace_plugin.evaluation.baselines.base import ROWS, Baseline, chunks, fixed, generator_of, spread
from flashtrace_plugin.evaluation.baselines.perturbation import CHUNK
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood
from flashtrace_plugin.models.guard import evaluating

if TYPE_CHECKING:
    from flashtrace_plugin.evaluation.cases import Case

_ABLATIONS = 64
_ALPHA = 0.01
_ROUNDS = 64
_REPLACED = 0.3


def _context_cite(model: Any, case: Case) -> Tensor:
    """Chunks are the sources, half of them are left out at random, and a sparse linear fit says what each adds."""
    groups = chunks(case.prompt_length, CHUNK)
    generator, token = generator_of(case), replacement_token(model)
    kept = torch.rand(_ABLATIONS, len(groups), generator=generator, dtype=torch.float32) < 0.5
    rows = case.input_ids.repeat(_ABLATIONS, 1)
    for row, mask in zip(rows, kept, strict=True):
        row[[i for group, there in zip(groups, mask.tolist(), strict=True) if not there for i in group]] = token
    found = log_likelihood(model, rows, generation=case.generation, batch_size=ROWS)
    weights = lasso_weights(kept, _log_odds(found), len(case.generation))
    return spread(weights.clamp(min=0), groups, case.prompt_length)


def _log_odds(log_prob: Tensor) -> Tensor:
    """log( P / (1 - P) ) from log P, which no rounding takes to infinity. log_prob, result: [n]"""
    return log_prob - torch.log(-torch.expm1(log_prob.clamp(max=-1e-12)))


def lasso_weights(kept: Tensor, outputs: Tensor, tokens: int) -> Tensor:
    """What each source adds to the outputs, by least squares with an L1 penalty (ContextCite, Cohen-Wang et al. 2024).

    Masks are standardised, outputs taken per token, the penalty is 0.01, as in the authors' package.

    kept: [ablations, sources] bool;  outputs: [ablations];  result: [sources] in the unit of outputs
    """
    sklearn_linear, sklearn_scaling = _sklearn()
    masks = kept.float().numpy()
    scaler = sklearn_scaling.StandardScaler().fit(masks)
    fit = sklearn_linear.Lasso(alpha=_ALPHA, random_state=0).fit(scaler.transform(masks), outputs.numpy() / tokens)
    return torch.tensor(fit.coef_ / scaler.scale_ * tokens, dtype=torch.float32)


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn import linear_model, preprocessing
    except ImportError as error:
        raise ImportError("ContextCite needs scikit-learn: pip install 'flashtrace-plugin[evaluation]'") from error
    return linear_model, preprocessing


def _reagent(model: Any, case: Case) -> Tensor:
    """A random third of the prompt is replaced again and again by what the model itself would write there.

    The importance of what was replaced rises by the fall of the target's probability, that of the rest falls by it; a
    softmax makes it positive. The authors' package draws replacements from RoBERTa and stops early; here they are
    drawn from the model and the rounds are fixed.
    """
    length, generator = case.prompt_length, generator_of(case)
    drawn = _own_words(model, case, generator)
    replaced = torch.rand(_ROUNDS, length, generator=generator, dtype=torch.float32) < _REPLACED
    rows = case.input_ids.repeat(_ROUNDS + 1, 1)
    rows[1:, :length] = torch.where(replaced, drawn, rows[1:, :length])
    found = log_likelihood(model, rows, generation=case.target, batch_size=ROWS)
    fall = ((found[0] - found[1:]) / len(case.target)).float()[:, None]
    return torch.where(replaced, fall, -fall).mean(0).softmax(0)


def _own_words(model: Any, case: Case, generator: torch.Generator) -> Tensor:
    """A token for each prompt position and round, drawn as the model would go on there. result: [rounds, prompt]"""
    with evaluating(model), torch.no_grad():
        logits = model(case.input_ids[None, : case.prompt_length].to(model.device), use_cache=False).logits[0].float()
    likely = logits[:-1].softmax(-1).cpu()
    drawn = torch.multinomial(likely, _ROUNDS, replacement=True, generator=generator).T
    first = torch.randint(logits.shape[-1], (_ROUNDS, 1), generator=generator)
    return torch.cat([first, drawn], 1)


SAMPLING = {
    "context_cite": Baseline(
        _context_cite, fixed(_ABLATIONS), f"ContextCite (Cohen-Wang et al. 2024) over chunks of {CHUNK} tokens"
    ),
    "reagent": Baseline(_reagent, fixed(_ROUNDS + 1), "ReAGent (Zhao and Shan 2024), replacements by the model"),
}
