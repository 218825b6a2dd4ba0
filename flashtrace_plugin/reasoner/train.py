"""Train the bundled reasoner: ``python -m flashtrace_plugin.reasoner.train --out weights``.

Lengths grow from 32 to 512 tokens: the next one is added when the current one is learnt or its time is over. The rate
is constant for the first 15 % of the time and then falls linearly to zero. Data and first weights follow from the
seed; the number of steps follows from the machine's speed, so two runs agree in accuracy and not bit by bit.
"""

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from flashtrace_plugin.reasoner.batches import IGNORED, Batch, Vocabulary, make_batch
from flashtrace_plugin.reasoner.build import build_model, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

_LENGTHS = (32, 64, 128, 256, 512)  # words of the body
_LEARNT = 0.85  # share of samples without any wrong token at which the next length is added
_LAST_LENGTH_BY = 0.5  # share of the time after which every length is in use, learnt or not
_CONSTANT_UNTIL = 0.15  # share of the time at which the learning rate begins to fall
_MORE_NEEDLES_FROM = 0.73  # share of the time at which the tasks' shares change, as crowded needles are learnt last
_CHECKPOINT_SECONDS = 240


@dataclass(frozen=True)
class _Plan:
    """What a run is asked to do: seconds to train, seed, highest learning rate, tokens per step with padding."""

    seconds: float
    seed: int
    peak: float
    tokens: int


@dataclass
class Progress:
    """Where the run stands: seconds trained, steps done, number of lengths in use, smoothed share of right samples."""

    seconds: float = 0.0
    step: int = 0
    lengths: int = 1
    right: float = 0.0

    def update(self, right: float, length: int, seconds: float) -> None:
        """Count a step; add the next length when the longest one in use is learnt."""
        self.step += 1
        self.seconds += seconds
        if length == _LENGTHS[self.lengths - 1]:
            self.right = 0.95 * self.right + 0.05 * right
        if self.right > _LEARNT and self.lengths < len(_LENGTHS):
            self.lengths, self.right = self.lengths + 1, 0.0


def lengths_due(done: float) -> int:
    """How many lengths are in use at a share ``done`` of the time at the latest."""
    return min(len(_LENGTHS), 1 + int(done / _LAST_LENGTH_BY * (len(_LENGTHS) - 1)))


def _questions_room(length: int) -> int:
    """Words of questions and generations behind a body of ``length`` words."""
    return length // 2 + 64


def _draw_length(rng: random.Random, lengths: int) -> int:
    """Mostly the longest length in use, else a shorter one, so that short prompts are not forgotten."""
    return _LENGTHS[lengths - 1] if rng.random() < 0.6 else _LENGTHS[rng.randrange(lengths)]


def chains_share(done: float) -> float:
    """The share of bodies with chains; the others hold needles."""
    return 0.65 if done < _MORE_NEEDLES_FROM else 0.3


def rate(done: float, step: int, peak: float, warm_up: int = 100) -> float:
    """Learning rate at a share ``done`` of the time: warm-up over steps, constant, linear fall."""
    return peak * min(1.0, (step + 1) / warm_up, max(0.0, 1 - done) / (1 - _CONSTANT_UNTIL))


def loss_and_right(model: Any, batch: Batch) -> tuple[Tensor, float]:
    """Mean cross-entropy of the generated tokens, and the share of samples with every token right."""
    hidden = model.model(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    scored = batch.labels != IGNORED
    logits, labels = model.lm_head(hidden[scored]), batch.labels[scored]
    return torch.nn.functional.cross_entropy(logits, labels), _share_right(logits.argmax(-1) == labels, batch, scored)


def _share_right(hits: Tensor, batch: Batch, scored: Tensor) -> float:
    """Greedy decoding reproduces a generation exactly when every token is right after the right ones before it."""
    samples = torch.arange(len(batch.ids))[:, None] * 1000 + batch.segments
    _, sample = samples[scored].unique(return_inverse=True)
    right = torch.ones(int(sample.max()) + 1).scatter_reduce(0, sample, hits.float(), "amin")
    return float(right.mean())


def _train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float
) -> tuple[float, float]:
    """One step of AdamW at rate ``lr``; returns the loss and the share of samples without a wrong token."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss, right = loss_and_right(model, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach()), right


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=True)


def save_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write weights, optimizer and progress to one file, whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Continue from a checkpoint; a new Progress if there is none."""
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def save_pretrained(model: "Qwen3ForCausalLM", tokenizer: "PreTrainedTokenizerFast", out: Path) -> None:
    """Write the model (float32 safetensors) and the tokenizer as a Hugging Face folder."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _next_batch(progress: Progress, plan: _Plan, encode: Vocabulary) -> tuple[Batch, int]:
    """The batch of a step and the length of its bodies; both follow from the seed, the step and the lengths in use."""
    rng = random.Random(f"{plan.seed}/{progress.step}")
    length = _draw_length(rng, progress.lengths)
    extra = _questions_room(length)
    rows = max(2, plan.tokens // (length + extra))
    return make_batch(rng, encode, length, extra, rows, chains_share(progress.seconds / plan.seconds)), length


def _train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    encode: Vocabulary,
    progress: Progress,
    plan: _Plan,
    checkpoint: Path,
) -> None:
    """Train until the time of the plan is used up, with a checkpoint every few minutes."""
    saved = progress.seconds
    bar = tqdm(total=round(plan.seconds), initial=round(progress.seconds), unit="s", mininterval=10)
    while progress.seconds < plan.seconds:
        began = time.monotonic()
        done = progress.seconds / plan.seconds
        progress.lengths = max(progress.lengths, lengths_due(done))
        batch, length = _next_batch(progress, plan, encode)
        loss, right = _train_step(model, optimizer, batch, rate(done, progress.step, plan.peak))
        progress.update(right, length, time.monotonic() - began)
        bar.update(round(progress.seconds) - bar.n)
        shown = {"step": progress.step, "length": length, "loss": f"{loss:.4f}", "right": f"{progress.right:.3f}"}
        bar.set_postfix(shown, refresh=False)
        if progress.seconds - saved > _CHECKPOINT_SECONDS:
            save_checkpoint(checkpoint, model, optimizer, progress)
            saved = progress.seconds


def main(
    out: Annotated[Path, typer.Option(help="folder of the trained model")],
    minutes: Annotated[float, typer.Option(help="time to train")] = 60,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    seed: Annotated[int, typer.Option(help="seed of the data and the first weights")] = 0,
    peak: Annotated[float, typer.Option(help="highest learning rate")] = 4e-3,
    tokens: Annotated[int, typer.Option(help="tokens per step, padding included")] = 2048,
) -> None:
    """Train for a number of minutes; run again with the same folder to continue after an interruption."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    optimizer = make_optimizer(model)
    checkpoint = out / "checkpoint.pt"
    progress = load_checkpoint(checkpoint, model, optimizer)
    plan = _Plan(seconds=minutes * 60, seed=seed, peak=peak, tokens=tokens)
    _train(model, optimizer, tokenizer.get_vocab(), progress, plan, checkpoint)
    save_pretrained(model, tokenizer, out)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    typer.run(main)
