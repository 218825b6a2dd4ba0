"""Time and peak memory of FlashTrace on a TransformerBridge, each in a process of its own (Linux).

Run ``python -m benchmarks.lens_memory`` from the repository's root; it prints the table of docs/transformer-lens.md.
The shape is that of ``benchmarks.memory``; 32 target tokens, N/2 of reasoning, one hop.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from benchmarks.memory import SHAPE

WARM_UP = 128
"""Tokens of a first run, in which the bridge's logits are checked and libraries set themselves up."""

PARTS = {
    "forward": "forward of the Hugging Face model (SDPA)",
    "streaming": "`FlashTrace(hf_model)`, streaming",
    "bridge": "forward of the bridge",
    "lens": "`flashtrace(bridge, …)`",
    "all rows": "the same, with `KEPT_BYTES` large enough for all rows",
    "cache": "`run_with_cache` with `names_filter`, then `cache=`",
}


def measure(part: str, length: int) -> None:
    """Prints CPU seconds, and peak memory above what was resident before [MiB]."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = bare(part) if part in ("forward", "streaming") else bridged(part)
    run(torch.randint(4, SHAPE["vocab_size"], (1, WARM_UP)))
    ids = torch.randint(4, SHAPE["vocab_size"], (1, length))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, began = memory("VmRSS"), time.process_time()
    run(ids)
    print(time.process_time() - began, memory("VmHWM") - before)


def memory(field: str) -> float:
    """A size from this process' status [MiB]."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


def bare(part: str) -> Callable[[Any], Any]:
    """Runs the Hugging Face model on ids [1, N]."""
    import torch

    from flashtrace_plugin import FlashTrace, Span

    model = llama()
    if part == "forward":
        return torch.no_grad()(lambda ids: model(ids, use_cache=False, logits_to_keep=1))

    def streaming(ids: Any) -> Any:
        target, reasoning = (Span(*edges) for edges in spans(ids))
        return FlashTrace(model).attribute_ids(ids, prompt_length=reasoning.start, target=target, reasoning=reasoning)

    return streaming


def bridged(part: str) -> Callable[[Any], Any]:
    """Runs a bridge on ids [1, N]."""
    import torch

    from flashtrace_lens import bridge_for, capture, flashtrace, names_filter

    bridge = bridge_for(llama())
    if part == "bridge":
        return torch.no_grad()(lambda ids: bridge(ids, use_cache=False, logits_to_keep=1))
    if part == "all rows":
        capture.KEPT_BYTES = 1 << 40

    def lens(ids: Any) -> Any:
        cache = None
        if part == "cache":
            with torch.no_grad():
                _, cache = bridge.run_with_cache(ids, names_filter=names_filter)
        target, reasoning = spans(ids)
        return flashtrace(bridge, ids, target=target, reasoning=reasoning, cache=cache)

    return lens


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(**SHAPE)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def spans(ids: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Target and reasoning as (start, stop)."""
    length = ids.shape[1]
    target = length - 32
    return (target, length), (target - length // 2, target)


def cell(part: str, length: int) -> str:
    code = f"from benchmarks.lens_memory import measure; measure({part!r}, {length})"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    seconds, mib = (float(x) for x in out.stdout.split()[-2:])
    return f"{seconds:.2g} s, {mib:.0f} MiB"


def main(
    length: Annotated[list[int] | None, typer.Option(help="tokens of the sequence; repeatable")] = None,
) -> None:
    """Measure the bridge beside the Hugging Face model and print a Markdown table."""
    lengths = length or [1024, 2048]
    rows = [["", *(f"N = {n}" for n in lengths)], ["---"] * (1 + len(lengths))]
    rows += [[name, *(cell(part, n) for n in lengths)] for part, name in tqdm(PARTS.items(), unit="row")]
    typer.echo("\n".join("| " + " | ".join(row) + " |" for row in rows))


if __name__ == "__main__":
    typer.run(main)
