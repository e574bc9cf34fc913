"""One copy of a model's weights in a session, and graphs of a few sizes that run on it."""

import contextlib
import dataclasses
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import (
    check_not_forked,
    extend_session,
    extend_when_told,
    mtf,
    probe_devices,
    quiet_logging,
    tf,
)
from gpt_neo_sampling._types import DType, Params
from gpt_neo_sampling.checkpoint import Checkpoint
from gpt_neo_sampling.generation.decode_graph import (
    LOGIT_BIAS,
    NO_STOP_TOKEN,
    ModelArguments,
    ProgramInputs,
    ProgramKey,
    add_variables,
    build,
    build_chain,
    load_weights,
    variable_dtype_of,
)
from gpt_neo_sampling.generation.options import PER_PROMPT
from gpt_neo_sampling.generation.request import Request
from gpt_neo_sampling.generation.scoring import ScoreKey
from gpt_neo_sampling.generation.streaming import Watcher
from gpt_neo_sampling.mesh.cluster import ClusterError
from gpt_neo_sampling.mesh.devices import DeviceMesh, round_up
from gpt_neo_sampling.mesh.sharded_rows import padded_size
from gpt_neo_sampling.models import config, gpt2

MAX_PROGRAMS = 8  # graphs kept; one more, and all are dropped and the weights read again
SHORTEST = 32  # positions of the smallest graph


class Graphs:
    """The session of a model on a mesh, and the graphs that were asked for, at most `MAX_PROGRAMS` of them."""

    def __init__(self, checkpoint: Checkpoint, mesh: DeviceMesh, dtype: DType | None = None) -> None:
        """Takes a `Checkpoint`, a `devices.DeviceMesh` and a dtype as for `TextGenerator`; raises what it does."""
        gpt2.check_params(checkpoint.params)
        self.params = dict(checkpoint.params, mode="predict")
        self.mesh = mesh
        # memory is as long as the request, rounded up, and at most n_ctx; with `num_mem_kv` ahead of it
        memory_length = math.gcd(self.params["n_ctx"], config.n_learned_keys(self.params))
        mesh.check(dict(config.splittable_dims(self.params), memory_length=memory_length), config.TENSORS)
        variable_dtype, n_vocab, vocab_parts = variable_dtype_of(dtype), self.params["n_vocab"], mesh.parts("vocab")
        self.dtype = variable_dtype.activation_dtype.name
        self._model: ModelArguments = (
            self.params,
            n_vocab if vocab_parts == 1 else padded_size(n_vocab, vocab_parts),
            mesh.impl(),
            variable_dtype,
        )
        self._checkpoint = checkpoint
        self._build_lock = threading.Lock()  # not held while a graph runs
        self._builder: int | None = None  # the thread that holds it
        self._state_lock = threading.Lock()  # of what follows, for moments
        self._loaded: _Loaded | None = None

    def run(
        self,
        kind: type[Any],
        key: Any,
        *request: Any,
        run: Callable[[Callable[[], Any]], Any] | None = None,
        **more: Any,
    ) -> Any:
        """What a graph gives for a request. Any number of threads may run graphs at once, and others build meanwhile.

        Args:
          kind: one of the classes below, or `ScoreProgram`.
          key: what the graph is built for.
          *request, **more: what the class's `feeds` takes behind the key.
          run: None, or a function that calls the one it is given and returns its result.

        Returns:
          what the graph's `results` are, as ndarrays.

        Raises:
          RuntimeError: in a process that was forked from one that had used TensorFlow, and from within a function
            that this very graph is being built with.
        """
        check_not_forked()
        loaded = self._loaded_with(kind, key)
        try:
            program = loaded.programs[kind, key]
            feeds = program.feeds(key, *request, **more)
            run_graph = functools.partial(self.mesh.run, loaded.session, program.results, feeds)
            return run_graph() if run is None else run(run_graph)
        except ClusterError:
            self._retire(loaded)  # what the processes held is lost: the next request begins anew
            raise
        finally:
            self._release(loaded)

    def close(self) -> None:
        """Frees the weights and the graphs, once what runs has ended; the next run makes them anew."""
        if (loaded := self._loaded) is not None:
            self._retire(loaded)

    def _loaded_with(self, kind: type[Any], key: Any) -> "_Loaded":
        """What has the graph of a kind for a key, built if need be, to be released in the end."""
        with self._state_lock:
            if self._loaded is not None and (kind, key) in self._loaded.programs:
                return self._loaded.taken()
        if self._builder == threading.get_ident():
            raise RuntimeError("a logits processor cannot use the generator that it is built into")
        with self._build_lock:
            self._builder = threading.get_ident()
            try:
                return self._built(kind, key)
            finally:
                self._builder = None

    def _built(self, kind: type[Any], key: Any) -> "_Loaded":
        with self._state_lock:
            loaded = self._loaded
            if loaded is not None:
                loaded.taken()
        if loaded is not None and (kind, key) not in loaded.programs and len(loaded.programs) >= MAX_PROGRAMS:
            self._retire(loaded)  # nodes cannot be taken out of a graph, only the graph dropped
            self._release(loaded)
            loaded = None
        if loaded is None:
            probe_devices()
            loaded = _Loaded(self._session_with_weights()).taken()
            with self._state_lock:
                self._loaded = loaded
        try:
            if (kind, key) not in loaded.programs:
                with self._open(loaded.session.graph):
                    program = kind(key, *self._model)
                extend_session(loaded.session)
                loaded.programs[kind, key] = program
        except BaseException:
            self._release(loaded)
            raise
        return loaded

    def _retire(self, loaded: "_Loaded") -> None:
        """No more runs begin in it, and it is closed when those of now have ended."""
        with self._state_lock:
            loaded.retired = True
            if self._loaded is loaded:
                self._loaded = None
            unused = loaded.n_users == 0
        if unused:
            loaded.session.close()

    def _release(self, loaded: "_Loaded") -> None:
        with self._state_lock:
            loaded.n_users -= 1
            unused = loaded.retired and loaded.n_users == 0
        if unused:
            loaded.session.close()

    @contextlib.contextmanager
    def _open(self, graph: tf.Graph) -> Iterator[None]:
        with graph.as_default(), quiet_logging(), self.mesh.place(), tf.variable_scope("", reuse=tf.AUTO_REUSE):
            yield

    def _session_with_weights(self) -> tf.Session:
        graph = tf.Graph()
        with self._open(graph):
            weights = add_variables(*self._model)
            session = self.mesh.session(graph)
            try:
                extend_when_told(session)
                extend_session(session)
                _, _, mesh_impl, _ = self._model
                load_weights(self._checkpoint, weights, mesh_impl, functools.partial(self.mesh.run, session))
            except BaseException:
                session.close()
                raise
        return session


