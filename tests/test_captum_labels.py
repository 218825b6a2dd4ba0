"""Labels are those of Captum's own results, so that results of two methods can be joined; texts are readable."""

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LLMAttribution,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
)

from flashtrace_captum import FlashTrace, LLMTraceAttribution, TokenIdsInput
from flashtrace_plugin import reasoner
from tests.tiny import tiny, tiny_tokenizer

PROMPT = "The key of the red box\nis in the  garden €."
RESPONSE = "<think>\nThe box is red.\n</think>\nIt is 🙂 in the garden."


@pytest.fixture(scope="module", params=["byte level", "reasoner"])
def host(request):
    """A model and its tokenizer, a prompt and a response."""
    if request.param == "reasoner":
        return *reasoner.load(), "v7 84 ; grass . ? v7 think", " <think> v7 84 </think> 84"
    return tiny("gpt2"), tiny_tokenizer(), PROMPT, RESPONSE


def inputs(kind, prompt, tokenizer):
    if kind == "skipping":
        return TextTokenInput(prompt, tokenizer, skip_tokens=tokenizer(prompt)["input_ids"][1:2])
    if kind == "ids":
        return TokenIdsInput(tokenizer(prompt)["input_ids"], tokenizer)
    return TextTokenInput(prompt, tokenizer)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["plain", "skipping", "ids"])
def test_results_join_with_those_of_captum(host, kind):
    model, tokenizer, prompt, response = host
    inp = inputs(kind, prompt, tokenizer)
    ours = LLMTraceAttribution(FlashTrace(model), tokenizer).attribute(inp, response)
    theirs = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, response, forward_in_tokens=False)
    assert ours.input_tokens == theirs.input_tokens
    assert ours.output_tokens == theirs.output_tokens
    assert ours.seq_attr_dict.keys() == theirs.seq_attr_dict.keys()


def test_also_with_those_of_gradients_and_templates(host):
    model, tokenizer, prompt, response = host
    llm, inp = LLMTraceAttribution(FlashTrace(model), tokenizer), TextTokenInput(prompt, tokenizer)
    ours = llm.attribute(inp, response)
    layer = LayerGradientXActivation(model, model.get_input_embeddings())
    theirs = LLMGradientAttribution(layer, tokenizer).attribute(inp, response)
    assert (ours.input_tokens, ours.output_tokens) == (theirs.input_tokens, theirs.output_tokens)
    slots = TextTemplateInput(prompt.replace("v7", "{}").replace("red", "{}"), ["7"] * prompt.count("v7") or ["red"])
    assert llm.attribute(slots, response).input_tokens == slots.values


def test_ids_have_the_labels_of_their_text(host):
    _, tokenizer, prompt, _ = host
    text, ids = (inputs(kind, prompt, tokenizer) for kind in ("plain", "ids"))
    assert ids.values == text.values


def test_texts_are_readable_and_join_to_what_was_read(host):
    model, tokenizer, prompt, response = host
    found = LLMTraceAttribution(FlashTrace(model), tokenizer).attribute(TextTokenInput(prompt, tokenizer), response)
    assert "".join(found.input_texts + found.output_texts) == prompt + response
    assert found.answer_text == "".join(found.output_texts[found.answer])
    assert [one.token for one in found.top(2)] == [found.input_texts[one.position] for one in found.top(2)]


def test_a_response_that_captum_cannot_label_has_its_texts_in_the_same_writing():
    tokenizer = tiny_tokenizer()
    llm = LLMTraceAttribution(FlashTrace(tiny("gpt2")), tokenizer)
    cut = torch.tensor(tokenizer("\n red €")["input_ids"])[:-2]
    with pytest.raises(IndexError):
        LLMAttribution(FeatureAblation(llm.model), tokenizer).attribute(
            TextTokenInput(PROMPT, tokenizer), cut, forward_in_tokens=False
        )
    found = llm.attribute(TextTokenInput(PROMPT, tokenizer), cut, answer=slice(None))
    assert found.output_tokens[:2] == ["\\n", "red"] and len(found.output_tokens) == len(cut)
