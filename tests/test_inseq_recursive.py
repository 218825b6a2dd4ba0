"""Recursion for the methods of Inseq: the numbers by hand, bases by name, stored results, and a model left alone."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

inseq = pytest.importorskip("inseq")

from inseq.data import Aggregator  # noqa: E402
from inseq.data.attribution import FeatureAttributionSequenceOutput  # noqa: E402

import flashtrace_inseq  # noqa: E402
from flashtrace_inseq.aggregators import RecursiveAggregator  # noqa: E402
from flashtrace_inseq.matrices import matrix_of, on_model  # noqa: E402
from flashtrace_plugin import FlashTrace, InputError, Recursive, RecursiveAttribution  # noqa: E402
from tests.tiny import tiny, tiny_tokenizer  # noqa: E402

PROMPT = "The key of the red box is in the garden. Question: where is the key?"
GENERATION = "<think>\nThe box is red.\n</think>\nIt is in the garden."
TEXT = PROMPT + GENERATION
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def hf():
    return tiny("qwen3")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(hf, tokenizer):
    return inseq.load_model(hf, "saliency", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def stored(model):
    return model.attribute(PROMPT, TEXT, **QUIET)


def one(out):
    (found,) = flashtrace_inseq.attributions(out)
    return found


def by_hand(hf, ids, start):
    """| d P(token) / d embedding |, its L2 norm over the embedding, a row for every token from ``start`` on: [M, N]"""
    matrix = torch.zeros(len(ids) - start, len(ids))
    for i in range(start, len(ids)):
        embedded = hf.get_input_embeddings()(ids[None, :i]).detach().requires_grad_()
        p = hf(inputs_embeds=embedded).logits[0, -1].softmax(-1)[ids[i]]
        matrix[i - start, :i] = torch.autograd.grad(p, embedded)[0][0].norm(dim=-1)
    return matrix


@pytest.mark.parametrize("hops", [0, 2, "auto", float("inf")])
def test_a_base_is_its_matrix_by_hand_through_the_recursion(hf, tokenizer, model, stored, hops, tmp_path):
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    start = len(tokenizer(PROMPT)["input_ids"])
    expected = Recursive(by_hand(hf, ids, start), tokenizer, hops=hops).attribute_ids(ids, prompt_length=start)
    out = model.attribute(PROMPT, TEXT, method="recursive", base="saliency", hops=hops, **QUIET)
    found = one(out)
    assert found.text(found.target) == "It is in the garden." and found.text(found.reasoning) == "The box is red."
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.hop_scores, expected.hop_scores, rtol=1e-4, atol=1e-6)
    assert found.settings["base"] == "saliency" and out.info["attribution_args"]["base"] == "saliency"
    later = one(flashtrace_inseq.recursive(stored, tokenizer, hops=hops))
    torch.testing.assert_close(later.scores, found.scores)
    out.save(tmp_path / "out.json")
    assert inseq.FeatureAttributionOutput.load(tmp_path / "out.json") == out


def test_without_a_base_it_is_the_exhaustive_recursion(hf, tokenizer, model):
    found = one(model.attribute(PROMPT, TEXT, method="recursive", hops=2))
    assert found == RecursiveAttribution(hf, tokenizer, hops=2).attribute(PROMPT, GENERATION)


@pytest.mark.parametrize(
    ("base", "args"),
    [
        ("input_x_gradient", {}),
        ("integrated_gradients", {"n_steps": 3}),
        ("attention", {}),
        ("occlusion", {"perturbations_per_eval": 16}),
    ],
)
def test_a_base_and_its_stored_result_say_the_same_and_the_model_stays_as_it_was(hf, tokenizer, base, args):
    hf.set_attn_implementation("eager")
    model = inseq.load_model(hf, base, tokenizer=tokenizer)
    stored = flashtrace_inseq.recursive(model.attribute(PROMPT, TEXT, **args, **QUIET), tokenizer)
    hf.set_attn_implementation("sdpa")
    before = state(model)
    out = model.attribute(PROMPT, TEXT, method="recursive", base=base, base_args=args, **QUIET)
    assert state(model) == before
    torch.testing.assert_close(one(out).scores, one(stored).scores, rtol=1e-4, atol=1e-6)
    again = model.attribute(PROMPT, TEXT, method="recursive", base=base, base_args=args, **QUIET)
    assert one(again) == one(out)


def state(model):
    """What a run could leave behind; hooks of transformers stay, inert, once outputs were asked for."""
    hooks = [
        (name, key)
        for name, module in model.model.named_modules()
        for known in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in known.items()
        if not hook.__module__.startswith("transformers")
    ]
    grads = [(p.requires_grad, p.grad is None) for p in model.model.parameters()]
    return hooks, grads, model.model.config._attn_implementation, model.model.training, model.config


def test_a_base_that_fails_leaves_no_hook(hf, model):
    before = state(model)

    def hook(*args):
        return None

    with pytest.raises(RuntimeError, match="in the middle"), on_model(model, "attention"):
        assert hf.config._attn_implementation == "eager"
        hf.model.layers[0].register_forward_hook(hook)
        raise RuntimeError("in the middle")
    assert state(model) == before


def test_methods_of_this_package_are_bases_too(hf, tokenizer, model):
    options = {"positions": "predicting"}
    found = one(model.attribute(PROMPT, TEXT, method="recursive", base="flashtrace", base_args=options, hops=2))
    assert found == FlashTrace(hf, tokenizer, hops=2, **options).attribute(PROMPT, GENERATION)
    with pytest.raises(InputError, match="hops is an option of attribute"):
        model.attribute(PROMPT, TEXT, method="recursive", base="flashtrace", base_args={"hops": 2})
    with pytest.raises(InputError, match="positions belongs to the base"):
        model.attribute(PROMPT, TEXT, method="recursive", base="ifr", positions="predicting")
    with pytest.raises(InputError, match="hops=inf needs a row"):
        model.attribute(PROMPT, TEXT, method="recursive", base="flashtrace", hops=float("inf"))


def test_spans_and_what_is_followed_are_chosen_as_always(model, stored, tokenizer):
    options = {"target": [36, 38], "reasoning": "box is red", "recursion": "generation", "ignore": ["."], "hops": 3}
    found = one(model.attribute(PROMPT, TEXT, method="recursive", base="saliency", **options, **QUIET))
    assert (found.target.start, found.target.stop) == (36, 38) and found.text(found.reasoning) == " box is red"
    later = one(flashtrace_inseq.recursive(stored, tokenizer, **(options | {"target": (36, 38)})))
    torch.testing.assert_close(later.scores, found.scores)
    through = one(model.attribute(PROMPT, TEXT, method="recursive", base="saliency", recursion="prompt", **QUIET))
    assert through.settings["hops_followed"] > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "salience"}, "base is 'salience', which is no method of Inseq; there are .*saliency"),
        ({"base": "saliency", "base_args": {"steps": 3}}, "the base 'saliency' takes no argument steps"),
        ({"base_args": {"n_steps": 3}}, "base_args n_steps go with base=…"),
        ({"base": "saliency", "positions": "token"}, "positions has no meaning for the base 'saliency'"),
        ({"base": "dummy"}, "holds no scores of tokens"),
    ],
)
def test_bases_that_are_refused(model, options, message):
    before = state(model)
    with pytest.raises(InputError, match=message):
        model.attribute(PROMPT, TEXT, method="recursive", **options, **QUIET)
    assert state(model) == before


def test_the_aggregator_needs_no_tokenizer_where_positions_are_given(stored, tokenizer, tmp_path):
    expected = one(flashtrace_inseq.recursive(stored, tokenizer))
    where = {"target": expected.target, "reasoning": expected.reasoning}
    found = stored.aggregate("recursive", **where)
    torch.testing.assert_close(one(found).scores, expected.scores)
    assert found[0].target[-1].id == -1 and found[0].attr_pos_end == found[0].attr_pos_start + 1
    assert stored[0].target_attributions.ndim == 3, "the stored result is left as it was"
    once = stored.aggregate().aggregate("recursive", hops=float("inf"), **where)
    assert once[0].target_attributions.shape[1:] == (1, 4)
    found.save(tmp_path / "out.json")
    loaded = inseq.FeatureAttributionOutput.load(tmp_path / "out.json")
    assert loaded == found and one(loaded) == one(found)
    found.show(display=False, return_html=True)
    stored.save(tmp_path / "stored.json")
    again = inseq.FeatureAttributionOutput.load(tmp_path / "stored.json").aggregate("recursive", **where)
    torch.testing.assert_close(one(again).scores, expected.scores)


def test_each_input_has_spans_of_its_own(model, tokenizer):
    texts = [TEXT, PROMPT + " <think>\nNo.\n</think>\nYes."]
    stored = model.attribute([PROMPT, PROMPT], texts, **QUIET)
    found = flashtrace_inseq.attributions(flashtrace_inseq.recursive(stored, tokenizer, target=["garden", "Yes"]))
    assert [a.text(a.target).strip() for a in found] == ["garden", "Yes"]


def test_results_that_lack_what_the_recursion_needs(model, stored, tokenizer):
    late = model.attribute(PROMPT, TEXT, attr_pos_start=34, **QUIET)
    with pytest.raises(InputError, match="no reasoning was found from token 34, where attribution began"):
        flashtrace_inseq.recursive(late, tokenizer)
    with pytest.raises(InputError, match=r"the reasoning .* has no scores before token 34.*leave attr_pos_start out"):
        flashtrace_inseq.recursive(late, tokenizer, target=(36, 38), reasoning=(25, 30), prompt_length=20)
    assert one(flashtrace_inseq.recursive(late, tokenizer, hops=0)).hops == 0
    with pytest.raises(InputError, match="without a tokenizer nothing can be found in the text"):
        stored.aggregate("recursive", target=(36, 38))
    with pytest.raises(InputError, match="no importance in the row of token"):
        stored.aggregate("recursive", target=(36, 38), reasoning=(25, 30), recursion="prompt")


def test_scores_that_are_not_finite_are_refused(stored, tokenizer):
    broken = deepcopy(stored)
    broken[0].target_attributions[3, 9] = torch.nan
    token = broken[0].attr_pos_start + 9
    with pytest.raises(InputError, match=rf"the scores of token {token} \('.*'\) are not finite"):
        flashtrace_inseq.recursive(broken, tokenizer)


def test_the_matrix_of_a_stored_result(stored):
    matrix = matrix_of(stored[0])
    start = stored[0].attr_pos_start
    assert matrix.shape == (len(stored[0].target) - start, len(stored[0].target))
    assert not matrix.triu(start).any() and bool((matrix.tril(start - 1).sum(1) > 0).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source_attributions": torch.ones(3, 2)}, "is of an encoder-decoder"),
        ({}, "holds no scores of tokens"),
        ({"target_attributions": torch.ones(4, 2)}, r"has scores \[4, 2\] for the tokens 1:4"),
    ],
)
def test_results_of_another_form(stored, fields, message):
    item = FeatureAttributionSequenceOutput(
        source=stored[0].source[:3], target=stored[0].target[:4], attr_pos_start=1, attr_pos_end=4, **fields
    )
    with pytest.raises(InputError, match=message):
        matrix_of(item)


def test_the_method_explains_its_base_and_the_aggregator(capsys):
    inseq.explain("recursive")
    text = " ".join(capsys.readouterr().out.split())
    assert "base: name of a method of Inseq" in text and "out.aggregate('recursive'" in text
    assert Aggregator.available_classes()["recursive"] is RecursiveAggregator
