"""One copy of a model's weights in a session, and graphs of a few sizes that share it."""

import contextlib
import dataclasses
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import check_not_forked, extend_when_told, probe_devices, tf
from gpt_neo_sampling._types import DType
from gpt_neo_sampling.checkpoint import Checkpoint
from gpt_neo_sampling.generation.decode_graph import (
    NO_STOP_TOKEN,
    Model,
    ProgramInputs,
    ProgramKey,
    add_variables,
    build,
    build_chain,
    build_first_pass,
    build_segment,
    fill_variables,
    opened,
    padded,
    variable_dtype_of,
)
from gpt_neo_sampling.generation.options import PER_PROMPT
from gpt_neo_sampling.generation.request import Request
from gpt_neo_sampling.generation.scoring import ScoreKey
from gpt_neo_sampling.generation.streaming import Watcher
from gpt_neo_sampling.mesh.cluster import ClusterError
from gpt_neo_sampling.mesh.devices import DeviceMesh, MeshError, round_up
from gpt_neo_sampling.mesh.sharded_rows import padded_size
from gpt_neo_sampling.models import config, gpt2
from gpt_neo_sampling.sampling.prefix_function import NO_ROW, PrefixFunctions
from gpt_neo_sampling.sampling.token_sequences import TokenSequences

MAX_PROGRAMS = 8  # graphs kept; before one more, all are dropped and the weights loaded again
SHORTEST = 32  # positions of the smallest graph


