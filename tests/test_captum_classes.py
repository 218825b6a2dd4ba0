"""Captum classes are made from what methods declare: names, signatures, docstrings, and methods registered later."""

import inspect
import pickle
from dataclasses import dataclass

import pytest
import torch
from captum.attr import TextTokenInput

import flashtrace_captum
import flashtrace_plugin
from flashtrace_captum import CaptumInputError, FlashTrace, LLMTraceAttribution, TokenAttribution, TokenScores
from flashtrace_plugin import InputError, Method, Span, register_method
from flashtrace_plugin.attribution import generation_rows
from flashtrace_plugin.core.recursion import Hop
from flashtrace_plugin.methods import METHODS
from flashtrace_plugin.methods.base import options_of
from flashtrace_plugin.methods.options import Options, driven, option
from tests.tiny import random_ids, tiny, tiny_tokenizer

NAMES = ["FlashTrace", "IFR", "RecursiveAttribution", "HETA"]
LENGTH, REASONING, TARGET = 23, slice(9, 17), slice(18, 21)
PROMPT = "The key of the red box is in the garden. Question: where is the key?"
RESPONSE = "<think>\nThe box is red.\n</think>\nIt is in the garden."


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def ids():
    return random_ids(LENGTH, seed=3)[None]


@dataclass(frozen=True)
class RecencyOptions(Options):
    half_life: float = option(4.0, "tokens after which importance is halved")


class Recency(Method):
    """Importance that halves with the distance."""

    name = "recency_of_captum"
    Options = RecencyOptions
    drives = driven(hops=2, ignore=())

    def start(self, task):
        at = torch.arange(task.length)
        rows = (0.5 ** ((at[:, None] - at) / self.options.half_life)).tril()
        each = {"per_token": rows[task.target.slice]}
        return lambda weights: Hop(weights @ rows, components=each)


class OneLook(Recency):
    """The same, in one hop and as a whole."""

    name = "one_look_of_captum"
    drives = driven()

    def start(self, task):
        step = super().start(task)
        return lambda weights: Hop(step(weights).alpha)


class Exact(OneLook):
    """The same, which conserves something."""

    name = "exact_of_captum"
    conserves = True

    def conservation_delta(self, found):
        return 0.25


@pytest.fixture
def late(monkeypatch):
    """Two methods that are registered after flashtrace_captum was imported."""
    monkeypatch.setattr(METHODS, "_registered", dict(METHODS._registered))
    register_method(Recency)
    register_method(OneLook)


