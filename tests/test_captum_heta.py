"""HETA in Captum: ids, embeddings, NoiseTunnel and the metrics that perturb embeddings."""

import pytest
import torch
from captum.attr import NoiseTunnel, TextTokenInput
from captum.metrics import infidelity, sensitivity_max

import flashtrace_plugin
from flashtrace_captum import HETA, CaptumInputError, LLMTraceAttribution, TargetError
from flashtrace_plugin import InputError, Span, UnsupportedModelError
from tests.tiny import random_ids, tiny, tiny_tokenizer

LENGTH, TARGET = 14, slice(10, 12)
OPTIONS = {"probes": 2, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def ids():
    return random_ids(LENGTH, seed=5)[None]


@pytest.fixture(scope="module")
def embeddings(model, ids):
    return model.get_input_embeddings()(ids).detach()


@pytest.fixture(scope="module")
def heta(model):
    return HETA(model, **OPTIONS)


@pytest.fixture(scope="module")
def scores(heta, ids):
    return heta.attribute(ids, TARGET)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class TestIds:
    def test_as_the_core(self, model, ids, scores):
        want = flashtrace_plugin.HETA(model, **OPTIONS).attribute_ids(ids, prompt_length=10, target=Span(10, 12))
        assert torch.equal(scores[0, :10], want.scores)
        assert bool((scores[0, 10:] == 0).all())

    def test_options_and_hops_reach_the_core(self, model, ids):
        options = OPTIONS | {"curvature": "gradient_squared", "gate": "per_head"}
        got = HETA(model, **options).attribute(ids, TARGET, reasoning=slice(6, 9), hops=1)
        core = flashtrace_plugin.HETA(model, hops=1, **options)
        want = core.attribute_ids(ids, prompt_length=6, target=Span(10, 12), reasoning=Span(6, 9))
        assert torch.equal(got[0, :6], want.scores)

    def test_in_the_language_model_wrapper(self, model):
        tokenizer = tiny_tokenizer()
        prompt, response = "The key is in the red box.", "<think>red</think> box"
        llm = LLMTraceAttribution(HETA(model, **OPTIONS), tokenizer)
        got = llm.attribute(TextTokenInput(prompt, tokenizer), response)
        want = flashtrace_plugin.HETA(model, tokenizer, **OPTIONS).attribute(prompt, response)
        assert torch.equal(got.seq_attr, want.scores)
        assert set(got.attribution.components) == {"gate", "curvature", "information"}

    def test_name_and_options_are_checked_early(self, model):
        assert HETA.get_name() == "HETA"
        with pytest.raises(InputError, match="curvature"):
            HETA(model, curvature="none")
        with pytest.raises(TypeError, match="probe"):
            HETA(model, probe=2)
        with pytest.raises(UnsupportedModelError):
            HETA(torch.nn.Linear(2, 2))
        with pytest.raises(TypeError, match="n_steps"):
            HETA(model).attribute(torch.ones(1, 4).long(), n_steps=3)


class TestEmbeddings:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
    def test_those_of_the_model_give_the_scores_of_the_ids(self, family, ids):
        model = tiny(family)
        heta = HETA(model, **OPTIONS)
        inputs = model.get_input_embeddings()(ids)
        got = heta.attribute(inputs, TARGET, input_ids=ids)
        assert got.shape == inputs.shape
        torch.testing.assert_close(got.sum(-1), heta.attribute(ids, TARGET), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mask", ["zero", "mean", "pad"])
    def test_others_are_as_a_model_with_other_embeddings(self, ids, mask):
        model, other = tiny("llama"), tiny("llama")
        used = ids[0].unique()
        with torch.no_grad():
            other.get_input_embeddings().weight[used] *= 1.5
        # The target's tokens are embedded as well, so all of the text is scaled. The mean over the vocabulary is
        # the module's own in both, hence the comparison with a mask that does not look it up.
        given = 1.5 * model.get_input_embeddings()(ids)
        got = HETA(model, mask=mask, **OPTIONS).attribute(given, TARGET, input_ids=ids).sum(-1)
        if mask == "mean":
            assert not torch.allclose(got, HETA(model, mask=mask, **OPTIONS).attribute(ids, TARGET))
            return
        torch.testing.assert_close(got, HETA(other, mask=mask, **OPTIONS).attribute(ids, TARGET), rtol=1e-4, atol=1e-5)

    def test_a_batch_has_its_own_ids(self, model, heta):
        ids = torch.stack([random_ids(LENGTH, seed=s) for s in (1, 2)])
        inputs = model.get_input_embeddings()(ids)
        got = heta.attribute(inputs, [10, slice(9, 12)], input_ids=ids).sum(-1)
        torch.testing.assert_close(got, heta.attribute(ids, [10, slice(9, 12)]), rtol=1e-4, atol=1e-5)

    def test_padding(self, model, heta, ids, scores):
        padded = torch.cat([torch.ones(1, 3).long(), ids], 1)
        mask = torch.ones_like(padded).index_fill(1, torch.tensor([0, 1, 2]), 0)
        inputs = model.get_input_embeddings()(padded)
        got = heta.attribute(inputs, slice(13, 15), mask, input_ids=padded).sum(-1)
        torch.testing.assert_close(got[:, 3:], scores, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("run", ["normal", "target", "width", "ids"])
    def test_nothing_is_left_behind(self, run, model, heta, ids, embeddings):
        calls = {
            "normal": lambda: heta.attribute(embeddings, TARGET, input_ids=ids),
            "target": lambda: heta.attribute(embeddings, (9999,) * 20, input_ids=ids),
            "width": lambda: heta.attribute(embeddings[..., :8], TARGET, input_ids=ids),
            "ids": lambda: heta.attribute(embeddings, TARGET, input_ids=ids + 10_000),
        }
        if run == "normal":
            calls[run]()
        else:
            with pytest.raises({"target": TargetError, "width": CaptumInputError, "ids": InputError}[run]):
                calls[run]()
        assert hooks(model) == 0
        assert all(p.grad is None and p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize(
        ("inputs", "input_ids", "message"),
        [
            (torch.randn(1, LENGTH, 32), None, "input_ids=ids"),
            (torch.randn(1, LENGTH, 32), torch.ones(1, 5).long(), "do not fit"),
            (torch.randn(3, LENGTH, 32), torch.ones(2, LENGTH).long(), "do not fit"),
            (torch.randn(1, LENGTH), torch.ones(1, LENGTH).long(), r"\(batch, length, d\)"),
            (torch.ones(1, LENGTH).long(), torch.ones(1, LENGTH).long(), "already"),
        ],
    )
    def test_what_does_not_fit(self, heta, inputs, input_ids, message):
        with pytest.raises(CaptumInputError, match=message):
            heta.attribute(inputs, TARGET, input_ids=input_ids)


class TestCaptumsTools:
    @pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
    def test_noise_tunnel(self, heta, ids, embeddings, kind):
        torch.manual_seed(0)
        got = NoiseTunnel(heta).attribute(embeddings, kind, nt_samples=3, stdevs=0.1, target=TARGET, input_ids=ids)
        assert got.shape == embeddings.shape
        assert bool(got.isfinite().all())
        assert bool((got[:, TARGET.start :] == 0).all())

    def test_noise_tunnel_without_noise_gives_the_scores(self, heta, ids, embeddings, scores):
        mask = torch.ones_like(ids)
        got = NoiseTunnel(heta).attribute(
            embeddings,
            nt_samples=4,
            nt_samples_batch_size=2,
            stdevs=0.0,
            target=TARGET,
            input_ids=ids,
            additional_forward_args=(mask,),
        )
        torch.testing.assert_close(got.sum(-1), scores, rtol=1e-4, atol=1e-5)

    def test_noise_tunnel_repeats_the_examples_of_a_batch(self, model, heta):
        ids = torch.stack([random_ids(LENGTH, seed=s) for s in (1, 2)])
        inputs = model.get_input_embeddings()(ids).detach()
        got = NoiseTunnel(heta).attribute(inputs, nt_samples=2, stdevs=0.0, target=[10, 11], input_ids=ids)
        torch.testing.assert_close(got.sum(-1), heta.attribute(ids, [10, 11]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("reasoning", [[slice(3, 6), slice(4, 9)], torch.tensor([5, 7]), [None, slice(4, 9)]])
    def test_reasoning_is_repeated_with_its_example(self, model, reasoning):
        ids = torch.stack([random_ids(LENGTH, seed=s) for s in (1, 2)])
        inputs = model.get_input_embeddings()(ids).detach()
        heta = HETA(model, curvature="gradient_squared", progress=False)
        where = {"target": [slice(10, 12), 11], "reasoning": reasoning, "hops": 1}
        want = heta.attribute(ids, **where)
        for batch in (None, 2):  # 3 samples in parts of 2 and 1
            got = NoiseTunnel(heta).attribute(
                inputs, nt_samples=3, nt_samples_batch_size=batch, stdevs=0.0, input_ids=ids, **where
            )
            torch.testing.assert_close(got.sum(-1), want, rtol=1e-4, atol=1e-5)
        worst = sensitivity_max(
            heta.attribute, inputs, perturb_radius=0.0, n_perturb_samples=2, input_ids=ids, **where
        )
        torch.testing.assert_close(worst, torch.zeros(2), rtol=0, atol=1e-4)

    def test_reasoning_of_other_lengths_is_refused(self, model, heta):
        ids = torch.stack([random_ids(LENGTH, seed=s) for s in (1, 2)])
        inputs = model.get_input_embeddings()(ids).detach()
        for given in ([slice(3, 6)] * 3, [slice(3, 6)]):
            with pytest.raises(TargetError, match=f"reasoning lists {len(given)} entries for 4 examples"):
                NoiseTunnel(heta).attribute(inputs, nt_samples=2, target=10, reasoning=given, input_ids=ids)

    def test_infidelity_and_sensitivity(self, model, heta, ids, embeddings):
        def forward(inputs):
            return model(inputs_embeds=inputs).logits[:, 9].log_softmax(-1)[:, ids[0, 10]]

        def perturb(inputs):
            noise = 0.01 * torch.randn_like(inputs)
            return noise, inputs - noise

        torch.manual_seed(0)
        attributions = heta.attribute(embeddings, 10, input_ids=ids)
        with torch.no_grad():
            found = infidelity(forward, perturb, embeddings, attributions, n_perturb_samples=4, normalize=True)
        assert bool(found.isfinite().all())
        worst = sensitivity_max(
            heta.attribute, embeddings, perturb_radius=0.01, n_perturb_samples=2, target=10, input_ids=ids
        )
        assert worst.shape == (1,)
        assert 0 < float(worst) < 1
