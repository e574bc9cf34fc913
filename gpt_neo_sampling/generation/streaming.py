"""Tokens as text while they are drawn: whole characters, stop strings, and a way to end early."""

import concurrent.futures
import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._types import Streamer, Tokenizer
from gpt_neo_sampling.checkpoint.tokenizer import decoded

REPLACEMENT = "\ufffd"  # what a tokenizer decodes the bytes of half a character to


class TextStream:
    """The text of one continuation, piece by piece.

    What a token adds is told from a few tokens before it, so that its cost does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        """prompt: a list of ids, which new tokens are decoded behind: a character's bytes may lie on both sides."""
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._ids = list(prompt[-8:])  # a few that are out, for the others to be decoded behind them
        self._n_out = len(self._ids)
        self._held = ""  # decoded, and not shown yet: it may be the beginning of a stop string
        self.stopped = False  # a stop string has come; nothing comes behind it

    def push(self, token: int, is_last: bool = False) -> str:
        """The text that this token completes: whole characters, and nothing of a stop string."""
        self._ids.append(token)
        before, text = (decoded(self._tokenizer, ids) for ids in (self._ids[: self._n_out], self._ids))
        # where the prompt ends with half a character, all of that is new
        out = before if text.startswith(before) else before.rstrip(REPLACEMENT)
        new = ""
        if text == before and not text.endswith(REPLACEMENT):  # a special token
            self._ids.pop()
        elif len(text) > len(out) and (is_last or not text.endswith(REPLACEMENT)):
            new = text[len(out) :]
            if out == before:  # characters begin there
                del self._ids[: self._n_out]
            self._n_out = len(self._ids)
        self._held += new
        ends = [at for at in (self._held.find(s) for s in self._stop_strings) if at >= 0]
        if ends:
            self.stopped = True
            out, self._held = self._held[: min(ends)], ""
            return out
        keep = 0 if is_last else max((_overlap(self._held, s) for s in self._stop_strings), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop_string: str) -> int:
    """How many of the last characters of a text may be the first ones of a stop string."""
    longest = min(len(text), len(stop_string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop_string[:n])), 0)


class Watcher:
    """Sees each token of a batch as it is drawn, and says which rows are done.

    Belongs to one run of a graph. TensorFlow's threads call it; the caller of `run` hands the tokens on.
    """

    def __init__(
        self, rows: Sequence[tuple[TextStream | None, int, Sequence[int]]], on_token: Streamer | None = None
    ) -> None:
        """rows: list of (TextStream or None, how many new tokens at most, stop tokens); on_token: a function of
        (row, token, text, is_last), text None where there is no TextStream."""
        self._rows = rows
        self._on_token = on_token
        self._drawn = np.zeros(len(rows), int)
        self._events: queue.SimpleQueue[tuple[int, int, str | None, bool] | None] = queue.SimpleQueue()
        self._cancelled = False
        self._error: BaseException | None = None  # what watching raised
        self.finished = np.zeros(len(rows), bool)  # rows whose last token was drawn
        self.interrupted = False  # by Ctrl-C

    def __call__(self, tokens: np.ndarray, n_drawn: np.ndarray) -> np.ndarray:
        """Takes a step's tokens [batch] and how many each row has had; returns float32 [batch], 1.0 for a row that is
        done. Rows behind those of the request fill the batch."""
        done = np.zeros(len(tokens), np.float32)
        if not self._cancelled:
            try:
                for row in np.flatnonzero(n_drawn[: len(self._rows)] > self._drawn).tolist():
                    done[row] = self._push(row, int(tokens[row]))
            except BaseException as e:  # TensorFlow would make another error of it
                self._error = e
                self._cancelled = True
        return np.ones_like(done) if self._cancelled else done

    def _push(self, row: int, token: int) -> bool:
        stream, limit, stop_tokens = self._rows[row]
        self._drawn[row] += 1
        if token < 0:  # no distribution to draw from
            return True
        text, is_last = None, bool(self._drawn[row] == limit or token in stop_tokens)
        if stream is not None:
            text = stream.push(token, is_last)
            is_last = is_last or stream.stopped
        if self._on_token is not None:
            self._events.put((row, token, text, is_last))
        self.finished[row] = is_last
        return is_last

    def run(self, fn: Callable[[], Any]) -> Any:
        """The result of fn(), which calls this watcher meanwhile.

        It runs in a thread of its own. This one calls `on_token`, which may do what it likes, another run
        included. Ctrl-C ends all rows once `on_token` has returned, and sets `interrupted`; a second one interrupts
        `on_token` itself. What `on_token` raises ends the rows too, and is raised here.
        """
        begin = threading.Event()  # once Ctrl-C is caught
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            begin.wait()
            try:
                future.set_result(fn())
            except BaseException as e:
                future.set_exception(e)
            self._events.put(None)  # wakes the other thread

        threading.Thread(target=work, daemon=True).start()
        try:
            with self._interruptible():
                try:
                    begin.set()
                    self._hand_on(future)
                except KeyboardInterrupt:  # a second Ctrl-C, or another handler's
                    self._interrupt()
                    self._hand_on(future)  # what was drawn before
        finally:
            self._cancelled = True
            concurrent.futures.wait([future])
        result = future.result()
        if self._error is not None:
            raise self._error
        return result

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C is heard between two calls of on_token: Python's own handler would raise in the middle of one."""

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
        """Calls on_token for each token that is drawn until there are no more."""
        while not (future.done() and self._events.empty()):
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=1)
                if event is not None and self._on_token is not None:
                    self._on_token(*event)