class TestDeclared:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_option_is_in_a_signature_with_its_default(self, name):
        made = getattr(flashtrace_captum, name)
        constructor = inspect.signature(made).parameters
        assert list(constructor)[:2] == ["forward_func", "tokenizer"]
        call = inspect.signature(made.attribute).parameters
        for one in options_of(METHODS[made.method.name]):
            where, other = (call, constructor) if one.name == "hops" else (constructor, call)
            assert where[one.name].default == one.default
            assert where[one.name].kind is inspect.Parameter.KEYWORD_ONLY
            assert one.name not in other
        for parameters in (constructor, call):
            assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values())

    @pytest.mark.parametrize("name", NAMES)
    def test_every_option_is_in_a_docstring_as_captum_writes_them(self, name):
        made = getattr(flashtrace_captum, name)
        method = METHODS[made.method.name]
        assert made.__doc__.startswith(method.__doc__.split("\n")[0])
        assert "forward_func (Module)" in made.__doc__
        assert "Returns:" in made.attribute.__doc__
        for one in options_of(method):
            where = made.attribute.__doc__ if one.name == "hops" else made.__doc__
            assert f"\n    {one.name} ({one.type}, optional): " in where
        assert "**" not in made.__doc__.partition("Args:")[2] + made.attribute.__doc__.partition("Returns:")[0]

    def test_only_heta_takes_embeddings(self):
        takers = [
            n for n in NAMES if "input_ids" in inspect.signature(getattr(flashtrace_captum, n).attribute).parameters
        ]
        assert takers == ["HETA"]

    @pytest.mark.parametrize("name", NAMES)
    def test_the_class_is_one_object_with_an_address(self, name):
        made = getattr(flashtrace_captum, name)
        assert made is getattr(flashtrace_captum, name)
        assert pickle.loads(pickle.dumps(made)) is made
        assert made.__module__ == "flashtrace_captum"
        assert made.__qualname__ == name
        assert {name} <= set(flashtrace_captum.__all__) <= set(dir(flashtrace_captum))

    def test_other_names_are_told(self):
        with pytest.raises(AttributeError, match=r"Rollout.*no registered method"):
            flashtrace_captum.Rollout  # noqa: B018
        assert not hasattr(flashtrace_captum, "__wrapped__")

    def test_unknown_options_are_told_with_the_known_ones(self, model, ids):
        with pytest.raises(TypeError, match="FlashTrace has no option hop; it takes recursion, positions"):
            FlashTrace(model, hop=1)
        with pytest.raises(
            TypeError, match=r"FlashTrace has no option hops; it takes recursion.*; attribute takes hops"
        ):
            FlashTrace(model, hops=1)
        with pytest.raises(TypeError, match="FlashTrace has no option hop of attribute; it takes hops"):
            FlashTrace(model).attribute(ids, hop=1)
        with pytest.raises(TypeError, match="IFR has no option hops of attribute; it takes none"):
            flashtrace_captum.IFR(model).attribute(ids, hops=1)
        with pytest.raises(InputError, match="hops"):
            FlashTrace(model).attribute(ids, hops=-1)

    @pytest.mark.parametrize("name", ["FlashTrace", "IFR", "RecursiveAttribution"])
    def test_positions_and_ignored_tokens_reach_every_method(self, name, model, ids):
        options = {"positions": "predicting", "ignore": [int(ids[0, 4]), int(ids[0, 19])]}
        got = getattr(flashtrace_captum, name)(model, **options).attribute(ids, TARGET, reasoning=REASONING)
        core = getattr(flashtrace_plugin, name)(model, **options)
        want = core.attribute_ids(ids, prompt_length=9, target=Span(18, 21), reasoning=Span(9, 17))
        assert torch.equal(got[0, :9], want.scores)
        assert got[0, 4] == 0

    def test_ignored_tokens_may_be_texts_with_a_tokenizer_and_an_iterator(self, model, ids):
        tokenizer = tiny_tokenizer()
        word = tokenizer.decode([int(ids[0, 4])]).strip()
        method = FlashTrace(model, tokenizer, ignore=iter([word]))
        for _ in range(2):
            assert method.attribute(ids, TARGET)[0, 4] == 0

    def test_a_subclass_keeps_its_own_signature_and_scores(self, model, ids):
        class Doubled(FlashTrace):
            def __init__(self, forward_func, times=2.0):
                super().__init__(forward_func, positions="predicting")
                self.times = times

            def token_scores(self, input_ids, **where):
                return TokenScores(self.times * super().token_scores(input_ids, **where).scores)

        plain = FlashTrace(model, positions="predicting")
        assert list(inspect.signature(Doubled).parameters) == ["forward_func", "times"]
        assert torch.equal(Doubled(model).attribute(ids, TARGET, hops=2), 2 * plain.attribute(ids, TARGET, hops=2))
        tokenizer = tiny_tokenizer()
        inp = TextTokenInput(PROMPT, tokenizer)
        got = LLMTraceAttribution(Doubled(model), tokenizer).attribute(inp, RESPONSE)
        assert torch.equal(got.seq_attr, 2 * LLMTraceAttribution(plain, tokenizer).attribute(inp, RESPONSE).seq_attr)


class TestConvergenceDelta:
    def test_only_what_conserves_has_one(self, model):
        made = {name: getattr(flashtrace_captum, name) for name in (*NAMES, "ALTI", "LRP", "Recommended")}
        having = {name for name, cls in made.items() if "return_convergence_delta" in signature_of(cls)}
        assert having == {"LRP", "Recommended"}
        assert {name for name, cls in made.items() if cls(model).has_convergence_delta()} == {"LRP"}
        assert not made["LRP"](model, rule="attn").has_convergence_delta()
        assert made["Recommended"](model, rule="cp").has_convergence_delta()

    @pytest.mark.parametrize("family", ["gpt2", "qwen2"])
    @pytest.mark.parametrize("objective", ["logit", "log_probability"])
    def test_it_is_what_is_lost_between_objective_and_shares(self, family, objective, ids):
        model = tiny(family, seed=3)
        method = flashtrace_captum.LRP(model, objective=objective)
        plain = method.attribute(ids, TARGET, reasoning=REASONING, hops=1)
        got, delta = method.attribute(ids, TARGET, reasoning=REASONING, hops=1, return_convergence_delta=True)
        assert torch.equal(got, plain)
        core = flashtrace_plugin.LRP(model, objective=objective, hops=1)
        found = core.attribute_ids(ids, prompt_length=9, target=Span(18, 21), reasoning=Span(9, 17))
        told, signed = found.settings, found.components["relevance"].double()
        shares = float(signed.sum()) + told["bias_share"] + told["position_share"]
        assert told["bias_share"] and (told["position_share"] != 0) == (family == "gpt2")
        assert delta.shape == (1,) and delta.dtype == torch.float32
        assert float(delta) == pytest.approx(shares - told["objective_value"], abs=1e-6)
        assert abs(float(delta)) < 1e-5 * float(signed.abs().sum())

    def test_it_tells_what_was_lost(self, model, ids):
        class Leaky(flashtrace_captum.LRP):
            def token_scores(self, input_ids, **where):
                found = super().token_scores(input_ids, **where)
                found.attribution.components["relevance"][3] += 0.5
                return found

        delta = Leaky(model).attribute(ids, TARGET, return_convergence_delta=True)[1]
        assert float(delta) == pytest.approx(0.5, abs=1e-4)

    def test_each_example_of_a_batch_has_its_own(self, model, ids):
        both = torch.cat([ids, ids.roll(1)])
        mask = torch.ones_like(both)
        mask[1, :4] = 0
        (got,), delta = flashtrace_captum.LRP(model).attribute((both,), TARGET, mask, return_convergence_delta=True)
        assert got.shape == both.shape and delta.shape == (2,) and delta.device == both.device
        assert not got[1, :4].any() and float(delta.abs().max()) < 1e-3

    def test_where_there_is_none_it_is_refused(self, model, ids):
        with pytest.raises(CaptumInputError, match="LRP with these options conserves nothing"):
            flashtrace_captum.LRP(model, rule="attn").attribute(ids, TARGET, return_convergence_delta=True)
        with pytest.raises(TypeError, match="FlashTrace has no option return_convergence_delta"):
            FlashTrace(model).attribute(ids, TARGET, return_convergence_delta=True)
        with pytest.raises(NotImplementedError, match="'flashtrace' conserves nothing"):
            core = flashtrace_plugin.FlashTrace(model)
            core.conservation_delta(core.attribute_ids(ids, prompt_length=9, target=Span(18, 21)))

        class Halved(flashtrace_captum.LRP):
            def token_scores(self, input_ids, **where):
                return TokenScores(super().token_scores(input_ids, **where).scores / 2)

        with pytest.raises(CaptumInputError, match=r"Halved\.token_scores gave scores without the attribution"):
            Halved(model).attribute(ids, TARGET, return_convergence_delta=True)

    @pytest.mark.usefixtures("late")
    def test_a_method_of_ones_own_declares_it(self, model, ids):
        made = flashtrace_captum.Recency
        assert "return_convergence_delta" not in signature_of(made)
        register_method(Exact)
        delta = flashtrace_captum.Exact(model).attribute(ids, TARGET, return_convergence_delta=True)[1]
        assert delta.tolist() == [0.25]


