"""HETA's cost: against a loop that does one thing at a time, by preset, and on a long text.

    python benchmarks/heta_speed.py loop --length 128      GPT-2 shape, random weights
    python benchmarks/heta_speed.py presets                every preset in forward passes of the model
    python benchmarks/heta_speed.py throughput             the information term against plain batched forward passes
    python benchmarks/heta_speed.py products               two ways to take Hessian products
    python benchmarks/heta_speed.py patterns               attention patterns kept, or formed again by blocks
    python benchmarks/heta_speed.py long                   2,048 tokens with LR+WIN, to the end: hours

Times are CPU seconds of this process, so that other work on the machine does not count; the unit is the model's own
forward pass of the same text in the same run. The loop is timed on a sample of tokens spread over the text and scaled
up, our groups of tokens likewise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from flashtrace_plugin import HETA, Span
from flashtrace_plugin.core.batches import Batches
from flashtrace_plugin.core.hessian.curvature import (
    OVERSAMPLING,
    HessianProducts,
    block_curvature,
    low_rank_curvature,
    rademacher,
)
from flashtrace_plugin.core.hessian.information import information, kl
from flashtrace_plugin.methods.heta import PRESETS
from flashtrace_plugin.methods.heta.terms import LARGEST_BATCH, WeightedTarget
from flashtrace_plugin.models.derive.tails import Tails, twice_differentiable

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt2_shape(layers: int) -> PreTrainedModel:
    return _random(GPT2Config(n_layer=layers, **NO_DROPOUT))


def llama_shape(width: int, layers: int, vocabulary: int) -> PreTrainedModel:
    inner = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 64}
    return _random(LlamaConfig(num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=4096, **inner))


def _random(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def cpu_seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats


def forward_seconds(model: PreTrainedModel, ids: Tensor) -> float:
    """One forward pass of the text as the loop does it, logits of all positions included."""
    with torch.no_grad():
        model(ids, use_cache=False)
        return cpu_seconds(lambda: model(ids, use_cache=False), 3)


class Loop:
    """One token and one probe at a time, on the whole text: the shape of the authors' released code.

    The graph of the gradient is kept between products, which is the faster of the two ways to write the loop.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, target: int) -> None:
        self.model, self.ids, self.target = model, ids, target
        self.X = model.get_input_embeddings()(ids)[0].detach()

    def log_probs(self, X: Tensor) -> Tensor:
        return self.model(inputs_embeds=X[None], use_cache=False).logits[0, -1].log_softmax(-1)

    def information(self, tokens: list[int]) -> list[float]:
        with torch.no_grad():
            log_p = self.log_probs(self.X)
            return [float(kl(log_p, self.log_probs(self._masked(i)))) for i in tokens]

    def _masked(self, i: int) -> Tensor:
        X = self.X.clone()
        X[i] = 0
        return X

    def gradient(self) -> tuple[Tensor, Tensor]:
        X = self.X.clone().requires_grad_()
        return X, torch.autograd.grad(self.log_probs(X)[self.target], X, create_graph=True)[0]

    def products(self, vectors: Tensor) -> list[Tensor]:
        X, gradient = self.gradient()
        return [torch.autograd.grad((gradient * v).sum(), X, retain_graph=True)[0] for v in vectors]


def _spread(length: int, count: int) -> list[int]:
    return [int((k + 0.5) * length / count) for k in range(count)]


@app.command()
def loop(length: int = 128, probes: int = 8, rank: int = 64, sample: int = 4, layers: int = 12) -> None:
    """Information, full curvature and low rank against the loop, on GPT-2's shape."""
    model = gpt2_shape(layers)
    ids = torch.randint(0, 50000, (1, length), generator=torch.Generator().manual_seed(0))
    forward = forward_seconds(model, ids)
    print(f"GPT-2 shape, {layers} layers, N = {length}, one forward pass {forward:.3f} s")
    print("| term | loop, s | here, s | times faster | here, forward passes |\n|---|---|---|---|---|")
    with twice_differentiable(model):
        bench = Bench(model, ids, probes, sample)
        for name, theirs, ours in (bench.information(), *bench.curvature(rank)):
            print(f"| {name} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.1f} | {ours / forward:.0f} |", flush=True)


