"""A TensorFlow session on a cluster, which is closed whatever becomes of the cluster."""

import atexit
import concurrent.futures
import contextlib
import functools
import queue
import threading
import time
import weakref
from collections.abc import Callable

from gpt_neo_sampling._compat import tf
from gpt_neo_sampling._threads import THREADS, call_in_thread

CLOSE_SECONDS = 5  # for a cluster to free a session's state


class ClusterSession(tf.Session):
    """A session that closes in bounded time.

    TensorFlow would wait minutes, or until it is back, for a process that has gone,
    even when the session is garbage-collected or the program ends.
    """

    def __init__(
        self, master: str, gone: Callable[[], list[str]], graph: tf.Graph | None, config: tf.ConfigProto
    ) -> None:
        """master: an address; gone: a function that returns the processes that do not answer."""
        self._gone, self.ended = gone, False
        super().__init__("grpc://" + master, graph=graph, config=config)
        _open_sessions.add(self)
        _start_background()

    def close(self) -> None:
        if self.ended:
            return
        self.ended = True
        closed = call_in_thread(self.close_now)  # refers to the session, which is therefore not freed earlier
        if not self._gone():
            concurrent.futures.wait([closed], CLOSE_SECONDS)

    def close_now(self) -> None:
        with contextlib.suppress(tf.errors.OpError):  # the session may no longer exist
            super().close()

    def __del__(self) -> None:
        if self.ended:
            super().__del__()
        else:
            self.ended = True
            _background.put(self._close_and_free)

    def _close_and_free(self) -> None:
        self.close_now()
        super().__del__()


_open_sessions: weakref.WeakSet[ClusterSession] = weakref.WeakSet()
# calls for the background thread; garbage collection cannot start a thread itself
_background: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()


@functools.cache
def _start_background() -> None:
    """Starts a thread that closes sessions nobody has closed, including those left at program exit."""

    def work() -> None:
        while True:
            _background.get()()

    def at_exit() -> None:  # newer Pythons cannot start a thread at exit
        done = threading.Event()
        for session in list(_open_sessions):
            if not session.ended:
                session.ended = True
                _background.put(session.close_now)
        _background.put(done.set)
        done.wait(CLOSE_SECONDS)
        end = time.monotonic() + CLOSE_SECONDS
        for thread in list(THREADS):  # TensorFlow 2.12 aborts if one is cut off
            thread.join(max(0, end - time.monotonic()))

    threading.Thread(target=work, daemon=True).start()
    atexit.register(at_exit)
