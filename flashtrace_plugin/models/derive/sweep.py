"""One forward pass cut at the blocks, and backward sweeps over the pieces, from the top block to the embeddings.

A block's graph is kept while it fits the memory budget. The other blocks run without a graph, and every sweep runs
them again, one at a time, from what entered them: O(N d) per block. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashtrace_plugin.core.relevance.attention import Store
from flashtrace_plugin.core.relevance.rules import Rules


@dataclass
class Run:
    """One block's run: ``entry`` (its input where it came from), ``x`` (the same, as a leaf), ``y`` and ``out``.

    y: its result with the graph, or None: to be run again. out: the result as the leaf that later pieces start from.
    attention: results of fused attention, which need not be computed again
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entry: Tensor
    x: Tensor
    y: Tensor | None = None
    out: Tensor | None = None
    attention: list[Tensor] = field(default_factory=list)

    def again(self, rules: Rules) -> Tensor:
        """Runs the block once more, with a graph; its own hooks did their part around it, and it is in ``x``."""
        args, kwargs = _with_hidden(self.args, self.kwargs, self.x.view_as(self.x))
        rules.known = iter(self.attention)
        with rules:
            y = _hidden(self.block.forward(*args, **kwargs))
        rules.known = iter(())
        return y


class Sweep:
    """Watches the blocks of a view of a model during forward passes.

    blocks: in any order; a block may be called more than once
    rules:  the mode under which the model runs
    budget: bytes that the graphs of the blocks may take
    """

    def __init__(self, blocks: Sequence[nn.Module], rules: Rules, budget: float) -> None:
        self.blocks, self.rules, self.budget = blocks, rules, budget
        self.runs: list[Run] = []
        self.kept = 0.0
        self._sizes: dict[Any, int] = {}
        self._outs, self._attention = Store(len(blocks)), Store(len(blocks))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The hooks are gone on leaving, since a second sweep may watch the same blocks."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._leave, prepend=True).remove)
            yield

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch._C.DisableTorchFunction():
            entry = args[0] if args else kwargs["hidden_states"]
            x = entry.detach().requires_grad_()
            self.runs.append(Run(block, args, kwargs, entry, x))
            keeps = self._keeps(block)
            torch.set_grad_enabled(keeps)
            self.rules.note = None if keeps else self._note
            return _with_hidden(args, kwargs, x.view_as(x) if keeps else entry.detach())

    def _keeps(self, block: nn.Module) -> bool:
        return self.kept + self._sizes.get(_kind(block), 0) < self.budget

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        with torch._C.DisableTorchFunction():
            run, y = self.runs[-1], _hidden(output)
            if torch.is_grad_enabled():
                run.y = y
                self.kept += self._size(block, y)
            torch.set_grad_enabled(True)
            self.rules.note = None
            run.out = (self._outs.put(y) if run.y is None else y.detach()).requires_grad_()
            out = run.out.view_as(run.out)
            return out if isinstance(output, Tensor) else type(output)((out, *output[1:]))

    def _note(self, attention: Tensor) -> None:
        self.runs[-1].attention.append(self._attention.put(attention))

    def _size(self, block: nn.Module, y: Tensor) -> int:
        kind = _kind(block)
        if kind not in self._sizes:
            self._sizes[kind] = saved_bytes(y, {p.untyped_storage().data_ptr() for p in block.parameters()})
        return self._sizes[kind]

    def backward(
        self, top: Tensor, cotangent: Tensor, sources: Sequence[Tensor], see: Callable[[int, Tensor, Tensor], None]
    ) -> Gradients:
        """Gradients at the sources, for one cotangent at ``top``; ``see(run, x, gradient)`` is told of every block."""
        gradients = Gradients({})
        gradients.push(top, cotangent, [*sources, *self._leaves(len(self.runs))], retain=True)
        for i in reversed(range(len(self.runs))):
            run = self.runs[i]
            grad = gradients.pop(run.out)
            if grad is None:
                continue
            before = len(self.rules.positions)
            y = run.y if run.y is not None else run.again(self.rules)
            new = self.rules.positions[before:]
            leaves = [*sources, *new, *self._leaves(i)]
            gradients.push(y, grad, [run.x, *leaves], retain=run.y is not None)
            del y, grad
            grad = gradients.pop(run.x)
            if grad is not None:
                see(i, run.x, grad)
                gradients.push(run.entry, grad, leaves, retain=True)
        return gradients

    def _leaves(self, stop: int) -> list[Tensor]:
        """What the pieces before block ``stop`` start from."""
        return [leaf for run in self.runs[:stop] for leaf in (run.x, run.out) if leaf is not None]


class Gradients:
    """Gradients by leaf, added up as the pieces of a graph give them."""

    def __init__(self, found: dict[int, Tensor]) -> None:
        self._found = found

    def push(self, output: Tensor, cotangent: Tensor, leaves: list[Tensor], *, retain: bool) -> None:
        """One piece: from ``output`` back to the leaves that it depends on."""
        if not output.requires_grad:
            return
        grads = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), retain_graph=retain, allow_unused=True)
        for leaf, grad in zip(leaves, grads):
            if grad is not None:
                self._found[id(leaf)] = self._found[id(leaf)] + grad if leaf in self else grad

    def __contains__(self, leaf: Tensor) -> bool:
        return id(leaf) in self._found

    def __getitem__(self, leaf: Tensor) -> Tensor:
        return self._found[id(leaf)]

    def pop(self, leaf: Tensor | None) -> Tensor | None:
        return self._found.pop(id(leaf), None)


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[Any, dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _kind(block: nn.Module) -> Any:
    """Blocks of one kind have graphs of one size."""
    return type(block), sum(p.numel() for p in block.parameters())


def saved_bytes(y: Tensor, known: set[int]) -> int:
    """Bytes that the graph of ``y`` keeps for its backward pass, less the storages in ``known`` (parameters)."""
    sizes: dict[int, int] = {}
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        todo += [edge[0] for edge in node.next_functions]
    return sum(size for pointer, size in sizes.items() if pointer not in known)


def _saved(node: Any) -> list[Tensor]:
    names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
    values = [getattr(node, name) for name in names]
    flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
    return [v for v in flat if isinstance(v, Tensor)]
