"""Samples drawn for a run, each a line with its cases, so that no model writes twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtrace_plugin.evaluation.cases import Case, case_of, plain_case
from flashtrace_plugin.evaluation.run.lines import append_line, cut_unfinished, read_lines

_TRIES = 6
"""Samples that are drawn for each one wanted before there are fewer."""


@dataclass(frozen=True)
class Shard:
    """Part i of n of a run: the samples whose number leaves i - 1 when divided by n. ``Shard(1, 1)`` is all."""

    part: int = 1
    of: int = 1

    @property
    def name(self) -> str:
        """For files, such as ``2-of-4``."""
        return f"{self.part}-of-{self.of}"

    def wanted(self, samples: int) -> int:
        """How many of so many samples are this part's."""
        return (samples - self.part) // self.of + 1 if samples >= self.part else 0


def drawn_cases(
    file: Path,
    task: str,
    draw: Callable[[int], list[Case] | None],
    *,
    seed: int,
    samples: int,
    shard: Shard,
    progress: Callable[[int], object] = lambda number: None,
) -> Iterator[Case]:
    """The cases of the first ``samples`` usable samples of a task; those that the file holds are not drawn again.

    draw:     the cases of a sample by its number, none where it is of no use, None beyond the last
    progress: called with the number of each sample that is drawn
    """
    cut_unfinished(file)
    kept = {line["number"]: line for line in read_lines(file) if (line["task"], line["seed"]) == (task, seed)}
    usable, wanted = 0, shard.wanted(samples)
    for number in range(shard.part - 1, _TRIES * samples, shard.of):
        if usable >= wanted:
            return
        if number not in kept:
            progress(number)
            found = draw(number)
            if found is None:
                return
            kept[number] = {"task": task, "seed": seed, "number": number, "cases": [plain_case(c) for c in found]}
            append_line(file, kept[number])
        cases = [case_of(row) for row in kept[number]["cases"]]
        usable += bool(cases)
        yield from cases


def count_drawn(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Samples drawn and used, by task."""
    counts: dict[str, dict[str, Any]] = {}
    for file in files:
        for line in read_lines(file):
            one = counts.setdefault(line["task"], {"drawn": 0, "used": 0})
            one["drawn"] += 1
            one["used"] += bool(line["cases"])
    return counts
