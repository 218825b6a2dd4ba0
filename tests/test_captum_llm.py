"""The language model wrapper: Captum's inputs, the response, the result, and the same numbers as elsewhere."""

import copy
import inspect
import pickle

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    LLMAttributionResult,
    Saliency,
    TextTemplateInput,
    TextTokenInput,
)
from captum.metrics import infidelity
from transformers import GenerationConfig

import flashtrace_captum
import flashtrace_plugin
from flashtrace_captum import (
    IFR,
    CaptumInputError,
    FlashTrace,
    LLMTraceAttribution,
    RecursiveAttribution,
    TemplateError,
    TokenAttribution,
    TokenIdsInput,
    TokenScores,
    recursive,
)
from flashtrace_plugin import FlashTraceError, InputError, Span, SpanError, UnsupportedModelError
from tests.tiny import BOS, EOS, PAD, tiny, tiny_tokenizer

PROMPT = "The key of the red box is in the garden. Question: where is the key?"
THINKING = "\nThe box is red.\n"
RESPONSE = f"<think>{THINKING}</think>\nIt is in the garden."
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3")


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def llm(model, tokenizer):
    return LLMTraceAttribution(FlashTrace(model), tokenizer)


@pytest.fixture(scope="module")
def inp(tokenizer):
    return TextTokenInput(PROMPT, tokenizer)


@pytest.fixture(scope="module")
def result(llm, inp):
    return llm.attribute(inp, RESPONSE, hops=2)


def bos_tokenizer():
    """The same tokenizer, adding its first special token by itself."""
    from tokenizers.processors import TemplateProcessing

    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made.chat_template = CHAT
    return made


class TestTheSameNumbersEverywhere:
    @pytest.mark.parametrize("method", [FlashTrace, IFR, RecursiveAttribution])
    def test_as_the_core_from_text(self, method, model, tokenizer, inp):
        got = LLMTraceAttribution(method(model), tokenizer).attribute(inp, RESPONSE)
        want = getattr(flashtrace_plugin, method.__name__)(model, tokenizer).attribute(PROMPT, RESPONSE)
        assert torch.equal(got.seq_attr, want.scores)
        assert got.attribution == want

    def test_as_inseq(self, model, tokenizer, result):
        inseq = pytest.importorskip("inseq")
        import flashtrace_inseq

        host = inseq.load_model(model, "flashtrace", tokenizer=tokenizer)
        found = flashtrace_inseq.attributions(host.attribute(PROMPT, PROMPT + RESPONSE, hops=2, show_progress=False))
        torch.testing.assert_close(result.seq_attr, found[0].scores, rtol=1e-5, atol=1e-7)

    def test_as_the_method_on_ids(self, model, llm, inp, result):
        ids = torch.tensor([result.attribution.token_ids])
        start = len(result.input_tokens)
        got = FlashTrace(model).attribute(
            ids,
            slice(start + result.answer.start, start + result.answer.stop),
            reasoning=slice(start + result.reasoning.start, start + result.reasoning.stop),
            hops=2,
        )[0]
        assert torch.equal(got[:start], result.seq_attr)
        # The opening tag is prompt here: everything before the reasoning.
        assert torch.equal(got[start + result.reasoning.start :], result.response_attr[result.reasoning.start :])

    def test_text_ids_and_a_row_of_ids_agree(self, tokenizer, llm, inp, result):
        response = torch.tensor(tokenizer(RESPONSE)["input_ids"])
        for target in (response, response[None]):
            assert torch.equal(llm.attribute(inp, target, hops=2).seq_attr, result.seq_attr)


