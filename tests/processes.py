"""Runs the command in processes that need not import TensorFlow.

The import takes 4 s of a processor, longer than most of what such a test runs. So one process, started on first use,
imports the package and then only forks. A forked process has its own file descriptors, environment, process id and
exit status. (For a fresh interpreter: `run` in test_cli.py.)
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time

PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT


class Command:
    """`gpt-neo-sampling` with these arguments, with the methods of subprocess.Popen; output is text."""

    def __init__(self, *args, stdin=b"", stderr=PIPE, env=None):
        out, its_out = os.pipe()
        self.stdout, self.stderr = open(out), None
        its_err = its_out
        if stderr is PIPE:
            from_err, its_err = os.pipe()
            self.stderr = open(from_err)
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            self._start(args, env, [file.fileno(), its_out, its_err])
        for descriptor in {its_out, its_err}:
            os.close(descriptor)

    def _start(self, args, env, standard_files, **more):
        self.args, self.returncode = [str(a) for a in args], None
        self._end, ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"args": self.args, "env": dict(os.environ if env is None else env), **more}
        with ends:
            socket.send_fds(_forker(), [json.dumps(request).encode()], [*standard_files, ends.fileno()])
        self.pid = int(self._end.recv(100))

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            self._end.settimeout(timeout)
            try:
                self.returncode = int(self._end.recv(100))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._end.close()
        return self.returncode

    def communicate(self, timeout=None):
        """(stdout, stderr), once the process has ended."""
        err = []
        thread = threading.Thread(target=lambda: err.append(self.stderr.read()))
        if self.stderr is not None:
            thread.start()
        watch = None if timeout is None else threading.Timer(timeout, self.kill)
        if watch is not None:
            watch.start()
        out = self.stdout.read()
        if self.stderr is not None:
            thread.join()
        self.wait()
        if watch is not None:
            watch.cancel()
        return out, (err[0] if err else None)

    def close(self):
        """Kills the process if it still runs."""
        self.kill()
        self.wait()
        for file in filter(None, (self.stdout, self.stderr)):
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Terminal(Command):
    """The same on a terminal of its own. `shown` is all that has appeared there."""

    def __init__(self, *args, columns=80, env=None):
        self._main, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown, self._seen, self.stdout, self.stderr = "", 0, None, None
        self._start(args, env, [end] * 3, is_terminal=True)
        os.close(end)

    def type(self, text):
        """Types it; "\udcff" is a byte ff, which is not UTF-8."""
        os.write(self._main, text.encode(errors="surrogateescape"))

    def expect(self, text, timeout=60):
        """Waits until the text appears; returns what appeared since the last call, the text included."""
        end = time.monotonic() + timeout
        while text not in self.shown[self._seen :]:
            assert self._read(end - time.monotonic()), f"{text!r} is not in {self.shown!r}"
        begin, self._seen = self._seen, self.shown.index(text, self._seen) + len(text)
        return self.shown[begin : self._seen]

    def rest(self, timeout=60):
        """What appears until the process has ended."""
        end = time.monotonic() + timeout
        while self._read(end - time.monotonic()):
            pass
        self.wait(timeout)
        return self.shown[self._seen :]

    def _read(self, timeout):
        """Whether something more has appeared."""
        if not select.select([self._main], [], [], max(0, timeout))[0]:
            return False
        try:
            new = os.read(self._main, 10000)
        except OSError:  # at the end, on Linux
            return False
        self.shown += new.decode(errors="replace")
        return bool(new)

    def close(self):
        super().close()
        os.close(self._main)


def run(*args, **kwargs):
    """Runs a Command to its end; returns a subprocess.CompletedProcess."""
    with Command(*args, **kwargs) as command:
        out, err = command.communicate(timeout=300)
        return subprocess.CompletedProcess(command.args, command.returncode, out, err)


@functools.cache
def _forker():
    """The socket to the process that forks, which ends with this one."""
    own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(its.fileno())]
    # one thread, as a fork copies only one; a new session, as Ctrl-C in a terminal goes to the whole process group
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with its:
        process = subprocess.Popen(command, pass_fds=[its.fileno()], env=environment, start_new_session=True)

    def end():
        own.close()
        process.wait()

    atexit.register(end)
    return own


def _fork(requests):
    """Runs in the process that forks. Forks for each request, and returns the request in the child only."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            with socket.socket(fileno=descriptors.pop()) as ends:
                pid = os.fork()
                if pid:  # a process in between, that waits for the child and reports its exit status
                    for descriptor in descriptors:
                        os.close(descriptor)
                    ends.send(str(pid).encode())
                    ends.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
                    os._exit(0)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            return json.loads(message)
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _main():
    from gpt_neo_sampling.cli import commands  # noqa: F401  (imports TensorFlow)
    from gpt_neo_sampling.cli import main as cli

    gc.freeze()  # collecting garbage would touch, and so copy, the shared memory
    request = _fork(socket.socket(fileno=int(sys.argv[1])))
    if request.get("is_terminal"):
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.main(request["args"]))


if __name__ == "__main__":
    _main()
