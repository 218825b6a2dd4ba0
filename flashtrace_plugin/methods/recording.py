"""One text, run once: any number of targets, methods and graphs on one recorded forward pass."""

from __future__ import annotations

import threading
from copy import copy
from typing import TYPE_CHECKING

from flashtrace_plugin.attribution import Attribution
from flashtrace_plugin.errors import InputError
from flashtrace_plugin.methods.passes import KeptPasses
from flashtrace_plugin.text import TokenizedText, Where

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashtrace_plugin.graph.hops import GraphOptions
    from flashtrace_plugin.graph.result import Graph
    from flashtrace_plugin.methods.base import Method

_KEPT_BYTES = 4 << 30
"""Bytes that a recording may keep."""


class Recording:
    """A text on which a method explains one target after another; made by :meth:`Method.record`::

        recording = FlashTrace(model, tokenizer).record(prompt, generation)
        recording.attribute(target="84")                               # one forward pass, and one per hop
        recording.attribute(target="in the garden")                    # hops only
        recording.using(ALTI(model, tokenizer)).attribute(target="84") # the same pass, unless it needs other positions

    The numbers are those of :meth:`Method.attribute` up to rounding. The pass is run when it is first needed. LRP and
    the recommended setting keep their linearised pass, and what it told of targets seen before; what a method runs
    beside such passes (HETA's derivatives) is run for every target.

    method: that explains
    text:   tokenized

    Calls from several threads wait for each other. A model whose weights, hooks or kernels have changed since is
    refused; what a hook does is not watched, so drop the recording where one does something else than before.
    """

    def __init__(
        self, method: Method, text: TokenizedText, *, max_bytes: int = _KEPT_BYTES, passes: KeptPasses | None = None
    ) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 0:
            raise InputError(f"max_bytes must be a whole number of bytes >= 0, got {max_bytes!r}")
        self.text = text
        # The position before the generation predicts its first token.
        self._passes = KeptPasses(text.prompt_length - 1, max_bytes) if passes is None else passes
        self._lock = threading.RLock()
        self.method = copy(method)
        self.method.passes = self._passes

    @property
    def passes(self) -> int:
        """Forward passes that were run so far; more than one where positions or rules came that were not recorded."""
        return self._passes.count

    @property
    def pass_seconds(self) -> float:
        """Seconds that they took."""
        return self._passes.seconds

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, at most ``max_bytes``."""
        return self._passes.nbytes

    def attribute(self, *, target: Where | None = None, reasoning: Where | None = None) -> Attribution:
        """:meth:`Method.attribute` of this text; raises InputError also for a model that has changed since."""
        with self._lock:
            self._passes.check_model(self.method.source.language_model)
            return self.method.attribute_text(self.text, target=target, reasoning=reasoning)

    def graph(self, **options: Unpack[GraphOptions]) -> Graph:
        """:meth:`Method.graph` of this text, on the same pass."""
        with self._lock:
            self._passes.check_model(self.method.source.language_model)
            return self.method.graph_text(self.text, **options)

    def using(self, method: Method) -> Recording:
        """The same text and passes for another method. Raises InputError for one of another model."""
        if method.source.language_model is not self.method.source.language_model:
            raise InputError("the method explains another model than the one recorded; make a recording of that model")
        other = Recording(method, self.text, passes=self._passes)
        other._lock = self._lock
        return other

    def drop(self) -> None:
        """Forgets what was recorded; the next target runs the model again."""
        with self._lock:
            self._passes.drop()

    def __repr__(self) -> str:
        return f"Recording({self.method.name}, {len(self.text.input_ids)} tokens, {self.passes} passes)"