class Bench:
    """The loop and the batched terms on the same text; every method gives (name, loop seconds, our seconds)."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, probes: int, sample: int) -> None:
        self.n, self.probes, self.sample = ids.shape[1], probes, sample
        self.slow = Loop(model, ids, 7)
        self.target = WeightedTarget(ids, torch.ones(1), torch.tensor([7]), ids[:, :0])
        self.tails = Tails(model, ids, 1)
        self.X = self.tails.embeddings

    def g(self, tail: Tensor, start: int) -> Tensor:
        return self.target.log_prob(self.tails.log_probs(tail[None], start)[0])

    def information(self) -> tuple[str, float, float]:
        tokens = _spread(self.n, self.sample)
        each = cpu_seconds(lambda: self.slow.information(tokens)) / (self.sample + 1)
        return "information", each * self.n, cpu_seconds(self.masked)

    def masked(self) -> None:
        """Our information term."""
        with torch.no_grad():
            zero = torch.zeros(self.X.shape[1])
            information(self.tails.log_probs, self.X, zero, torch.ones(1), length=self.n, batches=_batches())

    def curvature(self, rank: int) -> Iterator[tuple[str, float, float]]:
        vectors = torch.randn(self.sample, *self.X.shape)
        graph = cpu_seconds(self.slow.gradient)
        product = (cpu_seconds(lambda: self.slow.products(vectors)) - graph) / self.sample
        loop = graph + product * self.n * self.probes
        group = 64 // self.probes
        ours = [cpu_seconds(lambda s=s: self._group(s, group)) for s in _spread(self.n - group, 2)]
        yield f"curvature full, {self.probes} probes", loop, sum(ours) / len(ours) * self.n / group
        build = cpu_seconds(lambda: HessianProducts(self.g, self.X, 0))
        few = cpu_seconds(lambda: self._low_rank(8)) - build
        yield f"low rank {rank} against full by the loop", loop, build + few * (rank + OVERSAMPLING) / 8

    def _group(self, start: int, tokens: int) -> None:
        """The full curvature of neighbours that share a graph."""
        signs = self._signs(tokens)
        tail = self.X[start:]
        block_curvature(lambda moved, s: self.g(moved, s + start), tail, signs, batches=_batches())

    def _low_rank(self, k: int) -> None:
        omega = torch.randn(k, *self.X.shape)
        low_rank_curvature(self.g, self.X, omega, self._signs(self.n), batches=_batches())

    def _signs(self, tokens: int) -> Tensor:
        return rademacher(self.probes, tokens, self.X.shape[1], generator=torch.Generator().manual_seed(0))


def _batches() -> Batches:
    return Batches(LARGEST_BATCH["cpu"])


@app.command()
def presets(length: int = 128, window: int = 64, last_layers: int = 2, width: int = 256, layers: int = 4) -> None:
    """All of HETA by preset; window and layers are scaled down with the model from the paper's 512 and 6."""
    model = llama_shape(width, layers, 4096)
    ids = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(0))
    forward = forward_seconds(model, ids)
    print(f"llama shape d = {width}, {layers} layers, N = {length}, one forward pass {forward:.3f} s")
    print("| preset | products | forward passes run | CPU seconds | forward passes' worth |\n|---|---|---|---|---|")
    for name in PRESETS:
        scaled = {"window": window} if "WIN" in name else {}
        scaled |= {"last_layers": last_layers} if "LS" in name else {}
        heta = HETA.preset(model, None, name, progress=False, max_cost=None, **scaled)
        began = time.process_time()
        found = heta.attribute_ids(ids[0], prompt_length=length - 2, target=Span(length - 1, length))
        seconds, cost = time.process_time() - began, found.settings
        worth = seconds / forward
        print(f"| {name} | {cost['hvps']} | {cost['forwards']} | {seconds:.1f} | {worth:.0f} |", flush=True)


@app.command()
def long(
    length: int = 2048, width: int = 512, layers: int = 8, preset: str = "LR+WIN", rank: int | None = None
) -> None:
    """The whole of one preset on a long text, hours on a CPU: seconds, and the most memory ever resident."""
    model = llama_shape(width, layers, 8192)
    ids = torch.randint(0, 8192, (1, length), generator=torch.Generator().manual_seed(0))
    forward = forward_seconds(model, ids)
    print(f"llama shape d = {width}, {layers} layers, N = {length}: one forward pass {forward:.1f} s", flush=True)
    heta = HETA.preset(model, None, preset, max_cost=None, **({} if rank is None else {"rank": rank}))
    began = time.process_time()
    found = heta.attribute_ids(ids[0], prompt_length=length - 2, target=Span(length - 1, length))
    seconds, cost = time.process_time() - began, found.settings
    worth, peak = seconds / forward, cost["peak_memory_bytes"] / 2**30
    print(f"{preset}: {cost['hvps']} products, {cost['forwards']} forward passes of tails")
    print(
        f"{seconds:.0f} CPU seconds ({worth:.0f} forward passes), {cost['seconds']:.0f} s, peak memory {peak:.2f} GiB"
    )


