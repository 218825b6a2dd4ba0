"""The methods as Captum sees them: contract, spans, batches, masks, bad input, and a model left as it was found."""

import inspect
import subprocess
import sys

import pytest
import torch
from captum.attr import Attribution as CaptumAttribution
from captum.attr import NoiseTunnel

import flashtrace_plugin
from flashtrace_captum import IFR, CaptumInputError, FlashTrace, RecursiveAttribution, TargetError, TokenAttribution
from flashtrace_plugin import FlashTraceError, InputError, Span, SpanError, UnsupportedModelError
from tests.tiny import PAD, random_ids, tiny

METHODS = [FlashTrace, IFR, RecursiveAttribution]
PROMPT, REASONING, TARGET, LENGTH = 9, slice(9, 17), slice(18, 21), 23


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3")


@pytest.fixture(scope="module")
def ids():
    return random_ids(LENGTH, seed=3)[None]


def core(method, model, ids, **where):
    return getattr(flashtrace_plugin, method.__name__)(model).attribute_ids(ids, **where)


class TestNumbers:
    @pytest.mark.parametrize("method", METHODS)
    def test_prompt_scores_are_those_of_the_core(self, method, model, ids):
        got = method(model).attribute(ids, target=TARGET, reasoning=REASONING)
        want = core(method, model, ids, prompt_length=PROMPT, target=Span(18, 21), reasoning=Span(9, 17))
        assert torch.equal(got[0, :PROMPT], want.scores)
        assert bool((got[0, PROMPT : TARGET.start] > 0).all())
        assert bool((got[0, TARGET.start :] == 0).all())

    @pytest.mark.parametrize("method", [FlashTrace, RecursiveAttribution])
    def test_reasoning_carries_the_weighted_sum_of_its_hops(self, method, model, ids):
        got = method(model).attribute(ids, target=TARGET, reasoning=REASONING, hops=2)[0]
        found = flashtrace_plugin.FlashTrace if method is FlashTrace else flashtrace_plugin.RecursiveAttribution
        want = found(model, hops=2).attribute_ids(
            ids, prompt_length=PROMPT, target=Span(18, 21), reasoning=Span(9, 17)
        )
        carried, total = 1.0, torch.zeros(LENGTH)
        for alpha, rho in zip(want.hop_scores, want.reasoning_mass, strict=True):
            total += carried * alpha
            carried *= float(rho)
        torch.testing.assert_close(got[: TARGET.start], total[: TARGET.start], rtol=1e-5, atol=1e-7)

    def test_without_reasoning_all_before_the_target_is_prompt(self, model, ids):
        got = FlashTrace(model).attribute(ids, target=TARGET)
        want = core(FlashTrace, model, ids, prompt_length=18, target=Span(18, 21))
        assert torch.equal(got[0, :18], want.scores)

    def test_options_reach_the_core(self, model, ids):
        got = FlashTrace(model, positions="predicting", recursion="generation").attribute(
            ids, target=TARGET, reasoning=REASONING, hops=3
        )
        want = flashtrace_plugin.FlashTrace(model, positions="predicting", recursion="generation", hops=3)
        found = want.attribute_ids(ids, prompt_length=PROMPT, target=Span(18, 21), reasoning=Span(9, 17))
        assert torch.equal(got[0, :PROMPT], found.scores)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gptj"])
    def test_other_families(self, family, ids):
        model = tiny(family)
        got = FlashTrace(model).attribute(ids, target=TARGET, reasoning=REASONING)
        want = core(FlashTrace, model, ids, prompt_length=PROMPT, target=Span(18, 21), reasoning=Span(9, 17))
        assert torch.equal(got[0, :PROMPT], want.scores)

    def test_bfloat16_gives_float32(self, ids):
        got = FlashTrace(tiny("llama", dtype=torch.bfloat16)).attribute(ids, target=TARGET)
        assert got.dtype == torch.float32
        assert not got.requires_grad

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_the_result_is_on_the_device_of_the_inputs(self, model, ids):
        method = FlashTrace(tiny("qwen3").cuda())
        for inputs in (ids, ids.cuda()):
            got = method.attribute(inputs, TARGET, reasoning=REASONING)
            assert got.device == inputs.device
            torch.testing.assert_close(
                got.cpu(), FlashTrace(model).attribute(ids, TARGET, reasoning=REASONING), rtol=1e-3, atol=1e-4
            )