class TestPartsOfTheResponse:
    def test_found(self, result):
        assert result.answer_text == "It is in the garden."
        assert "".join(result.output_texts[result.reasoning]).strip() == THINKING.strip()

    @pytest.mark.parametrize("as_span", [True, False])
    def test_given(self, llm, inp, result, as_span):
        def where(part):
            start = len(result.input_tokens)
            return Span(start + part.start, start + part.stop) if as_span else part

        got = llm.attribute(inp, RESPONSE, answer=where(result.answer), reasoning=where(result.reasoning), hops=2)
        assert torch.equal(got.seq_attr, result.seq_attr)
        assert (got.answer, got.reasoning) == (result.answer, result.reasoning)

    def test_a_piece_of_text(self, llm, inp):
        got = llm.attribute(inp, RESPONSE, answer="garden")
        assert got.answer_text.strip(" .") == "garden"

    def test_negative_and_open_slices(self, llm, inp, result):
        n = len(result.output_tokens)
        assert llm.attribute(inp, RESPONSE, answer=slice(-3, None)).answer == slice(n - 3, n)

    def test_all_of_it(self, llm, inp):
        got = llm.attribute(inp, "It is in the garden.", answer=slice(None))
        assert got.answer.start == 0
        assert got.reasoning is None

    def test_the_end_token_is_no_answer(self, tokenizer, llm, inp, result):
        ended = torch.tensor([*tokenizer(RESPONSE)["input_ids"], EOS, PAD])
        got = llm.attribute(inp, ended, hops=2)
        assert got.answer == result.answer
        assert len(got.output_tokens) == len(result.output_tokens) + 2
        torch.testing.assert_close(got.seq_attr, result.seq_attr)

    @pytest.mark.parametrize("answer", [slice(5, 5), slice(0, 999), slice(0, 4, 2), "nowhere", Span(900, 901)])
    def test_bad_ones(self, llm, inp, answer):
        with pytest.raises(SpanError, match=r"answer|target"):
            llm.attribute(inp, RESPONSE, answer=answer)

    @pytest.mark.parametrize("answer", [5, (3, 5), [1]])
    def test_other_kinds(self, llm, inp, answer):
        with pytest.raises(CaptumInputError, match="answer must be"):
            llm.attribute(inp, RESPONSE, answer=answer)

    def test_thinking_that_was_cut_off_names_the_remedy(self, llm, inp):
        with pytest.raises(SpanError, match=r"gen_args=\{'max_new_tokens'"):
            llm.attribute(inp, "<think>\nThe box is")


