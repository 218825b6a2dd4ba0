"""How close deletion curves come to the model's own batched throughput, in processor time.

Run ``python -m benchmarks.evaluation_speed --model smollm2`` from the repository's root. The unit is the model run
on the same texts in batches of the same size, with logits for the generation only. ``leave one out`` changes one
token after another, so that what precedes it is reused; there the unit runs the whole texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from flashtrace_plugin.evaluation import models
from flashtrace_plugin.evaluation.metrics.deletion import deletion_groups, deletion_rows, replacement_token
from flashtrace_plugin.evaluation.metrics.likelihood import token_log_likelihood
from flashtrace_plugin.spans import Span


def _best(work: Callable[[], object], tries: int) -> float:
    work()
    spent = []
    for _ in range(tries):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return min(spent)


@torch.no_grad()
def _plain(model: Any, rows: Tensor, kept: int, batch: int) -> None:
    for part in rows.split(batch):
        model(part[:, :-1], use_cache=False, logits_to_keep=kept)


def _rows(model: Any, prompt: int, generation: int, steps: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (prompt + generation,), generator=generator)
    scores = torch.rand(prompt, generator=generator, dtype=torch.float64)
    token = replacement_token(model)
    each = ids.repeat(prompt + 1, 1)
    each[torch.arange(prompt) + 1, torch.arange(prompt)] = token
    return {"deletion curve": deletion_rows(ids, deletion_groups(scores, steps), token), "leave one out": each}


def _main(
    model: Annotated[
        str, typer.Option(help="reasoner, smollm2, gemma3-270m, or as for the command line")
    ] = "reasoner",
    prompt: Annotated[int, typer.Option(help="tokens")] = 192,
    generation: Annotated[int, typer.Option(help="tokens")] = 16,
    steps: Annotated[int, typer.Option(help="groups of deletion")] = 20,
    batch: Annotated[int, typer.Option(help="texts at once")] = 8,
    tries: Annotated[int, typer.Option(help="the best of so many")] = 3,
) -> None:
    """Print the model's throughput and that of the curves, in texts per second of processor time."""
    lm, _ = models.load(model)
    for name, rows in _rows(lm, prompt, generation, steps).items():
        span = Span(prompt, prompt + generation)
        unit = _best(lambda r=rows: _plain(lm, r, generation, batch), tries)
        mine = _best(lambda r=rows, s=span: token_log_likelihood(lm, r, generation=s, batch_size=batch), tries)
        typer.echo(f"{model}, {name}: {len(rows) / unit:.1f} texts/s, here {len(rows) / mine:.1f}: {unit / mine:.0%}")


if __name__ == "__main__":
    typer.run(_main)