class TestTargets:
    @pytest.mark.parametrize(
        ("target", "same"),
        [
            (None, slice(22, 23)),
            (-1, slice(22, 23)),
            (20, slice(20, 21)),
            (slice(-5, -2), slice(18, 21)),
            (slice(18, None), slice(18, 23)),
            (Span(18, 21), slice(18, 21)),
            (torch.tensor(20), slice(20, 21)),
            (torch.tensor([20]), slice(20, 21)),
            ([20], slice(20, 21)),
            ([slice(18, 21)], slice(18, 21)),
        ],
    )
    def test_ways_to_say_it(self, model, ids, target, same):
        method = FlashTrace(model)
        assert torch.equal(method.attribute(ids, target), method.attribute(ids, same))

    @pytest.mark.parametrize(
        "target",
        [
            (9999,) * 20,
            9999,
            LENGTH,
            -LENGTH - 1,
            0,
            True,
            1.5,
            "answer",
            slice(18, 24),
            slice(20, 18),
            slice(18, 22, 2),
            slice(None, 5),
            [18, 19, 20],
            torch.tensor([18, 19, 20]),
            torch.tensor(18.0),
            torch.zeros(1, 2, dtype=torch.long),
        ],
    )
    def test_bad_ones_raise_both_kinds_of_error(self, model, ids, target):
        with pytest.raises(AssertionError) as caught:
            FlashTrace(model).attribute(ids, target)
        assert isinstance(caught.value, TargetError)
        assert isinstance(caught.value, FlashTraceError)

    def test_the_message_has_value_bound_and_remedy(self, model, ids):
        with pytest.raises(TargetError, match=r"target 18:24 .* outside the tokens 0:23 .* half-open"):
            FlashTrace(model).attribute(ids, slice(18, 24))
        with pytest.raises(TargetError, match=r"3 entries for 1 examples.*slice\(start, stop\)"):
            FlashTrace(model).attribute(ids, [18, 19, 20])

    @pytest.mark.parametrize("reasoning", [slice(0, 5), slice(9, 99), (1, 2)])
    def test_bad_reasoning(self, model, ids, reasoning):
        with pytest.raises(TargetError, match="reasoning"):
            FlashTrace(model).attribute(ids, TARGET, reasoning=reasoning)

    @pytest.mark.parametrize("reasoning", [slice(15, 19), slice(21, 22)])
    def test_reasoning_must_precede_the_target(self, model, ids, reasoning):
        with pytest.raises(SpanError, match="reasoning"):
            FlashTrace(model).attribute(ids, TARGET, reasoning=reasoning)


class TestBatches:
    def test_one_target_for_each_example(self, model):
        ids = torch.stack([random_ids(LENGTH, seed=s) for s in (1, 2)])
        method = FlashTrace(model)
        got = method.attribute(ids, [20, slice(18, 21)], reasoning=[None, REASONING])
        assert torch.equal(got[:1], method.attribute(ids[:1], 20))
        assert torch.equal(got[1:], method.attribute(ids[1:], slice(18, 21), reasoning=REASONING))
        assert torch.equal(method.attribute(ids, torch.tensor([20, 21]))[1:], method.attribute(ids[1:], 21))

    def test_one_target_for_all_examples(self, model):
        ids = torch.stack([random_ids(LENGTH, seed=s) for s in (1, 2)])
        got = IFR(model).attribute(ids, TARGET)
        assert torch.equal(got[1:], IFR(model).attribute(ids[1:], TARGET))

    @pytest.mark.parametrize("left", [True, False])
    def test_padding_is_as_if_it_were_not_there(self, model, ids, left):
        pad = torch.full((1, 4), PAD)
        padded = torch.cat([pad, ids] if left else [ids, pad], 1)
        mask = (padded != PAD).long()
        shift = 4 if left else 0
        got = FlashTrace(model).attribute(
            padded, slice(18 + shift, 21 + shift), (mask,), reasoning=slice(9 + shift, 17 + shift)
        )
        alone = FlashTrace(model).attribute(ids, TARGET, reasoning=REASONING)
        assert torch.equal(got[:, shift : shift + LENGTH], alone)
        assert float(got.sum()) == pytest.approx(float(alone.sum()))

    def test_the_last_token_is_the_last_real_one(self, model, ids):
        padded = torch.cat([ids, torch.full((1, 4), PAD)], 1)
        got = FlashTrace(model).attribute(padded, None, padded != PAD)
        assert torch.equal(got[:, :LENGTH], FlashTrace(model).attribute(ids))

    def test_a_mask_of_ones_changes_nothing(self, model, ids):
        plain = FlashTrace(model).attribute(ids, TARGET)
        for args in (torch.ones_like(ids), (torch.ones_like(ids),), (torch.ones(1, LENGTH),), (None,), (), None):
            assert torch.equal(FlashTrace(model).attribute(ids, TARGET, args), plain)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (lambda mask: (mask.index_fill(1, torch.tensor([5]), 0),), "hole at position 5"),
            (lambda mask: (torch.zeros_like(mask),), "leaves no token"),
            (lambda mask: (mask[:, 1:],), r"must be \[1, 23\]"),
            (lambda mask: (mask, mask), "nothing else"),
            (lambda mask: (None, mask), "nothing else"),
            (lambda mask: ("mask",), "nothing else"),
        ],
    )
    def test_other_forward_args_are_refused(self, model, ids, args, message):
        with pytest.raises(CaptumInputError, match=message):
            FlashTrace(model).attribute(ids, TARGET, args(torch.ones_like(ids)))

    def test_a_target_in_the_padding_is_refused(self, model, ids):
        mask = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1, 2]), 0)
        with pytest.raises(TargetError, match=r"outside the tokens 3:23"):
            FlashTrace(model).attribute(ids, slice(1, 5), mask)


