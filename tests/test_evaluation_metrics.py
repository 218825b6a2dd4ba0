"""AUROC, ceiling, specificity, sufficiency, paired differences: numbers by hand, invariances, refusals; and runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrace_plugin import InputError, Span, SpanError
from flashtrace_plugin.evaluation.cases import Case, load_cases, save_cases
from flashtrace_plugin.evaluation.metrics import (
    auroc,
    deletion_curve,
    log_likelihood,
    paired,
    recovery,
    recovery_ceiling,
    specificity,
    sufficiency,
)
from flashtrace_plugin.evaluation.metrics.likelihood import token_log_likelihood
from flashtrace_plugin.evaluation.run.contestants import scorer
from flashtrace_plugin.evaluation.run.measures import DELETIONS, GROUPS, KEPT, METRICS, NEUTRAL, Subject, measure
from flashtrace_plugin.evaluation.run.runner import SAMPLE, measure_cases
from flashtrace_plugin.evaluation.tables import differences, means
from flashtrace_plugin.methods.flashtrace import FlashTrace
from tests.tiny import PAD, random_ids, tiny

PROMPT, LENGTH = 30, 40
few = st.lists(st.integers(0, 5), min_size=2, max_size=40)


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def case():
    return Case(
        random_ids(LENGTH, seed=3),
        PROMPT,
        Span(38, 40),
        Span(30, 36),
        evidence=(4, 5),
        other_evidence=(9, 10),
        question=(28,),
        task="words",
        number=2,
    )


def scores_of(seed: int) -> torch.Tensor:
    return torch.rand(PROMPT, generator=torch.Generator().manual_seed(seed))


# Evidence


def test_auroc_by_hand():
    # gold 3 and 1, others 2, 1, 0: of six pairs 3 wins three times, 1 wins once and ties once
    assert auroc([3, 2, 1, 1, 0], [0, 2]) == pytest.approx((3 + 1 + 0.5) / 6)
    assert auroc([3, 2, 1, 1, 0], [0], against=[1]) == 1 and auroc([1, 1, 1], [1]) == 0.5


def pairs(scores, gold):
    """The definition: every pair, ties half."""
    other = [i for i in range(len(scores)) if i not in gold]
    wins = sum((scores[g] > scores[o]) + 0.5 * (scores[g] == scores[o]) for g in gold for o in other)
    return wins / (len(gold) * len(other))


@given(few, st.data())
def test_auroc_is_the_share_of_pairs_and_ignores_monotone_maps(scores, data):
    gold = data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1, max_size=len(scores) - 1))
    found = auroc(scores, gold)
    assert found == pytest.approx(pairs(scores, gold), abs=1e-12)
    assert found == auroc([math.exp(s) - 3 for s in scores], gold)
    assert auroc([-s for s in scores], gold) == pytest.approx(1 - found, abs=1e-12)


@given(few, st.data())
def test_no_scores_recover_more_than_the_ceiling(scores, data):
    gold = data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    ceiling = recovery_ceiling(len(scores), gold)
    assert recovery(scores, gold) <= ceiling
    assert recovery([float(i in gold) for i in range(len(scores))], gold) == ceiling


def test_ceiling_by_hand():
    assert recovery_ceiling(30, range(4)) == 0.75 and recovery_ceiling(30, [1]) == 1
    assert recovery_ceiling(30, range(4), fraction=0.2) == 1


def test_specificity_by_hand():
    assert specificity([1, 3, 0, 1], [0, 1], [3]) == pytest.approx(0.8)
    assert specificity([0, 0, 5, 0], [0, 1], [3]) == 0.5


@given(st.lists(st.floats(0, 1, width=16), min_size=4, max_size=20))
def test_specificity_of_both_sides_adds_up_to_one(scores):
    own, other = specificity(scores, [0, 2], [1, 3]), specificity(scores, [1, 3], [0, 2])
    assert 0 <= own <= 1 and own + other == pytest.approx(1)


# Sufficiency


def test_sufficiency_keeps_the_top_and_replaces_the_rest(model, case):
    scores = scores_of(1)
    found = sufficiency(model, case.input_ids, prompt_length=PROMPT, scores=scores, draws=3)
    assert [len(kept) for kept in found.kept] == [3, 6, 9] and found.random.shape == (3, 3)
    for kept, value in zip(found.kept, found.values, strict=True):
        assert set(kept) == set(scores.argsort(descending=True)[: len(kept)].tolist())
        row = torch.full_like(case.input_ids, PAD)
        row[PROMPT:] = case.input_ids[PROMPT:]
        row[list(kept)] = case.input_ids[list(kept)]
        expected = log_likelihood(model, row[None], generation=case.generation)
        assert float(value) == pytest.approx(float(expected), abs=1e-4)
    torch.testing.assert_close(found.gain, found.values - found.random.mean(0))


def test_keeping_all_is_the_prompt_itself_and_random_choices_depend_on_the_seed_alone(model, case):
    given_ = {"prompt_length": PROMPT, "generation": case.target, "fractions": (0.5, 1.0), "draws": 2}
    first = sufficiency(model, case.input_ids, scores=scores_of(1), **given_)
    second = sufficiency(model, case.input_ids, scores=scores_of(2), **given_, batch_size=1)
    torch.testing.assert_close(first.random, second.random, atol=1e-4, rtol=0)
    whole = log_likelihood(model, case.input_ids[None], generation=case.target)
    torch.testing.assert_close(first.values[1:], whole, atol=1e-4, rtol=0)
    other = sufficiency(model, case.input_ids, scores=scores_of(1), **given_, seed=1)
    assert not torch.equal(other.random[:, 0], first.random[:, 0])


def test_without_draws_there_is_nothing_to_compare_with(model, case):
    found = sufficiency(model, case.input_ids, prompt_length=PROMPT, scores=scores_of(1), draws=0)
    assert found.random.shape == (0, 3) and bool(found.gain.isnan().all())


def test_likelihood_by_token_adds_up(model, case):
    rows = torch.stack([case.input_ids, case.input_ids.flip(0)])
    by_token = token_log_likelihood(model, rows, generation=case.generation)
    assert by_token.shape == (2, len(case.generation))
    torch.testing.assert_close(by_token.sum(-1), log_likelihood(model, rows, generation=case.generation))


# Paired differences


def test_paired_differences_by_hand():
    found = paired([1.0, 2.0, 6.0], [0.0, 1.0, 2.0])
    assert found.mean == pytest.approx(2) and found.n == 3 and found.low >= 1 and found.high <= 4
    same = paired([5.0, 7.0], [5.0, 7.0])
    assert same.mean == same.low == same.high == 0


# Measurements of a case


def test_measure_agrees_with_each_metric_by_itself(model, case):
    scores = scores_of(4)
    found = measure(Subject(model, case), scores, GROUPS)
    assert set(METRICS) - {"DSA", "sensitivity", *NEUTRAL} <= set(found) and "ceiling" in found
    for name, watched in (("", case.generation), (" of the answer", case.target)):
        options = {"prompt_length": PROMPT, "scores": scores, "generation": watched}
        curve = deletion_curve(model, case.input_ids, steps=DELETIONS, **options)
        assert found[f"RISE{name}"] == pytest.approx(curve.rise, abs=1e-4)
        assert found[f"MAS{name}"] == pytest.approx(curve.mas(), abs=1e-4)
        assert found[f"falls{name}"] == curve.falls
        kept = sufficiency(model, case.input_ids, **options, fractions=KEPT, draws=0).values
        assert [found[f"log P{name}, top {p:.0%}"] for p in KEPT] == pytest.approx(kept.tolist(), abs=1e-4)
    assert found["specificity"] == specificity(scores, (4, 5), (9, 10))
    assert found["AUROC of own"] == auroc(scores, (4, 5), against=(9, 10))


def test_specificity_is_measured_only_where_there_is_other_evidence(model, case):
    found = measure(Subject(model, replace(case, other_evidence=())), scores_of(4))
    assert "specificity" not in found and "AUROC" in found


def test_cases_are_saved_without_loss(case, tmp_path):
    plain = replace(case, reasoning=None, other_evidence=(), right=False, forced=True)
    save_cases(tmp_path / "cases.json", [case, plain])
    for found, expected in zip(load_cases(tmp_path / "cases.json"), (case, plain), strict=True):
        assert torch.equal(found.input_ids, expected.input_ids) and found.digest == expected.digest
        same = {"input_ids": expected.input_ids}
        assert vars(found) | same == vars(expected) | same


# Runs


@pytest.fixture
def counted(model):
    """A method, and the names of the cases that it was asked for."""
    asked: list[str] = []

    def method(case):
        asked.append(case.name)
        return scores_of(len(case.name) + case.number)

    return method, asked


def test_a_run_goes_on_where_it_was_killed(model, case, counted, tmp_path):
    pytest.importorskip("pandas")
    method, asked = counted
    cases, out = [case, replace(case, number=3)], tmp_path / "new" / "lines.jsonl"
    first = measure_cases(model, cases, {"one": method, "two": method}, out=out, progress=False)
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])  # the last line is cut off
    asked.clear()
    second = measure_cases(model, cases, {"one": method, "two": method}, out=out, progress=False)
    assert asked == ["words/0/3/0"] and len(out.read_bytes().splitlines()) == 4
    timeless = [name for name in first if not name.startswith(("seconds", "cost"))]
    assert first[timeless].equals(second[timeless])
    measure_cases(model, cases, {"one": method, "three": method}, out=out, progress=False)
    assert asked == ["words/0/3/0", "words/0/2/0", "words/0/3/0"]


def test_tables_of_a_run(model, case, counted, tmp_path):
    pytest.importorskip("scipy")
    scorers = {"FlashTrace": scorer(FlashTrace(model)), "other": counted[0]}
    cases = [replace(case, number=n, other_evidence=(9,) if n else ()) for n in range(3)]
    values = measure_cases(model, cases, scorers, out=tmp_path / "lines.jsonl", progress=False)
    metrics = [name for name in METRICS if name in values and name not in NEUTRAL]
    assert list(means(values, metrics).index) == ["FlashTrace", "other"]
    assert values["specificity"].isna().sum() == 2
    assert list(differences(values, metrics, "FlashTrace", sample=SAMPLE).index) == ["other"]


def test_a_failing_method_loses_nothing(model, case, counted, tmp_path):
    out = tmp_path / "lines.jsonl"
    with pytest.raises(InputError, match="prompt token 0 is -1"):
        measure_cases(
            model, [case], {"good": counted[0], "bad": lambda c: -torch.ones(PROMPT)}, out=out, progress=False
        )
    assert [json.loads(line)["method"] for line in out.read_text().splitlines()] == ["good"]


def test_files_of_other_runs_are_refused(model, case, counted, tmp_path):
    out, scorers = tmp_path / "lines.jsonl", {"one": counted[0]}
    pytest.importorskip("pandas")
    measure_cases(model, [case], scorers, out=out, progress=False)
    other = replace(case, target=Span(37, 40))
    with pytest.raises(InputError, match="another case named 'words/0/2/0'"):
        measure_cases(model, [other], scorers, out=out, progress=False)
    out.write_text(out.read_text().replace('"model": ""', '"model": "larger"'))
    with pytest.raises(InputError, match="results of the model 'larger'"):
        measure_cases(model, [case], scorers, out=out, progress=False)
    out.write_text('{"case": 1}\n')
    with pytest.raises(InputError, match=r"line 1 of .* is not a result"):
        measure_cases(model, [case], scorers, out=out, progress=False)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 2000))
def test_any_cut_of_the_file_is_survived(model, case, tmp_path_factory, cut):
    pytest.importorskip("pandas")
    out = tmp_path_factory.mktemp("cut") / "lines.jsonl"
    scorers = {name: lambda c: scores_of(7) for name in ("one", "two")}
    measure_cases(model, [case], scorers, out=out, progress=False)
    whole = out.read_bytes()
    out.write_bytes(whole[:cut])
    assert list(measure_cases(model, [case], scorers, out=out, progress=False)["method"]) == ["one", "two"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: auroc([1.0, 2.0], []), SpanError, "gold is empty"),
        (lambda: auroc([1.0, 2.0], [0, 1]), SpanError, "against is empty"),
        (lambda: auroc([1.0, 2.0], [2]), SpanError, "gold position 2 is outside"),
        (lambda: auroc([1.0, 2.0], [0], against=[0]), SpanError, "position 0 is in both gold and against"),
        (lambda: auroc([1.0, math.nan], [0]), InputError, "prompt token 1 is nan"),
        (lambda: recovery_ceiling(3, []), SpanError, "gold is empty"),
        (lambda: recovery_ceiling(3, [0], fraction=2), InputError, "at most 1, got 2"),
        (lambda: specificity([1.0, -2.0], [0], [1]), InputError, "prompt token 1 is -2"),
        (lambda: specificity([1.0, 2.0], [0], [0, 1]), SpanError, "position 0 is in both own and other"),
        (lambda: specificity([1.0, 2.0], [0], []), SpanError, "other is empty"),
        (lambda: paired([1.0], [1.0, 2.0]), InputError, "1 values and 2 of the reference"),
        (lambda: paired([], []), InputError, "at least one"),
        (lambda: load_cases("none.json"), InputError, "cannot read none.json"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"fractions": ()}, InputError, "fractions is empty"),
        ({"fractions": (0.1, 0.0)}, InputError, "above 0 and at most 1, got 0"),
        ({"draws": -1}, InputError, "draws must be 0 or more, got -1"),
        ({"scores": torch.rand(3)}, InputError, "3 scores for 30 prompt tokens"),
        ({"generation": Span(3, 9)}, SpanError, "3:9 is outside 30:40"),
    ],
)
def test_sufficiency_refuses(model, case, change, error, message):
    with pytest.raises(error, match=message):
        sufficiency(model, case.input_ids, **{"prompt_length": PROMPT, "scores": scores_of(0)} | change)


def test_files_that_hold_no_cases(tmp_path):
    (tmp_path / "cases.json").write_text('[{"prompt_length": 1}]')
    with pytest.raises(InputError, match="not what save_cases writes"):
        load_cases(tmp_path / "cases.json")


def test_a_case_whose_parts_do_not_fit_is_refused(case):
    with pytest.raises(SpanError, match="evidence position 30 is outside"):
        replace(case, evidence=(30,))
    with pytest.raises(SpanError, match="outside the generation"):
        replace(case, target=Span(3, 5))
