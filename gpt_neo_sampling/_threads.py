"""Calls in threads of their own."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

THREADS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # those of `call_in_thread`


def call_in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Runs call() in a thread that does not keep the program from ending; the future has what it returns or raises."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    thread = threading.Thread(target=work, daemon=True)
    THREADS.add(thread)
    thread.start()
    return future