class TestContract:
    @pytest.mark.parametrize("method", METHODS)
    def test_it_is_one_of_captums(self, method, model):
        made = method(model)
        assert isinstance(made, CaptumAttribution)
        assert made.forward_func is model
        assert made.has_convergence_delta() is False
        assert made.multiplies_by_inputs is False
        assert inspect.unwrap(method.attribute) is not method.attribute  # Captum's wrappers call __wrapped__
        with pytest.raises(NotImplementedError, match=method.__name__):
            made.attribute_future()

    def test_captums_parameters_come_first_and_in_its_order(self):
        for method in METHODS:
            names = list(inspect.signature(method.attribute).parameters)
            assert names[:4] == ["self", "inputs", "target", "additional_forward_args"]

    def test_names(self):
        assert [m.get_name() for m in METHODS] == ["FlashTrace", "IFR", "Recursive Attribution"]

    @pytest.mark.parametrize("method", METHODS)
    def test_tuple_in_tuple_out(self, method, model, ids):
        got = method(model).attribute((ids,), TARGET)
        assert isinstance(got, tuple)
        assert torch.equal(got[0], method(model).attribute(ids, TARGET))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("keyword", ["hop", "n_steps", "return_convergence_delta"])
    def test_unknown_keywords(self, method, keyword, model, ids):
        with pytest.raises(TypeError, match=keyword):
            method(model).attribute(ids, TARGET, **{keyword: 1})

    @pytest.mark.parametrize("method", METHODS)
    def test_embeddings_are_refused(self, method, model, ids):
        with pytest.raises(CaptumInputError, match="token ids"):
            method(model).attribute(torch.randn(1, LENGTH, 32), TARGET)
        with pytest.raises(CaptumInputError, match="NoiseTunnel"):
            NoiseTunnel(method(model)).attribute(ids, nt_samples=2, target=TARGET)

    @pytest.mark.parametrize(
        "inputs",
        [
            torch.arange(8),
            torch.zeros(1, 0, dtype=torch.long),
            torch.zeros(1, 4, 3, dtype=torch.long),
            (torch.ones(1, 4).long(), torch.ones(1, 4).long()),
            [[5, 6, 7]],
            "text",
        ],
    )
    def test_other_inputs_are_refused(self, model, inputs):
        with pytest.raises(CaptumInputError):
            FlashTrace(model).attribute(inputs)

    def test_models_are_checked_when_the_method_is_made(self):
        for method in METHODS:
            with pytest.raises(UnsupportedModelError):
                method(torch.nn.Linear(2, 2))
        with pytest.raises(InputError, match="recursion"):
            FlashTrace(tiny("llama"), recursion="all")

    def test_ids_outside_the_vocabulary(self, model, ids):
        with pytest.raises(InputError, match="outside the vocabulary"):
            FlashTrace(model).attribute(ids + 10_000, TARGET)

    def test_the_base_is_abstract_and_enough_for_a_method_of_ones_own(self, model, ids):
        from flashtrace_captum import TokenScores

        class Recency(TokenAttribution):
            def token_scores(self, input_ids, *, prompt_length, target, reasoning=None):
                return TokenScores(torch.arange(len(input_ids)).float())

        with pytest.raises(TypeError, match="abstract"):
            TokenAttribution(model)
        got = Recency(model).attribute(ids, TARGET)
        assert got[0].tolist() == [float(i) for i in range(18)] + [0.0] * 5
        assert Recency.get_name() == "Recency"


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class TestTheModelIsLeftAsItWasFound:
    """The same two situations as in Captum's own hook removal tests: a normal run, and a target that cannot be."""

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("target", [TARGET, (9999,) * 20, 9999])
    def test_hooks_flags_and_gradients(self, method, target, ids):
        model = tiny("llama").train()
        frozen = next(model.parameters()).requires_grad_(False)
        attention = model.config._attn_implementation
        try:
            method(model).attribute(inputs=ids, target=target)
        except AssertionError:
            assert target != TARGET
        assert hooks(model) == 0
        assert model.training
        assert not frozen.requires_grad
        assert all(p.requires_grad for p in model.parameters() if p is not frozen)
        assert all(p.grad is None for p in model.parameters())
        assert model.config._attn_implementation == attention

    @pytest.mark.parametrize("method", METHODS)
    def test_after_an_error_inside_the_model(self, method, ids):
        model = tiny("llama")
        model.get_submodule("model.layers.1.mlp").forward = _broken
        with pytest.raises(AssertionError, match="broken"):
            method(model).attribute(inputs=ids, target=TARGET)
        assert hooks(model) == 0


def _broken(*args, **kwargs):
    raise AssertionError("broken")


def test_without_captum_the_error_names_the_extra():
    code = "import sys; sys.modules['captum'] = None; import flashtrace_captum"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'flashtrace-plugin[captum]'" in done.stderr
