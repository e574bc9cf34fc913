"""One decode graph of fixed sizes, and the weights in it: what `generate` runs and `export` writes."""

import contextlib
import dataclasses
import pathlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import mtf, quiet_logging, tf
from gpt_neo_sampling._types import DType, LogitsProcessor, Params
from gpt_neo_sampling.checkpoint import Checkpoint, CheckpointError
from gpt_neo_sampling.checkpoint.variables import fill_slices
from gpt_neo_sampling.generation.options import DTYPES
from gpt_neo_sampling.mesh.ops import host_call, take
from gpt_neo_sampling.models import config, gpt2
from gpt_neo_sampling.models.decoding_context import Decoder
from gpt_neo_sampling.models.utils import biasmask_attn_weights
from gpt_neo_sampling.sample import StoppingCriteria, continue_rows, sample_autoregressive
from gpt_neo_sampling.sampling.controls import INT32_MAX, NUMBERS, History, SamplingOptions, check_int
from gpt_neo_sampling.sampling.next_token import chain_distributions
from gpt_neo_sampling.sampling.prefix_function import PrefixFunctions
from gpt_neo_sampling.sampling.token_sequences import TokenSequences

DEMO_FOLDER = pathlib.Path(__file__).parents[1] / "demo"
NO_STOP_TOKEN = -1  # no id is drawn that equals it
MOST_STOP_TOKENS = 256  # a graph is built for their number

OnTokens = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # see `build`


