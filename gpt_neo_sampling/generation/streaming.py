"""New tokens as text while they are drawn: whole characters, stop strings, and a way to end early."""

import concurrent.futures
import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._threads import call_in_thread
from gpt_neo_sampling._types import Streamer, Tokenizer
from gpt_neo_sampling.checkpoint.tokenizer import decoded

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an incomplete character to


class IncrementalDetokenizer:
    """The text of one continuation, token by token.

    Each token is decoded after only a few earlier ones, so its cost does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        """prompt: a list of ids. New tokens are decoded after its last ones, as a character may begin in it."""
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._ids = list(prompt[-8:])  # a few tokens of context, then those whose text is still to come
        self._n_context = len(self._ids)
        self._held = ""  # decoded but not returned yet, as a stop string may begin in it
        self.stopped = False  # a stop string was reached; no text follows

    def push(self, token: int, is_last: bool = False) -> str:
        """The text that this token completes: whole characters, and no part of a stop string."""
        self._ids.append(token)
        context, text = (decoded(self._tokenizer, ids) for ids in (self._ids[: self._n_context], self._ids))
        # a character that the prompt leaves incomplete counts as new
        old = context if text.startswith(context) else context.rstrip(REPLACEMENT)
        new = ""
        if text == context and not text.endswith(REPLACEMENT):  # a special token
            self._ids.pop()
        elif len(text) > len(old) and (is_last or not text.endswith(REPLACEMENT)):
            new = text[len(old) :]
            if old == context:  # the new tokens begin a character
                del self._ids[: self._n_context]
            self._n_context = len(self._ids)
        self._held += new
        ends = [at for at in (self._held.find(s) for s in self._stop_strings) if at >= 0]
        if ends:
            self.stopped = True
            completed, self._held = self._held[: min(ends)], ""
            return completed
        n_held = 0 if is_last else max((_overlap(self._held, s) for s in self._stop_strings), default=0)
        cut = len(self._held) - n_held
        completed, self._held = self._held[:cut], self._held[cut:]
        return completed


def _overlap(text: str, stop_string: str) -> int:
    """How many of the text's last characters could begin the stop string."""
    longest = min(len(text), len(stop_string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop_string[:n])), 0)


class Watcher:
    """Receives each token of a batch as it is drawn, and decides which rows are done.

    Belongs to one run of a graph. TensorFlow's threads call it; the thread that called `run` calls `on_token`.
    """

    def __init__(
        self,
        rows: Sequence[tuple[IncrementalDetokenizer | None, int, Sequence[int]]],
        on_token: Streamer | None = None,
        n_drawn: np.ndarray | None = None,
        pause_at: int | None = None,
    ) -> None:
        """
        Args:
          rows: list of (IncrementalDetokenizer or None, the most new tokens, stop tokens).
          on_token: a function of (row, token, text, is_last), with None for text if the row has no detokenizer.
          n_drawn: int ndarray [rows], how many new tokens each row has before the run; None for none.
          pause_at: the number of rows that are done at which the run ends, though others are not.
        """
        self._rows = rows
        self._on_token = on_token
        self._pause_at = pause_at
        self.n_drawn = np.zeros(len(rows), int) if n_drawn is None else n_drawn.copy()  # new tokens of each row
        self._events: queue.SimpleQueue[tuple[int, int, str | None, bool] | None] = queue.SimpleQueue()
        self._cancelled = False
        self._error: BaseException | None = None  # raised while watching
        self.finished = np.zeros(len(rows), bool)  # rows whose last token was drawn
        self.invalid = np.zeros(len(rows), bool)  # rows that had no distribution to draw from
        self.interrupted = False  # by Ctrl-C

    def __call__(self, tokens: np.ndarray, n_drawn: np.ndarray) -> np.ndarray:
        """Takes a step's tokens [batch] and how many each row has drawn; returns float32 [batch], 1.0 for a row that
        gets no more in this run. Rows beyond those of the request only fill the batch."""
        done = np.zeros(len(tokens), np.float32)
        if not self._cancelled:
            try:
                for row in np.flatnonzero(n_drawn[: len(self._rows)] > self.n_drawn).tolist():
                    done[row] = self._push(row, int(tokens[row]))
            except BaseException as e:  # TensorFlow would turn it into an error of its own
                self._error = e
                self._cancelled = True
        n_done = np.count_nonzero(self.finished | self.invalid)
        is_paused = self._pause_at is not None and n_done >= self._pause_at
        return np.ones_like(done) if self._cancelled or is_paused else done

    def _push(self, row: int, token: int) -> bool:
        detokenizer, limit, stop_tokens = self._rows[row]
        self.n_drawn[row] += 1
        if token < 0:
            self.invalid[row] = True
            return True
        text, is_last = None, bool(self.n_drawn[row] == limit or token in stop_tokens)
        if detokenizer is not None:
            text = detokenizer.push(token, is_last)
            is_last = is_last or detokenizer.stopped
        if self._on_token is not None:
            self._events.put((row, token, text, is_last))
        self.finished[row] = is_last
        return is_last

    def run(self, fn: Callable[[], Any]) -> Any:
        """Runs fn(), which calls this watcher, in another thread, and returns its result.

        Meanwhile this thread calls `on_token`, which may do anything, even start another run. Ctrl-C ends all rows
        once `on_token` has returned, and sets `interrupted`; a second Ctrl-C interrupts `on_token` itself. An
        exception from `on_token` ends the rows too, and is raised here.
        """
        begin = threading.Event()  # set once Ctrl-C is handled here

        def work() -> Any:
            begin.wait()
            return fn()

        future = call_in_thread(work)
        future.add_done_callback(lambda _: self._events.put(None))  # wakes this thread
        try:
            with self._interruptible():
                try:
                    begin.set()
                    self._hand_on(future)
                except KeyboardInterrupt:  # a second Ctrl-C, or another handler's
                    self._interrupt()
                    self._hand_on(future)  # the tokens drawn before it
        finally:
            self._cancelled = True
            concurrent.futures.wait([future])
        result = future.result()
        if self._error is not None:
            raise self._error
        return result

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C takes effect between two calls of on_token; Python's own handler would raise in the middle of one."""

        def handler(*_: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._interrupt()

        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self) -> None:
        self.interrupted = self._cancelled = True
        self._events.put(None)

    def _hand_on(self, future: "concurrent.futures.Future[Any]") -> None:
        """Calls on_token for each token, until the run has ended."""
        while not (future.done() and self._events.empty()):
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=1)
                if event is not None and self._on_token is not None:
                    self._on_token(*event)
