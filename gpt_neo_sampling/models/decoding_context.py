"""The model's side of a decode loop: the context of each call, and the states kept between calls."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling._types import Params
from gpt_neo_sampling.mesh.ops import (
    check_tensor,
    computed_once,
    cwise_broadcast,
    force_allreduce,
    from_loop,
    repeat,
    resize,
    take,
    to_loop,
)
from gpt_neo_sampling.models.utils import feature_dim

Model = Callable[..., tuple[mtf.Tensor, Any, Any]]  # with the arguments of `models.gpt2.model`


@dataclasses.dataclass
class DecodeContext:
    """What a model is told in a decode loop, and where it records its states.

    The attributes are those of mesh-tensorflow's own `Context`, so models written
    for that class work with this one. Attributes not listed here keep that class's
    defaults.

    Attributes:
      mesh: mtf.Mesh.
      batch_dims: list of the rows' mtf.Dimensions.
      length_dim: mtf.Dimension of the ids.
      variable_dtype: mtf.VariableDType.
      mode: "first_part" for all positions at once, "incremental" for one token per row.
      position: int32 mtf.Tensor; if incremental [batch], the position about to be
        written (the model reads the token before it); in the first part [length].
      position_is_default: True in the first part: positions are 0, 1, 2, …
      states: if incremental, a list of mtf.Tensor, what the previous call recorded.
      new_states: list of mtf.Tensor, what this call records.
      initial_position: int32 mtf.Tensor [batch], the prompts' lengths.
      inputs: int32 mtf.Tensor [batch, length].
      write_priority: int32 mtf.Tensor [batch, length]; a query may see the keys whose
        write priority is at most its read priority.
      read_priority: the same; if incremental [batch].
      encoder_output, encoder_sequence_id, encoder_inputs, encoder_layer_outputs,
        shared_params: as `sample_autoregressive` was given them.
      constant_states: list of mtf.Tensor, recorded in the first part and read in
        every step.
      may_overwrite_states: True if nobody else reads `states`.
    """

    mesh: mtf.Mesh
    batch_dims: list[mtf.Dimension]
    length_dim: mtf.Dimension
    variable_dtype: mtf.VariableDType
    mode: str
    position: mtf.Tensor
    position_is_default: bool = False
    states: Any = None
    new_states: Any = None
    initial_position: mtf.Tensor | None = None
    inputs: mtf.Tensor | None = None
    sequence_id: mtf.Tensor | None = None
    subsequence_id: mtf.Tensor | None = None
    read_priority: mtf.Tensor | None = None
    write_priority: mtf.Tensor | None = None
    encoder_output: Any = None
    encoder_sequence_id: mtf.Tensor | None = None
    encoder_inputs: mtf.Tensor | None = None
    encoder_layer_outputs: list[mtf.Tensor] | None = None
    constant_states: Any = None
    shared_params: dict[str, Any] | None = None
    losses: list[mtf.Tensor] | None = None
    layer_outputs: list[mtf.Tensor] = dataclasses.field(default_factory=list)
    model: Any = None
    beam_dim: mtf.Dimension | None = None
    num_microbatches: int = 1
    layer_index: int = 0
    next_constant_state: int = 0
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)
    input_embeddings: mtf.Tensor | None = None
    may_overwrite_states: bool = False

    def __post_init__(self) -> None:
        self.shared_params = self.shared_params or {}

    @property
    def train(self) -> bool:
        """False: a loop only decodes."""
        return False

    @property
    def activation_dtype(self) -> tf.DType:
        """tf.DType that activations are computed in."""
        return self.variable_dtype.activation_dtype

    @property
    def encoder_length_dim(self) -> mtf.Dimension:
        """mtf.Dimension "memory_length" of the encoder's output."""
        (dim,) = [d for d in self.encoder_output.shape.dims if d.name == "memory_length"]
        return dim

    @property
    def nonpadding(self) -> mtf.Tensor | None:
        """1 where sequence_id is not 0, else 0, in the activation dtype; sequence_id itself if it is None or 1."""
        if self.sequence_id is None or (isinstance(self.sequence_id, int) and self.sequence_id == 1):
            return self.sequence_id
        return mtf.cast(mtf.not_equal(self.sequence_id, 0), self.activation_dtype)

    def get_position(self) -> mtf.Tensor:
        """int32 mtf.Tensor: `position`, or all positions of length_dim if position_is_default."""
        if self.position_is_default:
            return mtf.range(self.mesh, self.length_dim, tf.int32)
        return self.position

    def get_states(self, n: int) -> list[mtf.Tensor]:
        """The next n of the states that the previous step recorded, a list of mtf.Tensor.

        Raises:
          ValueError: if there are fewer, or in mode "first_part".
        """
        begin, recorded = len(self.new_states), self.states
        if recorded is None:
            raise ValueError(f"get_states({n}) with mode={self.mode!r}: there are states with mode='incremental' alone")
        if begin + n > len(recorded):
            raise ValueError(
                f"get_states({n}): the pass over the prompts recorded {len(recorded)} states, and {begin} of them have "
                "been read"
            )
        return recorded[begin : begin + n]

    def record_new_states(self, new_states: Iterable[mtf.Tensor]) -> None:
        """Records `new_states`, mtf.Tensors for the next step; their shapes must be the same in every step.

        Raises:
          TypeError: for anything but a list of mtf.Tensor.
        """
        if isinstance(new_states, mtf.Tensor):
            raise TypeError("record_new_states: one mtf.Tensor; a list of them is needed")
        new_states = list(new_states)
        for state in new_states:
            check_tensor(state, "record_new_states")
        self.new_states.extend(new_states)

    def record_constant_state(self, s: mtf.Tensor) -> None:
        """In the first part: records `s`, an mtf.Tensor that every step can read."""
        self.constant_states.append(s)

    def get_constant_state(self) -> mtf.Tensor:
        """The next of the constant states, in the order in which they were recorded."""
        self.next_constant_state += 1
        return self.constant_states[self.next_constant_state - 1]


