"""One job at a time, in a thread of its own; the others wait, and are told how many are before them."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from flashtrace_plugin.errors import FlashTraceError

Event = dict[str, Any]
"""What the page is told: ``{"event": …}`` with the parts that belong to it."""


class _Cancelled(BaseException):
    """The page that asked has gone; no error, so that nothing takes it for one."""


class Job:
    """What a page asked for, and what it is told meanwhile."""

    def __init__(self, work: Callable[[Job], None], loop: asyncio.AbstractEventLoop) -> None:
        self.work, self._loop = work, loop
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.cancelled = threading.Event()
        self.future: Future[None] | None = None

    def tell(self, event: str, **parts: Any) -> None:
        """Sends an event to the page, from any thread."""
        self._put({"event": event, **parts})

    def end(self) -> None:
        """No more events will come."""
        self._put(None)

    def check(self) -> None:
        """Ends the job where the page has gone."""
        if self.cancelled.is_set():
            raise _Cancelled

    def _put(self, event: Event | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Jobs:
    """The queue.

    most: jobs that may wait; more are refused
    """

    def __init__(self, most: int = 32) -> None:
        self.most = most
        self._open: list[Job] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flashtrace-job")

    async def run(self, work: Callable[[Job], None]) -> AsyncIterator[Event]:
        """Queues a job and gives its events; whoever stops listening cancels it."""
        job = Job(work, asyncio.get_running_loop())
        if len(self._open) > self.most:
            yield {"event": "error", "message": f"{self.most} jobs are waiting already; try again later"}
            return
        self._open.append(job)
        job.future = self._thread.submit(_work, job)
        job.future.add_done_callback(partial(self._done, job))
        try:
            self._tell_all()
            while (event := await job.events.get()) is not None:
                yield event
        finally:
            self._cancel(job)

    def stop(self) -> None:
        """Cancels all jobs; one that runs ends as soon as it looks."""
        for job in list(self._open):
            self._cancel(job)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _cancel(self, job: Job) -> None:
        job.cancelled.set()
        if job.future is not None:
            job.future.cancel()

    def _done(self, job: Job, future: Future[None]) -> None:
        """Ends a job that has run, failed or never began. What failed is told; the next job begins as always."""
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, _Cancelled):
            job.tell("error", message=_message(error))
        self._open.remove(job)
        self._tell_all()
        job.end()

    def _tell_all(self) -> None:
        for ahead, job in enumerate(list(self._open)):
            if ahead:
                job.tell("queue", ahead=ahead)


def _work(job: Job) -> None:
    job.check()
    job.tell("started")
    job.work(job)


def _message(error: BaseException) -> str:
    """What the page is told of an error; one that nobody foresaw is also printed."""
    if isinstance(error, FlashTraceError):
        return str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error):
        traceback.clear_frames(error.__traceback__)  # they hold what filled it
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        told = " ".join(str(error).split())[:200] or "none is left"
        return f"there is not enough memory for this ({told}); try a shorter text, or a method such as flashtrace"
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}. This is a defect; the terminal shows where"
