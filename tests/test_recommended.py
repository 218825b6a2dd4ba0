"""What users get by default: the setting, its doors, and that it finds the evidence on the bundled reasoner."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import LRP, Attribution, FlashTrace, Recommended, explain, reasoner
from flashtrace_plugin.cli import app
from flashtrace_plugin.evaluation.drawing import ONE_OF_TWO, reasoner_cases
from flashtrace_plugin.evaluation.metrics import recovery, specificity
from tests.reference import relevance as reference
from tests.tiny import random_ids, tiny, tiny_tokenizer

PROMPT, GENERATION = "The key is in the garden. Where is the key?", "<think>red box</think>In the garden."
SETTING = {"rule": "attn", "reading": "product", "context": "generation"}


def test_explain_is_the_recommended_method_is_lrp_with_its_setting():
    model, tokenizer = tiny("qwen3"), tiny_tokenizer()
    found = explain(model, tokenizer, PROMPT, GENERATION)
    assert found == Recommended(model, tokenizer).attribute(PROMPT, GENERATION)
    lrp = LRP(model, tokenizer, hops=1, sinks="report", **SETTING).attribute(PROMPT, GENERATION)
    assert torch.equal(found.hop_scores, lrp.hop_scores) and found.method == "recommended"
    assert {name: found.settings[name] for name in SETTING} == SETTING
    direct = explain(model, tokenizer, PROMPT, GENERATION, target="garden", hops=0)
    assert direct.hops == 0 and direct.text(direct.target).strip() == "garden"


def test_the_command_line_runs_it_by_default(tmp_path):
    model, tokenizer, saved = tiny("qwen3"), tiny_tokenizer(), tmp_path / "a.json"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["--prompt", PROMPT, "--generation", GENERATION, "--json", str(saved)]
    result = CliRunner().invoke(app, ["attribute", "--model", str(tmp_path / "model"), *texts])
    assert result.exit_code == 0, result.output
    assert torch.equal(Attribution.load(saved).scores, explain(model, tokenizer, PROMPT, GENERATION).scores)


def test_it_is_the_product_of_its_readings():
    """|R| at the embeddings times sum over layers of (|R| + R+), for the target and for the generation."""
    model, ids = tiny("llama", seed=3), random_ids(30, seed=5)
    found = Recommended(model, hops=0, sinks="keep").attribute_ids(
        ids, prompt_length=12, target=(25, 29), reasoning=(14, 22)
    )
    mass = torch.ones(30, dtype=torch.float64)
    for start, stop in ((25, 29), (12, 29)):
        weights = torch.zeros(30, dtype=torch.float64)
        weights[start:stop] = 1
        one = reference.relevance(model, ids, weights, rule="attn", objective="logit")
        mass = mass * one.embedding.abs() * (one.layers.abs() + one.layers.clamp(min=0)).sum(0)
    expected = mass / mass.sum()
    torch.testing.assert_close(found.hop_scores[0].double(), expected, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def bundled():
    return reasoner.load()


def test_it_explains_one_answer_and_not_the_generation(bundled):
    cases = [c for task in ONE_OF_TWO for c in reasoner_cases(*bundled, task, wanted=2, seed=5).cases]

    def own(method) -> float:
        found = [method.attribute_ids(c.input_ids, **c.spans).scores for c in cases]
        shares = [specificity(s, c.evidence, c.other_evidence) for s, c in zip(found, cases, strict=True)]
        return sum(shares) / len(shares)

    assert own(Recommended(bundled[0])) > 0.9 > 0.7 > own(FlashTrace(bundled[0]))


def test_it_finds_the_evidence_where_the_papers_setting_does_not(bundled):
    tasks = ("needles", "variables, 2 hops, 2 questions", "variables, 4 hops, 2 questions")
    cases = [c for task in tasks for c in reasoner_cases(*bundled, task, wanted=3, seed=5).cases]

    def found(method) -> float:
        scores = [method.attribute_ids(c.input_ids, **c.spans).scores for c in cases]
        return sum(recovery(s, c.evidence) for s, c in zip(scores, cases, strict=True)) / len(cases)

    assert found(Recommended(bundled[0])) > 1.5 * found(FlashTrace(bundled[0]))