class TestTokenInputs:
    def test_shapes_and_devices(self, model, result, inp):
        n, r = len(inp.values), len(result.output_tokens)
        assert result.seq_attr.shape == (n,)
        assert result.response_attr.shape == result.output_probs.shape == (r,)
        assert result.hop_attr.shape == (3, n)
        assert result.token_attr is None
        assert result.inp is inp
        assert "".join(result.input_texts) == PROMPT
        assert "".join(result.output_texts) == RESPONSE
        for tensor in (result.seq_attr, result.response_attr, result.hop_attr, result.output_probs):
            assert (tensor.device, tensor.dtype, tensor.requires_grad) == (model.device, torch.float32, False)

    def test_skipped_tokens_are_no_feature_and_their_share_is_told(self, llm, tokenizer, result):
        skip = tokenizer(PROMPT)["input_ids"][0]
        got = llm.attribute(TextTokenInput(PROMPT, tokenizer, skip_tokens=[skip]), RESPONSE, hops=2)
        assert torch.equal(got.seq_attr, result.seq_attr[1:])
        assert got.unassigned_attr == pytest.approx(float(result.seq_attr[0]))
        assert got.input_tokens == result.input_tokens[1:]
        assert result.unassigned_attr == 0

    def test_from_ids(self, llm, tokenizer, inp, result):
        ids = tokenizer(PROMPT)["input_ids"]
        for given in (ids, torch.tensor(ids), torch.tensor([ids])):
            made = TokenIdsInput(given, tokenizer)
            assert torch.equal(made.to_model_input(), inp.to_model_input())
            assert torch.equal(llm.attribute(made, RESPONSE, hops=2).seq_attr, result.seq_attr)
        assert made.values == inp.values
        assert made.baselines == PAD

    @pytest.mark.parametrize("skip", [["."], ["Ġthe", 17]])
    def test_it_is_as_captums_own(self, tokenizer, skip):
        ids = [tokenizer.convert_tokens_to_ids(s) if isinstance(s, str) else s for s in skip]
        theirs = TextTokenInput(PROMPT, tokenizer, baselines="<unk>", skip_tokens=ids)
        ours = TokenIdsInput(tokenizer(PROMPT)["input_ids"], tokenizer, baselines="<unk>", skip_tokens=skip)
        z = torch.ones_like(theirs.to_tensor())
        z[0, ::3] = 0
        assert torch.equal(ours.to_tensor(), theirs.to_tensor())
        assert torch.equal(ours.to_model_input(z), theirs.to_model_input(z))
        assert torch.equal(ours.itp_mask, theirs.itp_mask)
        assert ours.n_itp_features == theirs.n_itp_features

    def test_captums_own_wrapper_takes_it(self, model, tokenizer):
        inp = TokenIdsInput(tokenizer("The key of the red box")["input_ids"], tokenizer)
        found = LLMAttribution(FeatureAblation(model), tokenizer).attribute(
            inp, torch.tensor([20, 30]), forward_in_tokens=False
        )
        assert found.seq_attr.shape == (inp.n_itp_features,)

    def test_chat_messages_begin_once(self):
        tokenizer = bos_tokenizer()
        messages = [{"role": "user", "content": PROMPT}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert TextTokenInput(text, tokenizer).to_model_input()[0, :2].tolist() == [BOS, BOS]
        ids = TokenIdsInput.from_messages(messages, tokenizer).to_model_input()[0].tolist()
        assert ids.count(BOS) == 1
        assert tokenizer.decode(ids) == text

    def test_chat_messages_give_the_numbers_of_the_core(self, llm, model, tokenizer):
        messages = [{"role": "user", "content": PROMPT}]
        got = llm.attribute(TokenIdsInput.from_messages(messages, tokenizer), RESPONSE)
        want = flashtrace_plugin.FlashTrace(model, tokenizer).attribute(messages, RESPONSE)
        assert torch.equal(got.seq_attr, want.scores)
        assert got.attribution == want

    @pytest.mark.parametrize(
        "make",
        [
            lambda t: TokenIdsInput([], t),
            lambda t: TokenIdsInput(torch.ones(2, 3).long(), t),
            lambda t: TokenIdsInput(torch.ones(3), t),
            lambda t: TokenIdsInput([5, 6], t, baselines="no such token"),
            lambda t: TokenIdsInput([5, 6], t, skip_tokens=[5, 6]),
        ],
    )
    def test_bad_ones(self, tokenizer, make):
        with pytest.raises(CaptumInputError):
            make(tokenizer)


class TestTemplateInputs:
    def test_slots_have_the_sum_of_their_tokens(self, llm, result):
        inp = TextTemplateInput("The key of the {} box is in the {}. Question: where is the key?", ["red", "garden"])
        got = llm.attribute(inp, RESPONSE, hops=2)
        text, tokens = "", []
        for i, token in enumerate(result.input_texts):
            tokens.append((len(text), i))
            text += token
        for name, score in zip(got.input_tokens, got.seq_attr, strict=True):
            inside = range(PROMPT.index(name), PROMPT.index(name) + len(name))
            # Tokens begin with the space before a word, so the one that begins a character early belongs too.
            mine = [i for begin, i in tokens if begin in inside or begin + 1 == inside.start]
            assert float(score) == pytest.approx(float(result.seq_attr[mine].sum()), rel=1e-6)
        total = float(result.seq_attr.sum())
        assert float(got.seq_attr.sum()) + got.unassigned_attr == pytest.approx(total)

    @pytest.mark.parametrize(
        ("template", "values"),
        [
            ("The {} of the {} box. The {} box!", ["key", "red", "red"]),
            ("{0} and {1} and {0}", ["red", "garden"]),
            ("{colour} box, {colour} key, in the {place}", {"colour": "red", "place": "garden"}),
            (lambda *values: " ".join(v for v in values if v) + "?", ["the key", "", "red box"]),
            (lambda place, colour: f"{colour}\n{place}{colour}", {"place": "garden", "colour": "red"}),
            ("{}{}", ["is in the gar", "den of the box"]),
            ("{}", ["  the key  "]),
            ("key{}", ["€é🙂"]),
        ],
    )
    def test_everything_is_a_slot_or_unassigned(self, llm, template, values):
        inp = TextTemplateInput(template, values)
        got = llm.attribute(inp, RESPONSE, hops=2)
        flat = llm.attribute(TextTokenInput(inp.to_model_input(), llm.tokenizer), RESPONSE, hops=2)
        assert got.seq_attr.shape == (len(values),)
        assert got.input_tokens == inp.values
        total = float(flat.seq_attr.sum())
        assert float(got.seq_attr.sum()) + got.unassigned_attr == pytest.approx(total, rel=1e-5)
        assert all((score > 0) == bool(value.strip()) for score, value in zip(got.seq_attr, inp.values, strict=True))

    def test_a_template_of_slots_alone_leaves_nothing(self, llm):
        got = llm.attribute(TextTemplateInput("{}{}", ["is in the gar", "den of the box"]), RESPONSE)
        assert got.unassigned_attr == pytest.approx(0, abs=1e-6)

    def test_repeated_slots_add_up(self, llm):
        once = llm.attribute(TextTemplateInput("{} key {}", ["red", "red"]), RESPONSE)
        twice = llm.attribute(TextTemplateInput("{0} key {0}", ["red"]), RESPONSE)
        assert float(twice.seq_attr[0]) == pytest.approx(float(once.seq_attr.sum()))

    def test_groups_share_their_sum_as_in_captum(self, llm):
        values = ["red", "box", "garden"]
        alone = llm.attribute(TextTemplateInput("{} {} {}", values), RESPONSE)
        grouped = llm.attribute(TextTemplateInput("{} {} {}", values, mask=[7, 3, 7]), RESPONSE)
        both = float(alone.seq_attr[[0, 2]].sum())
        assert grouped.seq_attr.tolist() == pytest.approx([both, float(alone.seq_attr[1]), both])
        assert grouped.hop_attr.shape == (2, 3)

    @pytest.mark.parametrize(
        ("template", "values", "message"),
        [
            ("{:>9}", ["red"], "width"),
            (lambda v: v.strip(), [" red "], "changes its values"),
            (lambda v: v.upper(), ["red"], None),
            (lambda v: v[:3], ["garden"], "slot 0|changes"),
            (lambda *v: " ".join(sorted(v, key=len)), ["garden", "a"], None),
            (lambda v: v + "\U000f0000", ["red"], "private"),
        ],
    )
    def test_slots_that_cannot_be_traced(self, llm, template, values, message):
        inp = TextTemplateInput(template, values)
        if message is None:  # the marks change neither case nor the order of lengths, so these can
            assert llm.attribute(inp, RESPONSE).seq_attr.shape == (len(values),)
            return
        with pytest.raises(TemplateError, match=message):
            llm.attribute(inp, RESPONSE)

    def test_a_slow_tokenizer_is_refused(self, llm):
        slow = copy.copy(llm)
        slow.tokenizer = type("Slow", (), {"is_fast": False, "bos_token": None})()
        with pytest.raises(TemplateError, match="fast tokenizer"):
            slow.attribute(TextTemplateInput("{}", ["red"]), RESPONSE)

    def test_a_chat_template_begins_once(self, model):
        tokenizer = bos_tokenizer()
        llm = LLMTraceAttribution(FlashTrace(model), tokenizer)

        def chat(question):
            messages = [{"role": "user", "content": question}]
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

        got = llm.attribute(TextTemplateInput(chat, ["where is the key?"]), RESPONSE)
        assert got.attribution.token_ids.count(BOS) == 1
        plain = llm.attribute(TextTemplateInput("{}", ["where is the key?"]), RESPONSE)
        assert plain.attribution.token_ids[0] == BOS


class TestGeneration:
    def test_without_a_target_the_model_writes_it(self, model, tokenizer, llm, inp):
        got = llm.attribute(inp, gen_args={"max_new_tokens": 5, "do_sample": False}, answer=slice(None))
        ids = inp.to_model_input()
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert list(got.attribution.token_ids) == written[0].tolist()
        assert len(got.output_tokens) == 5

    def test_by_default_as_much_as_captum(self, llm, inp):
        assert len(llm.attribute(inp, answer=slice(None)).output_tokens) <= 25

    def test_dropout_does_not_make_it_random(self, inp, tokenizer):
        model = tiny("gpt2", resid_pdrop=0.5).train()
        llm = LLMTraceAttribution(FlashTrace(model), tokenizer)
        first, second = (
            llm.attribute(inp, gen_args={"max_new_tokens": 4}, answer=slice(None)).attribution.token_ids
            for _ in range(2)
        )
        assert first == second
        assert model.training

    def test_what_generate_returns_beside_the_text_changes_nothing(self, llm, inp):
        args = {"max_new_tokens": 4, "do_sample": False}
        want = llm.attribute(inp, gen_args=args, answer=slice(None))
        more = {"return_dict_in_generate": True, "output_scores": True, "attention_mask": torch.ones(1, 19).long()}
        got = llm.attribute(inp, gen_args=args | more, answer=slice(None))
        assert got.attribution == want.attribution

    @pytest.mark.parametrize("as_config", [True, False])
    def test_several_responses_are_refused(self, llm, inp, as_config):
        args = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2}
        if as_config:
            args = {"generation_config": GenerationConfig(**args)}
        with pytest.raises(CaptumInputError, match="num_return_sequences: generate wrote 2 responses"):
            llm.attribute(inp, gen_args=args, answer=slice(None))

    def test_gen_args_with_a_target(self, llm, inp):
        with pytest.raises(CaptumInputError, match="gen_args") as caught:
            llm.attribute(inp, RESPONSE, gen_args={"max_new_tokens": 5})
        assert isinstance(caught.value, AssertionError)

    @pytest.mark.parametrize("text", ["It is €", "答案是花园", "🙂 in the garden"])
    @pytest.mark.parametrize("cut", [1, 2, 3])
    def test_a_response_cut_inside_a_character(self, tokenizer, llm, inp, text, cut):
        ids = torch.tensor(tokenizer(text)["input_ids"])[:-cut]
        if not len(ids):
            return
        got = llm.attribute(inp, ids, answer=slice(None))
        assert len(got.output_tokens) == len(ids)
        got.plot_seq_attr()
        assert got.to_visualization_record(response=True).raw_input_ids

    @pytest.mark.parametrize("target", ["", torch.zeros(0).long(), torch.ones(2, 3).long(), torch.ones(3), 7, ["a"]])
    def test_bad_targets(self, llm, inp, target):
        with pytest.raises(CaptumInputError):
            llm.attribute(inp, target)


