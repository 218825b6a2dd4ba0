"""The bundled reasoner: loads offline, tokenizes word by word, solves held-out samples; its training shares bodies."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from flashtrace_plugin import reasoner
from flashtrace_plugin.evaluation.tasks import make, variable_tracking
from flashtrace_plugin.evaluation.tasks.vocabulary import MARKS, words
from flashtrace_plugin.reasoner import evaluate, train
from flashtrace_plugin.reasoner.batches import IGNORED, draw_body, draw_question, make_batch
from flashtrace_plugin.reasoner.build import EOS, build_model, build_tokenizer


@pytest.fixture(scope="module")
def bundled():
    return reasoner.load()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(reasoner.path())


@pytest.fixture(scope="module")
def untrained():
    tokenizer = build_tokenizer()
    return build_model(tokenizer, seed=1).eval(), tokenizer


@pytest.fixture
def sample():
    return make("variable_tracking", 11, hops=3, chains=2, length=48)


def test_auto_classes_load_it():
    model = AutoModelForCausalLM.from_pretrained(reasoner.path())
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    assert not model.generation_config.do_sample and model.generation_config.max_new_tokens >= 64


def test_weights_are_small():
    assert sum(file.stat().st_size for file in reasoner.path().iterdir()) < 8_000_000
    assert {file.suffix for file in reasoner.path().iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize(
    "task, own",
    [
        *(("variable_tracking", {"hops": hops, "chains": 3, "length": 64}) for hops in (1, 2, 3, 4, 5)),
        ("variable_tracking", {"hops": 4, "chains": 4, "length": 128}),
        ("variable_tracking", {"hops": 6, "chains": 3, "length": 128}),
        ("variable_tracking", {"hops": 2, "chains": 4, "length": 128, "questions": 2}),
        ("needle_retrieval", {"keys": 8, "values": 1, "length": 64}),
        ("needle_retrieval", {"keys": 8, "values": 4, "length": 128}),
        ("needle_retrieval", {"keys": 8, "values": 2, "length": 128, "questions": 2}),
    ],
)
def test_solves_held_out_samples(bundled, task, own):
    own = dict(own)
    answers, whole = evaluate.accuracy(*bundled, evaluate.held_out(task, own.pop("length"), 10, own))
    assert answers >= 0.9 and whole >= 0.9


def test_answers_without_reasoning(bundled):
    samples = evaluate.held_out("variable_tracking", 64, 10, {"hops": 1, "chains": 3, "thinking": False})
    answers, _ = evaluate.accuracy(*bundled, samples)
    assert answers >= 0.9


def test_answer_is_the_generated_text(bundled):
    sample = variable_tracking(random.Random(5), hops=4, chains=2, length=64)
    text = reasoner.answer(*bundled, sample)
    assert text == reasoner.answer(*bundled, sample.prompt) == sample.generation
    assert reasoner.final_answer(text) == sample.answer


def test_decoding_returns_the_text(tokenizer, sample):
    text = f"{sample.prompt} {sample.generation}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(f"{text} {EOS}")["input_ids"], skip_special_tokens=True) == text


def test_one_token_for_each_word_and_none_added(tokenizer, sample):
    encoded = tokenizer(sample.prompt, return_offsets_mapping=True)
    spans = [sample.prompt[start:end] for start, end in encoded["offset_mapping"]]
    assert spans == sample.prompt.split() == tokenizer.convert_ids_to_tokens(encoded["input_ids"])


def test_evidence_holds_for_token_offsets(tokenizer, sample):
    offsets = tokenizer(sample.prompt, return_offsets_mapping=True)["offset_mapping"]
    texts = tuple(sample.prompt[offsets[step[0]][0] : offsets[step[-1]][1]] for step in sample.steps)
    assert texts == sample.evidence_text
    assert " ".join(f"{text} ;" for text in texts) == sample.reasoning


def test_every_word_is_known_and_only_three_tokens_are_special(tokenizer):
    assert tokenizer.unk_token_id not in tokenizer(" ".join(words()))["input_ids"]
    assert set(tokenizer.all_special_tokens) == {"<pad>", "<eos>", "<unk>"}
    assert not set(MARKS) & set(tokenizer.all_special_tokens)


def test_chat_template_gives_the_prompt(tokenizer, sample):
    text = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
    assert text == sample.prompt
    direct = make("variable_tracking", 11, hops=3, chains=2, length=48, thinking=False)
    text = tokenizer.apply_chat_template(
        direct.messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text == direct.prompt


def test_chat_template_closes_the_answer(tokenizer):
    messages = [{"role": "user", "content": "v1 5 ; ? v1"}, {"role": "assistant", "content": "5"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "v1 5 ; ? v1 think 5 <eos>"


def test_saved_tokenizer_is_the_built_one(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_final_answer_without_reasoning():
    assert reasoner.final_answer("12 7") == "12 7"


def test_shared_body_has_the_loss_of_separate_samples(untrained):
    """A row with several questions about one body scores each as if it stood alone."""
    model, tokenizer = untrained
    encode = tokenizer.get_vocab()
    batch = make_batch(random.Random(3), encode, 32, 60, 2)
    with torch.no_grad():
        packed, _ = train.loss_and_right(model, batch)
        losses = [loss for row in range(2) for loss in separate_losses(model, batch, row)]
    assert len(losses) == int((batch.labels != IGNORED).sum())
    assert torch.allclose(packed, torch.stack(losses).mean(), atol=1e-5)


def separate_losses(model, batch, row):
    """The loss of each trained token, from one plain forward pass per question."""
    segments = batch.segments[row]
    for number in range(1, int(segments.max()) + 1):
        chosen = (segments == 0) | (segments == number)
        labels = batch.labels[row][chosen]
        logits = model(batch.ids[row][chosen][None]).logits[0]
        scored = labels != IGNORED
        yield from torch.nn.functional.cross_entropy(logits[scored], labels[scored], reduction="none")


def test_a_sample_is_right_only_if_all_its_tokens_are(untrained):
    _, tokenizer = untrained
    batch = make_batch(random.Random(0), tokenizer.get_vocab(), 32, 60, 1)
    scored = batch.labels != IGNORED
    questions = int(batch.segments.max())
    hits = torch.ones(int(scored.sum()), dtype=torch.bool)
    assert train._share_right(hits, batch, scored) == 1
    hits[0] = False
    assert train._share_right(hits, batch, scored) == pytest.approx(1 - 1 / questions)


@pytest.mark.parametrize("length", [32, 64, 512])
def test_training_bodies_fit(length):
    rng = random.Random(0)
    for _ in range(50):
        body = draw_body(rng, length)
        sample = draw_question(rng, body)
        assert length - 2 <= len(body.words) <= length
        assert sample.thinking or len(sample.steps) <= 2


def test_longer_prompts_come_when_learnt_or_due():
    progress = train.Progress()
    for _ in range(100):
        progress.update(right=1.0, length=32, seconds=1.0)
    assert progress.lengths == 2 and progress.step == 100 and progress.seconds == 100
    assert [train.lengths_due(done) for done in (0.0, 0.13, 0.5, 1.0)] == [1, 2, 5, 5]


def test_rate_warms_up_stays_and_falls_to_zero():
    steps = (0.0, 0), (0.1, 1000), (0.575, 1000), (1.0, 1000)
    assert [train.rate(done, step, peak=2.0) for done, step in steps] == pytest.approx([0.02, 2.0, 1.0, 0.0])


def test_needles_are_practised_last():
    assert train.chains_share(0.5) > 0.5 > train.chains_share(0.9)


def test_training_runs_saves_and_resumes(tmp_path):
    train.main(out=tmp_path, minutes=0.01, threads=1, seed=0, peak=1e-3, tokens=256)
    model, tokenizer = reasoner.load(tmp_path)
    assert tokenizer.is_fast and model.num_parameters() < 1_000_000
    optimizer = train.make_optimizer(model)
    train.save_checkpoint(tmp_path / "checkpoint.pt", model, optimizer, train.Progress(seconds=9.0, step=7))
    again = build_model(tokenizer, seed=5)
    progress = train.load_checkpoint(tmp_path / "checkpoint.pt", again, train.make_optimizer(again))
    assert progress.step == 7 and progress.seconds == 9.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_evaluation_table(bundled, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "KINDS", (("needle_retrieval", {"keys": 20, "values": 1}),))
    monkeypatch.setattr(evaluate, "LENGTHS", (32, 96))
    monkeypatch.setattr(reasoner, "load", lambda weights: bundled)
    evaluate.main(samples=2, threads=torch.get_num_threads(), weights=None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| task | 32 tokens | 96 tokens |"
    assert lines[2].startswith("| needle retrieval: keys 20, values 1 | – | ")


def test_generation_is_batched(monkeypatch, bundled):
    samples = [make("needle_retrieval", seed, keys=3, values=1, length=24 + seed) for seed in range(5)]
    monkeypatch.setattr(evaluate, "BATCH", 2)
    assert list(evaluate.generate(*bundled, samples)) == [reasoner.answer(*bundled, s) for s in samples]