@dataclasses.dataclass
class _Loaded:
    """Weights in a session, and the graphs on them."""

    session: tf.Session
    programs: dict[tuple[type[Any], Any], Any] = dataclasses.field(default_factory=dict)
    n_users: int = 0  # how many runs there are now
    retired: bool = False

    def taken(self) -> "_Loaded":
        self.n_users += 1
        return self


class DecodeProgram:
    """A decode graph: tokens, and log-probabilities if the key asks for them."""

    def __init__(
        self, key: ProgramKey, params: Params, n_vocab: int, mesh_impl: mtf.MeshImpl, variable_dtype: mtf.VariableDType
    ) -> None:
        """key: ProgramKey; the rest as for `build`."""

        def option(name: str) -> tf.Tensor:
            return tf.placeholder(PER_PROMPT[name].dtype, [key.rows])

        options = {name: option(name) for name in sorted(key.steps - {LOGIT_BIAS})}
        if LOGIT_BIAS in key.steps:
            options[LOGIT_BIAS] = tf.placeholder(tf.float32, [n_vocab])
        self._n_vocab = n_vocab
        self._inputs = ProgramInputs(
            ids=tf.placeholder(tf.int32, [key.batch, key.length]),
            prompt_lengths=tf.placeholder(tf.int32, [key.batch]),
            max_steps=tf.placeholder(tf.int32, [key.rows]),
            stream=option("stream"),
            seed=option("seed"),
            stop_tokens=[tf.placeholder(tf.int32, []) for _ in range(key.n_stop_tokens)],
            temperature=option("temperature"),
            options=options,
        )
        self.results = self._build(key, (params, n_vocab, mesh_impl, variable_dtype))

    def _build(self, key: ProgramKey, model: ModelArguments) -> Any:
        return build(key, self._inputs, *model)

    def feeds(
        self, key: ProgramKey, request: Request, prompts: range, which: range, limits: list[int]
    ) -> dict[tf.Tensor, Any]:
        """What is fed for these samples of these prompts of a `Request`, ranges both; limits: how many new tokens each
        prompt may get."""
        to, n_filling = self._inputs, key.batch - len(prompts)  # rows of one token, and no step, fill the batch
        ids = np.zeros([key.batch, key.length], np.int32)  # behind the prompts anything
        part = [request.prompts[p] for p in prompts]
        for row, prompt in enumerate(part):
            ids[row, : len(prompt)] = prompt

        def for_rows(name: str) -> np.ndarray:
            column = request.values[name][prompts.start : prompts.stop]
            return np.repeat(np.pad(column, (0, n_filling), mode="edge"), key.samples)

        stop_tokens = request.stop_tokens + [NO_STOP_TOKEN] * (key.n_stop_tokens - len(request.stop_tokens))
        feeds = {
            to.ids: ids,
            to.prompt_lengths: [len(p) for p in part] + [1] * n_filling,
            to.max_steps: np.repeat(limits + [0] * n_filling, key.samples),
            to.stream: for_rows("stream") + np.tile(np.arange(which.start, which.stop, dtype=np.int32), key.batch),
            to.seed: for_rows("seed"),
            to.temperature: for_rows("temperature"),
            **dict(zip(to.stop_tokens, stop_tokens)),
            **{placeholder: for_rows(name) for name, placeholder in to.options.items() if name != LOGIT_BIAS},
        }
        if request.logit_bias is not None:
            feeds[to.options[LOGIT_BIAS]] = np.pad(request.logit_bias, (0, self._n_vocab - len(request.logit_bias)))
        return feeds


