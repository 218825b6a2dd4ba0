"""docs/adding-a-method.md to the letter: one file of at most 40 lines, in every host, equal to a dense rollout."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import Attribution, FlashTraceError, MethodError, Span
from flashtrace_plugin.cli import app
from flashtrace_plugin.methods import METHODS, Hop, Method, Options, Rows, driven, option, register_method
from flashtrace_plugin.methods.base import options_of
from tests.tiny import random_ids, tiny, tiny_tokenizer

PAGE = (Path(__file__).parent.parent / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
SOURCE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
PROMPT, GENERATION = "The key is in the garden. Where is the key?", "<think>red box</think>In the garden."
SPANS = {"prompt_length": 14, "target": Span(31, 36), "reasoning": Span(17, 29)}
IDS = random_ids(40, seed=4)


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    """The page's file, imported from outside the package."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "rollout_of_the_page.py").write_text(SOURCE, encoding="utf-8")
    sys.path.insert(0, str(folder))
    import rollout_of_the_page

    yield rollout_of_the_page.AttentionRollout
    sys.path.remove(str(folder))


def dense_rollout(model, ids, weights, stay):
    """From the model's own patterns: w through prod_l (stay I + (1 - stay) mean_h A_l), float64."""
    eager = tiny("qwen3", attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        patterns = eager(ids[None], output_attentions=True).attentions
    rho = weights.double() / weights.sum()
    for A in reversed(patterns):
        rho = rho @ (stay * torch.eye(len(ids)).double() + (1 - stay) * A[0].double().mean(0))
    return rho


def test_it_is_short_and_equals_a_dense_rollout(rollout):
    assert len(SOURCE.splitlines()) <= 40
    model = tiny("qwen3")
    found = rollout(model, residual=0.3, hops=1).attribute_ids(IDS, **SPANS)
    weights = torch.zeros(40).index_fill(0, torch.arange(30, 35), 1.0)
    first = dense_rollout(model, IDS, weights, 0.3)
    torch.testing.assert_close(found.hop_scores[0].double(), first, rtol=1e-5, atol=1e-7)
    through = torch.zeros(40).double()
    through[16:28] = first[17:29]
    second = dense_rollout(model, IDS, through, 0.3)
    torch.testing.assert_close(found.hop_scores[1].double(), second, rtol=1e-5, atol=1e-7)
    assert 0 < found.closure_error < 2e-6, "layers that a method only reads are proved as well"
    assert found.settings["residual"] == 0.3 and found.method == "rollout"


def test_every_host_runs_it_by_name_with_the_same_numbers(rollout, tmp_path):
    flashtrace_captum, flashtrace_lens, inseq = (
        pytest.importorskip(name) for name in ("flashtrace_captum", "flashtrace_lens", "inseq")
    )
    import flashtrace_inseq

    model, tokenizer = tiny("qwen3"), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    expected = rollout(model, tokenizer, residual=0.3).attribute(PROMPT, GENERATION)
    where = {"target": expected.target, "reasoning": expected.reasoning}
    ids = torch.tensor(expected.token_ids)

    out = inseq.load_model(model, "rollout", tokenizer=tokenizer).attribute(
        PROMPT, PROMPT + GENERATION, residual=0.3, show_progress=False
    )
    assert torch.equal(flashtrace_inseq.attributions(out)[0].hop_scores, expected.hop_scores)

    captum = flashtrace_captum.AttentionRollout(model, residual=0.3)
    assert "residual" in inspect.signature(flashtrace_captum.AttentionRollout).parameters
    scores = captum.attribute(ids[None], target=expected.target.slice, reasoning=expected.reasoning.slice)
    torch.testing.assert_close(scores[0, : len(expected.scores)], expected.scores)

    bridge = flashtrace_lens.bridge_for(model, tokenizer)
    lens = flashtrace_lens.rollout(bridge, ids, prompt_length=len(expected.prompt), residual=0.3, **where)
    lens = getattr(lens, "attribution", lens)
    torch.testing.assert_close(lens.scores, expected.scores, rtol=1e-4, atol=1e-6)

    saved = tmp_path / "a.json"
    texts = ["--prompt", PROMPT, "--generation", GENERATION, "--json", str(saved)]
    command = ["attribute", "--model", str(tmp_path / "model"), "--method", "rollout", "--residual", "0.3", *texts]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert torch.equal(Attribution.load(saved).hop_scores, expected.hop_scores)
    assert "residual" in CliRunner().invoke(app, ["methods", "rollout"]).output


def test_its_declaration_is_what_users_see(rollout):
    assert [one.name for one in options_of(rollout)] == [
        *("hops", "recursion", "positions", "ignore", "format", "max_cost"),
        "residual",
    ]
    assert inspect.signature(rollout).parameters["positions"].default == "predicting"
    assert "residual: share of every layer that stays where it is; default: 0.5" in rollout.__doc__
    with pytest.raises(TypeError, match="no option speed; it takes hops, recursion"):
        rollout(tiny("qwen3"), speed=3)


def test_another_package_adds_a_method_by_an_entry_point(tmp_path):
    (tmp_path / "rollout_elsewhere.py").write_text(SOURCE, encoding="utf-8")
    folder = tmp_path / "elsewhere-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n", encoding="utf-8")
    group = "[flashtrace_plugin.methods]\nrollout = rollout_elsewhere:AttentionRollout\n"
    (folder / "entry_points.txt").write_text(group, encoding="utf-8")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from flashtrace_plugin.methods import METHODS\n"
        "assert 'rollout' in METHODS and 'torch' not in sys.modules\n"
        "print(METHODS['rollout'].__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "rollout_elsewhere"


