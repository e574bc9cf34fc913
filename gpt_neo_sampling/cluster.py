"""Several processes as one mesh, through TensorFlow's own distributed runtime.

Every process of a cluster serves its devices (`serve`); one program, the client,
builds the graph for all of them. TensorFlow itself waits without end for a
process that is missing and long for one that has died, so both are watched from
here: by opening a connection to each address, before the session and during it.
"""

import contextlib
import dataclasses
import json
import os
import queue
import re
import signal
import socket
import threading
import time
import uuid

from gpt_neo_sampling._compat import quiet_stderr, tf

CONNECT_SECONDS = 20  # how long a process may take to come up
WATCH_SECONDS = 2  # between looks at whether all are still there
LOST_AFTER = 2  # looks in a row that found one gone
ANSWER_SECONDS = 60  # for a cluster that accepts connections to answer its first request


class ClusterError(OSError):
    """A process of the cluster that cannot be reached; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a cluster. Made by `parse_cluster` or `cluster_from_environment`."""

    jobs: dict  # job's name -> its addresses, "host:port", a task each
    task: str | None = None  # what this process is, such as "worker:0"; None for a client from outside

    @property
    def addresses(self):
        """{"worker:0": "host:port", …}, in order."""
        return {f"{job}:{i}": address for job, tasks in self.jobs.items() for i, address in enumerate(tasks)}

    def checked(self, what="cluster"):
        """Itself; raises ValueError for addresses or a task that cannot be."""
        addresses = list(self.addresses.values())
        if not addresses:
            raise ValueError(f"{what} names no address; allowed: host:port,host:port")
        for a in addresses:
            m = re.fullmatch(r"(\[[^\]]+\]|[^:\s/]+):(\d+)", a)
            if not m or not 0 < int(m[2]) < 65536:
                raise ValueError(f"{what}: {a!r} is not an address; allowed: host:port")
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"{what} names an address more than once")
        if self.task is not None and self.task not in self.addresses:
            raise ValueError(f"{what}: there is no task {self.task}; allowed: {', '.join(self.addresses)}")
        return self

    def first_cpus(self):
        """The first CPU of each process, by TensorFlow's names."""
        return tuple(_device_prefix(task) + "/device:CPU:0" for task in self.addresses)

    def session(self, graph, devices):
        """A tf.Session on the cluster, once every process has answered.

        Raises:
          ClusterError: if one does not within CONNECT_SECONDS, or has not the
            devices that the mesh names.
        """
        if self.task:
            _local_server(self)
        self._wait_for_all()
        target = "grpc://" + (self.addresses[self.task] if self.task else next(iter(self.addresses.values())))
        config = tf.ConfigProto(allow_soft_placement=True)
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        with quiet_stderr():
            session = tf.Session(target, graph=graph, config=config)
        present = {d.name for d in self._watched(session.list_devices, seconds=ANSWER_SECONDS)}
        missing = [d for d in devices if d not in present]
        if missing:
            raise ClusterError(
                f"the cluster has no {_short(missing[0])}; it has {', '.join(sorted(_short(d) for d in present))} "
                "(gpt-neo-sampling serve --cpus N makes more CPUs)"
            )
        return session

    def run(self, session, fetches, feed=None):
        """session.run, with an eye on the cluster.

        Raises:
          ClusterError: seconds after a process has gone.
        """
        return self._watched(lambda: session.run(fetches, feed))

    @contextlib.contextmanager
    def container(self, graph, name=None):
        """Gives the variables made inside a place of their own on the processes,
        which outlive the session; yields its name, for `clear`."""
        name = name or f"gpt_neo_sampling_{uuid.uuid4().hex}"
        with graph.container(name):
            yield name

    def clear(self, container):
        """Frees the variables of a container, on whichever processes are left."""
        target = "grpc://" + next(iter(self.addresses.values()))
        if not self._gone(list(self.addresses)):
            tf.Session.reset(target, [container])

    def _wait_for_all(self):
        end = time.monotonic() + CONNECT_SECONDS
        missing = list(self.addresses)
        while missing := self._gone(missing):
            if time.monotonic() > end:
                raise ClusterError(
                    f"{self._named(missing)} did not answer within {CONNECT_SECONDS} s; start it with "
                    f"gpt-neo-sampling serve --task {missing[0]}, with the same cluster"
                )
            time.sleep(0.2)

    def _gone(self, tasks):
        return [t for t in tasks if not _answers(self.addresses[t])]

    def _named(self, tasks):
        return ", ".join(f"{t} at {self.addresses[t]}" for t in tasks)

    def _watched(self, call, seconds=None):
        """call() on a thread of its own, for as long as the cluster is whole."""
        results = queue.SimpleQueue()

        def target():
            try:
                results.put((call(), None))
            except BaseException as e:
                results.put((None, e))

        threading.Thread(target=target, daemon=True).start()
        end = None if seconds is None else time.monotonic() + seconds
        suspects = {}
        while True:
            try:
                result, error = results.get(timeout=WATCH_SECONDS)
            except queue.Empty:
                gone = self._gone(list(self.addresses))
                suspects = {t: suspects.get(t, 0) + 1 for t in gone}
                lost = [t for t, looks in suspects.items() if looks >= LOST_AFTER]
                if lost:
                    raise ClusterError(f"{self._named(lost)} has gone; what it held is lost") from None
                if end is not None and time.monotonic() > end:
                    raise ClusterError(
                        f"the cluster accepts connections, but gave no answer within {seconds} s; is each of "
                        f"{self._named(list(self.addresses))} a gpt-neo-sampling serve of the same cluster?"
                    ) from None
                continue
            if error is None:
                return result
            if isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)):
                time.sleep(0.5)  # a process that dies may still accept for a moment
                gone = self._gone(list(self.addresses))
                if gone:
                    raise ClusterError(f"{self._named(gone)} has gone; what it held is lost") from None
                first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ClusterError(f"the cluster has lost a process or its state: {first_line}") from None
            raise error