class Minimal:
    """A tokenizer that can do what Captum asks of one, and no more."""

    def __init__(self):
        self.inner = tiny_tokenizer()

    def encode(self, text, add_special_tokens=True, return_tensors=None):
        return self.inner.encode(text, add_special_tokens=add_special_tokens, return_tensors=return_tensors)

    def decode(self, token_ids):
        assert isinstance(token_ids, torch.Tensor)
        return self.inner.decode(token_ids)

    def convert_ids_to_tokens(self, token_ids):
        return self.inner.convert_ids_to_tokens(token_ids)


class TestMinimalTokenizers:
    def test_three_methods_are_enough(self, model, inp, result):
        minimal = Minimal()
        llm = LLMTraceAttribution(FlashTrace(model), minimal)
        for given in (TextTokenInput(PROMPT, minimal), TokenIdsInput(inp.to_model_input(), minimal, baselines=PAD)):
            got = llm.attribute(given, RESPONSE, hops=2)
            assert torch.equal(got.seq_attr, result.seq_attr)
            assert got.attribution.tokens == result.attribution.tokens
            assert got.input_tokens == result.input_tokens
            assert (got.output_tokens, got.output_texts) == (result.output_tokens, result.output_texts)
            drop_first = torch.ones(1, given.n_itp_features).index_fill(1, torch.tensor(0), 0)
            assert llm.presence_function(given, RESPONSE)(drop_first).shape == (1,)
        wrote = llm.attribute(given, gen_args={"max_new_tokens": 3, "pad_token_id": PAD}, answer=slice(None))
        assert len(wrote.output_tokens) == 3

    @pytest.mark.parametrize("name", ["encode", "decode", "convert_ids_to_tokens"])
    def test_one_less_is_named(self, monkeypatch, model, name):
        monkeypatch.delattr(Minimal, name)
        with pytest.raises(CaptumInputError, match=f"Minimal has no {name}"):
            LLMTraceAttribution(FlashTrace(model), Minimal())

    def test_what_needs_more_says_so(self, model):
        minimal = Minimal()
        with pytest.raises(CaptumInputError, match="baselines="):
            TokenIdsInput([5, 6], minimal)
        with pytest.raises(CaptumInputError, match="Minimal has no convert_tokens_to_ids"):
            TokenIdsInput([5, 6], minimal, baselines="<pad>")
        with pytest.raises(InputError, match="chat template"):
            TokenIdsInput.from_messages([{"role": "user", "content": PROMPT}], minimal)
        with pytest.raises(TemplateError, match="fast tokenizer"):
            LLMTraceAttribution(FlashTrace(model), minimal).attribute(TextTemplateInput("{}", ["red"]), RESPONSE)