class Decoder:
    """A model that reads whole prompts first, and then one token per row in each step.

    With "slow_sampling" in its params it keeps no states and reads all ids in every step.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        other_features: dict[str, Any],
        variable_dtype: mtf.VariableDType,
        length_dim: mtf.Dimension,
        initial_position: mtf.Tensor,
        shared_params: Any,
        encoder: dict[str, Any],
    ) -> None:
        """
        Args:
          model, params, other_features, variable_dtype, shared_params: as for `sample_autoregressive`.
          length_dim: mtf.Dimension of the ids that the model is called with.
          initial_position: int32 mtf.Tensor [batch], the prompts' lengths, at least 1.
          encoder: a dict of the encoder's outputs and inputs, by their names in DecodeContext.
        """
        self._model, self._params, self._variable_dtype = model, params, variable_dtype
        self._length_dim, self._initial_position = length_dim, initial_position
        self._slow = bool(params.get("slow_sampling"))
        self._other_features, self._shared_params, self._encoder = (
            map_tensors(computed_once, x) for x in (other_features, shared_params, encoder)
        )
        self._constant_states: list[mtf.Tensor] = []
        mesh, rows = initial_position.mesh, initial_position.shape
        # as in GPT-Neo: a new token may be read from its own position on
        self._priority = to_loop(
            cwise_broadcast(
                lambda at, n: tf.where_v2(at > n, at, 0),
                [mtf.range(mesh, length_dim, tf.int32), initial_position],
                rows + length_dim,
            )
        )

    def _call(self, ids: mtf.Tensor, context: DecodeContext | None = None) -> mtf.Tensor:
        """The logits, [rows, length, vocab]."""
        with tf.variable_scope("gpt2", reuse=tf.AUTO_REUSE):
            returned = self._model(
                {"inputs": ids}, self._other_features, self._params, ids.mesh, self._variable_dtype, context=context
            )
        if not isinstance(returned, (tuple, list)) or len(returned) != 3:
            is_alone = not isinstance(returned, (tuple, list))
            kind = "logits alone" if isinstance(returned, mtf.Tensor) else f"a {type(returned).__name__}"
            what = kind if is_alone else f"{len(returned)} values"
            raise TypeError(
                f"the model returned {what}; (logits, loss, loss_batch) is needed, with None for losses that it does "
                "not compute"
            )
        return returned[0]

    def _context(self, mode: str, position: mtf.Tensor, inputs: mtf.Tensor, **kwargs: Any) -> DecodeContext:
        return DecodeContext(
            mesh=inputs.mesh,
            batch_dims=self._initial_position.shape.dims,
            variable_dtype=self._variable_dtype,
            mode=mode,
            position=position,
            new_states=[],
            initial_position=self._initial_position,
            inputs=inputs,
            constant_states=self._constant_states,
            shared_params=self._shared_params,
            **self._encoder,
            **kwargs,
        )

    def first_pass(self, ids: mtf.Tensor, prompt_length: int) -> list[mtf.Tensor]:
        """The model's states after the prompts. None of these is longer than prompt_length."""
        if self._slow:
            return []
        prompt_dim = mtf.Dimension(self._length_dim.name, prompt_length)
        prompts, priority = (resize(x, self._length_dim, prompt_length) for x in (ids, from_loop(self._priority)))
        context = self._context(
            "first_part",
            mtf.range(ids.mesh, prompt_dim, tf.int32),
            prompts,
            length_dim=prompt_dim,
            position_is_default=True,
            read_priority=priority,
            write_priority=priority,
        )
        self._call(prompts, context)
        self._constant_states = map_tensors(force_allreduce, self._constant_states)
        return context.new_states

    def repeat(self, dim: mtf.Dimension, times: int) -> None:
        """From here on each row along `dim` stands for `times` rows."""
        for_each_row = functools.partial(repeat, dim=dim, times=times)
        self._initial_position, self._priority, self._constant_states, self._other_features, self._encoder = (
            map_tensors(for_each_row, x)
            for x in (
                self._initial_position, self._priority, self._constant_states, self._other_features, self._encoder
            )
        )  # fmt: skip

    def step(
        self, ids: mtf.Tensor, position: mtf.Tensor, states: list[mtf.Tensor]
    ) -> tuple[mtf.Tensor, list[mtf.Tensor]]:
        """The logits of the token at `position`, and the states after the token before it.

        Args:
          ids: int32 mtf.Tensor [rows, length].
          position: int32 mtf.Tensor [rows].
          states: those that `first_pass` or the last step returned.

        Returns:
          (logits, states): mtf.Tensor [rows, vocab], and a list of mtf.Tensors.

        Raises:
          TypeError, ValueError: for what the model returned or recorded, if that is not what a step needs.
        """
        rows, vocab_dim = position.shape, feature_dim(self._other_features, "vocab_dim")
        if self._slow:
            logits = self._fitting(self._call(ids), rows + self._length_dim + vocab_dim)
            return take(logits, position - 1, self._length_dim), []
        priority = from_loop(self._priority)
        context = self._context(
            "incremental",
            position,
            ids,
            length_dim=self._length_dim,
            write_priority=priority,
            read_priority=take(priority, position, self._length_dim),
            states=states,
            may_overwrite_states=True,
        )
        logits = self._fitting(self._call(ids, context), rows + vocab_dim)  # drops the sequence dim of 1
        _check_states(context.new_states, states)
        return logits, context.new_states

    def _fitting(self, logits: mtf.Tensor, shape: mtf.Shape) -> mtf.Tensor:
        """The model's logits in this shape: its dims in any order, and any of size 1 beside them.

        In a step the rows' dims may have other names, or be one: they are taken in the order given.
        """
        check_tensor(logits, "the model's logits")
        given, (*row_dims, vocab_dim) = logits.shape.dims, shape.dims
        given_rows = [d for d in given if d != vocab_dim]
        if (
            vocab_dim in given
            and self._length_dim not in [*given, *row_dims]
            and mtf.Shape(given_rows).size == mtf.Shape(row_dims).size
            and all(_stride(given_rows, d) == _stride(row_dims, d) for d in row_dims if d in given_rows)
        ):
            if given[-1] != vocab_dim:
                logits = mtf.transpose(logits, mtf.Shape([*given_rows, vocab_dim]))
            return logits if logits.shape == shape else mtf.reshape(logits, shape)
        if any(d.size > 1 for d in set(given) ^ set(shape.dims)):
            raise ValueError(self._misfit(logits.shape, shape))
        known = [d for d in shape.dims if d in given]
        if known != [d for d in given if d in known]:
            logits = mtf.transpose(logits, mtf.Shape([*(d for d in given if d not in known), *known]))
        return logits if logits.shape == shape else mtf.reshape(logits, shape)

    def _misfit(self, given: mtf.Shape, wanted: mtf.Shape) -> str:
        """What is wrong with logits of another shape than is wanted."""
        vocab_dim = wanted.dims[-1]
        if vocab_dim not in given.dims:
            return f"the model's logits, {_shown(given)}, lack other_features['vocab_dim'], {_shown([vocab_dim])}"
        if self._length_dim in given.dims and self._length_dim not in wanted.dims:
            return (
                f"the model gave logits of all positions, {_shown(given)}, in a step that asks for one token a row: a "
                "model that keeps no states needs params['slow_sampling'] = True, and one that keeps them looks at "
                "context.mode (see DecodeContext)"
            )
        return f"the model's logits are {_shown(given)}; {_shown(wanted)} is needed"


