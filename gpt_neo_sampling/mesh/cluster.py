"""Several processes as one mesh, through TensorFlow's own distributed runtime.

Every process of a cluster serves its devices (`serve`); one program, the client,
builds the graph for all of them. TensorFlow waits forever for a missing process
and long for a dead one. So this module checks for both, by opening a connection to
each address before the session and during it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpt_neo_sampling._compat import quiet_stderr, tf
from gpt_neo_sampling._threads import call_in_thread

CONNECT_SECONDS = 20  # the longest that a process may take to start
WATCH_SECONDS = 2  # between checks that all processes are there
LOST_AFTER = 2  # failed checks in a row
ANSWER_SECONDS = 60  # for a cluster that accepts connections to answer its first request
MOST_CPUS = 1024  # CPU devices of a process; TensorFlow creates all of them up to the last that is named


class ClusterError(OSError):
    """A process of the cluster cannot be reached; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a cluster. Made by `parse_cluster` or `cluster_from_environment`."""

    jobs: dict[str, list[str]]  # job's name -> the addresses of its tasks, "host:port"
    task: str | None = None  # this process's task, such as "worker:0"; None for a client outside the cluster

    @property
    def addresses(self) -> dict[str, str]:
        """{"worker:0": "host:port", …}, in order."""
        return {f"{job}:{i}": address for job, tasks in self.jobs.items() for i, address in enumerate(tasks)}

    def checked(self, what: str = "cluster") -> Cluster:
        """Itself; raises ValueError for invalid addresses or an unknown task."""
        addresses = list(self.addresses.values())
        if not addresses:
            raise ValueError(f"{what} names no address; allowed: host:port,host:port")
        for a in addresses:
            m = re.fullmatch(r"(\[[^\]]+\]|[^:\s/]+):([0-9]{1,10})", a)
            if not m or not 0 < int(m[2]) < 65536:
                raise ValueError(f"{what}: {a!r} is not an address; allowed: host:port")
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"{what} names an address more than once")
        if self.task is not None and self.task not in self.addresses:
            raise ValueError(f"{what}: there is no task {self.task}; allowed: {', '.join(self.addresses)}")
        return self

    @property
    def master(self) -> str:
        """The address of the process that sessions connect to."""
        return self.addresses[self.task] if self.task else next(iter(self.addresses.values()))

    def first_cpus(self) -> tuple[str, ...]:
        """The first CPU of each process, by TensorFlow's names."""
        return tuple(_device_prefix(task) + "/device:CPU:0" for task in self.addresses)

    def session(self, graph: tf.Graph | None, devices: Sequence[str]) -> tf.Session:
        """A tf.Session on the cluster, once every process has answered.

        Raises:
          ClusterError: if a process does not answer within CONNECT_SECONDS, or lacks
            a device that the mesh names.
        """
        if self.task:
            own = _device_prefix(self.task) + "/device:CPU:"
            _local_server(self, max((int(d.removeprefix(own)) + 1 for d in devices if d.startswith(own)), default=1))
        self._wait_for_all()
        # without isolation, sessions share variables by name, and variables outlive their session
        config = tf.ConfigProto(allow_soft_placement=True, isolate_session_state=True)
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        from gpt_neo_sampling.mesh.cluster_session import ClusterSession  # (imports TensorFlow)

        with quiet_stderr():
            session = ClusterSession(self.master, self.gone, graph, config)
        with session.graph.as_default(), tf.device(None):
            answer = tf.no_op()
        try:
            self.watched(lambda: session.run(answer), seconds=ANSWER_SECONDS)
            # only after the answer: list_devices may wait, and then blocks all Python threads
            present = {d.name for d in session.list_devices()}
            for d in devices:
                if d not in present:
                    raise ClusterError(
                        f"the cluster has no {short_name(d)}; it has {', '.join(sorted(map(short_name, present)))} "
                        "(gpt-neo-sampling serve --cpus N makes more CPUs)"
                    )
        except BaseException:
            session.close()
            raise
        return session

    def _wait_for_all(self) -> None:
        end = time.monotonic() + CONNECT_SECONDS
        missing = list(self.addresses)
        while missing := self.gone(missing):
            if time.monotonic() > end:
                raise ClusterError(
                    f"{self._named(missing)} did not answer within {CONNECT_SECONDS} s; start it with "
                    f"gpt-neo-sampling serve --task {missing[0]}, with the same cluster"
                )
            time.sleep(0.2)

    def gone(self, tasks: Iterable[str] | None = None) -> list[str]:
        """The tasks, out of these or all, that accept no connection."""
        addresses = self.addresses
        return [t for t in (addresses if tasks is None else tasks) if not _answers(addresses[t])]

    def _named(self, tasks: Iterable[str]) -> str:
        return ", ".join(f"{t} at {self.addresses[t]}" for t in tasks)

    def watched(self, call: Callable[[], Any], seconds: float | None = None) -> Any:
        """Returns call(), which runs in another thread while this one watches the cluster.

        TensorFlow by itself may wait forever for a process that it has lost.

        Raises:
          ClusterError: within seconds of losing a process, or if the call takes longer than `seconds`.
        """
        future = call_in_thread(call)
        end = None if seconds is None else time.monotonic() + seconds
        suspects: dict[str, int] = {}
        while not concurrent.futures.wait([future], WATCH_SECONDS).done:
            suspects = {t: suspects.get(t, 0) + 1 for t in self.gone()}
            lost = [t for t, n_checks in suspects.items() if n_checks >= LOST_AFTER]
            if lost:
                raise ClusterError(f"{self._named(lost)} has gone; its state is lost")
            if end is not None and time.monotonic() > end:
                raise ClusterError(
                    f"the cluster accepts connections, but gave no answer within {seconds} s; is each of "
                    f"{self._named(list(self.addresses))} a gpt-neo-sampling serve with the same cluster?"
                )
        try:
            return future.result()
        except tf.errors.OpError as e:
            time.sleep(0.5)  # a process that dies may still accept for a moment
            if gone := self.gone():
                raise ClusterError(f"{self._named(gone)} has gone; its state is lost") from None
            if isinstance(e, (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)):
                raise ClusterError(f"the cluster has lost a process or its state: {_reason(e)}") from None
            raise


