"""One side of a benchmark row: a process that builds, checks and times what it is told.

    python benchmarks/worker.py MODULE

Requests and answers are JSON objects, a line each, on stdin and stdout:

    {"do": "build", "spec": {...}}     makes it, by MODULE's `make(spec)`, in place of the one before
    {"do": "check", "file": PATH}      writes the arrays of its `check()` to PATH, as .npz
    {"do": "time", "calls": N}         one block of N calls: {"milliseconds": of one call}
    {"do": "versions", "of": [...]}    {distribution: its version in this process's environment, or None}

The answer to what failed is {"error": its traceback}. The process ends with stdin.
"""

import importlib
import json
import os
import sys
import time
import traceback

import common
import numpy as np


class Server:
    """Answers requests for one module's candidates, objects with `run()` and `check()`."""

    def __init__(self, make):
        self._make, self._candidate = make, None

    def answer(self, request):
        try:
            return getattr(self, f"_{request['do']}")(request)
        except Exception:
            return {"error": traceback.format_exc()}

    def _build(self, request):
        self._candidate = None  # frees the one before, which may be large
        began = time.perf_counter()
        self._candidate = self._make(request["spec"])
        return {"seconds": time.perf_counter() - began}

    def _check(self, request):
        np.savez(request["file"], **self._candidate.check())
        return {}

    def _time(self, request):
        run, calls = self._candidate.run, request["calls"]
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return {"milliseconds": 1000 * (time.perf_counter() - began) / calls}

    def _versions(self, request):
        return common.versions(request["of"])


def main(module):
    common.pin()
    # What libraries print goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(importlib.import_module(module).make)
    for line in sys.stdin:
        answers.write(json.dumps(server.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