@app.command()
def throughput(length: int = 256, width: int = 512, layers: int = 8, batch: int = 8) -> None:
    """The information term against the model's own forward pass of as many texts, in batches."""
    model = llama_shape(width, layers, 8192)
    ids = torch.randint(0, 8192, (1, length), generator=torch.Generator().manual_seed(0))
    _, ours = _after_warming(Bench(model, ids, 1, 1).masked)
    many = ids.expand(batch, -1)

    def plain() -> None:
        with torch.no_grad():
            model(many, use_cache=False, logits_to_keep=1)

    each = min(cpu_seconds(plain) for _ in range(3)) / batch
    print(f"llama shape d = {width}, {layers} layers, N = {length}, batches of {batch}: CPU seconds")
    print(f"information term {ours:.2f}, {length} texts forward {each * length:.2f}: ratio {ours / each / length:.2f}")


@app.command()
def products(length: int = 128, layers: int = 4, count: int = 32) -> None:
    """Hessian products by a second backward pass against forward-over-reverse, vmapped; GPT-2's shape."""
    model = gpt2_shape(layers)
    ids = torch.randint(0, 50000, (1, length), generator=torch.Generator().manual_seed(0))
    with twice_differentiable(model):
        bench = Bench(model, ids, 1, 1)
        vectors = torch.randn(count, *bench.X.shape, generator=torch.Generator().manual_seed(0))
        ours = HessianProducts(bench.g, bench.X, 0)

        def forward_over_reverse(part: Tensor) -> Tensor:
            gradient = torch.func.grad(lambda X: bench.g(X, 0))
            return torch.func.vmap(lambda v: torch.func.jvp(gradient, (bench.X,), (v,))[1])(part)

        print("| at once | forward-over-reverse, s each | here, s each | largest difference |\n|---|---|---|---|")
        for size in (1, 8, 32):
            part = vectors[:size]
            a, theirs = _after_warming(lambda part=part: forward_over_reverse(part))
            b, mine = _after_warming(lambda part=part: ours(part))
            gap = float((a - b).abs().max() / b.abs().max())
            print(f"| {size} | {theirs / size:.3f} | {mine / size:.3f} | {gap:.1e} |", flush=True)


@app.command()
def patterns(lengths: list[int] | None = None, width: int = 512, layers: int = 2) -> None:
    """Hessian products with attention patterns kept against patterns formed again by blocks of queries."""
    model = llama_shape(width, layers, 8192)
    print(f"llama shape d = {width}, {layers} layers, CPU seconds\n")
    print("| N | forward pass | patterns kept | by blocks | largest difference |\n|---|---|---|---|---|")
    for length in lengths or (256, 512, 1024, 2048):
        ids = torch.randint(0, 8192, (1, length), generator=torch.Generator().manual_seed(0))
        bench = Bench(model, ids, 1, 1)
        vector = torch.randn(1, *bench.X.shape, generator=torch.Generator().manual_seed(0))
        a, kept = _product(model, bench, vector, blockwise=False)
        b, blocks = _product(model, bench, vector, blockwise=True)
        gap, forward = float((a - b).abs().max() / a.abs().max()), forward_seconds(model, ids)
        print(f"| {length} | {forward:.2f} | {kept:.2f} | {blocks:.2f} | {gap:.1e} |", flush=True)


def _product(model: PreTrainedModel, bench: Bench, vector: Tensor, *, blockwise: bool) -> tuple[Tensor, float]:
    with twice_differentiable(model, blockwise=blockwise):
        product = HessianProducts(bench.g, bench.X, 0)
        return _after_warming(lambda: product(vector))


def _after_warming(run: Callable[[], Any]) -> tuple[Any, float]:
    """What the second run gives, and its CPU seconds."""
    run()
    began = time.process_time()
    return run(), time.process_time() - began


if __name__ == "__main__":
    app()