def signature_of(cls):
    return inspect.signature(cls.attribute).parameters


@pytest.mark.usefixtures("late")
class TestRegisteredLater:
    def test_it_is_a_class_of_captum(self):
        made = flashtrace_captum.Recency
        assert issubclass(made, TokenAttribution)
        assert made is flashtrace_captum.Recency
        assert "Recency" in dir(flashtrace_captum)
        assert made.get_name() == "Recency"
        assert flashtrace_captum.OneLook.get_name() == "One Look"
        assert str(inspect.signature(made)).replace("'", "") == (
            "(forward_func: Any, tokenizer: Any = None, *, ignore: Iterable[str | int] = (), "
            "format: FormatChoice = None, max_cost: float | None = 10000, half_life: float = 4.0) -> None"
        )
        assert list(inspect.signature(made.attribute).parameters)[-2:] == ["reasoning", "hops"]
        assert list(inspect.signature(flashtrace_captum.OneLook.attribute).parameters)[-1] == "reasoning"
        assert "halves with the distance" in made.__doc__
        assert "half_life (float, optional): tokens after which importance is halved. Default: 4.0" in made.__doc__

    @pytest.mark.parametrize("hops", [0, 1, 3])
    def test_on_ids_it_has_the_numbers_of_the_core(self, model, ids, hops):
        got = flashtrace_captum.Recency(model, half_life=2.0).attribute(ids, TARGET, reasoning=REASONING, hops=hops)
        core = Recency(model, half_life=2.0, hops=hops)
        want = core.attribute_ids(ids, prompt_length=9, target=Span(18, 21), reasoning=Span(9, 17))
        assert torch.equal(got[0, :9], want.scores)

    def test_in_the_wrapper_it_has_what_it_found(self, model):
        tokenizer = tiny_tokenizer()
        inp = TextTokenInput(PROMPT, tokenizer)
        want = Recency(model, tokenizer).attribute(PROMPT, RESPONSE)
        got = LLMTraceAttribution(flashtrace_captum.Recency(model), tokenizer).attribute(inp, RESPONSE)
        assert got.attribution == want
        assert got.hop_attr.shape == (3, len(got.input_tokens))
        torch.testing.assert_close(got.token_attr[got.answer].sum(0).sum(), got.seq_attr.sum())
        whole = LLMTraceAttribution(flashtrace_captum.OneLook(model), tokenizer).attribute(inp, RESPONSE)
        assert whole.token_attr is None
        assert whole.attribution == OneLook(model, tokenizer).attribute(PROMPT, RESPONSE)


class TestRowsOfTheGeneration:
    def test_by_hand(self):
        per_token = torch.tensor([[1.0, 3.0, 0.0, 9.0, 9.0], [2.0, 2.0, 0.0, 9.0, 9.0]])
        rows = generation_rows(per_token, Span(3, 5), torch.tensor([0.25, 0.75]))
        assert rows.shape == (3, 2)
        assert bool(rows[0].isnan().all())
        torch.testing.assert_close(rows[1:], torch.tensor([[0.125, 0.375], [0.25, 0.25]]))

    def test_rows_without_mass_stay_zero(self):
        rows = generation_rows(torch.zeros(1, 3), Span(2, 3), torch.tensor([0.5, 0.5]))
        assert rows.tolist() == [[0, 0]]