def parse_cluster(text: str, task: str | None = None) -> Cluster:
    """A cluster from "host:port,host:port", with tasks worker:0, worker:1 …

    Raises:
      ValueError: for text of another form.
    """
    addresses = [a.strip() for a in text.split(",") if a.strip()]
    return Cluster({"worker": addresses}, task).checked(f"cluster {text!r}")


def cluster_from_environment() -> Cluster | None:
    """The cluster in the environment variable TF_CONFIG, or None without one.

    It has the form `{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}`;
    without "task", this process is a client outside the cluster.

    Raises:
      ValueError: for text of another form.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    try:
        config = json.loads(text)
        jobs = config.get("cluster") or {}
        task = config.get("task")
        task = None if not task else f"{task['type']}:{int(task.get('index', 0))}"
        if not all(isinstance(addresses, list) for addresses in jobs.values()):
            raise TypeError("each job needs a list of addresses")  # shown in the message below
        jobs = {job: [str(a) for a in addresses] for job, addresses in jobs.items()}
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as e:
        raise ValueError(
            f'TF_CONFIG is not of the form {{"cluster": {{"worker": ["host:port", …]}}, "task": …}}: {e!r}'
        ) from None
    return Cluster(jobs, task).checked("TF_CONFIG") if jobs else None


def serve(cluster: Cluster, cpus: int = 1, started: Callable[[], object] | None = None) -> None:
    """Serves this process's devices to the cluster until a signal stops it.

    Args:
      cluster: a Cluster with a task.
      cpus: int, the number of CPU devices to offer.
      started: None, or a function without arguments that is called once the server runs.

    Raises:
      ClusterError: if the address cannot be used.
    """
    _local_server(cluster, cpus)
    stop = threading.Event()
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda *_: stop.set())
    if started:
        started()
    while not stop.wait(1.0):
        pass


_servers: dict[str, tf.train.Server] = {}  # by address; TensorFlow cannot stop a server


def _local_server(cluster: Cluster, cpus: int = 1) -> None:
    if cluster.task is None:
        raise ValueError(f"a task is needed to serve, one of {', '.join(cluster.addresses)}")
    address = cluster.addresses[cluster.task]
    if address in _servers:
        return
    job, index = cluster.task.rsplit(":", 1)
    if _answers(address):
        raise ClusterError(f"{cluster.task} cannot serve at {address}: the address is in use already")
    config = tf.ConfigProto(device_count={"CPU": cpus}, allow_soft_placement=True)
    with quiet_stderr():
        try:
            _servers[address] = tf.train.Server(
                tf.train.ClusterSpec(cluster.jobs), job_name=job, task_index=int(index), config=config, protocol="grpc"
            )
            return
        except tf.errors.OpError as e:
            reason = _reason(e)
    raise ClusterError(f"{cluster.task} cannot serve at {address}: {reason}")


def _answers(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=WATCH_SECONDS).close()
        return True
    except (OSError, UnicodeError):  # UnicodeError: an invalid host name
        return False


def _reason(error: Exception) -> str:
    """The first informative line of TensorFlow's message."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)


def _device_prefix(task: str) -> str:
    job, index = task.rsplit(":", 1)
    return f"/job:{job}/replica:0/task:{index}"


def short_name(device: str) -> str:
    """The short form of a TensorFlow device's name, such as worker:1/cpu:0."""
    match = re.fullmatch(r"(?:/job:(.*))?/device:(\w+):(\d+)", device)
    if match is None:
        return device
    job, kind, number = match.groups()
    return f"{job.replace('/replica:0/task', '')}/{kind.lower()}:{number}" if job else f"{kind.lower()}:{number}"
