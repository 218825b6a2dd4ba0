"""A method declares its options and one step; everything around them is here and in the driver."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.core.recursion import Rows
from flashtrace_plugin.errors import FlashTraceError, InputError, MethodError, UnsupportedModelError
from flashtrace_plugin.images import ImageTokens
from flashtrace_plugin.methods.batch import caught, run_batch
from flashtrace_plugin.methods.cost import check_cost, hops_ahead
from flashtrace_plugin.methods.driver import Found, Step, drive
from flashtrace_plugin.methods.options import Declared, Driving, Options, declared, driven, one_of
from flashtrace_plugin.methods.passes import Passes
from flashtrace_plugin.methods.task import Task
from flashtrace_plugin.models.modes import same_function_modes, without_autocast
from flashtrace_plugin.models.read.source import Source, source_for
from flashtrace_plugin.spans import Span, check_spans
from flashtrace_plugin.text import (
    Located,
    Prompt,
    TokenizedText,
    Where,
    end_ids,
    from_ids,
    text_tokenizer,
    tokenize,
    without_text,
)
from flashtrace_plugin.units.contents import Content, between_special
from flashtrace_plugin.units.scores import Units

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashtrace_plugin.graph.hops import GraphOptions
    from flashtrace_plugin.graph.result import Graph
    from flashtrace_plugin.methods.recording import Recording


class Method(ABC):
    """What all methods share: texts and ids in, an :class:`Attribution` out.

    A method of your own declares the following and defines :meth:`start`; docs/adding-a-method.md builds one.

    name:         how hosts and the command line call it
    reads_images: whether it can be asked about a model that is given images: whether :meth:`start` reads the model
                  through the task alone
    explains_steps: whether a hop of it may explain any tokens of the reasoning, as the graph of steps needs
    Options:      its own options, a frozen dataclass of :func:`~flashtrace_plugin.methods.options.option` fields
    drives:       the driver's options that mean something for it, with their defaults here
    renormalises: whether the prompt's scores are brought to sum 1 (Eq. 31)
    hop_cost:     forward passes that a hop takes, see :meth:`cost`
    cost_of:      what the cost grows with, as refused runs are told
    cheaper:      its own options that take less, the better ones first
    recorded:     ``recorded(task)`` gives the positions [r] that :meth:`start` reads by ``task.record``, so that short
                  texts can be run together; None for a method that reads the model in another way

    model:     a Hugging Face causal language model, or a TransformerBridge of TransformerLens
    tokenizer: the model's tokenizer, or its processor where messages hold images; only texts need it
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    drives: ClassVar[Mapping[str, Any]] = driven(hops=1, recursion="reasoning", positions="token", ignore=())
    renormalises: ClassVar[bool] = False
    reads_images: ClassVar[bool] = False
    explains_steps: ClassVar[bool] = True
    hop_cost: ClassVar[float] = 1.0
    cost_of: ClassVar[str] = "one forward pass, and more for every hop"
    cheaper: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    recorded: ClassVar[Callable[[Any, Task], Tensor] | None] = None
    passes: Passes = Passes()

    @property
    def conserves(self) -> bool:
        """Whether what it finds adds up to what it explains, which :meth:`conservation_delta` then checks."""
        return False

    def conservation_delta(self, found: Attribution) -> float:
        """All shares of an attribution of this method, less what they should add up to, in the unit of the latter."""
        raise NotImplementedError(f"the method {self.name!r} conserves nothing that could be compared")

    def cost(self, task: Task) -> float:
        """What a run takes in forward passes of the text, to a factor of two; above ``max_cost`` it is refused.

        Here one pass, and ``hop_cost`` for the target, every hop, and one that measures sinks.
        """
        return 1 + self.hop_cost * (1 + hops_ahead(self, task) + (task.sinks != "keep"))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_options(cls)
        cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]
        cls.__doc__ = _documented(cls)

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        self.options, self.driving = self._chosen(options)
        self._hops_asked = "hops" in options  # a default is nothing that a text without reasoning could disappoint
        self.source = source_for(model)
        self.tokenizer = tokenizer if tokenizer is not None else self.source.tokenizer

    @classmethod
    def _chosen(cls, options: Mapping[str, Any]) -> tuple[Any, Driving]:
        """Its own options and the driver's. Raises TypeError for one that it has not, InputError for a value."""
        unknown = sorted(options.keys() - {one.name for one in options_of(cls)})
        if unknown:
            raise TypeError(f"{cls.__name__} has no option {', '.join(unknown)}; {takes(cls)}")
        driving = dict(cls.drives) | {k: v for k, v in options.items() if k in cls.drives}
        own = cls.Options(**{k: v for k, v in options.items() if k not in cls.drives})
        return own, Driving(**({"hops": 0} | driving))

    @classmethod
    def settings_with(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """What results note of these options, those left at their defaults too; no model is needed."""
        own, driving = cls._chosen(options)
        return {k: v for k, v in driving.noted().items() if k in cls.drives} | own.noted()

    @abstractmethod
    def start(self, task: Task) -> Step | Rows:
        """Begins to explain one sequence.

        result: ``step(weights)``, which gives a :class:`~flashtrace_plugin.core.recursion.Hop` for weights [N] on the
                positions that stand for tokens; or :class:`~flashtrace_plugin.core.recursion.Rows`, one row of
                importance for every token, from which the driver makes the step
        """

    def attribute(
        self,
        prompt: Prompt,
        generation: str,
        *,
        target: Where | None = None,
        reasoning: Where | None = None,
    ) -> Attribution:
        """Attributes a generated text to its prompt.

        prompt:     a text, or chat messages that go through the tokenizer's template; with a processor in the
                    tokenizer's place they may hold images, as its template wants them
        generation: what the model wrote after it, thinking included
        target:     what to explain: a piece of the generation, token positions of the whole sequence, or what finds
                    them, such as ``Sentence(0)`` or ``ToolCall(0).argument("to")``. By default the answer: what
                    follows the reasoning, narrowed by ``<answer>`` or ``\\boxed{}``; see
                    :func:`flashtrace_plugin.formats.find_parts`
        reasoning:  what to follow importance through; by default the thinking before the target

        Raises SpanError or InputError for spans and texts that do not fit, UnsupportedModelError and ClosureError
        for a model that cannot be decomposed, and CostError before it runs what takes more than ``max_cost``. Warns
        with ReasoningWarning where hops that were asked for find no reasoning to follow. The model is left as it was
        found.
        """
        return self.attribute_text(self._read(prompt, generation), target=target, reasoning=reasoning)

    def attribute_ids(
        self,
        input_ids: Tensor,
        *,
        prompt_length: int,
        target: Where | None = None,
        reasoning: Where | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Attribution:
        """Attributes a generated sequence of token ids.

        input_ids:     [N] or [1, N], prompt and generation
        prompt_length: number of prompt tokens
        inputs:        what else the model is given, as its processor returns it for the prompt: ``pixel_values``,
                       ``image_grid_thw``, ``mm_token_type_ids``, …
        target:        what to explain, as for :meth:`attribute`
        reasoning:     what to follow importance through; without a tokenizer, only positions can be told
        """
        text = self.read_ids(input_ids, prompt_length)
        return self.attribute_text(
            text if inputs is None else replace(text, inputs=inputs), target=target, reasoning=reasoning
        )

    def attribute_text(
        self,
        text: TokenizedText,
        *,
        target: Where | None = None,
        reasoning: Where | None = None,
    ) -> Attribution:
        """Attributes a tokenized text: the one door that Python, the command line and all hosts go through.

        text: from :func:`flashtrace_plugin.text.tokenize`, or from ids by :meth:`read_ids`
        target, reasoning: as for :meth:`attribute`
        """
        return self._explained(text, self._located(text, target, reasoning))

    def _explained(self, text: TokenizedText, where: Located) -> Attribution:
        with self._opened(text, where) as (task, autocast):
            found = drive(self.name, self.start(task), task, **self._driven())
        return self._put_together(text, where, found, autocast)

    def _driven(self) -> dict[str, Any]:
        """What the driver is told."""
        hops = self.driving.hops if "hops" in self.drives else 0
        return {"hops": hops, "asked": self._hops_asked, "renormalise": self.renormalises}

    def _put_together(
        self, text: TokenizedText, where: Located, found: Found, autocast: Mapping[str, Any]
    ) -> Attribution:
        """The result for a text, from what the driver found. autocast: see :meth:`_modes`"""
        numbers = dict(vars(found))
        # Options first, then what is known only after the run.
        settings = self.settings() | self.source.describe() | dict(autocast)
        settings |= _rules(where) | numbers.pop("settings")
        if "hops" not in self.drives:
            settings = {k: v for k, v in settings.items() if k not in ("hops_followed", "mass_left")}
        explained = Attribution(
            tokens=text.tokens,
            token_ids=tuple(text.input_ids.tolist()),
            prompt=Span(0, text.prompt_length),
            reasoning=where.reasoning,
            target=where.target,
            method=self.name,
            settings=settings,
            contents=self._contents(text),
            messages=text.messages,
            images=self._images(text),
            **numbers,
        )
        explained.remember(self.source.language_model)
        return explained

    def record(self, prompt: Prompt, generation: str, **options: Any) -> Recording:
        """A text to be explained target by target: the forward pass is run once, and a new target costs its hops.

        prompt, generation: as for :meth:`attribute`
        max_bytes:          that may be kept in memory, by default 4 GiB; what takes more is run again

        See :class:`~flashtrace_plugin.methods.recording.Recording`.
        """
        return self.record_text(tokenize(self._need_tokenizer(), prompt, generation, self.end_ids()), **options)

    def record_ids(self, input_ids: Tensor, *, prompt_length: int, **options: Any) -> Recording:
        """:meth:`record` of a generated sequence of token ids, given as for :meth:`attribute_ids`."""
        return self.record_text(self.read_ids(input_ids, prompt_length), **options)

    def record_text(self, text: TokenizedText, **options: Any) -> Recording:
        """:meth:`record` of a tokenized text."""
        from flashtrace_plugin.methods.recording import Recording

        return Recording(self, text, **options)

    def graph(
        self,
        prompt: Prompt,
        generation: str,
        *,
        target: Where | None = None,
        reasoning: Where | None = None,
        unit: Units = "sentence",
        step_unit: Units = "step",
        max_units: int = 2000,
    ) -> Graph:
        """Which step of the reasoning rests on which, and the answer on all of them: one hop from every step.

        prompt, generation, target, reasoning: as for :meth:`attribute`; without reasoning there are no steps
        unit:      of the prompt, as for :meth:`~flashtrace_plugin.attribution.Attribution.by`
        step_unit: of the reasoning, likewise
        max_units: how many steps there may be, each of which costs a hop

        Raises what :meth:`attribute` raises, InputError for units that do not fit and for too many steps, and
        MethodError for a method whose hops cannot explain a step by itself. See docs/graph.md.
        """
        text = self._read(prompt, generation)
        return self.graph_text(
            text, target=target, reasoning=reasoning, unit=unit, step_unit=step_unit, max_units=max_units
        )

    def graph_ids(self, input_ids: Tensor, *, prompt_length: int, **options: Unpack[GraphOptions]) -> Graph:
        """:meth:`graph` of a generated sequence of token ids, given as for :meth:`attribute_ids`."""
        return self.graph_text(self.read_ids(input_ids, prompt_length), **options)

    def graph_text(
        self,
        text: TokenizedText,
        *,
        target: Where | None = None,
        reasoning: Where | None = None,
        unit: Units = "sentence",
        step_unit: Units = "step",
        max_units: int = 2000,
    ) -> Graph:
        """:meth:`graph` of a tokenized text: the one door, as :meth:`attribute_text` is for attributions."""
        from flashtrace_plugin.graph.hops import Asked, check_steps_are_explained, graph_of_steps

        check_steps_are_explained(self)
        if text.inputs:
            raise UnsupportedModelError("a graph of steps has no place for images yet; use attribute")
        where = self._located(text, target, reasoning)
        asked = Asked(text, where, self._contents(text), unit, step_unit, max_units)
        with self._opened(text, where) as (task, autocast):
            graph = graph_of_steps(self, task, asked, autocast | _rules(where))
        graph.remember(self.source.language_model)
        return graph

    def _located(self, text: TokenizedText, target: Where | None, reasoning: Where | None) -> Located:
        """The spans of a text, checked."""
        where = text.parts(target, reasoning, self.driving.format)
        check_spans(len(text.input_ids), text.prompt_length, where.target, where.reasoning, str(where))
        return where

    @contextmanager
    def _opened(self, text: TokenizedText, where: Located) -> Iterator[tuple[Task, dict[str, Any]]]:
        """The task of a text in the state in which methods run, and what results note of the caller's state."""
        with self._modes() as autocast, ExitStack() as open_for_the_call:
            yield self._open(text, where, open_for_the_call), autocast

    @contextmanager
    def _modes(self) -> Iterator[dict[str, Any]]:
        """The state in which methods run, and what results note of the caller's."""
        # Tensors made in inference mode cannot be differentiated, whatever the caller's mode is.
        with same_function_modes(), torch.inference_mode(False), without_autocast() as autocast:
            yield autocast

    def _open(self, text: TokenizedText, where: Located, contexts: ExitStack) -> Task:
        """The task of a text, once its ids and its cost are checked."""
        ids = self.source.check_ids(text.input_ids).clone()
        source = self._source(text, ids)
        task = self._task(ids, text.prompt_length, where.target, where.reasoning, contexts, source)
        check_cost(self, task)
        return task

    def _source(self, text: TokenizedText, ids: Tensor) -> Source:
        """What reads the model on this text. Raises UnsupportedModelError where the method would leave out images."""
        if not text.inputs:
            return self.source
        if not self.reads_images:
            raise UnsupportedModelError(
                f"the method {self.name!r} does not read images ({', '.join(text.inputs)}); use 'flashtrace', "
                "'ifr', 'alti', 'lrp' or 'recommended', which do"
            )
        return self.source.given(ids, text.prompt_length, text.inputs)

    def _images(self, text: TokenizedText) -> tuple[ImageTokens, ...]:
        if not text.inputs:
            return ()
        return self._source(text, self.source.check_ids(text.input_ids)).images(text.input_ids)

    def _contents(self, text: TokenizedText) -> tuple[Content, ...]:
        """Where the prompt's contents are: those of its messages, or what stands between special tokens."""
        prompt = slice(0, text.prompt_length)
        return text.contents or between_special(
            text.tokens[prompt], text.input_ids[prompt].tolist(), self._special_ids()
        )

    def attribute_batch(
        self,
        prompts: Sequence[Prompt],
        generations: Sequence[str],
        *,
        targets: Sequence[Where | None] | None = None,
        reasonings: Sequence[Where | None] | None = None,
        progress: bool = False,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """Attributes several texts, with the numbers of :meth:`attribute` (to 1e-5).

        errors: what becomes of a text that cannot be attributed: "raise" raises its error, the first in the order of
                the texts; "return" leaves the FlashTraceError in its place

        result: an :class:`Attribution` for every text, in their order

        Short texts of nearly one length share forward passes and hops, where the method and the model allow it; see
        docs/batches.md. Every text is checked by itself, and one that fails takes no other with it.
        """
        if isinstance(prompts, str) or isinstance(generations, str):
            raise InputError("attribute_batch takes lists of texts; pass one text to attribute")
        n = len(prompts)
        columns = [prompts, generations, targets or [None] * n, reasonings or [None] * n]
        if len({len(column) for column in columns}) != 1:
            raise InputError(
                f"prompts, generations, targets and reasonings must be equally long, got {[len(c) for c in columns]}"
            )
        texts = [caught(partial(self._read, *pair)) for pair in zip(prompts, generations, strict=True)]
        return self.attribute_texts(texts, targets=targets, reasonings=reasonings, progress=progress, errors=errors)

    def attribute_texts(
        self,
        texts: Sequence[TokenizedText | FlashTraceError],
        *,
        targets: Sequence[Where | None] | None = None,
        reasonings: Sequence[Where | None] | None = None,
        progress: bool = False,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """:meth:`attribute_batch` of tokenized texts, with an error in the place of each that could not be read."""
        one_of("errors", errors, ("raise", "return"))
        missing = [None] * len(texts)
        found = run_batch(self, zip(texts, targets or missing, reasonings or missing, strict=True), progress)
        failed = next((one for one in found if isinstance(one, FlashTraceError)), None)
        if failed is not None and errors == "raise":
            raise failed
        return found

    def _read(self, prompt: Prompt, generation: str) -> TokenizedText:
        return tokenize(self._need_tokenizer(), prompt, generation, self.end_ids())

    def read_ids(self, input_ids: Any, prompt_length: int) -> TokenizedText:
        """Token ids [N] or [1, N] as a tokenized text. Raises InputError for what are no ids of this model."""
        if not isinstance(prompt_length, int):
            raise InputError(f"prompt_length must be a whole number of tokens, got {prompt_length!r}")
        ids = self.source.check_ids(torch.as_tensor(input_ids))[0].cpu()
        if self.tokenizer is None:
            return without_text(ids, prompt_length)
        return from_ids(text_tokenizer(self.tokenizer), ids, prompt_length, self.end_ids())

    def end_ids(self) -> frozenset[int]:
        """Ids that end a text or a turn for this tokenizer and model, see :func:`flashtrace_plugin.text.end_ids`."""
        return end_ids(text_tokenizer(self.tokenizer), *self.source.configs())

    def ignored(self, ids: Tensor) -> Tensor:
        """Which of the tokens [N] are in ``ignore``. result: [N] bool"""
        ignore = tuple(self.driving.ignore)
        chosen = torch.tensor([i for i in ignore if isinstance(i, int)], dtype=torch.long)
        ignored = torch.isin(ids, chosen)
        words = {word for word in ignore if isinstance(word, str)}
        if words:
            texts = text_tokenizer(self._need_tokenizer()).batch_decode([[i] for i in ids.tolist()])
            ignored |= torch.tensor([text in words or text.strip() in words for text in texts])
        return ignored

    def settings(self) -> dict[str, Any]:
        """The options of this method, for the record."""
        return {k: v for k, v in self.driving.noted().items() if k in self.drives} | self.options.noted()

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("texts need a tokenizer: pass one as the second argument, or use attribute_ids")
        return self.tokenizer

    def _task(
        self,
        ids: Tensor,
        prompt_length: int,
        target: Span,
        reasoning: Span | None,
        contexts: ExitStack,
        given: Source | None = None,
    ) -> Task:
        source = given or self.source
        # A position of its own stands for a token only where the method says so; nothing predicts the first token.
        own = "positions" in self.drives and self.driving.positions == "token"
        shift = int("positions" in self.drives and not own)
        kept = ~self.ignored(ids[0].cpu())
        chosen = _mask(len(kept), target) & kept
        if not bool(chosen.any()):
            raise InputError(f"all tokens of target {target} are ignored; ignore fewer, or choose another target")
        first = 0 if own else 1
        followed: dict[str, list[Span | None]] = {
            "reasoning": [reasoning],
            "generation": [reasoning, target],
            "prompt": [Span(first, target.start) if first < target.start else None],
        }
        through = _mask(len(kept), *followed[self.driving.recursion]) & kept
        sinks = self.driving.sinks if "sinks" in self.drives else "keep"
        special = torch.isin(ids[0].cpu(), torch.tensor(sorted(self._special_ids()), dtype=torch.long))
        special[[i for image in source.images(ids[0]) for i in image.positions]] = False
        spans = (prompt_length, target, reasoning)
        return Task(source, ids, *spans, kept, chosen, through, shift, sinks, special, contexts, passes=self.passes)

    def _special_ids(self) -> set[int]:
        """Ids that begin, end or pad a text, and all special tokens of the tokenizer."""
        tokenizer = text_tokenizer(self.tokenizer)
        begins = (getattr(owner, "bos_token_id", None) for owner in (tokenizer, *self.source.configs()))
        known = {i for i in begins if isinstance(i, int)} | self.end_ids()
        return known | set(getattr(tokenizer, "all_special_ids", None) or ())


def options_of(method: type[Method]) -> list[Declared]:
    """All options of a method: the driver's that it takes, with its own defaults, and those it declares."""
    driver = [_with_default(one, method.drives[one.name]) for one in declared(Driving) if one.name in method.drives]
    return driver + declared(method.Options)


def takes(method: type[Method]) -> str:
    """The options of a method in words, for errors."""
    known = [one.name for one in options_of(method)]
    return f"it takes {', '.join(known)}" if known else "it takes none"


def check_declaration(method: type[Method]) -> None:
    """Raises MethodError for a name that is none, and for options that the driver does not know."""
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise MethodError(f"{method.__name__}.name must be a word such as 'rollout', got {name!r}")
    known = {one.name for one in declared(Driving)}
    unknown = sorted(method.drives.keys() - known)
    if unknown:
        raise MethodError(
            f"the method {name!r} drives {', '.join(unknown)}, which the driver does not know; it knows "
            f"{', '.join(sorted(known))}"
        )


def _check_options(method: type[Method]) -> None:
    clash = sorted({one.name for one in declared(Driving)} & {one.name for one in declared(method.Options)})
    if clash:
        name = getattr(method, "name", method.__name__)
        raise MethodError(
            f"the method {name!r} declares the option {', '.join(clash)}, which is the driver's; name yours "
            "otherwise, or set the driver's default in `drives`"
        )


def _with_default(one: Declared, default: Any) -> Declared:
    return Declared(**(vars(one) | {"default": default}))


def _signature(method: type[Method]) -> inspect.Signature:
    kinds = inspect.Parameter
    head = [
        kinds("model", kinds.POSITIONAL_OR_KEYWORD),
        kinds("tokenizer", kinds.POSITIONAL_OR_KEYWORD, default=None),
    ]
    tail = [kinds(o.name, kinds.KEYWORD_ONLY, default=o.default, annotation=o.type) for o in options_of(method)]
    return inspect.Signature(head + tail)


def _documented(method: type[Method]) -> str:
    """The docstring with the options that were declared, unless a parent's stands for it."""
    text = inspect.cleandoc(vars(method).get("__doc__") or "")
    lines = [f"{one.shown()}" for one in options_of(method)]
    return "\n".join([text, "", "Options:", "", *lines]) if lines else text


def _mask(length: int, *spans: Span | None) -> Tensor:
    """The positions of some spans. result: [length] bool"""
    inside = torch.zeros(length, dtype=torch.bool)
    for span in spans:
        if span is not None:
            inside[span.slice] = True
    return inside


def _rules(where: Located) -> dict[str, str]:
    """The rules that found the spans, where they were not given."""
    found = {"target_rule": where.target_rule, "reasoning_rule": where.reasoning_rule}
    return {name: rule for name, rule in found.items() if rule}