class Fake(Method):
    """A method whose answer is given by the test."""

    name = "fake"
    drives = driven(hops=0, recursion="reasoning")
    answer = None

    def start(self, task):
        return lambda weights: self.answer(task, weights)


def even(task, weights):
    alpha = torch.zeros(task.length)
    alpha[: task.target.stop] = 1.0
    return alpha


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda task, w: Hop(torch.ones(10)), r"importance \[10\] for 40 tokens"),
        (lambda task, w: Hop(torch.full((40,), torch.nan)), "40 of 40 numbers that are negative or not finite"),
        (lambda task, w: Hop(-even(task, w)), "the first -1 at position 0"),
        (lambda task, w: Hop(torch.ones(40)), "mass on position 36, after the target 31:36"),
        (lambda task, w: Hop([1.0] * 40), "importance list for 40 tokens"),
        (even, "returned Tensor from a step; it must return a Hop"),
        (lambda task, w: Hop(even(task, w), head_shares=torch.ones(3)), r"head_shares \[3\]"),
        (lambda task, w: Hop(even(task, w), mlp_shares=torch.tensor([torch.nan])), "mlp_shares that are not finite"),
        (
            lambda task, w: Hop(even(task, w), residual_shares=torch.ones(2) if w[31] else None),
            r"residual_shares None after \[2\] in the first hop",
        ),
    ],
)
def test_what_no_attribution_can_be_is_refused_by_the_name_of_the_method(answer, message):
    method = Fake(tiny("llama"), hops=1)
    method.answer = answer
    with pytest.raises(MethodError, match=f"the method 'fake' .*{message}"):
        method.attribute_ids(IDS, **SPANS)


def test_rows_are_all_that_a_recursion_needs():
    class Matrix(Method):
        """A matrix of one row per token."""

        name = "matrix"
        lower = True

        def start(self, task):
            rows = task.rows
            before = torch.arange(task.length) <= rows[:, None]
            return Rows(rows, torch.ones(len(rows), task.length) * (before if self.lower else 1))

    found = Matrix(tiny("llama")).attribute_ids(IDS, **SPANS)
    assert float(found.hop_scores[0].sum()) == pytest.approx(1) and found.hop_scores.shape == (2, 40)
    Matrix.lower = False
    with pytest.raises(MethodError, match="after the target"):
        Matrix(tiny("llama")).attribute_ids(IDS, **SPANS)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"name": "two words"}, "must be a word"),
        ({"name": "flashtrace"}, r"'flashtrace' is taken by flashtrace_plugin.methods.flashtrace.FlashTrace"),
        ({"name": "mine", "drives": {"hop": 1}}, "drives hop, which the driver does not know"),
        ({"name": "mine", "Options": "clash"}, "declares the option hops, which is the driver's"),
    ],
)
def test_declarations_that_cannot_be(declared, message):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Clash(Options):
        hops: int = option(3, "mine")

    fields = {k: Clash if v == "clash" else v for k, v in declared.items()}
    with pytest.raises(MethodError, match=message):
        register_method(type("Mine", (Method,), {"start": lambda self, task: None, **fields}))
    assert "mine" not in METHODS


def test_what_is_no_method_cannot_be_registered():
    with pytest.raises(MethodError, match="takes a subclass of flashtrace_plugin"):
        register_method(int)
    assert issubclass(MethodError, FlashTraceError)
