"""The text before the question: statements in random order between noise sentences."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from flashtrace_plugin.errors import InputError
from flashtrace_plugin.evaluation.tasks import vocabulary


@dataclass(frozen=True)
class Statement:
    """``key value … ;``: the values follow their key at once. A value that is itself a key continues the chain."""

    key: str
    values: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The statement as it stands in the prompt, with its closing mark."""
        return (self.key, *self.values, vocabulary.END_OF_STATEMENT)


@dataclass(frozen=True)
class Body:
    """Words of the text before the question, its statements by key, and where each begins (0-based word index)."""

    words: tuple[str, ...]
    statements: dict[str, Statement]
    starts: dict[str, int]

    def positions(self, key: str) -> tuple[int, ...]:
        """Word indices of the key and the values of a statement, without its closing mark."""
        start = self.starts[key]
        return tuple(range(start, start + 1 + len(self.statements[key].values)))

    def follow(self, key: str) -> tuple[Statement, ...]:
        """The statements from ``key`` to the one whose values are no keys, one per hop."""
        path = [self.statements[key]]
        while path[-1].values[0] in self.statements:
            path.append(self.statements[path[-1].values[0]])
        return tuple(path)


def scatter(rng: random.Random, statements: Sequence[Statement], room: int, noise: float = 1.0) -> Body:
    """Shuffle statements and noise sentences into one body of at most ``room`` words.

    ``noise`` is the share, 0 to 1, of the words left over by the statements that noise sentences fill. With 1 the body
    has exactly ``room`` words, or up to 2 fewer where less than a shortest sentence is left.
    Raises InputError if the statements do not fit or ``noise`` is out of range.
    """
    needed = sum(len(s.words) for s in statements)
    _check_room(needed, room, noise)
    pieces: list[Statement | tuple[str, ...]] = [*statements, *_sentences(rng, int((room - needed) * noise))]
    rng.shuffle(pieces)
    return _join(pieces)


def _check_room(needed: int, room: int, noise: float) -> None:
    if needed > room:
        raise InputError(
            f"the statements take {needed} words but the length leaves {room} for them; "
            f"raise length by at least {needed - room} or ask for fewer statements"
        )
    if not 0 <= noise <= 1:
        raise InputError(f"noise is {noise}; it is the share of free room filled with noise, from 0 to 1")


def _sentences(rng: random.Random, room: int) -> list[tuple[str, ...]]:
    sentences = []
    while room >= vocabulary.SHORTEST_SENTENCE:
        sentences.append(vocabulary.noise_sentence(rng, room))
        room -= len(sentences[-1])
    return sentences


def _join(pieces: Sequence[Statement | tuple[str, ...]]) -> Body:
    words: list[str] = []
    statements, starts = {}, {}
    for piece in pieces:
        if isinstance(piece, Statement):
            statements[piece.key], starts[piece.key] = piece, len(words)
        words.extend(piece.words if isinstance(piece, Statement) else piece)
    return Body(tuple(words), statements, starts)
