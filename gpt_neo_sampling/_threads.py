"""Calls in threads of their own."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_running: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def call_in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Runs call() in a thread that does not keep the program from ending; the future has what it returns or raises."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    thread = threading.Thread(target=work, daemon=True)
    _running.add(thread)
    thread.start()
    return future


def running() -> list[threading.Thread]:
    """The threads of `call_in_thread`, those that have ended perhaps among them."""
    return list(_running)
