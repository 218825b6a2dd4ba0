"""One list of awkward examples through all doors: the same spans and the same numbers wherever one asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flashtrace_plugin import Attribution, FlashTrace, FlashTraceError, Span, SpanError
from flashtrace_plugin.cli import app
from flashtrace_plugin.text import tokenize
from tests.tiny import tiny, tiny_tokenizer

PROMPT = "The key of the red box is in the garden. Where is the key?\n"
MESSAGES = [{"role": "user", "content": "Where is the key?"}]
SPECIAL = [
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<answer>", "</answer>"),
    *("<|im_end|>", "<|turn|>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>"),
]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Example:
    """A generation with what its target and reasoning must be; ``ask`` holds spans that the user gives."""

    generation: str
    target: str
    reasoning: str | None
    prompt: Any = PROMPT
    ask: Any = None
    through: Any = None


EXAMPLES = {
    "tags of tokens": Example("<think>red box</think>In the garden.", "In the garden.", "red box"),
    "answer as special tokens": Example("<think>red box</think><answer>garden</answer>", "garden", "red box"),
    "turn end of a known name": Example("<think>red box</think>In the garden.<|im_end|>", "In the garden.", "red box"),
    "turn end of the template": Example("<think>red</think>In the garden.<|turn|>", "In the garden.", "red"),
    "end and padding": Example("<think>red</think>In the garden.</s><pad><pad>", "In the garden.", "red"),
    "bytes": Example("<think>東京 🙂 é</think>café 東", "café 東", "東京 🙂 é"),
    "mistral": Example("[THINK]red box[/THINK]In the garden.", "In the garden.", "red box"),
    "channels": Example(
        "<|channel|>analysis<|message|>red box<|end|><|start|>assistant<|channel|>final<|message|>garden.<|return|>",
        "garden.",
        "red box",
    ),
    "boxed": Example("The box is red, so \\boxed{garden}.", "garden", "The box is red, so"),
    "no reasoning": Example("In the garden.", "In the garden.", None),
    "chat": Example("<think>red box</think>In the garden.<|turn|>", "In the garden.", "red box", MESSAGES),
    "two answers": Example("<think>red; blue</think>garden; kitchen", "kitchen", "red; blue", ask="kitchen"),
    "given texts": Example("the red box; the garden", "garden", "red box", ask="garden", through="red box"),
    "the last position": Example("<think>red box</think>the garden", "garden", "red box", ask=-1),
    "a slice from the end": Example("the red box the garden", "the garden", None, ask=slice(-2, None)),
    "a pair from the end": Example("<think>a</think>the garden is", " garden", "a", ask=(-2, -1)),
}
REFUSED = {
    "cut-off thinking": (Example("<think>red box and", "", None), "no </think>"),
    "cut-off channel": (Example("<|channel|>analysis<|message|>red box", "", None), "no <|end|>"),
    "nothing after the thinking": (Example("<think>red box</think>", "", None), "nothing follows"),
    "not there": (Example("In the garden.", "", None, ask="attic"), "occurs 0 times"),
    "twice there": (Example("garden garden", "", None, ask="garden"), "occurs 2 times"),
    "reversed": (Example("In the garden.", "", None, ask=slice(-1, -3)), "is empty"),
    "in the prompt": (Example("In the garden.", "", None, ask=(0, 2)), "outside"),
    "behind the end": (Example("In the garden.", "", None, ask=(5, 900)), "outside"),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("model"))


class Host:
    """A tiny model with an awkward tokenizer, and every door to it."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.model, self.tokenizer = tiny("qwen3", vocab_size=512), tiny_tokenizer()
        self.tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        self.tokenizer.chat_template = TEMPLATE
        self.model.generation_config.eos_token_id = 2
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def text(self, example: Example):
        return tokenize(self.tokenizer, example.prompt, example.generation)

    def python(self, example: Example) -> Attribution:
        method = FlashTrace(self.model, self.tokenizer)
        return method.attribute(example.prompt, example.generation, target=example.ask, reasoning=example.through)

    def ids(self, example: Example) -> Attribution:
        text, method = self.text(example), FlashTrace(self.model, self.tokenizer)
        spans = {"target": example.ask, "reasoning": example.through}
        return method.attribute_ids(text.input_ids, prompt_length=text.prompt_length, **spans)

    def inseq(self, example: Example) -> Attribution:
        import inseq

        import flashtrace_inseq

        prompt = example.prompt
        if not isinstance(prompt, str):
            prompt = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        attributor = inseq.load_model(self.model, "flashtrace", tokenizer=self.tokenizer)
        spans = {k: v for k, v in (("target", example.ask), ("reasoning", example.through)) if v is not None}
        out = attributor.attribute(prompt, prompt + example.generation, show_progress=False, **spans)
        return flashtrace_inseq.attributions(out)[0]

    def captum(self, example: Example) -> Attribution:
        from flashtrace_captum import FlashTrace as CaptumFlashTrace
        from flashtrace_captum import LLMTraceAttribution, TokenIdsInput

        text = self.text(example)
        start = text.prompt_length
        inp = TokenIdsInput(text.input_ids[:start], self.tokenizer)
        spans = {"answer": _of_response(example.ask, text), "reasoning": _of_response(example.through, text)}
        llm = LLMTraceAttribution(CaptumFlashTrace(self.model), self.tokenizer)
        return llm.attribute(inp, text.input_ids[start:], **spans).attribution

    def lens(self, example: Example) -> Attribution:
        from flashtrace_lens import bridge_for, flashtrace

        text = self.text(example)
        spans = {"target": example.ask, "reasoning": example.through, "prompt_length": text.prompt_length}
        return flashtrace(bridge_for(self.model, self.tokenizer), text.input_ids, **spans).attribution

    def command_line(self, example: Example) -> Attribution:
        saved, messages = self.folder / "a.json", self.folder / "m.json"
        messages.write_text(json.dumps(example.prompt))
        prompt = ["--prompt", example.prompt] if isinstance(example.prompt, str) else ["--messages-file", messages]
        asked = [("--target", example.ask), ("--reasoning", example.through)]
        spans = [part for flag, value in asked if value is not None for part in (flag, self._typed(value, example))]
        texts = [*prompt, "--generation", example.generation, "--json", saved]
        command = ["attribute", "--method", "flashtrace", "--model", self.folder, *texts, *spans]
        result = CliRunner().invoke(app, [str(part) for part in command])
        if result.exit_code:
            raise SpanError(result.output) if result.exit_code == 2 else result.exception
        return Attribution.load(saved)

    def _typed(self, value: Any, example: Example) -> str:
        """Positions as the command line writes them, a:b."""
        if isinstance(value, int):
            return str(self.text(example).span("target", value))
        edges = (value.start, value.stop) if isinstance(value, slice) else value
        return value if isinstance(value, str) else ":".join("" if e is None else str(e) for e in edges)


