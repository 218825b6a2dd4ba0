"""Work cut into batches that become smaller when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batches:
    """Runs items in batches, halves the batch when memory runs out, and counts what was done.

    size:   most items at once
    tick:   called with the number of items that each batch finished
    shrunk: called with the number of items tried when memory ran out, before the next try; here one may warn and free
    done:   items finished so far
    halved: how often memory ran out
    """

    size: int
    tick: Callable[[int], object] | None = None
    shrunk: Callable[[int], object] | None = None
    done: int = 0
    halved: int = 0

    def run(self, work: Callable[[slice], Tensor], count: int) -> Tensor:
        """``work(part)`` for consecutive parts of ``count`` items, concatenated. Raises what the work raises."""
        results, begin = [], 0
        while begin < count:
            part = slice(begin, min(begin + self.size, count))
            result = self._try(work, part)
            if result is None:
                self._halve(part.stop - part.start)
                continue
            results.append(result)
            begin = part.stop
            self._count(part.stop - part.start)
        return torch.cat(results)

    def _try(self, work: Callable[[slice], Tensor], part: slice) -> Tensor | None:
        """None when memory ran out; the failed batch is released before the next is tried."""
        try:
            return work(part)
        except RuntimeError as error:
            if not out_of_memory(error) or part.stop - part.start == 1:
                raise
            return None

    def _halve(self, tried: int) -> None:
        self.size, self.halved = tried // 2, self.halved + 1
        if self.shrunk is not None:
            self.shrunk(tried)

    def _count(self, items: int) -> None:
        self.done += items
        if self.tick is not None:
            self.tick(items)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is an accelerator's or the CPU allocator's refusal."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