class Graphs:
    """A model's session on a mesh, and the graphs built so far, at most `MAX_PROGRAMS` of them."""

    def __init__(
        self, checkpoint: Checkpoint, mesh: DeviceMesh, dtype: DType | None = None, jit_compile: bool = False
    ) -> None:
        """Takes a `Checkpoint`, a `devices.DeviceMesh` and the rest as `TextGenerator` does, and raises as it does."""
        gpt2.check_params(checkpoint.params)
        if jit_compile and mesh.size > 1:
            raise MeshError(f"jit_compile: the mesh has {mesh.size} processors; a program is compiled for one")
        if jit_compile and mesh.cluster:
            raise MeshError("jit_compile: a device of this process is needed, not of a cluster's")
        if jit_compile and not tf.test.is_built_with_xla():
            raise ValueError("jit_compile: this TensorFlow is built without XLA")
        # XLA's product of one row reads weights [out, in] faster than TensorFlow's kernels read either.
        self.params = dict(checkpoint.params, mode="predict", use_tpu=False, transposed_weights=jit_compile)
        self.mesh = mesh
        # memory is as long as the request, rounded up, and at most n_ctx, after the learned keys of `num_mem_kv`
        memory_length = math.gcd(self.params["n_ctx"], config.n_learned_keys(self.params))
        mesh.check(dict(config.splittable_dims(self.params), memory_length=memory_length), config.TENSORS)
        variable_dtype, n_vocab, vocab_parts = variable_dtype_of(dtype), self.params["n_vocab"], mesh.parts("vocab")
        self.dtype = variable_dtype.activation_dtype.name
        n_vocab = n_vocab if vocab_parts == 1 else padded_size(n_vocab, vocab_parts)
        self._model = Model(self.params, n_vocab, mesh.impl(), variable_dtype, jit_compile)
        self._checkpoint = checkpoint
        self._build_lock = threading.Lock()  # not held while a graph runs
        self._builder: int | None = None  # the thread that holds it
        self._state_lock = threading.Lock()  # guards what follows, briefly
        self._loaded: _Loaded | None = None

    def run(
        self,
        program_class: type[Any],
        key: Any,
        *args: Any,
        around: Callable[[Callable[[], Any]], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs a graph. Any number of threads may do so at once, while another graph is built.

        Args:
          program_class: one of the classes below, or `ScoreProgram`.
          key: what the graph is built for.
          *args, **kwargs: passed on to the class's `feeds`, after the key.
          around: None, or a function that runs the graph by calling its argument, and returns the result.

        Returns:
          the class's `results`, as ndarrays.

        Raises:
          RuntimeError: in a process forked from one that had used TensorFlow, and from within a logits processor
            while the graph that it belongs to is being built.
        """
        check_not_forked()
        loaded = self._acquire(program_class, key)
        with self._in_use(loaded):
            program = loaded.programs[program_class, key]
            feeds = program.feeds(key, *args, **kwargs)

            def run_graph() -> Any:
                try:
                    return self.mesh.run(loaded.session, program.results, feeds)
                except tf.errors.OpError:
                    if (cause := getattr(program, "cause", lambda _: None)(feeds)) is not None:
                        raise cause from None
                    raise

            return run_graph() if around is None else around(run_graph)

    def close(self) -> None:
        """Frees the weights and the graphs once no graph runs; the next run loads and builds them again."""
        self._drop(self._loaded)

    def _acquire(self, program_class: type[Any], key: Any) -> "_Loaded":
        """The loaded weights, with this program built on them, for a `with self._in_use`."""
        while True:
            with self._state_lock:
                if self._loaded is not None and (program_class, key) in self._loaded.programs:
                    return self._loaded.add_user()
            if self._builder == threading.get_ident():
                raise RuntimeError("a logits processor cannot use the generator that it is built into")
            with self._build_lock:
                self._builder = threading.get_ident()
                try:
                    self._load_and_build(program_class, key)
                finally:
                    self._builder = None

    def _load_and_build(self, program_class: type[Any], key: Any) -> None:
        loaded = self._loaded
        if loaded is not None and (program_class, key) not in loaded.programs and len(loaded.programs) >= MAX_PROGRAMS:
            self._drop(loaded)  # nodes cannot be removed from a graph; only the whole graph can be dropped
        with self._state_lock:
            loaded = self._loaded and self._loaded.add_user()
        if loaded is None:
            probe_devices()
            loaded = _Loaded(self._session_with_weights()).add_user()
            self._loaded = loaded
        with self._in_use(loaded):
            if (program_class, key) not in loaded.programs:
                try:
                    with self._open(loaded.session.graph):
                        program = program_class(key, self._model)
                    self.mesh.extend(loaded.session)
                except KeyboardInterrupt:
                    self._drop(loaded)  # what is built in its graph next might be placed by a scope left open
                    raise
                loaded.programs[program_class, key] = program

    @contextlib.contextmanager
    def _in_use(self, loaded: "_Loaded") -> Iterator[None]:
        """For what has added itself as a user of `loaded`."""
        try:
            yield
        except ClusterError:
            self._drop(loaded)  # the processes' state is lost: the next request starts over
            raise
        finally:
            self._remove_user(loaded)

    def _drop(self, loaded: "_Loaded | None") -> None:
        """Lets no further run begin in it; it is closed once the current ones have ended."""
        with self._state_lock:
            if loaded is None or self._loaded is not loaded:
                return
            self._loaded = None
        self._remove_user(loaded)

    def _remove_user(self, loaded: "_Loaded") -> None:
        with self._state_lock:
            loaded.n_users -= 1
            unused = loaded.n_users == 0
        if unused:
            loaded.session.close()

    def _open(self, graph: tf.Graph) -> contextlib.AbstractContextManager[None]:
        return opened(graph, self.mesh.place())

    def _session_with_weights(self) -> tf.Session:
        graph = tf.Graph()
        with self._open(graph):
            weights = add_variables(self._model)
            session = self.mesh.session(graph)
            try:
                extend_when_told(session)
                self.mesh.extend(session)
                run = functools.partial(self.mesh.run, session)
                fill_variables(self._checkpoint, weights, self._model, run)
            except BaseException:
                session.close()
                raise
        return session


@dataclasses.dataclass
class _Loaded:
    """Weights in a session, and the graphs on them."""

    session: tf.Session
    programs: dict[tuple[type[Any], Any], Any] = dataclasses.field(default_factory=dict)  # by class and key
    n_users: int = 1  # `Graphs`, until it drops it, and those that run or build a graph

    def add_user(self) -> "_Loaded":
        self.n_users += 1
        return self


@dataclasses.dataclass
class RowArrays:
    """The rows of a `SegmentProgram` and where each stands."""

    prompt_indices: np.ndarray  # int64 [rows], of its prompt in the request
    streams: np.ndarray  # int32 [rows]
    prompt_lengths: np.ndarray  # int32 [rows], at least 1
    limits: np.ndarray  # int32 [rows], the most new tokens
    n_drawn: np.ndarray  # int32 [rows], new tokens so far
    done: np.ndarray  # bool [rows]
    ids: np.ndarray  # int32 [rows, length]; prompt and new tokens
    answers: list[np.ndarray]  # [rows, length, …]: see `answers_of`
    control_states: list[np.ndarray]  # float32 [rows], as many as the key's n_control_states
    states: list[np.ndarray]  # the model's, [rows, heads, memory_length, features_per_head]


class DecodeProgram:
    """A decode graph. Its results are tokens, and log-probabilities if the key asks for them."""

    def __init__(self, key: ProgramKey, model: Model) -> None:
        def option(name: str) -> tf.Tensor:
            return tf.placeholder(PER_PROMPT[name].dtype, [key.rows, *PER_PROMPT[name].shape])

        options = {name: option(name) for name in sorted(key.steps)}
        options.update((name, tf.placeholder(tf.float32, [model.n_vocab])) for name in sorted(key.arrays))
        sequences = {
            name: TokenSequences(*map(tf.placeholder, TokenSequences.dtypes, shapes)) for name, shapes in key.sequences
        }
        prefix_functions = None
        if key.has_prefix_function:
            prefix_functions = PrefixFunctions(
                weakref.WeakValueDictionary(), tf.placeholder(tf.int32, []), tf.placeholder(tf.int32, [key.rows])
            )
        self._n_vocab = model.n_vocab
        self._inputs = ProgramInputs(
            ids=tf.placeholder(tf.int32, [key.batch, key.length]),
            prompt_lengths=tf.placeholder(tf.int32, [key.batch]),
            max_steps=tf.placeholder(tf.int32, [key.rows]),
            stream=option("stream"),
            seed=option("seed"),
            stop_tokens=[tf.placeholder(tf.int32, []) for _ in range(key.n_stop_tokens)],
            temperature=option("temperature"),
            options=options,
            sequences=sequences,
            prefix_functions=prefix_functions,
        )
        self.results = self._build(key, model)

    def _build(self, key: ProgramKey, model: Model) -> Any:
        return build(key, self._inputs, model)

    def cause(self, feeds: dict[tf.Tensor, Any]) -> BaseException | None:
        """What a user's function raised in the run of these feeds, which TensorFlow hides in an error of its own."""
        asked = self._inputs.prefix_functions
        return None if asked is None else asked.functions[feeds[asked.run]].error

    def feeds(
        self, key: ProgramKey, request: Request, prompt_range: range, sample_range: range, limits: list[int]
    ) -> dict[tf.Tensor, Any]:
        """The feeds for a range of a `Request`'s prompts and of their samples; limits: the most new tokens of each
        prompt."""
        inputs, prompts = self._inputs, request.prompts[prompt_range.start : prompt_range.stop]
        n_padding = key.batch - len(prompts)  # rows of one token, and no step, that fill the batch
        ids = padded(prompts, [key.batch, key.length])

        def for_rows(name: str) -> np.ndarray:
            values = request.values[name][prompt_range.start : prompt_range.stop]
            padding = [(0, n_padding), *[(0, 0)] * (values.ndim - 1)]
            return np.repeat(np.pad(values, padding, mode="edge"), key.samples, axis=0)

        n_samples = request.num_return_sequences
        indices = [p * n_samples + n for p in prompt_range for n in sample_range] + [NO_ROW] * n_padding * key.samples
        return {
            inputs.ids: ids,
            inputs.prompt_lengths: [len(p) for p in prompts] + [1] * n_padding,
            inputs.max_steps: np.repeat(limits + [0] * n_padding, key.samples),
            inputs.stream: for_rows("stream") + np.tile(np.array(sample_range, np.int32), key.batch),
            **self._feeds_of_request(key, request, for_rows, indices),
        }

    def _feeds_of_request(
        self, key: ProgramKey, request: Request, for_rows: Callable[[str], np.ndarray], indices: Sequence[int]
    ) -> dict[tf.Tensor, Any]:
        """What does not depend on the step.

        for_rows: a function of an option's name to its value for each row; indices: of each row's sample, or NO_ROW.
        """
        inputs = self._inputs
        stop_tokens = request.stop_tokens + [NO_STOP_TOKEN] * (key.n_stop_tokens - len(request.stop_tokens))
        feeds: dict[tf.Tensor, Any] = {
            inputs.seed: for_rows("seed"),
            inputs.temperature: for_rows("temperature"),
            **dict(zip(inputs.stop_tokens, stop_tokens)),
            **{placeholder: for_rows(name) for name, placeholder in inputs.options.items() if name in key.steps},
        }
        for name, array in request.arrays.items():
            feeds[inputs.options[name]] = np.pad(array, (0, self._n_vocab - len(array)))
        for name, sequences in request.sequences.items():
            feeds.update(zip(inputs.sequences[name].arrays(), sequences.arrays()))
        if inputs.prefix_functions is not None:
            assert request.prefix_function is not None
            number = next(_numbers) % 2**31
            inputs.prefix_functions.functions[number] = request.prefix_function  # which lives until the run ends
            feeds.update({inputs.prefix_functions.run: number, inputs.prefix_functions.rows: indices})
        return feeds


class WatchedProgram(DecodeProgram):
    """A decode graph that calls a `Watcher` after each step."""

    def _build(self, key: ProgramKey, model: Model) -> Any:
        self._number = tf.placeholder(tf.int32, [])  # which watcher belongs to the run
        self._watchers: weakref.WeakValueDictionary[int, Watcher] = weakref.WeakValueDictionary()
        return self._build_watched(key, model)

    def _build_watched(self, key: ProgramKey, model: Model) -> Any:
        return build(key, self._inputs, model, on_tokens=self._watch, run_number=self._number)

    def _watch(self, tokens: np.ndarray, n_drawn: np.ndarray, number: np.ndarray) -> np.ndarray:
        return self._watchers[int(number)](tokens, n_drawn)

    def feeds(self, *args: Any, watcher: Watcher | None = None) -> dict[tf.Tensor, Any]:
        """watcher: of this run; the caller keeps it alive until the run ends."""
        return {**super().feeds(*args), self._number: self._number_of(watcher)}

    def _number_of(self, watcher: Watcher | None) -> int:
        """The number by which the graph's calls find the watcher."""
        assert watcher is not None
        number = next(_numbers) % 2**31
        self._watchers[number] = watcher
        return number


_numbers = itertools.count()


class SegmentProgram(WatchedProgram):
    """Some steps of rows that are under way, with a `Watcher`. Its results are a pair: those of a DecodeProgram, and 0.
    The model's states are where `RowArrays` has them."""

    def _build_watched(self, key: ProgramKey, model: Model) -> Any:
        self._position = tf.placeholder(tf.int32, [key.rows])
        self._done = tf.placeholder(tf.bool, [key.rows])
        self._control_states = [tf.placeholder(tf.float32, [key.rows]) for _ in range(key.n_control_states)]
        results, self._states, new_states = build_segment(
            key, self._inputs, self._position, self._done, model, self._watch, self._number, self._control_states
        )
        self._runs: weakref.WeakValueDictionary[int, RowArrays] = weakref.WeakValueDictionary()
        # not fetched, which copies them: what is fed was overwritten where it lies, as a rule
        return results, tf.numpy_function(self._keep, [self._number, *new_states], tf.float32)

    def _keep(self, number: np.ndarray, *states: np.ndarray) -> np.float32:
        for own, new in zip(self._runs[int(number)].states, states):
            if not np.may_share_memory(own, new):
                own[:] = new
        return np.float32(0)

    def feeds(self, *args: Any, watcher: Watcher | None = None) -> dict[tf.Tensor, Any]:
        """args: the key, a `Request`, and the `RowArrays` of its rows. The caller keeps these and the watcher alive
        until the run ends."""
        key, request, rows = args
        inputs, number = self._inputs, self._number_of(watcher)
        self._runs[number] = rows
        return {
            self._number: number,
            inputs.ids: rows.ids,
            inputs.prompt_lengths: rows.prompt_lengths,
            inputs.max_steps: rows.limits,
            self._position: rows.prompt_lengths + rows.n_drawn,
            self._done: rows.done,
            inputs.stream: rows.streams,
            **self._feeds_of_request(
                key, request, lambda name: request.values[name][rows.prompt_indices], [NO_ROW] * key.rows
            ),
            **dict(zip(self._control_states, rows.control_states)),
            **dict(zip(self._states, rows.states)),
        }


@dataclasses.dataclass(frozen=True)
class FirstPassKey:
    batch: int  # prompts
    length: int


class FirstPassProgram:
    """A pass over prompts. Its results are the model's states."""

    def __init__(self, key: FirstPassKey, model: Model) -> None:
        self._ids = tf.placeholder(tf.int32, [key.batch, key.length])
        self._lengths = tf.placeholder(tf.int32, [key.batch])
        self.results = build_first_pass(self._ids, self._lengths, model)

    def feeds(self, key: FirstPassKey, prompts: list[list[int]]) -> dict[tf.Tensor, Any]:
        """prompts: lists of ids, at most as many as the batch."""
        ids = padded(prompts, [key.batch, key.length])
        return {self._ids: ids, self._lengths: [len(p) for p in prompts] + [1] * (key.batch - len(prompts))}


class ChainProgram(DecodeProgram):
    """One step after a prompt. Its results are a dict: (number, name) of each step of the chain -> probabilities."""

    def _build(self, key: ProgramKey, model: Model) -> Any:
        return {(i, name): p for i, (name, p) in enumerate(build_chain(key, self._inputs, model))}


def program_key(
    request: Request, prompts: list[list[int]], limits: list[int], n_samples: int, mesh: DeviceMesh
) -> ProgramKey:
    """The ProgramKey of the smallest graph for these prompts of a `Request`, lists of ids.

    limits: the most new tokens of each prompt; n_samples: samples of each prompt; mesh: `devices.DeviceMesh`.
    """
    n_ctx, n_vocab = request.n_ctx, request.n_vocab
    steps = request.steps
    return ProgramKey(
        batch=_batch(len(prompts), mesh),
        prompt_length=_length(max(map(len, prompts)), n_ctx, mesh),
        length=_length(max(len(p) + n for p, n in zip(prompts, limits)), n_ctx, mesh),
        samples=n_samples,
        greedy=request.greedy,
        steps=steps,
        arrays=frozenset(request.arrays),
        sequences=tuple((name, sequences.shapes) for name, sequences in sorted(request.sequences.items())),
        max_top_k=_round_up_top_k(request.values["top_k"].max(), n_vocab) if "top_k" in steps else None,
        n_stop_tokens=round_up_power(max(1, len(request.stop_tokens))),
        no_repeat_ngram_size=request.options.no_repeat_ngram_size,
        logits_processors=tuple(request.options.logits_processors),
        has_prefix_function=request.prefix_function is not None,
        return_logprobs=request.options.return_logprobs,
        top_logprobs=request.options.top_logprobs or 0,
    )


def prompt_length_of(prompt: list[int], n_ctx: int) -> int:
    """The length of a `FirstPassProgram` for a prompt: a power of two from SHORTEST on, at most n_ctx."""
    return min(max(SHORTEST, round_up_power(len(prompt))), n_ctx)


def score_key(rows: list[list[int]], n_ctx: int, mesh: DeviceMesh) -> ScoreKey:
    """The ScoreKey of the smallest graph for these rows of ids."""
    return ScoreKey(_batch(len(rows), mesh), _length(max(map(len, rows)), n_ctx, mesh))


def _batch(rows: int, mesh: DeviceMesh) -> int:
    return round_up(round_up_power(rows), mesh.parts("batch"))


def _length(length: int, n_ctx: int, mesh: DeviceMesh) -> int:
    return round_up(_round_up_length(length, n_ctx), mesh.parts("memory_length"))


def round_up_power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _round_up_length(length: int, n_ctx: int) -> int:
    """32, 48, 64, 96, 128, …: powers of two and the midpoints between them."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, n_ctx)


def _round_up_top_k(top_k: int, n_vocab: int) -> int:
    return next(k for k in (64, 1024, n_vocab) if top_k <= k)
