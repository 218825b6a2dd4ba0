"""Recursion for any base: a method, or a matrix with a row of importance for every generated token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Union

import torch
from torch import Tensor

from flashtrace_plugin.core.flow.layer import Layer
from flashtrace_plugin.core.recursion import Rows
from flashtrace_plugin.errors import InputError, UnsupportedModelError
from flashtrace_plugin.images import ImageTokens
from flashtrace_plugin.methods.base import Method
from flashtrace_plugin.methods.ifr import ROW_COST
from flashtrace_plugin.methods.options import Driving, Hops, driven, one_of
from flashtrace_plugin.methods.task import Task
from flashtrace_plugin.models.guard import evaluating
from flashtrace_plugin.models.read.source import Source

Base = Union[Method, Tensor]

_GRADIENT_COST = 2.5
"""Forward passes that one gradient takes."""


class RecursiveAttribution(Method):
    """The exhaustive token-level recursion (FlashTrace, App. D.3): every token of reasoning and target by itself.

    Its matrix of one row per token is exact where FlashTrace aggregates, and costs |reasoning| + |target| times more.
    """

    name = "recursive"
    reads_images = True
    cost_of = "a flow for every token of the reasoning and the target; the method flashtrace takes one for each hop"

    def cost(self, task: Task) -> float:
        """One forward pass, and a part of one for every row; hops are products with the matrix."""
        return 1 + ROW_COST * len(task.rows)

    def recorded(self, task: Task) -> Tensor:
        """The positions that may carry weight."""
        return task.rows

    def start(self, task: Task) -> Rows:
        """One forward pass and one hop for every row."""
        rows = task.rows
        each = task.record(rows).each(rows)
        return Rows(rows, each.alpha, each.mixed)


def Recursive(
    base: Any,
    tokenizer: Any = None,
    *,
    hops: Hops = "auto",
    recursion: str = "reasoning",
    mass: str = "absolute",
    **driving: Any,
) -> Method:
    """The recursive form of a base: importance on the reasoning is passed on to what the reasoning rests on.

    base:      a method of this package, with or without hops of its own; or a matrix [N, N] or [M, N] whose rows say
               what every one of the (last M) tokens rests on, such as Inseq or Captum gives for saliency, attention or
               occlusion. Row i may score positions up to i; NaN counts as 0
    tokenizer: only for a matrix: lets spans be found, and names tokens
    hops:      how many; "auto"; or infinity, all at once by a triangular solve, which needs a matrix
    recursion: "reasoning", "generation" or "prompt", as for FlashTrace
    mass:      of a matrix: importance is the "absolute" value of a score, or its "positive" part
    driving:   ``ignore`` and ``format``, as for FlashTrace

    result: a method: ``Recursive(matrix).attribute_ids(ids, prompt_length=…, target=…, reasoning=…)``

    Raises InputError for a matrix that is not lower triangular, and when it is asked about tokens whose row is empty.
    """
    if isinstance(base, Method):
        return _with_hops(base, hops=hops, recursion=recursion, **driving)
    return _Matrix(base, tokenizer, mass, hops=hops, recursion=recursion, **driving)


class RecursiveRows(Method):
    """Recursion over rows of importance that something else computes token by token, such as another library.

    rows:  ``rows(input_ids [N], positions [r])`` gives [r, N], what the tokens at these positions rest on; it is asked
           only for those that the recursion needs
    mass:  as for :func:`Recursive`
    noted: further settings for the record

    Raises InputError for rows of another shape, and for scores that are not finite.
    """

    name = "recursive"
    drives = driven(hops="auto", recursion="reasoning", ignore=())
    cost_of = "a run of the base for every token of the reasoning and the target"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: Callable[[Tensor, Tensor], Tensor],
        *,
        mass: str = "absolute",
        noted: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.rows, self.mass, self.noted = rows, one_of("mass", mass, ("absolute", "positive")), dict(noted or {})

    def settings(self) -> dict[str, Any]:
        """The options and what else is to be noted."""
        return super().settings() | {"mass": self.mass} | self.noted

    def cost(self, task: Task) -> float:
        """A pass forward and back for every row: what a base takes for one is not known here, and gradients this."""
        return _GRADIENT_COST * len(task.rows)

    def start(self, task: Task) -> Rows:
        """Every row once, then hops over the matrix."""
        with evaluating(self.source.language_model):  # the base runs the user's model itself
            found = self.rows(task.input_ids[0], task.rows).detach().float().cpu()
        if found.shape != (len(task.rows), task.length):
            raise InputError(
                f"the base gave scores {list(found.shape)} for {len(task.rows)} rows over {task.length} tokens; it "
                "must give one number for each pair"
            )
        _check_finite(found, task)
        matrix = found.new_zeros(task.length, task.length).index_copy(0, task.rows, found)
        return _Matrix(matrix, None, self.mass).start(task)


def _check_finite(rows: Tensor, task: Task) -> None:
    bad = (~rows.isfinite()).any(1).nonzero()[:, 0]
    if len(bad):
        raise InputError(
            f"the base's scores of token {int(task.rows[bad[0]])} are not finite; half precision may overflow: use "
            "bfloat16 or float32"
        )


def _with_hops(base: Method, **driving: Any) -> Method:
    """The same method, driven with hops even if it declares none."""
    method = copy(base)
    taken = {name: getattr(base.driving, name) for name in base.drives}
    method.drives = taken | driving  # type: ignore[misc]
    method.driving = Driving(**method.drives)
    return method


class _Matrix(Method):
    """A matrix as a method: its rows are all there is to run."""

    name = "matrix"
    drives = driven(hops="auto", recursion="reasoning", ignore=())

    def __init__(self, matrix: Any, tokenizer: Any, mass: str, **options: Any) -> None:
        self.matrix = _lower_triangular(torch.as_tensor(matrix).detach().float().cpu())
        one_of("mass", mass, ("absolute", "positive"))
        self.matrix = self.matrix.abs() if mass == "absolute" else self.matrix.clamp(min=0)
        self.options, self.driving = self.Options(), Driving(**(dict(self.drives) | options))
        self._hops_asked = "hops" in options
        self.source, self.tokenizer = _MatrixSource(self.matrix.shape[1]), tokenizer

    def cost(self, task: Task) -> float:
        """No model is run."""
        return 0.0

    def start(self, task: Task) -> Rows:
        """The rows of the tokens that may carry weight."""
        rows = task.rows
        first = task.length - len(self.matrix)
        missing = rows[rows < first]
        chosen = self.matrix[(rows - first).clamp(min=0)]
        empty = rows[(chosen.sum(1) == 0) & (rows >= first)]
        if len(missing) or len(empty):
            token = int(torch.cat([missing, empty])[0])
            raise InputError(
                f"the matrix has no importance in the row of token {token}, which the recursion needs; give rows for "
                f"all of the reasoning {task.reasoning} and the target {task.target}, over the tokens before them"
            )
        return Rows(rows, chosen)


class _MatrixSource:
    """Stands where a model would: knows how long its sequence is."""

    tokenizer = language_model = None

    def __init__(self, length: int) -> None:
        self.length = length

    def check_ids(self, input_ids: Tensor) -> Tensor:
        """The ids as [1, N]. Raises InputError for another number of them than the matrix has columns."""
        ids = input_ids.reshape(1, -1)
        if ids.shape[1] != self.length:
            raise InputError(f"the matrix has {self.length} columns for {ids.shape[1]} tokens; give one for each")
        return ids

    def layers(self, input_ids: Tensor, rows: Tensor) -> list[Layer]:
        raise UnsupportedModelError("a matrix has no layers")

    def layers_together(self, texts: Sequence[Tensor], rows: Sequence[Tensor]) -> list[list[Layer]]:
        raise UnsupportedModelError("a matrix has no layers")

    def given(self, input_ids: Tensor, prompt_length: int, inputs: Mapping[str, Any]) -> Source:
        raise UnsupportedModelError("a matrix is given no images")

    def images(self, input_ids: Tensor) -> tuple[ImageTokens, ...]:
        return ()

    def describe(self) -> dict[str, Any]:
        return {"source": "matrix"}

    def configs(self) -> list[Any]:
        return []

    def whole_text(self) -> bool:
        return False

    def runner(self, input_ids: Tensor) -> Any:
        raise UnsupportedModelError("a matrix cannot be differentiated")


def _lower_triangular(matrix: Tensor) -> Tensor:
    """The matrix with 0 for NaN. Raises InputError unless it is [M, N] and nothing lies behind its diagonal."""
    if matrix.dim() != 2 or not 0 < matrix.shape[0] <= matrix.shape[1]:
        raise InputError(
            f"a base must be a method, or a matrix [N, N] or [M, N] with a row for each of the last M tokens, got "
            f"{list(matrix.shape)}"
        )
    matrix = matrix.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if not bool(matrix.isfinite().all()):
        raise InputError("the matrix holds infinity; scores must be finite, were they computed in half precision?")
    late = matrix.triu(matrix.shape[1] - matrix.shape[0] + 1).nonzero()
    if len(late):
        row, column = (int(i) for i in late[0])
        token = row + matrix.shape[1] - matrix.shape[0]
        raise InputError(
            f"the matrix is not lower triangular: row {row}, of token {token}, scores position {column} behind it. "
            "Rows are the tokens explained, columns what they rest on; was it transposed?"
        )
    return matrix