class TestBridges:
    @pytest.fixture(scope="class")
    def bridge(self, model, tokenizer):
        pytest.importorskip("transformer_lens")
        from flashtrace_lens import bridge_for

        return bridge_for(model, tokenizer)

    @pytest.mark.parametrize("method", [FlashTrace, IFR, RecursiveAttribution, flashtrace_captum.LRP])
    def test_methods_read_them(self, model, bridge, method, inp):
        ids = inp.to_model_input()
        got, want = (method(m).attribute(ids, slice(15, 18), reasoning=slice(9, 13)) for m in (bridge, model))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    def test_what_runs_the_model_by_itself_names_the_way(self, bridge, tokenizer, inp):
        way = r".*got a TransformerBridge; .*flashtrace_lens\.flashtrace\(bridge, tokens"
        with pytest.raises(UnsupportedModelError, match="LLMTraceAttribution " + way):
            LLMTraceAttribution(FlashTrace(bridge), tokenizer)
        for made in (lambda: recursive(Saliency(bridge)), lambda: recursive(IFR(bridge))):
            with pytest.raises(UnsupportedModelError, match="recursive " + way):
                made()
        heta = flashtrace_captum.HETA(bridge, progress=False)
        embeddings = torch.zeros(1, 5, 32)
        with pytest.raises(UnsupportedModelError, match="HETA on embeddings " + way):
            heta.attribute(embeddings, input_ids=inp.to_model_input()[:, :5])


