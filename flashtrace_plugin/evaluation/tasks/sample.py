"""One question with its reasoning, its answer and the positions of its evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flashtrace_plugin.evaluation.tasks import vocabulary
from flashtrace_plugin.evaluation.tasks.body import Body, Statement


@dataclass(frozen=True)
class Sample:
    """A prompt, what the model should generate, and which prompt tokens are the evidence.

    A position is a 0-based index into ``prompt.split()``; the bundled tokenizer makes one token of each word and adds
    none, so it is the token index as well. No position counts a statement's closing mark or the question.

    task         name in ``TASKS``
    prompt       body, ``?``, the asked keys, then the mode: ``think`` or ``direct``
    reasoning    one statement for each hop, questions one after another; empty in direct mode
    answer       the values of all questions in order, joined by spaces
    evidence     keys and values of the gold statements, ascending
    steps        the same positions by reasoning step: ``steps[i]`` is the statement that step ``i`` copies
    distractors  keys and values of all other statements, ascending
    question     the asked keys behind the ``?``
    parameters   the arguments that the sample was drawn with
    """

    task: str
    prompt: str
    reasoning: str
    answer: str
    evidence: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    distractors: tuple[int, ...]
    question: tuple[int, ...]
    parameters: Mapping[str, int | float | bool] = field(default_factory=dict, hash=False)

    @property
    def thinking(self) -> bool:
        """Whether the model reasons before it answers."""
        return self.prompt.endswith(" " + vocabulary.THINK)

    @property
    def generation(self) -> str:
        """``<think> reasoning </think> answer``, or the answer alone in direct mode; without the end-of-text token."""
        if not self.thinking:
            return self.answer
        return f"{vocabulary.THINK_OPEN} {self.reasoning} {vocabulary.THINK_CLOSE} {self.answer}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a chat: one user message; the chat template appends the mode (``enable_thinking``)."""
        return [{"role": "user", "content": self.prompt.rsplit(" ", 1)[0]}]

    @property
    def evidence_text(self) -> tuple[str, ...]:
        """Text of each gold statement, by reasoning step, for example ``("v12 v7", "v7 84")``."""
        words = self.prompt.split()
        return tuple(" ".join(words[i] for i in step) for step in self.steps)


def ask(body: Body, keys: Sequence[str], *, thinking: bool, task: str, parameters: Mapping | None = None) -> Sample:
    """Ask a body for the values that the chains from ``keys`` end in."""
    paths = [body.follow(key) for key in keys]
    gold = [statement for path in paths for statement in path]
    mode = vocabulary.THINK if thinking else vocabulary.DIRECT
    first = len(body.words) + 1
    return Sample(
        task=task,
        prompt=" ".join((*body.words, vocabulary.QUESTION, *keys, mode)),
        reasoning=" ".join(word for s in gold for word in s.words) if thinking else "",
        answer=" ".join(value for path in paths for value in path[-1].values),
        evidence=_positions(body, gold),
        steps=tuple(body.positions(s.key) for s in gold),
        distractors=_positions(body, [s for s in body.statements.values() if s not in gold]),
        question=tuple(range(first, first + len(keys))),
        parameters=dict(parameters or {}),
    )


def _positions(body: Body, statements: Sequence[Statement]) -> tuple[int, ...]:
    return tuple(sorted({i for s in statements for i in body.positions(s.key)}))
