"""What Inseq's users may ask for: honoured, refused by name, or named in one warning; never ignored in silence."""

from __future__ import annotations

import warnings

import pytest
import torch

inseq = pytest.importorskip("inseq")

import flashtrace_inseq  # noqa: E402
from flashtrace_plugin import LRP, reasoner  # noqa: E402
from flashtrace_plugin.errors import InputError, ReasoningWarning, UnsupportedModelError  # noqa: E402
from tests.tiny import tiny, tiny_tokenizer  # noqa: E402

PROMPT = "The key of the red box is in the garden. Question: where is the key?"
GENERATION = "<think>\nThe box is red.\n</think>\nIt is in the garden."
TEXT = PROMPT + GENERATION
METHODS = ("flashtrace", "ifr", "recursive", "alti", "lrp", "recommended", "heta")


@pytest.fixture(scope="module")
def hf():
    return tiny("qwen3")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(hf, tokenizer):
    return inseq.load_model(hf, "flashtrace", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def out(model):
    return model.attribute(PROMPT, TEXT, hops=2)


@pytest.fixture(scope="module")
def by_token(model):
    return model.attribute(PROMPT, TEXT, method="ifr")


def columns(found):
    return found[0].target_attributions


# Texts


def test_several_generations_of_one_prompt_are_refused_by_name(model):
    args = {"max_new_tokens": 3, "num_return_sequences": 2, "do_sample": True}
    with pytest.raises(
        InputError, match=r"2 generated texts for 1 prompt: num_return_sequences.* pass each text with"
    ):
        model.attribute(PROMPT, generation_args=args)


def test_no_texts_are_refused(model):
    with pytest.raises(InputError, match="no texts were given"):
        model.attribute([], [])


# Options


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("option", ["hop", "n_steps", "contrast_targets"])
def test_unknown_options_are_refused(model, name, option):
    with pytest.raises(InputError, match=f"'{name}' has no option {option}; it takes .*target"):
        model.attribute(PROMPT, TEXT, method=name, **{option: 1})


@pytest.mark.parametrize("name", METHODS)
def test_options_of_load_model_are_refused(hf, tokenizer, name):
    for options in ({"bogus": 1}, {"hops": 2, "bogus": 1}):
        with pytest.raises(InputError, match=rf"{', '.join(sorted(options))}: pass options to attribute\(\)"):
            inseq.load_model(hf, name, tokenizer=tokenizer, **options)


def test_what_has_no_effect_is_named_in_one_warning(model, out):
    generated = {"generation_args": {"max_new_tokens": 3}, "show_progress": False, "hops": 0}
    with pytest.warns(UserWarning) as caught:
        model.attribute([PROMPT, PROMPT[:-1]], batch_size=2, include_eos_baseline=True, **generated)
    (told,) = [str(one.message) for one in caught if one.category is not ReasoningWarning]
    assert told.startswith("'flashtrace' makes no use of batch_size, include_eos_baseline: ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = model.attribute(PROMPT, TEXT, hops=2, batch_size=8, pretty_progress=False)
    torch.testing.assert_close(columns(again), columns(out), equal_nan=True)


def test_a_base_makes_use_of_the_baseline(model):
    where = {"method": "recursive", "base": "integrated_gradients", "base_args": {"n_steps": 3}, "target": "garden"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.attribute(PROMPT, TEXT + "</s>", include_eos_baseline=True, show_progress=False, **where)


# What is explained


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "asked",
    [
        {"attributed_fn": "entropy"},
        {"attributed_fn": "contrast_prob_diff", "contrast_targets": TEXT.replace("garden", "box")},
        {"attributed_fn": "probability", "logprob": True},
        {"logprob": True},
        {"attributed_fn": "logit"},
    ],
    ids=["entropy", "contrast", "logprob", "logprob alone", "logit"],
)
def test_functions_of_the_output_are_honoured_or_refused(hf, tokenizer, model, name, asked):
    objective = {"logit": "logit", "probability": "log_probability", None: "log_probability"}
    wanted = objective.get(asked.get("attributed_fn"))
    call = dict(method=name, target=-2, reasoning="red.", show_progress=False, **asked)
    if name in ("lrp", "recommended") and wanted:
        found = model.attribute(PROMPT, TEXT, **call)
        (a,) = flashtrace_inseq.attributions(found)
        assert a.settings["objective"] == found.info["attribution_args"]["objective"] == wanted
        return
    if name == "heta" and wanted == "log_probability":
        assert columns(model.attribute(PROMPT, TEXT, curvature=None, **call)).isfinite().any()
        return
    told = asked.get("attributed_fn", "probability")
    with pytest.raises(InputError, match=rf"attributed_fn={told}_fn.*'{name}' .*leave attributed_fn out") as caught:
        model.attribute(PROMPT, TEXT, **call)
    assert ("objective='contrast'" in str(caught.value)) == (name in ("lrp", "recommended"))


def test_two_objectives_are_one_too_many(hf, tokenizer, model):
    with pytest.raises(InputError, match=r"attributed_fn=logit_fn and objective='centered' .* use one"):
        model.attribute(PROMPT, TEXT, method="lrp", attributed_fn="logit", objective="centered")
    found = model.attribute(PROMPT, TEXT, method="lrp", objective="contrast", against=" box", target="garden")
    want = LRP(hf, tokenizer, objective="contrast", against=" box").attribute(PROMPT, GENERATION, target="garden")
    assert flashtrace_inseq.attributions(found) == [want]


def test_a_base_is_told_what_to_attribute(model):
    contrast = {"attributed_fn": "contrast_logits", "contrast_targets": PROMPT + "The key is" + " in the box." * 4}
    where = {"target": [36, 38], "reasoning": [25, 30]}
    options = {"method": "recursive", "base": "saliency", "show_progress": False} | where
    found = model.attribute(PROMPT, TEXT, **contrast, **options)
    stored = model.attribute(PROMPT, TEXT, method="saliency", show_progress=False, **contrast)
    want = flashtrace_inseq.recursive(stored, **where)
    torch.testing.assert_close(columns(found), columns(want), equal_nan=True, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(
        columns(found).nan_to_num(), columns(model.attribute(PROMPT, TEXT, **options)).nan_to_num()
    )
    with pytest.raises(InputError, match="contrast_targets lists 2 texts"):
        model.attribute([PROMPT] * 2, [TEXT] * 2, **options | contrast | {"contrast_targets": [TEXT] * 2})
    with pytest.raises(InputError, match="'recursive' has no option contrast_targets"):
        model.attribute(PROMPT, TEXT, contrast_targets=contrast["contrast_targets"], **options)
    with pytest.raises(InputError, match="attributed_fn=logit_fn"):
        model.attribute(PROMPT, TEXT, attributed_fn="logit", **options | {"base": "ifr"})


# Parts


@pytest.mark.parametrize("call", ["show", "aggregate", "show_tokens", "get_scores_dicts"])
def test_the_wrong_name_of_a_hop_is_refused(out, by_token, call):
    more = {"display": False} if call.startswith("show") else {}
    for name in ("hops", "Hop", "parts"):
        with pytest.raises(InputError, match=rf"no option {name}; .* hop=…, part=…"):
            getattr(out[0], call)(**{name: 1}, **more)
    for found in (out.aggregate(hop=1)[0], by_token[0]):
        with pytest.raises(InputError, match="no parts to choose 'hop 1' from"):
            getattr(found, call)(hop=1, **more)
        with pytest.raises(InputError, match="no option hops"):
            getattr(found, call)(hops=1, **more)
    assert getattr(out[0], call)(hop=1, **more) is not False


def test_in_a_chain_the_wrong_name_is_refused_too(out):
    with pytest.raises(InputError, match="no option hops"):
        out.aggregate(["subwords", "hops"], special_chars="Ġ", hops=1)
    words = out.aggregate(["subwords", "hops"], special_chars="Ġ", hop=1)
    torch.testing.assert_close(columns(words).nansum(), out[0].target_attributions[:, 0, 2].nansum())


@pytest.mark.parametrize("function", ["mean", "sum", "max", "absmax", "vnorm", "scores", ["subwords", "mean"]])
def test_a_total_is_not_averaged_with_its_hops(out, function):
    with pytest.raises(InputError, match=r"total, hop 0, hop 1, hop 2, everywhere .* choose one: hop=… or part=…"):
        out.aggregate(function)
    chosen = out.aggregate("scores", select_idx=2)
    want = out[0].target_attributions[:, 0, 2].clone()
    torch.testing.assert_close(columns(chosen)[:, 0], want / want.nansum(), equal_nan=True)


def test_what_is_one_number_for_each_pair_has_nothing_to_average(out, by_token):
    for found in (out.aggregate(hop=1), by_token):
        with pytest.raises(InputError, match="one number for each pair of tokens"):
            found.aggregate("mean")


def test_spans_are_summed_alike_for_one_column_and_for_several(out, by_token, model):
    spans = [(0, 9), (9, 19)]
    one = model.attribute(PROMPT, TEXT, method="ifr", target=[36, 37])
    for found in (one, by_token):
        rows = columns(found)
        merged = columns(found.aggregate("spans", target_spans=spans))
        torch.testing.assert_close(merged[:2], torch.stack([rows[:9].sum(0), rows[9:19].sum(0)]))
    start = by_token[0].attr_pos_start
    pair = columns(by_token.aggregate("spans", target_spans=[(start + 1, start + 3)]))
    torch.testing.assert_close(pair[:start, 1], columns(by_token)[:start, 1:3].sum(1))


# Models


@pytest.mark.parametrize("method", ["flashtrace", "saliency"])
def test_bridges_are_refused_with_their_way(hf, tokenizer, method):
    pytest.importorskip("transformer_lens")
    from flashtrace_lens import bridge_for

    bridge = bridge_for(hf, tokenizer)
    way = r"TransformerBridge.*flashtrace_lens\.flashtrace\(bridge, tokens"
    with pytest.raises(UnsupportedModelError, match=way):
        inseq.load_model(bridge, method, tokenizer=tokenizer)
    with pytest.raises(UnsupportedModelError, match=way):
        inseq.load_model(bridge.original_model, method, tokenizer=tokenizer)
    assert inseq.load_model(hf, method, tokenizer=tokenizer).model is hf


def test_models_loaded_by_name_attend_as_transformers_loads_them(tmp_path, hf, tokenizer, monkeypatch):
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = inseq.load_model(str(tmp_path), "flashtrace")
    attention = model.model.config
    seen = []
    handle = model.model.model.register_forward_pre_hook(lambda m, a: seen.append(m.config._attn_implementation))
    for name in ("flashtrace", "ifr", "recursive", "alti"):
        model.attribute(PROMPT, TEXT, method=name)
    assert set(seen) == {"sdpa"} and attention._attn_implementation == "eager"
    with pytest.raises(InputError):
        model.attribute(PROMPT, TEXT + " No." * 100)
    assert attention._attn_implementation == "eager"
    seen.clear()
    model.attribute(PROMPT, TEXT, method="attention", attr_pos_start=37, show_progress=False)
    assert set(seen) == {"eager"}
    handle.remove()


def test_units_merge_tokens_and_keep_their_mass():
    model = inseq.load_model(str(reasoner.path()), "recommended")
    prompt = "the sun is green . v20 12 ; the sky is green . v55 v20 ; ? v55 think"
    out = model.attribute(prompt, show_progress=False)
    item = out.aggregate(["hops", "units"], unit="step").sequence_attributions[0]
    units = [one for one in flashtrace_inseq.attributions(out)[0].by("step") if one.unit.content]
    assert [t.token for t in item.target][: len(units)] == [one.unit.text.replace(" ", "") for one in units]
    expected = torch.tensor([one.score for one in units])
    torch.testing.assert_close(item.target_attributions[: len(units), 0], expected, rtol=1e-5, atol=1e-8)
    with pytest.raises(InputError, match="units must be one of"):
        out.aggregate("units", unit="chapter")