class TestOutputProbabilities:
    def test_they_are_the_models(self, model, tokenizer, result):
        ids = torch.tensor([result.attribution.token_ids])
        start = len(result.input_tokens)
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)
        want = torch.stack([log_p[0, i - 1, ids[0, i]] for i in range(start, ids.shape[1])])
        torch.testing.assert_close(result.output_log_probs, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.output_probs, want.exp(), rtol=1e-3, atol=1e-6)


class TestTokenwise:
    @pytest.fixture(scope="class")
    def found(self, model, tokenizer):
        inp = TextTokenInput(PROMPT, tokenizer)
        return LLMTraceAttribution(IFR(model), tokenizer).attribute(inp, RESPONSE)

    def test_rows_add_up_to_the_sequence_as_in_captum(self, found):
        assert found.token_attr.shape == (len(found.output_tokens), len(found.input_tokens))
        torch.testing.assert_close(found.token_attr[found.answer].sum(0), found.seq_attr)

    def test_rows_that_were_not_computed_are_not_zero(self, found):
        assert bool(found.token_attr[: found.answer.start].isnan().all())

    def test_each_row_is_that_token_alone(self, model, tokenizer, found):
        at = found.answer.start + 1
        inp = TextTokenInput(PROMPT, tokenizer)
        alone = LLMTraceAttribution(IFR(model), tokenizer).attribute(inp, RESPONSE, answer=slice(at, at + 1))
        row = found.token_attr[at]
        torch.testing.assert_close(row / row.sum(), alone.seq_attr, rtol=1e-5, atol=1e-7)


