"""The thread that owns the base: it runs the steps of one batch, which requests of all connections join and leave.

The event loop puts work into an inbox and gets tokens by callbacks. Neither waits for the other.
"""

import asyncio
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from softprompt.generation.running_batch import BatchGenerator, RunningBatch
from softprompt.generation.sampling import RequestState
from softprompt.serving.answer import Answer, Reply

Call = Callable[[], None]


class ModelThread(threading.Thread):
    """Runs decoding steps while there are requests, and other calls of the model between them.

    Args:
        generator: Answers the requests.
        batch_size: Maximum number of answers that are generated at a time.
        loop: The event loop. Its thread calls all methods except `run`, and receives the tokens.
    """

    def __init__(self, generator: BatchGenerator, batch_size: int, loop: asyncio.AbstractEventLoop):
        super().__init__(name="model", daemon=True)
        self.generator, self.batch_size, self.loop = generator, batch_size, loop
        self.batch: RunningBatch = generator.new_batch(batch_size)
        self.steps = 0
        self._inbox: queue.SimpleQueue[Reply | Call | None] = queue.SimpleQueue()
        self._calls = deque[Call]()
        self._answers: dict[RequestState, Answer] = {}
        self._leader: RequestState | None = None  # its next token shows that a decoding step is over; see `_on_token`
        self._events = deque[Call]()  # callbacks that the event loop is to run
        self._scheduled = False

    def submit(self, reply: Reply) -> None:
        """Let the requests of a reply join the batch at its next step."""
        self._inbox.put(reply)

    def call(self, function: Callable[[], Any]) -> "asyncio.Future[Any]":
        """Call a function that uses the model between two decoding steps; return a future of its result or
        exception."""
        future = self.loop.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                result = function()
            except Exception as error:
                self._post(lambda error=error: future.cancelled() or future.set_exception(error))
            else:
                self._post(lambda: future.cancelled() or future.set_result(result))

        self._inbox.put(run)
        return future

    def stop(self) -> None:
        """End the thread after its current step."""
        self._inbox.put(None)

    def run(self) -> None:
        """Run until `stop` is called."""
        while self._take_work():
            if self._calls:
                self._calls.popleft()()
            if not self.batch:
                continue
            self._leader = None
            try:
                self.batch.step(self._on_token)
                self.steps += 1
            except Exception as error:
                self._fail_all(error)
            self._report_finished()

    def _take_work(self) -> bool:
        """Take what is in the inbox; wait if there is nothing else to do. Return whether to go on."""
        idle = not self.batch and not self._calls
        while True:
            try:
                work = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if work is None:
                return False
            if isinstance(work, Reply):
                self._join(work)
            else:
                self._calls.append(work)

    def _join(self, reply: Reply) -> None:
        answers = [answer for answer in reply.answers if not answer.canceled]
        try:
            states = self.batch.add([answer.request for answer in answers])
        except Exception as error:
            for answer in answers:
                self._post(answer.fail, error)
            return
        for answer, state in zip(answers, states, strict=True):
            self._answers[state] = answer
            answer.state = state
            if answer.canceled:  # between the check above and now
                state.cancel()

    def _on_token(self, state: RequestState, token: int) -> None:
        answer = self._answers[state]
        self._post(answer.add, token, state.logprobs[-1] if state.logprobs else None)
        if state.finish_reason:
            self._finish(state)
        # With transformers' `generate`, one step generates whole answers. When an answer gets its next token, the
        # decoding step before it is over; report the answers that ended in it.
        if state is self._leader:
            self._report_finished()
        elif self._leader is None or self._leader.finished:
            self._leader = state

    def _report_finished(self) -> None:
        """Tell the event loop which answers have ended, and forget them and those that were canceled."""
        for state in [state for state in self._answers if state.finished]:
            self._finish(state)

    def _finish(self, state: RequestState) -> None:
        answer = self._answers.pop(state)
        if state.finish_reason:
            self._post(answer.end, state.finish_reason)

    def _fail_all(self, error: Exception) -> None:
        """Fail all requests and continue with an empty batch, since any of the requests, or the device, may be the
        cause."""
        traceback.print_exception(error, file=sys.stderr)
        traceback.clear_frames(error.__traceback__)  # the frames hold tensors, and memory may have run out
        for answer in self._answers.values():
            self._post(answer.fail, error)
        self._answers.clear()
        self.batch = self.generator.new_batch(self.batch_size)

    def _post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Let the event loop call a function. Functions are collected, so that one wake-up serves many of them."""
        self._events.append(lambda: function(*arguments))
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon_threadsafe(self._run_events)

    def _run_events(self) -> None:
        self._scheduled = False
        while self._events:
            self._events.popleft()()