def _stride(dims: list[mtf.Dimension], dim: mtf.Dimension) -> int:
    """How many rows on the next entry of dim is."""
    return mtf.Shape(dims[dims.index(dim) + 1 :]).size


def _shown(dims: Iterable[mtf.Dimension]) -> str:
    return f"[{', '.join(f'{d.name}={d.size}' for d in dims)}]"


def _check_states(new: list[mtf.Tensor], old: list[mtf.Tensor]) -> None:
    """Raises ValueError unless a step recorded states like those before it."""
    kinds = [[f"{s.dtype.name} {_shown(s.shape)}" for s in states] for states in (new, old)]
    if kinds[0] != kinds[1]:
        recorded, before = (f"{len(k)} states ({', '.join(k)})" if k else "no states" for k in kinds)
        raise ValueError(
            f"the model recorded {recorded} in a step, and {before} in the pass over the prompts; each call has to "
            "record as many, of the same shapes and dtypes"
        )


def cut_memory(other_features: dict[str, Any], length_dim: mtf.Dimension, length: int) -> dict[str, Any]:
    """GPT-Neo's features for ids of `length` in place of length_dim's size.

    The memory may be longer than the ids, by the `num_mem_kv` learned keys before theirs, and stays longer by as much;
    attn_bias aligns the ends of both.
    """
    bias = other_features.get("attn_bias")
    if other_features.get("memory_length_dim") is None:
        return other_features
    memory_dim = feature_dim(other_features, "memory_length_dim")
    memory_length = length + max(memory_dim.size - length_dim.size, 0)
    if memory_dim.size <= memory_length:
        return other_features
    other_features = {**other_features, "memory_length_dim": mtf.Dimension(memory_dim.name, memory_length)}
    if bias is not None:
        for d, size in ((memory_dim, memory_length), (length_dim, length)):
            bias = resize(bias, d, size) if d in bias.shape.dims else bias
        other_features["attn_bias"] = force_allreduce(bias)
    return other_features


def map_tensors(fn: Callable[[mtf.Tensor], mtf.Tensor], x: Any) -> Any:
    """Applies fn to every tensor in nested dicts, lists and tuples; leaves the rest as it is."""
    if isinstance(x, mtf.Tensor):
        return fn(x)
    if isinstance(x, dict):
        return {k: map_tensors(fn, v) for k, v in x.items()}
    if type(x) in (list, tuple):  # not mtf.Dimension, which is a tuple too
        return type(x)(map_tensors(fn, v) for v in x)
    return x