class TestResult:
    def test_it_is_captums(self, result):
        assert isinstance(result, LLMAttributionResult)

    def test_equal_texts_are_added_up(self, result):
        found = result.seq_attr_dict
        assert sum(found.values()) == pytest.approx(float(result.seq_attr.sum()))
        same = [i for i, token in enumerate(result.input_tokens) if token == "Ġthe"]
        assert len(same) > 1
        assert found["Ġthe"] == pytest.approx(float(result.seq_attr[same].sum()))

    def test_top(self, result):
        best = result.top(3)
        assert best[0].score == float(result.seq_attr.max())
        assert result.input_texts[best[0].position] == best[0].token

    def test_it_survives_pickle_and_deepcopy(self, result):
        for twin in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
            assert torch.equal(twin.seq_attr, result.seq_attr)
            assert twin.attribution == result.attribution

    def test_repr_is_short(self, result):
        assert len(repr(result)) < 400
        assert "garden" in repr(result)

    def test_response_scores_stop_at_the_answer(self, result):
        assert bool((result.response_attr[: result.answer.start] > 0).all())
        assert bool((result.response_attr[result.answer.start :] == 0).all())

    def test_hops_add_up(self, result):
        rho = result.attribution.reasoning_mass
        weights = torch.tensor([1.0, rho[0], rho[0] * rho[1]])
        torch.testing.assert_close(weights @ result.hop_attr, result.seq_attr)


