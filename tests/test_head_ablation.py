"""Which heads the ablation silences, where, and what that costs by another route."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformer_lens")

from flashtrace_lens import bridge_for
from flashtrace_plugin import reasoner
from flashtrace_plugin.evaluation.drawing import reasoner_cases
from tests.commands import run, script

ablation = script("benchmarks.head_ablation")


def test_sets_of_heads():
    shares = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    sets = ablation.choose(shares, 5, 7, torch.Generator().manual_seed(1))
    top = set(shares.flatten().topk(5).indices.tolist())
    assert set(sets[ablation.LARGEST].flatten().nonzero()[:, 0].tolist()) == top
    assert not (sets[ablation.LARGEST] & sets[ablation.SMALLEST]).any()
    per_layer = sets[ablation.LARGEST].sum(-1)
    assert torch.equal(sets[ablation.SAME_LAYERS].sum(-1), per_layer.expand(7, -1))
    assert sets[ablation.ANYWHERE].sum((1, 2)).tolist() == [5] * 7
    assert len(sets[ablation.ANYWHERE].unique(dim=0)) > 1


@pytest.mark.parametrize("where", [ablation.DECIDING, ablation.EVERYWHERE])
def test_a_silenced_head_costs_what_its_missing_write_costs(where):
    """Zeroing what the output projection reads of the head does the same in the plain model."""
    model, tokenizer = reasoner.load()
    (case,), _ = reasoner_cases(model, tokenizer, "variables, 2 hops", wanted=1, length=64)
    heads = torch.zeros(1, 4, 4, dtype=torch.bool)
    heads[0, 1, 2] = True
    bridge = bridge_for(model, tokenizer)
    falls = ablation.drops(bridge, case, dict.fromkeys((ablation.LARGEST, ablation.SAME_LAYERS), heads), where)

    def log_probability() -> float:
        with torch.no_grad():
            logits = model(case.input_ids.view(1, -1)).logits[0, ablation.deciding(case)].log_softmax(-1)
        return float(logits.gather(-1, case.input_ids.flatten()[case.target.slice, None]).sum())

    whole, attn = log_probability(), model.model.layers[1].self_attn

    def without(module, args):
        z = args[0].unflatten(-1, (4, -1)).clone()
        z[:, ablation.deciding(case) if where == ablation.DECIDING else slice(None), 2] = 0
        return z.flatten(-2)

    handle = attn.o_proj.register_forward_pre_hook(without)
    expected = whole - log_probability()
    handle.remove()
    assert falls[ablation.LARGEST] == pytest.approx(expected, abs=1e-4)
    assert falls[ablation.GAIN] == 0


def test_the_command_prints_a_table(capsys):
    out = run("benchmarks.head_ablation", "--samples 2 --draws 2 --task needles", capsys)
    head, _, *rows = out.strip().splitlines()
    assert head.startswith("| fall of log P(answer) | n | largest shares |") and "L0, L1, L2, L3" in head
    assert len(rows) == 3 and all(row.startswith("| needles; ") and "| 2 |" in row for row in rows)
