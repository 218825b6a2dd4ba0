"""What the page asks the model: to write, and to explain one target after another on a recorded pass."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from flashtrace_plugin.core.recursion import Hop, Rows
from flashtrace_plugin.errors import InputError, MethodError
from flashtrace_plugin.loading import write
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.driver import Step
from flashtrace_plugin.methods.options import one_of
from flashtrace_plugin.methods.recording import Recording
from flashtrace_plugin.methods.registry import METHODS
from flashtrace_plugin.methods.task import Task
from flashtrace_plugin.serve.jobs import Job
from flashtrace_plugin.serve.questions import Question, prompt_of
from flashtrace_plugin.serve.view import shown_text, view
from flashtrace_plugin.text import TokenizedText, ids_of_prompt, tokenize, with_messages


@dataclass(frozen=True)
class Limits:
    """What one page may ask for.

    tokens:     of a text, prompt and generation together
    new_tokens: that the model writes at once
    cost:       forward passes of a run, by its estimate
    bytes:      of all recordings together
    texts:      that are kept recorded
    request:    bytes of what the page sends, saved files included
    """

    tokens: int = 16_384
    new_tokens: int = 4_096
    cost: float = 500
    bytes: int = 4 << 30
    texts: int = 4
    request: int = 32 << 20


class Engine:
    """A model with its tokenizer, and the texts that were asked about lately. One thread at a time may use it."""

    def __init__(self, model: Any, tokenizer: Any, limits: Limits) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self._methods: dict[str, Method] = {}
        self._recordings: OrderedDict[Any, Recording] = OrderedDict()
        self.method("flashtrace")  # so that a model that is not supported is refused before the page opens

    @property
    def name(self) -> str:
        """Of the model, as results note it."""
        return str(self.method("flashtrace").source.describe().get("model"))

    def info(self) -> dict[str, Any]:
        """What the page has to know before anybody asks."""
        methods = [{"name": n, "summary": (cls.__doc__ or "").partition("\n")[0]} for n, cls in _importable()]
        return {
            "model": self.name,
            "chat": bool(getattr(self.tokenizer, "chat_template", None)),
            "methods": methods,
            "limits": {"tokens": self._most_tokens(), "new_tokens": self.limits.new_tokens},
        }

    def write(self, job: Job, question: Question) -> None:
        """Lets the model write; every piece is told as it comes, the exact text and its ids at the end."""
        prompt = prompt_of(question)
        length = len(ids_of_prompt(self.tokenizer, prompt)) if prompt else 0
        room = min(question.new_tokens, self.limits.new_tokens, self._most_tokens() - length)
        if room < 1:
            raise InputError(f"the prompt has {length:,} tokens and {self._most_tokens():,} are allowed; shorten it")
        began = time.perf_counter()
        text = write(
            self.model,
            self.tokenizer,
            prompt,
            room,
            streamer=_Streamer(self.tokenizer, job),
            stopping_criteria=StoppingCriteriaList([_WhenCancelled(job)]),
        )
        job.check()
        parts = {"ids": text.input_ids.tolist(), "prompt_length": text.prompt_length, "generation": text.generation}
        job.tell("wrote", **parts, ms=1000 * (time.perf_counter() - began), full=len(text.input_ids) - length >= room)

    def explain(self, job: Job, question: Question) -> None:
        """Tells the tokens of a text, and then what its target came from."""
        method = self.method(question.method)
        text = self._text(method, question)
        job.tell("text", **shown_text(text.tokens, text.prompt_length))
        recording = self._recording(method, text).using(_interruptible(method, job))
        before, began = (recording.passes, recording.pass_seconds), time.perf_counter()
        try:
            found = recording.attribute(target=question.where)
        finally:
            self._keep_within()
        whole, passing = time.perf_counter() - began, recording.pass_seconds - before[1]
        job.check()
        took = {"pass": 1000 * passing, "hops": 1000 * (whole - passing), "passes": recording.passes - before[0]}
        saved = {"attribution": found.to_dict()} if question.full else {}
        job.tell("found", **view(found, question.named_fields), ms=took, **saved)

    def method(self, name: str) -> Method:
        """The method with its defaults, made once. Raises InputError for a name that is none."""
        cls = METHODS[one_of("method", name, METHODS)]
        if name not in self._methods:
            self._methods[name] = cls(self.model, self.tokenizer, max_cost=self.limits.cost)
        return self._methods[name]

    def _most_tokens(self) -> int:
        known = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.limits.tokens, known or self.limits.tokens)

    def _text(self, method: Method, question: Question) -> TokenizedText:
        prompt = prompt_of(question)
        if question.ids is None:
            text = tokenize(self.tokenizer, prompt, question.generation, method.end_ids())
        else:
            text = method.read_ids(torch.tensor(question.ids), question.prompt_length)
            if prompt and ids_of_prompt(self.tokenizer, prompt) == list(question.ids[: question.prompt_length]):
                text = with_messages(self.tokenizer, prompt, text)
        if len(text.input_ids) > self._most_tokens():
            raise InputError(
                f"the text has {len(text.input_ids):,} tokens and {self._most_tokens():,} are allowed; shorten it"
            )
        return text

    def _recording(self, method: Method, text: TokenizedText) -> Recording:
        """The recording of a text, made when it is new; the one used last stays longest."""
        key = tuple(text.input_ids.tolist()), text.prompt_length, text.contents
        if key not in self._recordings:
            self._recordings[key] = method.record_text(text, max_bytes=self.limits.bytes)
        self._recordings.move_to_end(key)
        while len(self._recordings) > self.limits.texts:
            self._recordings.popitem(last=False)
        return self._recordings[key]

    def _keep_within(self) -> None:
        """Forgets the oldest recordings where all together take too much memory."""
        while len(self._recordings) > 1 and sum(one.nbytes for one in self._recordings.values()) > self.limits.bytes:
            self._recordings.popitem(last=False)


def _importable() -> Iterator[tuple[str, type[Method]]]:
    """The methods, without those of other packages that cannot be imported."""
    for name in METHODS:
        with suppress(MethodError):
            yield name, METHODS[name]


def _interruptible(method: Method, job: Job) -> Method:
    """The same method, which ends between two hops where the page has gone."""
    other, start = copy(method), method.start

    def begin(task: Task) -> Step | Rows:
        job.check()
        begun = start(task)
        if isinstance(begun, Rows):
            return begun

        def step(weights: torch.Tensor) -> Hop:
            job.check()
            return begun(weights)

        return step

    other.start = begin  # type: ignore[method-assign]
    return other


class _Streamer(TextStreamer):
    """Tells a job every word that is written."""

    def __init__(self, tokenizer: Any, job: Job) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.job = job

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.job.tell("written", text=text)


class _WhenCancelled(StoppingCriteria):
    """Stops the model where the page has gone, or its reader pressed Stop."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        stop = self.job.cancelled.is_set()
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)
