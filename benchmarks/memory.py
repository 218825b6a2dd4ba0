"""Peak memory and time of FlashTrace beyond the model's own forward pass, each in a process of its own.

    python -m benchmarks.memory [length [family ...]]

Shapes: 8 query heads, d = 256, 4 layers, float32; grouped-query attention, a sliding window, mixture of experts.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "max_position_embeddings": 1 << 17,
    "pad_token_id": 0,
}
KINDS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MAMBA2 = {"ssm_state_size": 64, "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 4}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 512}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}),
    "qwen3_5_text": ("Qwen3_5TextConfig", {"head_dim": 32, "layer_types": KINDS} | LINEAR),
    "nemotron_h": ("NemotronHConfig", {"head_dim": 32, "layers_block_type": ["linear_attention", "mlp"] * 2} | MAMBA2),
    "falcon_h1": ("FalconH1Config", {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 512}),
}
PARTS = ("forward", "target of 64", "half of all")


def measure(family: str, part: str, length: int) -> None:
    """Prints peak memory beyond the loaded model [MiB] and the best of three times [s]."""
    import torch
    import transformers

    from flashtrace_plugin import FlashTrace, Span

    torch.set_num_threads(1)
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**SHAPE, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(4, SHAPE["vocab_size"], (1, length))
    target = Span(length - (64 if part == "target of 64" else length // 4), length)
    reasoning = Span(length // 2, target.start)

    def run() -> None:
        if part == "forward":
            with torch.no_grad():
                model(ids, use_cache=False, logits_to_keep=1)
        elif part == "target of 64":
            FlashTrace(model, hops=0).attribute_ids(ids, prompt_length=length // 2, target=target)
        else:
            FlashTrace(model).attribute_ids(ids, prompt_length=length // 2, target=target, reasoning=reasoning)

    with torch.no_grad():
        model(ids[:, :128], use_cache=False)
    before, times = _peak(), []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    print(_peak() - before, min(times))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    print(f"N = {length}   MiB beyond the forward pass, time in forward passes")
    for family in sys.argv[2:] or FAMILIES:
        found = {}
        for part in PARTS:
            code = f"from benchmarks.memory import measure; measure({family!r}, {part!r}, {length})"
            out = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
            )
            found[part] = [float(x) for x in out.stdout.split()[-2:]]
        memory, seconds = found["forward"]
        parts = [f"{p}: {found[p][0] - memory:+.0f} MiB, {found[p][1] / seconds:.2f}x" for p in PARTS[1:]]
        print(f"{family:12s} forward {memory:.0f} MiB, {seconds:.2f} s;  " + ";  ".join(parts), flush=True)


if __name__ == "__main__":
    main()
