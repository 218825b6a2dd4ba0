"""What a command does right now, on a terminal; nothing where stderr is piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_Tell = Callable[[str], None]


@contextmanager
def telling() -> Iterator[_Tell]:
    """Gives a function that says what is being done; the line counts the seconds, and is gone at the end."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as line:
        task = line.add_task("Starting", total=None)
        yield lambda what: line.update(task, description=what)


class TokenCount:
    """What transformers calls a streamer: tells how many tokens the model has written."""

    def __init__(self, tell: _Tell, most: int) -> None:
        self.tell, self.most, self.written = tell, most, -1  # the first call brings the prompt

    def put(self, ids: Any) -> None:
        """One more token."""
        self.written += 1
        self.tell(f"The model writes: {self.written} of at most {self.most} tokens")

    def end(self) -> None:
        """Nothing is left to tell."""