def _of_response(value: Any, text: Any) -> Any:
    """Captum's wrapper counts slices from the response's start; all else is as everywhere."""
    if isinstance(value, (int, tuple)):
        return text.span("answer", value)
    return value


DOORS: dict[str, Callable[[Host, Example], Attribution]] = {
    name: getattr(Host, name) for name in ("ids", "inseq", "captum", "lens", "command_line")
}


@pytest.mark.filterwarnings("ignore::flashtrace_plugin.errors.ReasoningWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_python_finds_what_is_meant(host, name):
    example = EXAMPLES[name]
    found = host.python(example)
    assert found.text(found.target).strip() == example.target.strip()
    reasoning = None if found.reasoning is None else found.text(found.reasoning).strip()
    assert reasoning == example.reasoning


@pytest.mark.filterwarnings("ignore::flashtrace_plugin.errors.ReasoningWarning")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_door_gives_the_same_spans_and_numbers(host, name, door):
    example = EXAMPLES[name]
    expected, found = host.python(example), DOORS[door](host, example)
    assert found.token_ids == expected.token_ids
    assert (found.prompt, found.reasoning, found.target) == (expected.prompt, expected.reasoning, expected.target)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.hop_scores, expected.hop_scores, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::flashtrace_plugin.errors.ReasoningWarning")
@pytest.mark.parametrize("door", ["python", *DOORS])
@pytest.mark.parametrize("name", REFUSED)
def test_every_door_refuses_the_same(host, name, door):
    example, message = REFUSED[name]
    with pytest.raises(FlashTraceError) as caught:
        getattr(host, door)(example)
    assert message in " ".join(str(caught.value).replace("│", " ").split())


def test_spans_that_clash_say_which_rule_found_them(host):
    generation = "<think>red box</think>In the garden."
    with pytest.raises(SpanError, match=r"the target was found as what follows <think>…</think>"):
        FlashTrace(host.model, host.tokenizer).attribute(PROMPT, generation, reasoning="garden.")


def test_a_span_may_hold_what_ends_a_text(host):
    example = EXAMPLES["end and padding"]
    text = host.text(example)
    whole = Span(text.written - 1, len(text.input_ids))
    assert host.ids(Example(example.generation, "", None, ask=whole)).target == whole