@contextlib.contextmanager
def opened(graph: tf.Graph, place: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """A context to build in a graph that holds a model's variables once; `place` is entered too."""
    try:
        with graph.as_default(), quiet_logging(), place, tf.variable_scope("", reuse=tf.AUTO_REUSE):
            yield
    except Exception as e:
        behind: BaseException | None = e
        while behind is not None:  # TensorFlow's scopes fail to close where Ctrl-C came within one, and hide it
            if isinstance(behind, KeyboardInterrupt):
                raise behind from None
            behind = behind.__context__
        raise


def padded(rows: Sequence[Sequence[int]], shape: Sequence[int]) -> np.ndarray:
    """int32 ids of this shape, each of the rows followed by zeros."""
    ids = np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids


@dataclasses.dataclass(frozen=True)
class Model:
    """What every graph of a model is built from; its variables are in the scope "gpt2".

    Attributes:
      params: GPT-Neo's config, a dict, mode "predict".
      n_vocab: int, entries of the vocabulary's dimension, padding included.
      mesh_impl: what graphs are lowered on.
      variable_dtype: mtf.VariableDType.
      jit_compile: whether XLA compiles decode loops.
    """

    params: Params
    n_vocab: int
    mesh_impl: mtf.MeshImpl
    variable_dtype: mtf.VariableDType
    jit_compile: bool = False

    def inputs(self, batch: int, length: int) -> tuple[mtf.Mesh, mtf.Shape, dict[str, Any]]:
        """A new mesh, the shape of the model's ids on it, and GPT-Neo's other_features."""
        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        sequence_dim = mtf.Dimension("sequence", length)
        memory_dim = mtf.Dimension("memory_length", length + config.n_learned_keys(self.params))
        other_features = {
            "embd_dim": mtf.Dimension("embd", self.params["n_embd"]),
            "vocab_dim": mtf.Dimension("vocab", self.n_vocab),
            "embed_sequence_dim": mtf.Dimension("embed_sequence", self.params["n_ctx"]),
            "memory_length_dim": memory_dim,
            "attn_bias": biasmask_attn_weights(mesh, sequence_dim, memory_dim, self.variable_dtype),
        }
        return mesh, mtf.Shape([mtf.Dimension("batch", batch), sequence_dim]), other_features

    def logits(self, ids: mtf.Tensor, other_features: dict[str, Any]) -> mtf.Tensor:
        """The logits [batch, sequence, vocab] after each of the ids [batch, sequence]."""
        with tf.variable_scope("gpt2"):
            return gpt2.model({"inputs": ids}, other_features, self.params, ids.mesh, self.variable_dtype)[0]

    def lowered(self, mesh: mtf.Mesh) -> mtf.Lowering:
        """The lowering of all that was built on a mesh."""
        return mtf.Lowering(mesh.graph, {mesh: self.mesh_impl}, autostack=False)


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """What a graph is built for: its sizes, and the steps of sampling that it has."""

    batch: int  # prompts
    prompt_length: int
    length: int  # prompt and new tokens
    samples: int = 1  # rows of each prompt
    greedy: bool = False
    steps: frozenset[str] = frozenset()  # names of numbers among the controls that the request has
    arrays: frozenset[str] = frozenset()  # names of logit_bias and of sets of tokens that it has
    sequences: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()  # pairs of a name and TokenSequences.shapes
    max_top_k: int | None = None
    n_stop_tokens: int = 1
    no_repeat_ngram_size: int | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()  # see `sample_autoregressive`
    has_prefix_function: bool = False
    return_logprobs: bool = False
    top_logprobs: int = 0

    @property
    def rows(self) -> int:
        return self.batch * self.samples

    @property
    def n_control_states(self) -> int:
        """How many states the controls keep."""
        return sum(NUMBERS[name].keeps_state for name in self.steps)


@dataclasses.dataclass
class ProgramInputs:
    """What a graph is run with."""

    ids: tf.Tensor  # int32 [batch, length]; prompts, and anything after them
    prompt_lengths: tf.Tensor  # int32 [batch]
    # the rest scalar or [rows]
    max_steps: tf.Tensor  # int32
    stream: tf.Tensor  # int32
    seed: tf.Tensor  # int32
    stop_tokens: list[tf.Tensor]  # int32
    temperature: tf.Tensor  # float32; unused in a greedy graph
    options: dict[str, tf.Tensor]  # of the key's steps, name -> tensor [rows, …]; of its arrays, float32 [vocab]
    sequences: dict[str, TokenSequences] = dataclasses.field(default_factory=dict)
    prefix_functions: PrefixFunctions | None = None

    def row_options(self) -> dict[str, Any]:
        """The controls as `sample_autoregressive` and SamplingOptions take them, but for the key's own."""
        pairs = {name: tuple(tf.unstack(x, axis=-1)) for name, x in self.options.items() if x.shape.rank == 2}
        return {
            **self.options,
            **{name: (tf.cast(start, tf.int32), factor) for name, (start, factor) in pairs.items()},
            **self.sequences,
            "prefix_allowed_tokens_fn": self.prefix_functions,
        }


def build(
    key: ProgramKey,
    inputs: ProgramInputs,
    model: Model,
    bos_id: int = 0,
    on_tokens: OnTokens | None = None,
    run_number: tf.Tensor | None = None,
) -> list[tf.Tensor]:
    """Adds a decode graph to the one that is open.

    Args:
      key: ProgramKey.
      inputs: ProgramInputs.
      model: Model.
      bos_id: int, the token that an empty prompt is replaced by.
      on_tokens: None, or a function called after each step with ndarrays [rows]:
        each row's last token, and how many new ones it has, and with `run_number`; it returns
        a float32 one, 1.0 for rows that are done.
      run_number: int32 scalar tf.Tensor, which run of the graph it is; with on_tokens.

    Returns:
      a list: int32 tf.Tensor [rows, length], and with the key's return_logprobs and
      top_logprobs more: see `sample_autoregressive`.
    """
    mesh, shape, other_features = model.inputs(key.batch, key.length)
    watch = None
    if on_tokens is not None:
        rows = mtf.Shape([mtf.Dimension(shape[0].name, key.rows)])
        prompt_lengths = tf.repeat(tf.maximum(inputs.prompt_lengths, 1), key.samples)
        watch = _stopping_criteria(on_tokens, mtf.import_tf_tensor(mesh, prompt_lengths, rows), run_number)
    options = inputs.row_options()
    top_k, alpha = options.pop("top_k", None), options.pop("entmax_alpha", None)
    results = sample_autoregressive(
        mtf.import_tf_tensor(mesh, inputs.ids, shape),
        other_features,
        model.params,
        stop_at_token=inputs.stop_tokens,
        max_steps=inputs.max_steps,
        temperature=0 if key.greedy else inputs.temperature,
        variable_dtype=model.variable_dtype,
        sampling_keep_top_k=-1 if top_k is None else top_k,
        max_top_k=key.max_top_k,
        sampling_use_entmax=alpha is not None,
        entmax_alpha=alpha,
        bos_id=bos_id,
        seed=inputs.seed,
        stream=inputs.stream,
        prompt_lengths=inputs.prompt_lengths,
        max_prompt_length=key.prompt_length,
        no_repeat_ngram_size=key.no_repeat_ngram_size,
        logits_processors=key.logits_processors,
        stopping_criteria=watch,
        num_return_sequences=key.samples,
        return_logprobs=key.return_logprobs,
        top_logprobs=key.top_logprobs,
        # bfloat16 products of more rows than one are slower in XLA than TensorFlow's own on CPUs
        jit_compile=model.jit_compile and (key.rows == 1 or model.variable_dtype.activation_dtype == tf.float32),
        **options,
    )
    results = results if key.return_logprobs else [results]
    return list(map(model.lowered(mesh).export_to_tf_tensor, results))


def build_chain(key: ProgramKey, inputs: ProgramInputs, model: Model) -> list[tuple[str, tf.Tensor]]:
    """Adds a graph of the one step after a prompt to the graph that is open.

    Args:
      key: ProgramKey, of one prompt.
      inputs: ProgramInputs; max_steps says how many of a prompt's tokens are new ones.
      model: Model.

    Returns:
      a list of pairs of a step's name and float32 tf.Tensor [1, vocab]: see
      `chain_distributions`.
    """
    mesh, shape, other_features = model.inputs(key.batch, key.length)
    ids = mtf.import_tf_tensor(mesh, inputs.ids, shape)
    position = mtf.import_tf_tensor(mesh, inputs.prompt_lengths, shape[:1])
    options = _sampling_options(key, inputs, model, mesh, shape[:1])
    vocab_dim = other_features["vocab_dim"]
    logits = take(model.logits(ids, other_features), position - 1, shape[1])
    n_new = mtf.import_tf_tensor(mesh, inputs.max_steps, shape[:1])
    found = chain_distributions(logits, vocab_dim, options, History(ids, position, position - n_new))
    lowering = model.lowered(mesh)
    return [(name, lowering.export_to_tf_tensor(p)) for name, p in found]


def _sampling_options(
    key: ProgramKey, inputs: ProgramInputs, model: Model, mesh: mtf.Mesh, rows: mtf.Shape
) -> SamplingOptions:
    def imported(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(imported, value))
        return mtf.import_tf_tensor(mesh, value, rows)

    rest = inputs.row_options()
    rest = {name: imported(value) if name in key.steps else value for name, value in rest.items()}
    return SamplingOptions(
        logits_processors=key.logits_processors,
        no_repeat_ngram_size=key.no_repeat_ngram_size,
        stop_tokens=tuple(mtf.import_tf_tensor(mesh, t, mtf.Shape([])) for t in inputs.stop_tokens),
        temperature=0 if key.greedy else mtf.import_tf_tensor(mesh, inputs.temperature, rows),
        max_top_k=key.max_top_k,
        use_entmax="entmax_alpha" in key.steps,
        vocab_size=model.params["n_vocab"] if model.n_vocab > model.params["n_vocab"] else None,
        **rest,
    )


def _decoder(lengths: mtf.Tensor, length_dim: mtf.Dimension, other_features: dict[str, Any], model: Model) -> Decoder:
    """lengths: int32 [rows], the prompts'."""
    return Decoder(gpt2.model, model.params, other_features, model.variable_dtype, length_dim, lengths, None, {})


def build_first_pass(ids: tf.Tensor, lengths: tf.Tensor, model: Model) -> list[tf.Tensor]:
    """Adds a graph that reads prompts to the graph that is open.

    Args:
      ids: int32 tf.Tensor [batch, length]; prompts, and anything after them.
      lengths: int32 tf.Tensor [batch], the prompts', at least 1.
      model: Model.

    Returns:
      a list of tf.Tensors [batch, heads, memory_length, features_per_head], the model's states; the memory has
      `length` positions after its learned keys.
    """
    mesh, shape, other_features = model.inputs(*ids.shape.as_list())
    decoder = _decoder(mtf.import_tf_tensor(mesh, lengths, shape[:1]), shape[-1], other_features, model)
    states = decoder.first_pass(mtf.import_tf_tensor(mesh, ids, shape), shape[-1].size)
    return list(map(model.lowered(mesh).export_to_tf_tensor, states))


def build_segment(
    key: ProgramKey,
    inputs: ProgramInputs,
    position: tf.Tensor,
    done: tf.Tensor,
    model: Model,
    on_tokens: OnTokens,
    run_number: tf.Tensor,
    control_states: list[tf.Tensor],
) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
    """Adds a graph of some steps of rows that are under way to the graph that is open.

    Args:
      key: ProgramKey, of one sample a prompt.
      inputs: ProgramInputs; behind a prompt its ids have the new tokens so far.
      position: int32 tf.Tensor [rows], where each row's next token goes.
      done: bool tf.Tensor [rows].
      model: Model.
      on_tokens, run_number: as for `build`.
      control_states: float32 tf.Tensors [rows], as for `continue_rows`, as many as `n_control_states` says.

    Returns:
      (results, states, new_states): lists of tf.Tensors. The results are those of `build`, see `continue_rows`, and
      then the new control_states; the
      states are placeholders like what `build_first_pass` returns, with `key.length` positions, and may be overwritten
      where they lie.
    """
    mesh, shape, other_features = model.inputs(key.batch, key.length)
    rows = shape[:1]
    ids = mtf.import_tf_tensor(mesh, inputs.ids, shape)
    lengths = mtf.import_tf_tensor(mesh, inputs.prompt_lengths, rows)
    decoder = _decoder(lengths, shape[-1], other_features, model)
    # for what it keeps besides the states, of which only the shapes are used: TensorFlow does not compute them
    shapes = decoder.first_pass(ids, 1)
    states = [tf.placeholder(s.dtype, s.shape.to_integer_list) for s in shapes]
    results, new_control_states, new_states = continue_rows(
        ids,
        lengths,
        mtf.import_tf_tensor(mesh, position, rows),
        mtf.import_tf_tensor(mesh, done, rows),
        [mtf.import_tf_tensor(mesh, fed, s.shape) for fed, s in zip(states, shapes)],
        decoder,
        other_features["vocab_dim"],
        _sampling_options(key, inputs, model, mesh, rows),
        seed=inputs.seed,
        stream=inputs.stream,
        max_steps=inputs.max_steps,
        stopping_criteria=_stopping_criteria(on_tokens, lengths, run_number),
        return_logprobs=key.return_logprobs,
        top_logprobs=key.top_logprobs,
        control_states=[mtf.import_tf_tensor(mesh, state, rows) for state in control_states],
    )
    export = model.lowered(mesh).export_to_tf_tensor
    return list(map(export, results + new_control_states)), states, list(map(export, new_states))


def _stopping_criteria(on_tokens: OnTokens, prompt_lengths: mtf.Tensor, run_number: tf.Tensor) -> StoppingCriteria:
    """What calls on_tokens after each step, see `build`; prompt_lengths: int32 mtf.Tensor [rows]."""
    number = mtf.import_tf_tensor(prompt_lengths.mesh, run_number, mtf.Shape([]))

    def watch(ids: mtf.Tensor, position: mtf.Tensor) -> mtf.Tensor:
        return host_call(on_tokens, [take(ids, position - 1, ids.shape[-1]), position - prompt_lengths, number])

    return watch


def add_variables(model: Model) -> dict[str, tuple[mtf.Shape, Any]]:
    """Adds a model's variables to the graph that is open, for decode graphs to use.

    Weights are loaded while there is nothing else in the graph: TensorFlow works
    through all of it for each set of variables that is filled.

    Args:
      model: Model.

    Returns:
      a dict, name -> (mtf.Shape, mtf's laid-out variable), for `fill_variables`.
    """

    def name_alone(getter: Any, name: str, *args: Any, **kwargs: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(name=f"{name}:0")

    # the model itself knows what it has; all that mtf asks of its variables there is the name
    with tf.Graph().as_default(), tf.variable_scope("", custom_getter=name_alone):
        mesh, shape, other_features = model.inputs(1, 1)
        model.logits(mtf.zeros(mesh, shape, tf.int32), other_features)
        found = [(v.name, v.shape) for v in mesh.graph.all_variables]
    mesh = mtf.Mesh(mtf.Graph(), "mesh")
    for name, shape in found:
        # never run; others are many nodes
        mtf.get_variable(mesh, name, shape, dtype=model.variable_dtype, initializer=tf.zeros_initializer())
    return {v.name.removeprefix("gpt2/"): (v.shape, slices) for v, slices in model.lowered(mesh).variables.items()}


def fill_variables(
    checkpoint: Checkpoint, weights: dict[str, tuple[mtf.Shape, Any]], model: Model, run: Callable[..., Any]
) -> None:
    """Fills the slices of the variables from a checkpoint.

    Args:
      checkpoint: a `Checkpoint`.
      weights: what `add_variables` returned.
      model: what it was given.
      run: a function of (operations, feeds): a session's.

    Raises:
      CheckpointError: if the variables are others.
    """
    missing = sorted(set(weights) ^ set(checkpoint.names()))
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: model and checkpoint differ in {', '.join(missing[:5])}")

    def read(name: str) -> np.ndarray:
        value = checkpoint.read(name)
        return value.T if model.params.get("transposed_weights") and gpt2.is_matrix(name) else value

    fill_slices(weights, read, model.mesh_impl, run)


def first_token_of(checkpoint: Checkpoint) -> int:
    """int: the token that an empty prompt is replaced by, the model's bos_id or else its eos_id.

    Raises:
      ValueError: if it names neither, or one outside the vocabulary.
    """
    defaults, n_vocab = checkpoint.generation_defaults, checkpoint.params["n_vocab"]
    first = defaults.get("bos_token_id", defaults.get("eos_token_id"))
    if isinstance(first, list):
        first = first[0]
    if first is None or not 0 <= first < n_vocab:
        named = "none" if first is None else first
        raise ValueError(
            f"the model's first token is needed, and it names {named} (bos_id, or else eos_id); "
            f"0 to {n_vocab - 1} are allowed"
        )
    return first


def stop_tokens_of(checkpoint: Checkpoint, eos_token_id: Any = None) -> list[int]:
    """A list of ints, the stop tokens; for None the model's own. NO_STOP_TOKEN, or none at all, is none."""
    name, most = "eos_token_id", checkpoint.params["n_vocab"] - 1
    if eos_token_id is None:  # which a config may name beyond its vocabulary, where none is
        eos_token_id, most = checkpoint.generation_defaults.get("eos_token_id", NO_STOP_TOKEN), INT32_MAX
        name = "the model's eos_token_id"
    ids = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    for i in ids:
        check_int(name, i, NO_STOP_TOKEN if len(ids) == 1 else 0, most)
    ids = list(dict.fromkeys(int(i) for i in ids if i != NO_STOP_TOKEN))
    if len(ids) > MOST_STOP_TOKENS:
        raise ValueError(f"{name} has {len(ids)} tokens; at most {MOST_STOP_TOKENS} are allowed")
    return ids


def variable_dtype_of(dtype: DType | None) -> mtf.VariableDType:
    """The mtf.VariableDType for one of DTYPES, a str or a tf.DType; None is float32."""
    name = DTYPES[0] if dtype is None else getattr(dtype, "name", dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    return mtf.VariableDType(tf.as_dtype(name))
