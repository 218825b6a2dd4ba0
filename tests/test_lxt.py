"""LRP against lxt, the AttnLRP authors' package (``pip install --no-deps lxt==2.1``; these tests skip without it).

Rule "attn" is the same method, token by token, in every decoder that lxt's efficient mode has a table for. The two
packages differ in two places, of which tests/reference/relevance.py, written from the papers' formulas, is the judge:

* Rule "cp", gated MLPs. lxt's `cp_LRP` takes the gate phi(u) as a constant, so that all relevance goes to the other
  factor; ours gives half to each, by the uniform rule of AttnLRP. Ali et al. 2022, whom "cp" goes back to, freeze
  attention and norms, and have no gates. Neither loses relevance, so neither is wrong; ours keeps one rule for one
  product, whatever becomes of attention. That this is all of the difference is tested: with the gated MLP of lxt's
  own `attnLRP` table, lxt gives our numbers. Where biases lie behind a gate their share differs, too (qwen2).
* A soft cap on the logits. lxt has no rule for it and differentiates the tanh, so that its relevance adds up to
  another number than the logit: every token is too small by one factor. By AttnLRP's identity rule for activations
  (Eq. 9) the factor is phi(u) / u, and under "cp" relevance adds up to the logit of the model: ours is right.

No difference is left from norms (their scale is frozen, also of queries and keys), softmax (by its gradient), matrix
products (half and half), or lxt's 1e-10 in phi(u) / (u + 1e-10): it would show only where |u| is about as small.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from flashtrace_plugin import LRP
from tests.reference import relevance as reference
from tests.reference.lxt_relevance import IDS, TARGET, case

pytest.importorskip("lxt", reason="lxt is a development dependency: pip install --no-deps lxt==2.1")

GATED = ["llama", "qwen2", "qwen3", "gemma3_text"]


@pytest.fixture(scope="module")
def lxt(tmp_path_factory):
    """Relevance by lxt for all cases, by variant; each is run once, in a process that it can patch as it likes."""
    known = {}

    def run(variant):
        if variant not in known:
            path = tmp_path_factory.mktemp("lxt") / "relevance.pt"
            command = [sys.executable, "-m", "tests.reference.lxt_relevance", variant, str(path)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            known[variant] = torch.load(path)
        return known[variant]

    return run


def ours(name, rule):
    return LRP(case(name), rule=rule, hops=0).attribute_ids(IDS, prompt_length=10, target=TARGET)


def arbiter(name, rule):
    weights = torch.zeros(len(IDS)).index_fill(0, torch.tensor([TARGET]), 1.0)
    return reference.relevance(case(name), IDS, weights, rule=rule, objective="logit")


def close(one, other):
    torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", [*GATED, "gpt2"])
def test_attnlrp_is_lxts_token_by_token(lxt, family):
    found = ours(family, "attn").components["relevance"]
    close(found, lxt("attn")[family])
    close(found, arbiter(family, "attn").embedding)


@pytest.mark.parametrize("family", ["gpt2"])
def test_cp_is_lxts_where_no_mlp_is_gated(lxt, family):
    close(ours(family, "cp").components["relevance"], lxt("cp")[family])


@pytest.mark.parametrize("family", GATED)
def test_cp_differs_from_lxts_by_the_gate_alone(lxt, family):
    found = ours(family, "cp").components["relevance"]
    close(found, lxt("cp_gate")[family])
    close(found, arbiter(family, "cp").embedding)
    frozen_gate = lxt("cp")[family]
    assert (frozen_gate - found).abs().max() > 0.1 * found.abs().max()
    if family != "qwen2":  # without biases both add up to the logit
        assert float(frozen_gate.sum()) == pytest.approx(float(found.sum()), rel=1e-4)


@pytest.mark.parametrize(("rule", "variant"), [("attn", "attn"), ("cp", "cp_gate")])
def test_lxt_has_no_rule_for_a_cap_on_the_logits(lxt, rule, variant):
    name = "gemma3, capped"
    found, expected, theirs = ours(name, rule), arbiter(name, rule), lxt(variant)[name]
    close(found.components["relevance"], expected.embedding)
    u = 2 * torch.atanh(torch.tensor(expected.objective / 2))  # before the cap of 2
    factor = (1 - (expected.objective / 2) ** 2) / (expected.objective / u)  # the cap's slope, over phi(u) / u
    assert factor < 0.95
    close(theirs, factor * found.components["relevance"])


def test_nothing_is_patched_in_this_process(lxt):
    lxt("attn")
    from transformers.models.llama import modeling_llama

    assert "lxt.efficient" not in sys.modules
    assert modeling_llama.LlamaMLP.forward.__module__ == modeling_llama.__name__
