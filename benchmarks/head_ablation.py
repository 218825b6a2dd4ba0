"""Do shares of heads rank interventions? Silences heads of the bundled reasoner and prints a Markdown table.

Run ``python -m benchmarks.head_ablation --samples 40`` from the repository's root; docs/transformer-lens.md holds what
it printed. Every column is the fall of the answer's log probability with the reasoning before it held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from flashtrace_lens import bridge_for, flashtrace
from flashtrace_plugin import reasoner
from flashtrace_plugin.evaluation.cases import Case
from flashtrace_plugin.evaluation.drawing import REASONER_TASKS, reasoner_cases
from flashtrace_plugin.evaluation.tables import markdown, means

DEFAULT_TASKS = ["variables, 2 hops", "variables, 4 hops", "needles"]
DECIDING, EVERYWHERE = "deciding", "everywhere"
VARIANTS = {"predicting": (DECIDING, EVERYWHERE), "token": (EVERYWHERE,)}
"""Where heads are silenced, by the positions that were attributed: those that decide the answer, or all."""

LARGEST, ANYWHERE, SAME_LAYERS, SMALLEST = "largest shares", "random", "random, same layers", "smallest shares"
GAIN = "largest − same layers"
ROW = "fall of log P(answer)"


def choose(shares: Tensor, count: int, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The sets of ``count`` heads to silence, by their column.

    shares: [layer, head];  result: [sets, layer, head], true where a head is silenced

    A random set of the same layers has as many heads of each layer as the largest shares have there, drawn from all
    heads of the layer: it tells what choosing the layer alone achieves.
    """
    top = largest(shares, count)
    noise, order = (torch.rand(draws, *shares.shape, generator=generator) for _ in range(2))
    return {
        LARGEST: top[None],
        ANYWHERE: largest(noise, count),
        SAME_LAYERS: top.expand(draws, -1, -1).gather(-1, order.argsort(-1)),
        SMALLEST: largest(-shares, count)[None],
    }


def largest(values: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest of each [..., layer, head]."""
    flat = values.flatten(-2)
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, flat.topk(count).indices, True).view_as(values)


def log_probability(bridge: Any, case: Case, silenced: Tensor, where: slice) -> Tensor:
    """log P of the answer's tokens, summed, by set of heads.

    silenced: [sets, layer, head];  where: the positions at which they are silenced;  result: [sets]
    """
    hooks = [(f"blocks.{layer}.attn.hook_z", silence(silenced[:, layer], where)) for layer in range(silenced.shape[1])]
    ids = case.input_ids.expand(len(silenced), -1)
    with torch.no_grad():
        logits = bridge.run_with_hooks(ids, fwd_hooks=hooks)
    return logits[:, deciding(case)].log_softmax(-1).gather(-1, ids[:, case.target.slice, None]).sum((1, 2))


def deciding(case: Case) -> slice:
    """The positions whose logits the answer's tokens are read from."""
    return slice(case.target.start - 1, case.target.stop - 1)


def silence(heads: Tensor, where: slice) -> Callable[[Tensor, Any], Tensor]:
    """A hook at ``hook_z`` [batch, pos, head, d_head] that zeroes the heads [batch, head] of its layer."""

    def hook(z: Tensor, hook: Any) -> Tensor:
        changed = z.clone()
        changed[:, where] = z[:, where].masked_fill(heads[:, None, :, None], 0)
        return changed

    return hook


def drops(bridge: Any, case: Case, sets: dict[str, Tensor], where: str) -> dict[str, float]:
    """Fall of the log probability by column, the mean over the column's sets; all of them in one forward pass."""
    nothing, places = torch.zeros_like(sets[LARGEST]), deciding(case) if where == DECIDING else slice(None)
    whole, *found = log_probability(bridge, case, torch.cat([nothing, *sets.values()]), places).split(
        [1, *(len(group) for group in sets.values())]
    )
    falls = {name: float((whole - group).mean()) for name, group in zip(sets, found, strict=True)}
    return falls | {GAIN: falls[LARGEST] - falls[SAME_LAYERS]}


def run(bridge: Any, cases: Iterable[Case], *, heads: int, draws: int, seed: int) -> pd.DataFrame:
    """One row for each case and variant; also how many of the largest shares lie in each layer."""
    rows, generator = [], torch.Generator().manual_seed(seed)
    for case in tqdm(cases, unit="sample"):
        for positions, places in VARIANTS.items():
            sets = choose(head_shares(bridge, case, positions), heads, draws, generator)
            layers = {f"L{layer}": int(n) for layer, n in enumerate(sets[LARGEST][0].sum(1))}
            for where in places:
                name = f"{case.task}; `{positions}`, {where}"
                rows.append({ROW: name} | drops(bridge, case, sets, where) | layers)
    return pd.DataFrame(rows)


def head_shares(bridge: Any, case: Case, positions: str) -> Tensor:
    """Shares of the answer's own hop [layer, head]."""
    found = flashtrace(
        bridge, case.input_ids, target=case.target, prompt_length=case.prompt_length, hops=0, positions=positions
    )
    return found.heads[0]


def table(values: pd.DataFrame) -> pd.DataFrame:
    """Means with intervals, a row for each task and variant; last, where the largest shares lie."""
    frame = means(values, (LARGEST, ANYWHERE, SAME_LAYERS, SMALLEST, GAIN), by=ROW, digits=2)
    groups = values.groupby(ROW, sort=False)
    layers = [name for name in values if name.startswith("L")]
    frame.insert(0, "n", groups.size().to_list())
    frame["largest shares in " + ", ".join(layers)] = [
        ", ".join(f"{group[name].mean():.1f}" for name in layers) for _, group in groups
    ]
    return frame


def main(
    samples: Annotated[int, typer.Option(help="right samples for each task")] = 40,
    heads: Annotated[int, typer.Option(help="heads silenced at once")] = 4,
    draws: Annotated[int, typer.Option(help="random sets for each sample")] = 10,
    seed: Annotated[int, typer.Option(help="of samples and random sets")] = 0,
    length: Annotated[int, typer.Option(help="longest prompt, in tokens")] = 64,
    task: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(REASONER_TASKS)}; repeatable")] = None,
) -> None:
    """Silence heads with large, random and small shares of the answer; print means and 95 % bootstrap intervals."""
    chosen = task or DEFAULT_TASKS
    if set(chosen) - set(REASONER_TASKS):
        raise typer.BadParameter(f"tasks are {', '.join(REASONER_TASKS)}")
    model, tokenizer = reasoner.load()
    if not 1 <= heads < (total := model.config.num_hidden_layers * model.config.num_attention_heads):
        raise typer.BadParameter(f"--heads is {heads}; the reasoner has {total}, silence at least 1 and not all")
    cases = [
        case
        for name in chosen
        for case in reasoner_cases(model, tokenizer, name, wanted=samples, seed=seed, length=length).cases
    ]
    typer.echo(markdown(table(run(bridge_for(model, tokenizer), cases, heads=heads, draws=draws, seed=seed))))


if __name__ == "__main__":
    typer.run(main)