def parse_cluster(text, task=None):
    """A cluster from "host:port,host:port", its tasks being worker:0, worker:1 …

    Raises:
      ValueError: for another form.
    """
    addresses = [a.strip() for a in text.split(",") if a.strip()]
    return Cluster({"worker": addresses}, task).checked(f"cluster {text!r}")


def cluster_from_environment():
    """The cluster of the environment variable TF_CONFIG, or None without one.

    `{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}`;
    without "task", this process is a client from outside.

    Raises:
      ValueError: for another form.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    try:
        config = json.loads(text)
        jobs = config.get("cluster") or {}
        task = config.get("task")
        task = None if not task else f"{task['type']}:{int(task.get('index', 0))}"
        jobs = {str(job): [str(a) for a in addresses] for job, addresses in jobs.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise ValueError(
            f'TF_CONFIG is not of the form {{"cluster": {{"worker": ["host:port", …]}}, "task": …}}: {e!r}'
        ) from None
    return Cluster(jobs, task).checked("TF_CONFIG") if jobs else None


def serve(cluster, cpus=1):
    """Serves this process's devices to the cluster, until a signal ends it.

    Args:
      cluster: a Cluster with a task.
      cpus: int, how many CPU devices to offer.

    Raises:
      ClusterError: if its address cannot be had.
    """
    stop = threading.Event()
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda *_: stop.set())
    _local_server(cluster, cpus)
    while not stop.wait(1.0):
        pass


_servers = {}  # TensorFlow cannot end a server: one for each address and process


def _local_server(cluster, cpus=1):
    address = cluster.addresses[cluster.task]
    if address in _servers:
        return _servers[address]
    job, index = cluster.task.rsplit(":", 1)
    if _answers(address):
        raise ClusterError(f"{cluster.task} cannot serve at {address}: something answers there already")
    config = tf.ConfigProto(device_count={"CPU": cpus}, allow_soft_placement=True)
    try:
        with quiet_stderr():
            server = tf.train.Server(
                tf.train.ClusterSpec(cluster.jobs), job_name=job, task_index=int(index), config=config, protocol="grpc"
            )
    except tf.errors.OpError as e:
        raise ClusterError(f"{cluster.task} cannot serve at {address}: {str(e).splitlines()[0]}") from None
    _servers[address] = server
    return server


def _answers(address):
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=WATCH_SECONDS).close()
        return True
    except OSError:
        return False


def _device_prefix(task):
    job, index = task.rsplit(":", 1)
    return f"/job:{job}/replica:0/task:{index}"


def _short(device):
    return re.sub(r"/job:(\w+)/replica:0/task:(\d+)/device:", r"\1:\2/", device)
