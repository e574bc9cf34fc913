"""The command in processes of its own, which do not import TensorFlow each.

That takes some 4 s of a processor, more than most else that a test has a process for. So one process, started when the
first is wanted, imports the package and does nothing but fork. What it forks is a process like any other: with
descriptors, an environment, a number and an end of its own. (Interpreters that start afresh: `run` of test_cli.py.)
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading

PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT


class Command:
    """`gpt-neo-sampling` with these arguments; used as subprocess.Popen, its output being text."""

    def __init__(self, *args, stderr=PIPE, env=None):
        self.args, self.returncode = [str(a) for a in args], None
        out, self._out = os.pipe()
        self.stdout, self.stderr = open(out), None
        err = self._out
        if stderr is PIPE:
            from_err, err = os.pipe()
            self.stderr = open(from_err)
        self._end, ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        what = {"args": self.args, "env": dict(os.environ if env is None else env)}
        with ends, open(os.devnull) as nothing:
            socket.send_fds(_forker(), [json.dumps(what).encode()], [nothing.fileno(), self._out, err, ends.fileno()])
        for descriptor in {self._out, err}:
            os.close(descriptor)
        self.pid = int(self._end.recv(100))

    def send_signal(self, number):
        if self.poll() is None:
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
        """(stdout, stderr), once it has ended."""
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
        """Ends it, if it has not."""
        self.kill()
        self.wait()
        for stream in filter(None, (self.stdout, self.stderr)):
            stream.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def run(*args, **kwargs):
    """A Command that is waited for: with returncode, stdout and stderr."""
    with Command(*args, **kwargs) as command:
        out, err = command.communicate(timeout=300)
        return subprocess.CompletedProcess(command.args, command.returncode, out, err)


@functools.cache
def _forker():
    """The socket of the process that forks, which ends with this one."""
    own, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(its.fileno())]
    # Of one thread, as a fork takes along no other; by itself, as Ctrl-C in a terminal goes to all that stand together.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with its:
        process = subprocess.Popen(command, pass_fds=[its.fileno()], env=environment, start_new_session=True)

    def end():
        own.close()
        process.wait()

    atexit.register(end)
    return own


def _fork(requests):
    """Runs in the process that forks: for each request makes a process, in which alone it returns."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            with socket.socket(fileno=descriptors.pop()) as ends:
                pid = os.fork()
                if pid:  # between the two, one that waits for the end and says it
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
    from gpt_neo_sampling.cli import main as cli

    gc.freeze()  # looking for garbage in it would copy all that is shared
    what = _fork(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(what["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.main(what["args"]))


if __name__ == "__main__":
    _main()
