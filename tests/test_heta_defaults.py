"""The measurement behind HETA's defaults: what counts as evidence, and that nothing is computed twice."""

from __future__ import annotations

import json

import pytest
import torch

from flashtrace_plugin import HETA, Span
from flashtrace_plugin.evaluation import heta_defaults, heta_paragraphs, heta_variants
from flashtrace_plugin.evaluation.cases import Case
from tests.commands import run
from tests.tiny import random_ids, tiny, tiny_tokenizer

EXAMPLES = [
    {
        "narrative_id": f"n{i}",
        "sciq_id": f"s{j}",
        "narrative_segment": narrative,
        "sciq_support_segment": support,
        "question": "Where is the key?",
        "answer": "garden",
        "important_word_indices_in_sciq_support": [1, 5],
    }
    for i, narrative in enumerate(["The box is red.", "A red box is in the hall."])
    for j, support in enumerate(["The key is in the garden, says Ann.", "A key is in the garden."])
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def text_of(tokenizer, case, positions):
    return tokenizer.decode([case.input_ids[i] for i in positions])


@pytest.mark.parametrize("form", ["question", "completion"])
def test_evidence_and_segments_are_the_words_named(form, tokenizer):
    case = heta_paragraphs.paragraph_case(tokenizer, EXAMPLES[0], form)
    assert text_of(tokenizer, case, case.distractors) == "The box is red."
    assert text_of(tokenizer, case, case.segment).strip() == "The key is in the garden, says Ann."
    assert text_of(tokenizer, case, case.gold).split() == ["key", "garden,"]
    assert case.input_ids[0] == tokenizer.bos_token_id and 0 not in {*case.distractors, *case.segment}
    assert len(case.input_ids) == case.prompt_length + 1 == case.target.stop


def test_every_seed_has_other_pairs_and_every_segment_once():
    found = [heta_paragraphs.diagonal(EXAMPLES, seed) for seed in range(2)]
    pairs = {(e["narrative_id"], e["sciq_id"]) for examples in found for e in examples}
    assert len(pairs) == 4
    for examples in found:
        assert {e["narrative_id"] for e in examples} == {"n0", "n1"} and len({e["sciq_id"] for e in examples}) == 2


def test_agreement_looks_at_the_paragraph_alone(tokenizer):
    case = heta_paragraphs.paragraph_case(tokenizer, EXAMPLES[0], "completion")
    scores = torch.zeros(case.prompt_length)
    scores[list(case.gold)], scores[-1] = 1.0, 9.0 * len(case.gold)
    found = heta_paragraphs.agreement(case, scores)
    assert found["DSA"] == pytest.approx(1) and found["inside"] == pytest.approx(0.1) and found["recovery"] > 0


def test_combined_terms_are_the_method_and_are_kept(model, tokenizer, tmp_path, monkeypatch):
    case, path = heta_paragraphs.paragraph_case(tokenizer, EXAMPLES[0], "completion"), tmp_path / "terms.safetensors"
    rows = list(heta_defaults.paragraph_rows(model, case, ["full"], 3, path))
    found = heta_variants.variants(heta_variants.KnownTerms.load(path), 3)
    expected = HETA(model, seed=3, progress=False).attribute_ids(case.input_ids, **case.spans).scores
    torch.testing.assert_close(found[next(iter(found))], expected, rtol=1e-4, atol=0)
    monkeypatch.setattr(heta_variants, "HETA", None)
    assert list(heta_defaults.paragraph_rows(model, case, ["full"], 3, path)) == rows


@pytest.mark.parametrize(("name", "options"), [("", {}), ("rescaled, beta 0.2", {"beta": 0.2, "rescale": "max"})])
def test_variants_are_the_method_with_reasoning_too(name, options, model):
    """The maximum that rescaling divides by may lie on the reasoning."""
    ids = random_ids(20)
    case = Case(ids, 8, Span(18, 20), Span(8, 18), evidence=(1,), distractors=(2,))
    rows = heta_variants.variants(heta_variants.terms(model, case, ["full"], ("zero",)), 0)
    weights = options | ({"gamma": 1 - options["beta"]} if options else {})
    expected = HETA(model, progress=False, **weights).attribute_ids(ids, **case.spans).scores
    torch.testing.assert_close(rows[name or next(iter(rows))], expected, rtol=1e-4, atol=0)


def test_deletion_is_measured_where_it_is_asked_for(model, tokenizer, tmp_path):
    import pandas as pd

    case = heta_paragraphs.paragraph_case(tokenizer, EXAMPLES[0], "completion")
    path = tmp_path / "terms.safetensors"
    rows = pd.DataFrame(heta_defaults.paragraph_rows(model, case, ["full"], 0, path, deleted=["KL only"]))
    (measured,) = rows["variant"][rows["RISE"].notna()]
    assert measured == "KL only"
    lines = heta_defaults.variant_table(rows).splitlines()
    assert sum(" – | – |" in line for line in lines) == len(rows) - 1


def test_rows_of_fewer_samples_say_so():
    import pandas as pd

    values = pd.DataFrame({"variant": ["a", "a", "b"], "DSA": [0.5, 0.5, 1.0]})
    lines = heta_defaults.variant_table(values).splitlines()
    assert (
        lines[0] == "| variant | DSA |"
        and lines[2].startswith("| a | 0.500 [")
        and lines[3] == "| b (n = 1) | 1.000 |"
    )


def test_the_command_needs_a_model(tmp_path):
    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.command()(heta_defaults.main)
    (tmp_path / "a.json").write_text(json.dumps({"examples": EXAMPLES}), encoding="utf-8")
    result = CliRunner().invoke(app, ["--data", str(tmp_path / "a.json")])
    assert result.exit_code == 2 and "--data needs --model" in result.output


def test_the_command_measures_the_reasoner(capsys):
    options = '--task "direct answer, 1 hop" --samples 1 --seeds 1 --length 32'
    out = run("flashtrace_plugin.evaluation.heta_defaults", options, capsys)
    assert "**direct answer, 1 hop**, 1 seeds x 1 samples" in out and "| KL only | " in out


def test_the_command_measures_paragraphs_and_keeps_terms(model, tokenizer, tmp_path, capsys):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = tmp_path / "a.json"
    data.write_text(json.dumps({"examples": EXAMPLES}), encoding="utf-8")
    options = f"--data {data} --model {folder} --seeds 1 --curvature 'gradient squared' --out {tmp_path / 'terms'}"
    out = run("flashtrace_plugin.evaluation.heta_defaults", options, capsys)
    assert "completion: p 0." in out and "medians: full" in out and "**means by support**" in out
    assert len(list((tmp_path / "terms").rglob("*.safetensors"))) == 2
