"""Several processes as one mesh: the same tokens, and what happens when one is missing or dies."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import processes
import pytest
from helpers_model import config, random_weights
from test_cli import main
from test_mesh import PROMPTS, command, write_model

from gpt_neo_sampling import ClusterError, TextGenerator
from gpt_neo_sampling.checkpoint import write_mesh_tf_checkpoint
from gpt_neo_sampling.mesh import cluster
from gpt_neo_sampling.mesh.cluster import cluster_from_environment, parse_cluster, serve


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


def free_addresses(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def answers(address):
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        return True
    except OSError:
        return False


class Workers:
    """`gpt-neo-sampling serve`, each in its own process."""

    def __init__(self, n=2, *args):
        self.addresses, self._args, self._processes = free_addresses(n), args, {}
        self.cluster = ",".join(self.addresses)

    def start(self, *indices, env=None):
        """Starts workers, with `env` instead of the options --cluster and --task."""
        for i in indices:
            where = ["--cluster", self.cluster, "--task", f"worker:{i}"] if env is None else []
            self._processes[i] = processes.Command("serve", *where, *self._args, env={**os.environ, **(env or {})})
        for i in indices:
            end = time.monotonic() + 100
            while not answers(self.addresses[i]):
                assert self[i].poll() is None, self[i].stderr.read()
                assert time.monotonic() < end
                time.sleep(0.1)

    def __getitem__(self, i):
        return self._processes[i]

    def kill(self, i):
        self[i].kill()
        self[i].wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes.values():
            process.close()


@pytest.fixture(scope="module")
def workers():
    """Two workers that no test may stop."""
    with Workers(2, "--cpus", "2") as workers:
        workers.start(0, 1)
        yield workers


@pytest.fixture
def own_workers():
    with Workers() as workers:
        yield workers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("cluster") / "model", n_vocab=37)


@pytest.fixture(scope="module")
def expected(model):
    return tokens(TextGenerator.from_pretrained(model))


def tokens(generator, prompts=PROMPTS, **more):
    options = {**dict(max_new_tokens=12, seed=7, eos_token_id=-1, temperature=1), **more}
    return [s.tokens for s in generator.generate(prompts, **options)]


def generator(model, addresses, mesh_shape="x:2", layout="batch:x", devices=None):
    return TextGenerator.from_pretrained(
        model, mesh_shape=mesh_shape, layout=layout, devices=devices, cluster=addresses
    )


# --- the same tokens


FOUR = [f"worker:{task}/cpu:{i}" for task in range(2) for i in range(2)]


@pytest.mark.parametrize(
    ("mesh_shape", "layout", "devices"),
    [
        ("x:2", "batch:x", None),
        pytest.param("x:2", "vocab:x,heads:x", None, marks=pytest.mark.slow),
        pytest.param("x:2,y:2", "batch:x,vocab:y", FOUR, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_one_process(workers, model, expected, mesh_shape, layout, devices):
    split = generator(model, workers.cluster, mesh_shape, layout, devices)
    assert tokens(split) == expected
    split.close()


def test_a_streamer_is_refused(workers, model):
    split = generator(model, workers.cluster)
    with pytest.raises(ValueError, match="a streamer needs a mesh of this process's own devices, not a cluster"):
        split.generate([[5]], max_new_tokens=2, streamer=print)
    split.close()


def test_the_commands_output_is_that_of_one_process(workers, model, expected):
    on_cluster = ["--cluster", workers.cluster, "--mesh-shape", "x:2", "--layout", "batch:x"]
    done = processes.run(*command(model, "--temperature", 1, *on_cluster))
    assert done.returncode == 0
    assert [list(map(int, line.split())) for line in done.stdout.splitlines()] == expected
    assert done.stderr == "".join(" ".join(map(str, prompt)) + " \n" for prompt in PROMPTS)


@pytest.mark.slow
def test_a_program_that_is_a_task_itself(own_workers, model, expected):
    def tf_config(index):
        task = {"type": "worker", "index": index}
        return {"TF_CONFIG": json.dumps({"cluster": {"worker": own_workers.addresses}, "task": task})}

    own_workers.start(1, env=tf_config(1))
    devices = "worker:0/cpu:0,worker:0/cpu:1,worker:1/cpu:0"
    on_mesh = ["--mesh-shape", "x:3", "--layout", "batch:x", "--devices", devices]
    done = processes.run(*command(model, "--temperature", 1, *on_mesh), env={**os.environ, **tf_config(0)})
    assert done.returncode == 0
    assert [list(map(int, line.split())) for line in done.stdout.splitlines()] == expected
    assert done.stderr == "".join(" ".join(map(str, prompt)) + " \n" for prompt in PROMPTS)


@pytest.mark.slow
def test_what_a_generator_holds_is_its_own(workers, model, expected, tmp_path):
    """Several models have variables of the same names, in processes that outlive the models."""
    other = write_model(tmp_path / "other", n_vocab=41, n_embd=32)
    one, two = generator(model, workers.cluster), generator(other, workers.cluster)
    assert tokens(one) == expected
    of_other = tokens(two)
    assert of_other != expected
    one.close()
    assert tokens(two) == of_other
    assert tokens(one) == expected
    one.close()
    two.close()


@pytest.mark.slow
def test_closing_frees_the_weights(workers, tmp_path):
    params = config(["global"], n_vocab=37, n_ctx=1_000_000)  # a position table of 64 MB
    del params["mode"]
    long = tmp_path / "long"
    write_mesh_tf_checkpoint(long, params, random_weights(params))
    held = []
    for _ in range(5):
        split = generator(long, workers.cluster)
        tokens(split, [[1], [2]], max_new_tokens=2)
        split.close()
        held.append(resident_megabytes(workers[1]))
    assert held[-1] < held[1] + 100, held  # without closing: 190 and more


def resident_megabytes(process):
    with open(f"/proc/{process.pid}/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS"))


# --- missing and lost processes


def test_a_worker_that_is_missing_is_named(workers, model, monkeypatch, capfd):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    (nobody,) = free_addresses(1)
    message = (
        f"worker:1 at {nobody} did not answer within 1 s; "
        "start it with gpt-neo-sampling serve --task worker:1, with the same cluster"
    )
    addresses = f"{workers.addresses[0]},{nobody}"
    start = time.monotonic()
    with pytest.raises(ClusterError) as error:
        tokens(generator(model, addresses))
    assert str(error.value) == message
    assert time.monotonic() - start < 120  # most of it takes the graph

    done = main(capfd, *command(model, "--cluster", addresses, "--mesh-shape", "x:2", "--layout", "batch:x"))
    assert done == (1, "", f"gpt-neo-sampling: error: {message}\n")


@pytest.mark.parametrize("which", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_is_named_within_seconds(own_workers, model, expected, which, record_property):
    """Worker 0 is the one that the session connects to."""
    own_workers.start(0, 1)
    split = generator(model, own_workers.cluster)
    request = dict(prompts=[[1], [2]] * 16, num_return_sequences=1000, max_new_tokens=46)
    tokens(split, **{**request, "prompts": [[1]], "num_return_sequences": 32})  # the graph
    killed = []

    def kill():
        own_workers.kill(which)
        killed.append(time.monotonic())

    timer = threading.Timer(2, kill)
    timer.start()
    try:
        with pytest.raises(ClusterError) as error:
            tokens(split, **request)
        seconds = time.monotonic() - killed[0]
    finally:
        timer.join()
    assert str(error.value) == f"worker:{which} at {own_workers.addresses[which]} has gone; its state is lost"
    print(f"worker:{which}: {seconds:.1f} s from kill to error")
    record_property("seconds", seconds)
    assert seconds < 60
    start = time.monotonic()
    split.close()
    assert time.monotonic() - start < 60  # TensorFlow alone would wait for minutes

    own_workers.start(which)
    assert tokens(generator(model, own_workers.cluster)) == expected
    assert tokens(split) == expected


@pytest.mark.slow
def test_a_worker_that_is_killed_while_a_graph_is_built(own_workers, model, expected):
    """By a logits processor, which is called then; the session is extended after that."""
    own_workers.start(0, 1)
    split = generator(model, own_workers.cluster)
    killed = []

    def killing(logits, ids, position):
        if not killed:
            killed.append(own_workers.kill(0))
        return logits

    with pytest.raises(ClusterError, match="worker:0 at .* has gone"):
        tokens(split, logits_processors=[killing])
    own_workers.start(0)
    assert tokens(split) == expected


@pytest.mark.slow
def test_a_command_ends_soon_after_a_worker_is_killed(own_workers, model):
    own_workers.start(0, 1)
    on_cluster = ["--cluster", own_workers.cluster, "--mesh-shape", "x:2", "--layout", "batch:x"]
    with processes.Command(*command(model, "--num-samples", 50000, *on_cluster)) as process:
        busy = cpu_seconds(own_workers[1]) + 1.5  # more than it takes to be ready
        while cpu_seconds(own_workers[1]) < busy:
            time.sleep(0.2)
        own_workers.kill(1)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, ""), err
    assert err == (f"gpt-neo-sampling: error: worker:1 at {own_workers.addresses[1]} has gone; its state is lost\n")


def cpu_seconds(process):
    with open(f"/proc/{process.pid}/stat") as f:
        user, system = f.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("first", [0, 1])
def test_ports_where_something_else_listens(own_workers, model, monkeypatch, first):
    """Something that never answers replaces both workers, or the second."""
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1)
    with contextlib.ExitStack() as stack:
        for address in own_workers.addresses[first:]:
            stack.enter_context(socket.create_server(("127.0.0.1", int(address.split(":")[1]))))
        own_workers.start(*range(first))
        split = generator(model, own_workers.cluster)
        start = time.monotonic()
        with pytest.raises(ClusterError) as error:
            tokens(split)
        assert time.monotonic() - start < 120  # most of it takes the graph
    zero, one = own_workers.addresses
    assert str(error.value) == (
        "the cluster accepts connections, but gave no answer within 1 s; "
        f"is each of worker:0 at {zero}, worker:1 at {one} a gpt-neo-sampling serve with the same cluster?"
    )


def test_a_device_that_a_worker_has_not(workers, model):
    split = generator(model, workers.cluster, devices="worker:0/cpu:0,worker:1/cpu:2")
    with pytest.raises(ClusterError) as error:
        tokens(split)
    assert str(error.value) == (
        "the cluster has no worker:1/cpu:2; it has worker:0/cpu:0, worker:0/cpu:1, worker:1/cpu:0, worker:1/cpu:1 "
        "(gpt-neo-sampling serve --cpus N makes more CPUs)"
    )


# --- serve


def test_a_signal_ends_serve(own_workers):
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        own_workers.start(1)
        assert own_workers[1].stderr.readline() == f"serving worker:1 at {own_workers.addresses[1]}\n"
        own_workers[1].send_signal(signal_number)
        assert own_workers[1].wait(timeout=60) == 0
        assert own_workers[1].stderr.read() == ""
        own_workers[1].close()


@pytest.mark.slow
def test_a_signal_ends_a_fresh_interpreter_that_serves():
    (address,) = free_addresses(1)
    command = [sys.executable, "-m", "gpt_neo_sampling.cli.main", "serve", "--cluster", address, "--task", "worker:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr.readline() == f"serving worker:0 at {address}\n"
            process.terminate()
            assert process.wait(timeout=60) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "serve needs a cluster: --cluster host:port,host:port, or TF_CONFIG"),
        (["--cluster", "a:1,b:2"], "serve needs --task, one of worker:0, worker:1"),
        (["--cluster", "a:1,b:2", "--task", "worker:2"],
         "cluster 'a:1,b:2': there is no task worker:2; allowed: worker:0, worker:1"),
        (["--cluster", "a:1,b:2", "--task", "1"],
         "cluster 'a:1,b:2': there is no task 1; allowed: worker:0, worker:1"),
        (["--cluster", "a:1,b", "--task", "worker:0"], "cluster 'a:1,b': 'b' is not an address; allowed: host:port"),
        (["--cluster", "a:1", "--task", "worker:0", "--cpus", "0"],
         "--cpus=0; a whole number from 1 to 1024 is needed"),
    ],
)  # fmt: skip
def test_a_bad_value_for_serve_is_one_line_and_status_2(capfd, args, message):
    assert main(capfd, "serve", *args) == (2, "", f"gpt-neo-sampling: error: {message}\n")


@pytest.mark.parametrize("listens", [True, False])
def test_serve_at_an_address_in_use(capfd, listens):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:
            taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, out, err = main(capfd, "serve", "--cluster", address, "--task", "worker:0")
    assert (status, out) == (1, "")
    assert err.startswith(f"gpt-neo-sampling: error: worker:0 cannot serve at {address}: ") and err.count("\n") == 1


# --- descriptions


def test_a_client_from_outside_cannot_serve():
    with pytest.raises(ValueError, match="a task is needed to serve, one of worker:0, worker:1"):
        serve(parse_cluster("a:1,b:2"))


def test_what_a_description_of_a_cluster_comes_to(monkeypatch):
    assert parse_cluster(" a:1 , [::1]:22,").addresses == {"worker:0": "a:1", "worker:1": "[::1]:22"}
    assert parse_cluster("a:1,b:2", "worker:1").task == "worker:1"

    def from_environment(**config):
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        return cluster_from_environment()

    jobs = {"chief": ["a:1"], "worker": ["b:2", "c:3"]}
    c = from_environment(cluster=jobs)
    assert (c.addresses, c.task) == ({"chief:0": "a:1", "worker:0": "b:2", "worker:1": "c:3"}, None)
    assert from_environment(cluster=jobs, task={"type": "worker", "index": 1}).task == "worker:1"
    assert from_environment(cluster=jobs, task={"type": "chief", "index": "0"}).task == "chief:0"
    assert from_environment(cluster=jobs, task={"type": "chief"}).task == "chief:0"
    assert from_environment() is None
    assert from_environment(cluster={}, task={"type": "worker", "index": 0}) is None
    monkeypatch.setenv("TF_CONFIG", " ")
    assert cluster_from_environment() is None
    monkeypatch.delenv("TF_CONFIG")
    assert cluster_from_environment() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cluster '' names no address; allowed: host:port,host:port"),
        (" , ", "cluster ' , ' names no address; allowed: host:port,host:port"),
        ("a", "cluster 'a': 'a' is not an address; allowed: host:port"),
        ("a:1,b:", "cluster 'a:1,b:': 'b:' is not an address; allowed: host:port"),
        ("a:x", "cluster 'a:x': 'a:x' is not an address; allowed: host:port"),
        ("a:0", "cluster 'a:0': 'a:0' is not an address; allowed: host:port"),
        ("a:65536", "cluster 'a:65536': 'a:65536' is not an address; allowed: host:port"),
        ("::1:22", "cluster '::1:22': '::1:22' is not an address; allowed: host:port"),
        ("grpc://a:1", "cluster 'grpc://a:1': 'grpc://a:1' is not an address; allowed: host:port"),
        ("a:1,a:1", "cluster 'a:1,a:1' names an address more than once"),
    ],
)
def test_a_wrong_cluster_is_named(text, message):
    with pytest.raises(ValueError) as error:
        parse_cluster(text)
    assert str(error.value) == message


FORM = 'TF_CONFIG is not of the form {"cluster": {"worker": ["host:port", …]}, "task": …}: '


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", FORM + "JSONDecodeError("),
        ("[]", FORM),
        ('"a:1"', FORM),
        ('{"cluster": ["a:1"]}', FORM),
        ('{"cluster": {"worker": "a:1"}}', FORM + "TypeError('each job needs a list of addresses')"),
        ('{"cluster": {"worker": 3}}', FORM),
        ('{"cluster": {"worker": ["a:1"]}, "task": "worker"}', FORM),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"index": 0}}', FORM + "KeyError('type')"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": "x"}}', FORM),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1e999}}', FORM + "OverflowError("),
        pytest.param("[" * 100_000, FORM + "RecursionError(", id="lists"),
        ('{"cluster": {"worker": ["a"]}}', "TF_CONFIG: 'a' is not an address; allowed: host:port"),
        ('{"cluster": {"worker": [3]}}', "TF_CONFIG: '3' is not an address; allowed: host:port"),
        ('{"cluster": {"worker": []}}', "TF_CONFIG names no address; allowed: host:port,host:port"),
        ('{"cluster": {"worker": ["a:1"], "ps": ["a:1"]}}', "TF_CONFIG names an address more than once"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
         "TF_CONFIG: there is no task worker:1; allowed: worker:0"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator"}}',
         "TF_CONFIG: there is no task evaluator:0; allowed: worker:0"),
    ],
)  # fmt: skip
def test_a_wrong_tf_config_is_named(monkeypatch, text, message):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError) as error:
        cluster_from_environment()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
