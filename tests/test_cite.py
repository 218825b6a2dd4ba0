"""Citations: each sentence with the documents that it comes from, what removing them does, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import FlashTrace, InputError, Span, SpanError, cite, reasoner
from flashtrace_plugin.cli.app import app
from flashtrace_plugin.evaluation.metrics.deletion import replacement_token
from flashtrace_plugin.evaluation.metrics.likelihood import log_likelihood
from flashtrace_plugin.sources.citations import LEAST_EFFECT, Citation, CitedSource
from tests.tiny import tiny, tiny_tokenizer

PROMPT = "the valley grows . v41 v19 ; sun grows . v6 v9 ; v19 68 ; the sky sleeps near the sky . v83 12 ; ? v41 "
DOCUMENTS = {"first": "v41 v19 ;", "second": "v19 68 ;", "other": "v83 12 ;"}
THINKING = "<think> v41 v19 ; v19 68 ; </think> 68"
BOXES = {
    "red": "The key of the red box is in the garden.",
    "blue": "The key of the blue box is in the kitchen. It is red.",
}
QUESTION = f"{BOXES['red']}\n\n{BOXES['blue']}\n\nQuestion: where is the key?\n"
ANSWER = "The key is in the garden. The box is red."


@pytest.fixture(scope="module")
def small():
    return reasoner.load()


@pytest.fixture(scope="module")
def random_model():
    return tiny("llama", seed=3, max_position_embeddings=512), tiny_tokenizer()


@pytest.fixture(scope="module")
def found(random_model):
    return cite(*random_model, QUESTION, ANSWER, documents=BOXES, method="flashtrace", hops=0)


def test_the_statements_that_an_answer_follows_from_are_cited(small):
    one = cite(*small, PROMPT + "think", THINKING, documents=DOCUMENTS)[0]
    assert one.text == "68" and one.supported
    assert one.documents[0].name == "second" and one.documents[0].share > 0.5
    assert [source.name for source in one.sources] == ["second", "first"]  # the latter by what it costs
    effects = {source.name: source.effect for source in one.documents}
    assert effects["first"] > 5 and effects["second"] > 5 and abs(effects["other"]) < 1 and one.effect > 10


def test_an_answer_that_comes_from_elsewhere_has_no_source(small):
    noise = {"noise": "the sky sleeps near the sky .", "other": DOCUMENTS["other"]}
    found = cite(*small, PROMPT + "think", THINKING, documents=noise)
    assert not found[0].supported and found[0].sources == () and found[0].confidence == 0.0
    assert "no source" in str(found) and "no source" in found.to_markdown()


def test_numbers_are_those_of_an_attribution_of_each_sentence(random_model, found):
    method = FlashTrace(*random_model, hops=0, sinks="drop")
    assert [one.text for one in found] == ["The key is in the garden.", "The box is red."]
    for one in found:
        units = method.attribute(QUESTION, ANSWER, target=one.target).by(BOXES)
        masses = {score.unit.name: score.score for score in units if score.unit.content}
        shares = {source.name: source.share for source in one.documents}
        assert shares["red"] == pytest.approx(masses["red"] / sum(masses.values()), rel=1e-5)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert one.mass == pytest.approx(sum(s.share for s in units if s.unit.content), rel=1e-5)
        documents = [score for score in units if score.unit.content]
        contents = [score for score in units if score.unit.kind != "template"]
        density = sum(s.score for s in documents) / sum(s.score / s.density for s in documents)
        everywhere = sum(s.score for s in contents) / sum(s.score / s.density for s in contents)
        assert one.relative == pytest.approx(density / everywhere, rel=1e-3)


def test_effects_are_those_of_really_replacing_the_documents(random_model, found):
    model, tokenizer = random_model
    ids = torch.tensor(tokenizer(QUESTION + ANSWER)["input_ids"])
    tokens = [tokenizer.decode([i]) for i in ids]
    stops = torch.tensor([len("".join(tokens[: i + 1])) for i in range(len(tokens))])
    starts = torch.tensor([0, *stops[:-1].tolist()])
    for one in found:
        for source in one.documents:
            begin = QUESTION.index(BOXES[source.name])
            inside = (starts >= begin) & (stops <= begin + len(BOXES[source.name]))
            without = torch.where(inside, replacement_token(model), ids)
            log_p = log_likelihood(model, torch.stack([ids, without]), generation=one.target)
            assert source.effect == pytest.approx(float(log_p[0] - log_p[1]), abs=1e-3)
            assert one.log_p == pytest.approx(float(log_p[0]), abs=1e-3)


def test_without_verification_nothing_is_replaced(random_model, monkeypatch):
    monkeypatch.setattr("flashtrace_plugin.sources.citations.token_log_likelihood", None)
    found = cite(*random_model, QUESTION, ANSWER, documents=BOXES, method="flashtrace", hops=0, verify=False)
    assert found[0].effect is None and found[0].confidence is None and found[0].log_p is None
    assert found[0].supported == (found[0].relative > 1.0)
    assert "nats" not in str(found)


@pytest.mark.parametrize(
    ("effects", "cited"), [((9.0, 8.0, 0.1), ["a", "b"]), ((9.0, 0.2, 0.1), ["a"]), ((1.0, 0.2, 8.0), ["a", "c"])]
)
def test_which_documents_are_cited(effects, cited):
    documents = tuple(
        CitedSource(name, share, "…", effect) for name, share, effect in zip("abc", (0.8, 0.15, 0.05), effects)
    )
    one = Citation("…", (0, 1), Span(4, 8), documents, 0.9, 1.5, -3.0, 9.0)
    assert [source.name for source in one.sources] == cited
    assert one.confidence == pytest.approx(effects[0] / 9.0)


@pytest.mark.parametrize(("alone", "whole", "supported"), [(0.1, 2.1, True), (2.1, 0.1, True), (1.9, 1.9, False)])
def test_what_a_sentence_must_lose_without_its_documents(alone, whole, supported):
    one = Citation("…", (0, 1), Span(4, 8), (CitedSource("a", 1.0, "…", alone),), 0.9, 1.5, -3.0, whole)
    assert LEAST_EFFECT == 0.5 and one.supported == supported and bool(one.sources) == supported
    assert one.confidence == pytest.approx(alone / max(alone, whole) if supported else 0.0)


def test_the_best_sentence_of_a_document_is_one_of_its_own(found):
    assert {source.sentence for one in found for source in one.documents if source.name == "blue"} <= {
        "The key of the blue box is in the kitchen.",
        "It is red.",
    }


def test_markdown_and_json(found):
    text = found.to_markdown()
    assert text.startswith("The key is in the garden.[^1] The box is red.[^2]\n\n[^1]: ") and "\n[^2]: " in text
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["format"] == "flashtrace-citations/1" and data["method"] == "flashtrace"
    assert [row["text"] for row in data["sentences"]] == [one.text for one in found]
    assert data["answer"][data["sentences"][1]["start"] : data["sentences"][1]["stop"]] == "The box is red."
    assert {row["name"] for row in data["sentences"][0]["documents"]} == {"red", "blue"}
    assert str(found).count("  <- ") >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": {"a": "The key of the green box."}}, "'a' is not in the prompt"),
        ({"documents": {"a": "The key of the "}}, "occurs 2 times"),
        ({"documents": {"a": "The key of the red box", "b": "red box is in"}}, "overlap"),
        ({"documents": {"a": " "}}, "must be a text that is not empty"),
        ({"documents": {}}, "documents must be texts by name"),
        ({"documents": [BOXES["red"]]}, "documents must be texts by name"),
        ({"answer": ""}, "the generation is empty"),
        ({"answer": "<think>It is red.</think>"}, "nothing follows the reasoning"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"method": "nothing"}, "method must be one of"),
    ],
)
def test_what_is_refused(random_model, change, message):
    given = {"prompt": QUESTION, "answer": ANSWER, "documents": BOXES} | change
    with pytest.raises((InputError, SpanError), match=message):
        cite(
            *random_model,
            given["prompt"],
            given["answer"],
            documents=given["documents"],
            method=given.get("method", "ifr"),
        )


def test_options_and_tokenizers_that_there_are_not(random_model):
    with pytest.raises(TypeError, match="has no option hop"):
        cite(*random_model, QUESTION, ANSWER, documents=BOXES, hop=0)
    with pytest.raises(InputError, match="texts need a tokenizer"):
        cite(random_model[0], None, QUESTION, ANSWER, documents=BOXES)


def test_a_prompt_that_is_nothing_but_one_document(random_model):
    one = cite(*random_model, BOXES["red"], "In the garden.", documents={"red": BOXES["red"]}, method="ifr")[0]
    assert one.documents[0].share == pytest.approx(1.0) and one.relative == pytest.approx(1.0, rel=1e-3)
    assert one.documents[0].effect == pytest.approx(one.effect)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, text in {"prompt": PROMPT + "think", "answer": THINKING, **DOCUMENTS}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "documents.json").write_text(json.dumps({"other": DOCUMENTS["other"]}), encoding="utf-8")
    return folder


def call(*arguments):
    return CliRunner().invoke(app, ["cite", "--model", "reasoner", *map(str, arguments)])


def test_the_command(files, small):
    texts = ["--prompt-file", files / "prompt", "--answer-file", files / "answer"]
    named = ["--document", f"first={files / 'first'}", "--document", f"second={files / 'second'}"]
    outputs = ["--json", files / "out.json", "--markdown", files / "out.md"]
    done = call(*texts, *named, "--documents-file", files / "documents.json", *outputs)
    assert done.exit_code == 0, done.output
    expected = cite(*small, PROMPT + "think", THINKING, documents={"other": DOCUMENTS["other"], **DOCUMENTS})
    assert done.stdout == f"{expected}\n" and (files / "out.md").read_text("utf-8") == expected.to_markdown()
    assert json.loads((files / "out.json").read_text("utf-8"))["sentences"] == expected.to_dict()["sentences"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "v1 2 ;"], "no answer was given"),
        (["--prompt", "v1 2 ;", "--answer", "2"], "no documents were given"),
        (["--prompt", "v1 2 ;", "--answer", "2", "--document", "first"], "not of the form NAME=FILE"),
        (["--prompt", "v1 2 ;", "--answer", "2", "--document", "a=nowhere.txt"], "cannot read nowhere.txt"),
        (["--answer", "2", "--document", "a=b"], "0 prompts were given"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    done = call(*arguments)
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and message in done.stderr