class WatchedProgram(DecodeProgram):
    """A decode graph that calls a `Watcher` after each step."""

    def _build(self, key: ProgramKey, model: ModelArguments) -> Any:
        self._number = tf.placeholder(tf.int32, [])  # of the watcher that a run is for
        self._watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()
        return build(key, self._inputs, *model, on_tokens=self._watch, run_number=self._number)

    def _watch(self, tokens: np.ndarray, n_drawn: np.ndarray, number: np.ndarray) -> np.ndarray:
        return self._watchers[int(number)](tokens, n_drawn)

    def feeds(self, *args: Any, watcher: Watcher | None = None) -> dict[tf.Tensor, Any]:
        """watcher: of this run, which keeps it as long as it lasts."""
        assert watcher is not None
        number = next(_numbers) % 2**31
        self._watchers[number] = watcher
        return {**super().feeds(*args), self._number: number}


_numbers = itertools.count()


class ChainProgram(DecodeProgram):
    """One step behind a prompt; its results are a dict, (number, name) of each step of the chain -> probabilities."""

    def _build(self, key: ProgramKey, model: ModelArguments) -> Any:
        return {(i, name): p for i, (name, p) in enumerate(build_chain(key, self._inputs, *model))}


def program_key(
    request: Request, prompts: list[list[int]], limits: list[int], n_samples: int, mesh: DeviceMesh
) -> ProgramKey:
    """The ProgramKey of the smallest graph for some prompts of a `Request`, lists of ids.

    limits: how many new tokens each of them may get; n_samples: of each prompt; mesh: `devices.DeviceMesh`.
    """
    n_ctx, n_vocab = request.n_ctx, request.n_vocab
    steps = request.steps if request.logit_bias is None else request.steps | {LOGIT_BIAS}
    return ProgramKey(
        batch=_batch(len(prompts), mesh),
        prompt_length=_length(max(map(len, prompts)), n_ctx, mesh),
        length=_length(max(len(p) + n for p, n in zip(prompts, limits)), n_ctx, mesh),
        samples=n_samples,
        greedy=request.greedy,
        steps=steps,
        max_top_k=_round_up_top_k(request.values["top_k"].max(), n_vocab) if "top_k" in steps else None,
        n_stop_tokens=_round_up_power(max(1, len(request.stop_tokens))),
        no_repeat_ngram_size=request.options.no_repeat_ngram_size,
        logits_processors=tuple(request.options.logits_processors),
        return_logprobs=request.options.return_logprobs,
    )


def score_key(rows: list[list[int]], n_ctx: int, mesh: DeviceMesh) -> ScoreKey:
    """The ScoreKey of the smallest graph for some rows of ids."""
    return ScoreKey(_batch(len(rows), mesh), _length(max(map(len, rows)), n_ctx, mesh))


def _batch(rows: int, mesh: DeviceMesh) -> int:
    return round_up(_round_up_power(rows), mesh.parts("batch"))


def _length(length: int, n_ctx: int, mesh: DeviceMesh) -> int:
    return round_up(_round_up_length(length, n_ctx), mesh.parts("memory_length"))


def _round_up_power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _round_up_length(length: int, n_ctx: int) -> int:
    """32, 48, 64, 96, 128, …: powers of two and the middles between them."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, n_ctx)


def _round_up_top_k(top_k: int, n_vocab: int) -> int:
    return next(k for k in (64, 1024, n_vocab) if top_k <= k)
