"""The demo: runs through Inseq on the bundled model, tells what it found, and writes its report."""

from __future__ import annotations

import re

import pytest

from flashtrace_plugin import demo, reasoner
from flashtrace_plugin.evaluation import tasks

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


def test_what_it_says_about_the_evidence(sample, attribution):
    lines = demo.sources(sample, attribution)
    assert sample.evidence_text[-1] in lines[0] and "needed" in lines[0] and "?" not in lines[0]
    best = [one.unit.text for one in attribution.by("step").top(99)]
    ranks = [best.index(f"{text} ;") + 1 for text in reversed(sample.evidence_text)]
    assert f"number {', '.join(map(str, ranks))} of the {len(best)} sentences" in demo.found(sample, attribution)


def test_how_it_knows(attribution):
    said = demo.what_removal_does(attribution)
    assert "so these are what it drew on" in said and "8 times" in said and "10^" in said
    assert demo._times(0.0) == "1 times" and demo._times(23.0) == "10^10 times"


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
        "made it answer",
        "How do we know?",
        report.as_uri(),
    ):
        assert text in printed
    page = report.read_text(encoding="utf-8")
    assert page.count(' gold"') + page.count('"gold"') >= len(sample.evidence) and "http" not in page.replace(
        "http-equiv", ""
    )


def test_the_reasoner_is_in_the_package():
    assert (reasoner.path() / "model.safetensors").is_file()
