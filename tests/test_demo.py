"""The demo: runs through Inseq on the bundled model, tells what it found, and writes its report."""

from __future__ import annotations

import re

import pytest

from flashtrace_plugin import demo, reasoner
from flashtrace_plugin.evaluation import tasks
from flashtrace_plugin.evaluation.metrics import recovery

pytest.importorskip("inseq")


@pytest.fixture(scope="module")
def sample():
    return tasks.make("variable_tracking", demo.SEED, hops=demo.HOPS, chains=3, length=demo.LENGTH)


@pytest.fixture(scope="module")
def attribution(sample):
    return demo.explained(sample)


def test_the_model_reasons_and_answers_right(sample, attribution):
    assert attribution.text(attribution.target).strip() == sample.answer
    assert attribution.text(attribution.reasoning).strip() == sample.reasoning
    assert attribution.hops == demo.HOPS


def test_what_it_says_about_mass(attribution):
    direct = float(attribution.hop_scores[0, attribution.prompt.slice].sum() / attribution.scores.sum())
    assert f"they bring {100 * (1 - direct):.1f} % of the prompt's score" in demo.moved(attribution)


def test_what_it_says_about_the_evidence(sample, attribution):
    words, scores = sample.prompt.split(), attribution.scores.tolist()
    top = sorted(range(len(words)), key=lambda i: -scores[i])[:13]
    touched = {
        step for i in top for step in range(len(sample.steps)) if demo.marks(sample).get(i) == f"step {step + 1}"
    }
    said = demo.found(sample, attribution)
    assert f"The 13 strongest tokens of the prompt (10 %) touch {len(touched)} of 4 of them" in said
    assert f"the 13 tokens hold {recovery(attribution.scores, sample.evidence):.0%}, without" in said


def test_statements_are_whole(sample):
    words = sample.prompt.split()
    chain, others = demo.statements(sample)
    assert [" ".join(words[i] for i in s) for s in chain] == [f"{text} ;" for text in sample.evidence_text]
    assert len(others) == 8 and all(words[s[-1]] == ";" and len(s) == 3 for s in others)


def test_main_prints_everything_and_writes_the_report(sample, tmp_path, capsys):
    report = tmp_path / "demo.html"
    demo.main(["--html", str(report)])
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    for text in (
        sample.prompt,
        sample.reasoning,
        f"{sample.answer} (right)",
        "Top tokens",
        "Where each hop",
        report.as_uri(),
    ):
        assert text in printed
    page = report.read_text(encoding="utf-8")
    assert page.count(' gold"') + page.count('"gold"') >= len(sample.evidence) and "http" not in page.replace(
        "http-equiv", ""
    )


def test_the_reasoner_is_in_the_package():
    assert (reasoner.path() / "model.safetensors").is_file()