class TestWrapper:
    def test_captums_methods_are_refused_with_their_place(self, model, tokenizer):
        with pytest.raises(CaptumInputError, match=r"FeatureAblation.*captum\.attr\.LLMAttribution") as caught:
            LLMTraceAttribution(FeatureAblation(model), tokenizer)
        assert isinstance(caught.value, AssertionError)

    def test_it_needs_the_hugging_face_model(self, tokenizer):
        class Uniform(TokenAttribution):
            def token_scores(self, input_ids, *, prompt_length, target, reasoning=None):
                return TokenScores(torch.ones(len(input_ids)))

        with pytest.raises(UnsupportedModelError, match="Linear"):
            LLMTraceAttribution(Uniform(torch.nn.Linear(2, 2)), tokenizer)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu(self, tokenizer, inp, result):
        got = LLMTraceAttribution(FlashTrace(tiny("qwen3").cuda()), tokenizer).attribute(inp, RESPONSE, hops=2)
        for tensor in (got.seq_attr, got.response_attr, got.hop_attr, got.output_probs, got.output_log_probs):
            assert tensor.device.type == "cuda"
        torch.testing.assert_close(got.seq_attr.cpu(), result.seq_attr, rtol=1e-3, atol=1e-4)
        got.plot_seq_attr()

    def test_captums_global_tuples_are_as_they_were(self):
        for method in (FlashTrace, IFR, TokenAttribution):
            assert method not in LLMAttribution.SUPPORTED_METHODS

    def test_unknown_keywords_name_the_class_and_what_it_takes(self, model, tokenizer, llm, inp):
        class Uniform(TokenAttribution):
            def token_scores(self, input_ids, *, prompt_length, target, reasoning=None, power=1):
                return TokenScores(torch.ones(len(input_ids)))

        for keyword in ("skip_tokens", "n_steps"):
            with pytest.raises(TypeError, match=f"^FlashTrace has no option {keyword} of attribute; it takes hops"):
                llm.attribute(inp, RESPONSE, **{keyword: 1})
        message = r"option positions of attribute; it takes hops; FlashTrace\(model, \.\.\.\) takes positions"
        with pytest.raises(TypeError, match=message):
            llm.attribute(inp, RESPONSE, positions="predicting")
        for call in (LLMTraceAttribution(Uniform(model), tokenizer).attribute, Uniform(model).attribute):
            given = (inp, RESPONSE) if "inp" in inspect.signature(call).parameters else (inp.to_model_input(),)
            with pytest.raises(TypeError, match=r"^Uniform has no option strength of attribute; it takes power$"):
                call(*given, strength=2)

    def test_futures_are_not_implemented(self, llm):
        with pytest.raises(NotImplementedError, match="LLMTraceAttribution"):
            llm.attribute_future()

    @pytest.mark.parametrize("inp", ["text", torch.ones(1, 3).long(), None])
    def test_other_inputs(self, llm, inp):
        with pytest.raises(CaptumInputError, match="TextTokenInput"):
            llm.attribute(inp, RESPONSE)

    def test_a_method_of_ones_own(self, model, tokenizer, inp):
        class Uniform(TokenAttribution):
            def token_scores(self, input_ids, *, prompt_length, target, reasoning=None, power=1):
                return TokenScores(torch.full((len(input_ids),), 2.0**power))

        got = LLMTraceAttribution(Uniform(model), tokenizer).attribute(inp, RESPONSE, power=3)
        assert set(got.seq_attr.tolist()) == {8.0}
        assert got.attribution is got.hop_attr is got.token_attr is None
        assert len(got.output_probs) == len(got.output_tokens)

    def test_a_method_that_scores_only_the_prompt_is_told(self, model, tokenizer, inp):
        class Short(TokenAttribution):
            def token_scores(self, input_ids, *, prompt_length, target, reasoning=None):
                return TokenScores(torch.ones(prompt_length))

        with pytest.raises(CaptumInputError, match=r"Short\.token_scores .* one for each position"):
            LLMTraceAttribution(Short(model), tokenizer).attribute(inp, RESPONSE)
        with pytest.raises(CaptumInputError, match=r"Short\.token_scores"):
            Short(model).attribute(inp.to_model_input())

    def test_errors_have_one_base(self, llm, inp):
        with pytest.raises(FlashTraceError):
            llm.attribute(inp, 7)
        with pytest.raises(InputError):
            llm.attribute(inp, torch.tensor([10_000]), answer=slice(None))


class TestInfidelity:
    @pytest.mark.parametrize("template", [True, False])
    def test_it_runs_over_the_presence_mask(self, llm, tokenizer, template):
        inp = (
            TextTemplateInput("The {} of the {} box is in the {}.", ["key", "red", "garden"])
            if template
            else TextTokenInput("The key of the red box", tokenizer, baselines=PAD)
        )
        scores = llm.attribute(inp, RESPONSE).seq_attr[None]
        forward = llm.presence_function(inp, RESPONSE)

        def drop(presence):
            kept = (torch.rand_like(presence) > 0.3).float()
            return presence - kept, kept

        def measured(values):
            torch.manual_seed(0)
            return infidelity(forward, drop, torch.ones_like(scores), values, n_perturb_samples=8, normalize=True)

        found = measured(scores)
        assert found.shape == (1,)
        assert bool(found.isfinite())
        torch.testing.assert_close(measured(7 * scores), found)

    def test_the_first_token_can_be_absent(self, llm, tokenizer):
        inp = TextTokenInput("The key of the red box", tokenizer, baselines=PAD)
        presence = torch.eye(inp.n_itp_features)
        assert bool(llm.presence_function(inp, RESPONSE)(1 - presence).isfinite().all())

    def test_presence_is_as_captum_computes_it(self, model, llm, tokenizer):
        inp = TextTokenInput("The key of the red box", tokenizer, baselines=PAD)
        response = torch.tensor(tokenizer("in the garden")["input_ids"])
        z = torch.ones(1, inp.n_itp_features)
        z[0, 2] = 0
        theirs = LLMAttribution(FeatureAblation(model), tokenizer)._forward_func(z, inp, response, False, None, False)
        ours = llm.presence_function(inp, response)(z)
        torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-4, atol=1e-4)
