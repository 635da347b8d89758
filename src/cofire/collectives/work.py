"""Operations of one group in the order in which they were issued, and the handles that a program waits on.

PyTorch's contract: all ranks issue the operations of a group in one order, and who has a handle of an asynchronous
operation leaves its tensors alone until ``wait``. An :class:`OperationQueue` keeps more than that: the operations of a
group also run in that order, one at a time, so that two of them in flight may name the same tensor. An operation whose
caller waits at once, with nothing before it, runs on the caller's thread, since waking another costs more than a small
sum. Left out: priorities, and operations of one group side by side.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Work
from torch.futures import Future

from cofire.errors import CollectiveError


class HFReduceWork(Work):
    """The handle of one operation."""

    def __init__(self, run: Callable[[], None], tensors: Sequence[torch.Tensor], abort: Callable[[str], None]) -> None:
        """Make the handle of an operation that has not run.

        Args:
            run: The operation; blocks, and raises if it fails.
            tensors: Its outputs, which the future's value is.
            abort: Breaks the group with a message, where somebody no longer waits.
        """
        super().__init__()
        self._run: Callable[[], None] | None = run
        self._tensors, self._abort = list(tensors), abort
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._completed = False
        self._future: Future[list[torch.Tensor]] | None = None

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The output tensors, whether the operation has ended or not."""
        return self._tensors

    def run(self) -> None:
        """Run the operation and keep its error; :meth:`finish` tells those who wait."""
        run, self._run = self._run, None
        try:
            if run is not None:
                run()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Tell those who wait that the operation has ended."""
        with self._changed:
            self._completed = True
            future = self._future
            self._changed.notify_all()
        if future is not None:
            # On a thread of its own: a callback may issue operations of this group and wait for them, as PowerSGD's
            # does, and the queue's thread is the one that would run them.
            threading.Thread(target=self._complete, args=(future,), name="hfreduce-callback", daemon=True).start()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for the operation to end.

        Args:
            timeout: None or zero: as long as the group's own timeout lets the operation take.

        Raises:
            CollectiveError: The engine's error, unchanged; or ``timeout`` passed, which breaks the group.
        """
        limit_s = timeout.total_seconds() if timeout else None
        with self._changed:
            ended = self._changed.wait_for(lambda: self._completed, limit_s if limit_s and limit_s > 0 else None)
        if not ended:
            message = f"an operation took more than the {limit_s:g} s that wait() was given; give it more"
            self._abort(message)
            raise CollectiveError(message)
        if self._error is not None:
            raise self._error
        return True

    def get_future(self) -> Future[list[torch.Tensor]]:
        """Return a future of the output tensors; its callbacks may issue operations and wait for them."""
        with self._changed:
            if self._future is not None:
                return self._outcome
            devices = {tensor.device for tensor in self._tensors if tensor.device.type != "cpu"}
            future = self._future = Future(devices=list(devices))
            # An exception that Python sets is a mere value for C++ code, which takes it for tensors: DDP's reducer
            # would crash. One that a callback raises is an error for both.
            self._outcome: Future[list[torch.Tensor]] = future.then(self._outputs)
            completed = self._completed
        if completed:
            self._complete(future)
        return self._outcome

    def is_completed(self) -> bool:
        """Return whether the operation has ended, well or not."""
        return self._completed

    def is_success(self) -> bool:
        """Return whether it ended without an error."""
        return self._completed and self._error is None

    def exception(self) -> BaseException | None:
        """Return the error that it ended with."""
        return self._error if self._completed else None

    def result(self) -> list[torch.Tensor]:
        """Return the output tensors.

        Raises:
            CollectiveError: The operation is under way.
        """
        if not self._completed:
            raise CollectiveError("an operation under way has no result; call wait() first")
        return list(self._tensors)

    def synchronize(self) -> None:
        """Wait: what runs after this sees the result."""
        self.wait()

    def _outputs(self, _: Future[list[torch.Tensor]]) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._tensors

    def _complete(self, future: Future[list[torch.Tensor]]) -> None:
        future.set_result(self._tensors if self._error is None else [])


class OperationQueue:
    """Runs the operations of one group one after the other, here or on a thread of its own."""

    def __init__(self, name: str, abort: Callable[[str], None]) -> None:
        """Make a queue; its thread starts with the first asynchronous operation.

        Args:
            name: Of the thread.
            abort: Makes the operation that runs, and each later one, raise with a message.
        """
        self._name, self._abort_engine = name, abort
        self._changed = threading.Condition()
        self._waiting: deque[HFReduceWork] = deque()
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None
        self.failure: str | None = None

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is an operation that runs on the queue's thread."""
        return threading.current_thread() is self._thread

    def submit(self, run: Callable[[], None], tensors: Sequence[torch.Tensor], asynchronous: bool) -> HFReduceWork:
        """Issue an operation.

        Args:
            run: What to do; blocks.
            tensors: Its outputs.
            asynchronous: Return at once. If not, and nothing is before it, it has ended when this returns.

        Raises:
            CollectiveError: The group was destroyed.
        """
        work = HFReduceWork(run, tensors, self.abort)
        with self._changed:
            if self._closed:
                raise CollectiveError("this group was destroyed; make a new one")
            runs_here = not asynchronous and not self._busy and not self._waiting
            self._busy = self._busy or runs_here
            if not runs_here:
                self._waiting.append(work)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        if runs_here:
            self._execute(work)
        return work

    def abort(self, message: str) -> None:
        """Make the operation that runs raise, and each later one."""
        self.failure = self.failure or message
        self._abort_engine(message)

    def close(self, patience_s: float) -> None:
        """Take no more operations, and end the thread.

        Args:
            patience_s: How long operations in flight may still take; after that the group is aborted.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self.is_own_thread:
                return
            drained = self._changed.wait_for(lambda: not self._busy and not self._waiting, patience_s)
        if not drained:
            self.abort("the group was destroyed with operations in flight")
        if self._thread is not None:
            self._thread.join(patience_s)

    def _execute(self, work: HFReduceWork) -> None:
        work.run()
        # Idle first: who wakes up may issue the next operation, which is then run on its own thread.
        with self._changed:
            self._busy = False
            self._changed.notify_all()
        work.finish()

    def _take(self) -> HFReduceWork:
        """Return the next operation; only the queue's thread takes any."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            self._busy = True
            return self._waiting.popleft()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._busy and bool(self._waiting or self._closed))
                if not self._waiting:
                    return
            work = self._take()
            self._execute(work)
            # Not until the next operation: its tensors may be large.
            del work
