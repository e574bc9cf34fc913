"""The decode loop: GPT-Neo's `sample_autoregressive`.

The loop knows no model. It takes a callable with GPT-Neo's model signature,
hands it a context, and draws from the logits that come back.
"""

import collections
import dataclasses
import functools
import numbers

import numpy as np

from gpt_neo_sampling._compat import mtf, tf
from gpt_neo_sampling.draws import chosen_of, score_draw
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.masks import has_no_top_k, padding_mask, top_k_candidates, top_k_mask
from gpt_neo_sampling.models.penalties import tokens_mask
from gpt_neo_sampling.models.utils import DEFAULT_ALPHA, draw_uniforms, inverse_temperature
from gpt_neo_sampling.mtf_ops import (
    cwise_broadcast,
    first_argmax,
    import_rows,
    import_seed,
    resize,
    row_index,
    settle,
    take,
)

SOFTMAX_TEMPERATURE = 0.9  # the original's default,
ENTMAX_TEMPERATURE = 1.0  # and what it sampled entmax at, whatever it was given
MOST_CANDIDATES = 1024  # of top-k; where there may be more, the whole vocabulary is masked and drawn from
INVALID = -1  # the token of a row whose distribution is not one


@dataclasses.dataclass
class DecodeContext:
    """What a model is told in a decode loop, and where it leaves its states.

    The attributes are those of mesh-tensorflow's own context class, so models
    written for that one work with this.
    """

    mesh: mtf.Mesh
    batch_dims: list  # of mtf.Dimension
    length_dim: mtf.Dimension
    variable_dtype: mtf.VariableDType
    mode: str  # "first_part": all positions at once; "incremental": one token a row
    # Incremental: int32 [batch], the position about to be written; the model
    # reads the token before it. First part: int32 [length].
    position: mtf.Tensor
    position_is_default: bool = False
    states: list = None  # incremental: what the previous step recorded
    new_states: list = None  # what this one records
    initial_position: mtf.Tensor = None  # int32 [batch], the prompts' lengths
    inputs: mtf.Tensor = None  # int32 [batch, length]
    sequence_id: mtf.Tensor = None
    subsequence_id: mtf.Tensor = None
    read_priority: mtf.Tensor = None
    write_priority: mtf.Tensor = None
    encoder_output: mtf.Tensor = None
    encoder_sequence_id: mtf.Tensor = None
    encoder_inputs: mtf.Tensor = None
    encoder_layer_outputs: list = None
    constant_states: list = None  # recorded in the first part, read in every step
    shared_params: dict = None
    losses: list = None
    layer_outputs: list = dataclasses.field(default_factory=list)
    model: object = None
    beam_dim: mtf.Dimension = None
    num_microbatches: int = 1
    layer_index: int = 0
    next_constant_state: int = 0
    cache: dict = dataclasses.field(default_factory=dict)
    input_embeddings: mtf.Tensor = None
    may_overwrite_states: bool = False  # incremental: `states` are nobody else's to read

    def __post_init__(self):
        self.shared_params = self.shared_params or {}

    @property
    def train(self):
        return False

    @property
    def activation_dtype(self):
        return self.variable_dtype.activation_dtype

    @property
    def encoder_length_dim(self):
        (dim,) = [d for d in self.encoder_output.shape.dims if d.name == "memory_length"]
        return dim

    @property
    def nonpadding(self):
        if self.sequence_id is None or (isinstance(self.sequence_id, int) and self.sequence_id == 1):
            return self.sequence_id
        return mtf.cast(mtf.not_equal(self.sequence_id, 0), self.activation_dtype)

    def get_position(self):
        if self.position_is_default:
            return mtf.range(self.mesh, self.length_dim, tf.int32)
        return self.position

    def get_states(self, n):
        """The next n of the states that the previous step recorded."""
        begin = len(self.new_states)
        return self.states[begin : begin + n]

    def record_new_states(self, new_states):
        """Adds tensors that the next step is to find; their shapes must not change."""
        self.new_states.extend(new_states)

    def record_constant_state(self, s):
        """First part: keeps a value that every step is to find unchanged."""
        self.constant_states.append(s)

    def get_constant_state(self):
        """The next of the constant states, in the order of their recording."""
        self.next_constant_state += 1
        return self.constant_states[self.next_constant_state - 1]


@dataclasses.dataclass
class _LoopState:
    """The loop variables of `sample_autoregressive`."""

    position: mtf.Tensor  # int32 [batch]; where the row's next token goes
    ids: mtf.Tensor  # int32 [batch, length]; prompts, new tokens, padding
    done: mtf.Tensor  # bool [batch]; the row writes no more
    states: list  # the model's own, as its last call recorded them

    def tensors(self):
        # mtf's while_loop would carry an unfinished sum as it is: settle each.
        return [settle(t) for t in (self.position, self.ids, self.done, *self.states)]

    @classmethod
    def of(cls, position, ids, done, *states):
        return cls(position, ids, done, list(states))


@dataclasses.dataclass
class SamplingOptions:
    """How a token is drawn from its logits, the steps in the order of application.

    Each value may be a Python number or an mtf tensor, scalar or one a row.
    """

    never_token: object = None  # an id that is never drawn, None or a negative one for none
    temperature: object = SOFTMAX_TEMPERATURE  # above 0; 0 is argmax
    top_k: object = None  # None for no mask
    max_top_k: int = None  # needed where top_k is a tensor
    use_entmax: bool = False
    entmax_alpha: object = DEFAULT_ALPHA
    vocab_size: int = None  # where the vocabulary is padded: ids from here on are never drawn

    def check(self):
        """Raises ValueError for a number that is out of range."""
        t = self.temperature
        if isinstance(t, numbers.Real) and not 0 <= t < float("inf"):
            raise ValueError(f"temperature={t}; 0 (argmax) or a finite number above 0 is needed")
        a = self.entmax_alpha
        if self.use_entmax and isinstance(a, numbers.Real) and not 1 <= a <= 2:
            raise ValueError(f"entmax_alpha={a} is out of range: from 1 (softmax) to 2 (sparsemax)")


def next_token(logits, vocab_dim, options, seed, stream, step):
    """Draws one token a row: temperature, top-k, softmax or entmax, the draw.

    Args:
      logits: mtf.Tensor [batch…, vocab], any float dtype; computed in float32.
      vocab_dim: mtf.Dimension of logits.
      options: SamplingOptions.
      seed, stream, step: int32 mtf.Tensors, scalar or [batch…]; see
        `sample_categorical`.

    Returns:
      int32 mtf.Tensor [batch…]; −1 where the logits hold NaN or +inf or nothing
      above −inf. Where the temperature is 0, the first of the largest logits.
    """
    rows = logits.shape - vocab_dim
    mesh = logits.mesh
    logits = mtf.cast(logits, tf.float32)
    if options.vocab_size is not None:
        logits = padding_mask(logits, options.vocab_size, vocab_dim)
    if options.never_token is not None:
        logits = tokens_mask(logits, [options.never_token], vocab_dim)
    fixed = isinstance(options.temperature, numbers.Real)
    if fixed and options.temperature == 0:
        return first_argmax(logits, vocab_dim)

    factor = inverse_temperature(mesh, options.temperature, rows)
    alpha = import_rows(mesh, options.entmax_alpha, tf.float32, rows, "entmax_alpha") if options.use_entmax else None
    uniforms = draw_uniforms(mesh, rows, seed, stream, step)
    size = options.vocab_size or vocab_dim.size
    n_chosen = chosen_of(options.entmax_alpha)
    draw = functools.partial(score_draw, factor=factor, alpha=alpha, size=size, n_chosen=n_chosen)
    k, max_k = options.top_k, options.max_top_k
    if k is not None and (k if isinstance(k, numbers.Integral) else max_k or 0) > MOST_CANDIDATES:
        logits, k = top_k_mask(logits, k, vocab_dim, max_top_k=max_k, masked=-np.inf), None
    candidates = None if k is None else top_k_candidates(logits, k, vocab_dim, max_top_k=max_k)
    if candidates is None:
        token = draw(logits, *uniforms, vocab_dim)
    else:
        values, ids = candidates
        token = draw(values, *uniforms, values.shape[-1], ids=ids)
        if not isinstance(k, numbers.Integral):  # rows without a mask draw from all
            no_mask = mtf.broadcast(has_no_top_k(import_rows(mesh, k, tf.int32, rows, "top-k"), vocab_dim), rows)
            whole = draw(logits, *uniforms, vocab_dim, only=no_mask)
            token = cwise_broadcast(lambda n, w, t: tf.where_v2(n > 0, w, t), [no_mask, whole, token], rows, tf.int32)
    if fixed:
        return token
    if candidates is None:
        greedy = first_argmax(logits, vocab_dim)
    else:  # the first of them, where there is anything to draw
        first = take(ids, mtf.constant(mesh, 0, mtf.Shape([]), tf.int32), ids.shape[-1])
        greedy = cwise_broadcast(lambda token, first: tf.where_v2(token < 0, token, first), [token, first])
    temperature = import_rows(mesh, options.temperature, tf.float32, rows, "temperature")
    return cwise_broadcast(
        lambda token, greedy, t: tf.where_v2(tf.equal(t, 0.0), greedy, token), [token, greedy, temperature], rows
    )


def sample_autoregressive(
    partial_sequences,
    other_features,
    params,
    stop_at_token=50256,
    max_steps=None,
    temperature=None,
    variable_dtype=mtf.VariableDType(tf.float32),  # noqa: B008  (the original's default)
    encoder_output=None,
    encoder_sequence_id=None,
    encoder_inputs=None,
    shared_params=None,
    has_partial_sequences=True,
    encoder_layer_outputs=None,
    never_end=False,
    remove_partial_sequences=False,
    sampling_keep_top_k=-1,
    sampling_use_entmax=False,
    bos_id=50256,
    *,
    model=None,
    seed=None,
    stream=None,
    prompt_lengths=None,
    entmax_alpha=DEFAULT_ALPHA,
    max_top_k=None,
    max_prompt_length=None,
    max_length=None,
):
    """Continues a batch of prompts, one token a row and step.

    A row's prompt is its first tokens; row r writes from its own prompt length
    on. For example, with length 6, padding 0, and stop token 9:

        prompts          5 3 0 0 0 0      7 0 0 0 0 0      4 4 4 4 4 4
        after 1 step     5 3 8 0 0 0      7 9 0 0 0 0      (full: returned as it is)
        after 2          5 3 8 1 0 0      7 9 0 0 0 0      (9 was drawn: done, padding)
        after 4          5 3 8 1 6 2      7 9 0 0 0 0      all done: the loop ends

    In a step each row's logits pass through, in this order: `never_end`'s mask,
    temperature, top-k, softmax or entmax, and the draw, which is a function of
    (seed, stream, number of the new token in its row) and so does not depend on
    the layout, on the batch or on the other rows.

    Numbers marked † may also be int32 or float32 tensors, mtf or tf, scalar or
    one a row, so that one built graph serves mixed requests.

    Args:
      partial_sequences: int32 mtf.Tensor [batch…, length].
      other_features: GPT-Neo's dict, handed to the model; "vocab_dim" is used.
      params: GPT-Neo's config, a dict. "padding_id" is used (0 if absent);
        "slow_sampling": the model sees the whole sequence at every step, and no
        context, where otherwise it keeps states; and "n_vocab", if it is there:
        where the vocabulary's dimension is larger, the rest of it is padding
        that is never drawn.
      stop_at_token: † a row that draws it is done. None for none.
      max_steps: † the most new tokens in a row; None for up to `length`.
      temperature: † above 0: larger is more random; 0 is argmax. None is the
        original's 0.9 for softmax and 1.0 for entmax. (The original ignored a
        value given with entmax; here it counts.)
      variable_dtype: mtf.VariableDType, handed to the model.
      encoder_output, encoder_sequence_id, encoder_inputs, shared_params,
        encoder_layer_outputs: handed to the model in its context.
      has_partial_sequences: False if no row has a prompt.
      never_end: the stop token is never drawn.
      remove_partial_sequences: shifts each row left by its prompt's length.
      sampling_keep_top_k: † draw from the k likeliest tokens alone; −1 is off,
        −2 a tenth of the vocabulary. In a tensor, all below 1 are off.
      sampling_use_entmax: entmax in place of softmax.
      bos_id: † an empty prompt counts as the prompt of this one token, which is
        written at position 0.
      model: a callable with the arguments of `models.gpt2.model`, and that by
        default. It is called in the variable scope "gpt2".
      seed: † as in `sample_categorical`; None for a fresh one at each run.
      stream: † int32 [batch…]; a row's index in the request by default.
      prompt_lengths: int32 tensor [batch…]. By default a row's prompt is as
        long as it has tokens other than padding; give the lengths if a prompt
        may contain the padding id.
      entmax_alpha: † in [1, 2].
      max_top_k: an int, needed where sampling_keep_top_k is a tensor: the
        largest value that it may take.
      max_prompt_length: an int: no prompt is longer, so the first pass over the
        prompts reads no more positions. A row whose prompt is longer after all
        gets −1 and is done.
      max_length: an int: no row gets longer, its prompt included, so the model's
        states and its attention need no more positions. Where other_features
        has a "memory_length_dim" and an "attn_bias", the model is handed these
        cut to that length.

    Returns:
      int32 mtf.Tensor like partial_sequences: prompts, new tokens (the stop
      token among them) and padding. A row whose distribution is invalid (NaN
      logits) gets −1 at that position and is done.

    Raises:
      ValueError: for a number that is out of range, or a wrong shape.
    """
    mesh = partial_sequences.mesh
    *batch_dims, whole_length_dim = partial_sequences.shape.dims
    length = _length("max_length", max_length, whole_length_dim.size)
    prompt_length = _length("max_prompt_length", max_prompt_length, length)
    length_dim = mtf.Dimension(whole_length_dim.name, length)
    rows = mtf.Shape(batch_dims)
    vocab_dim = other_features["vocab_dim"]
    model = model or gpt2.model
    params = params if isinstance(params, collections.defaultdict) else collections.defaultdict(lambda: None, params)
    padding_id = params.get("padding_id") or 0
    slow = bool(params.get("slow_sampling"))
    if temperature is None:
        temperature = ENTMAX_TEMPERATURE if sampling_use_entmax else SOFTMAX_TEMPERATURE
    if isinstance(max_steps, numbers.Real) and max_steps < 0:
        raise ValueError(f"max_steps={max_steps}; 0 or more is needed")
    if never_end and stop_at_token is None:
        raise ValueError("never_end=True masks the stop token, but stop_at_token is None")
    vocab_size = _vocab_size(params, vocab_dim)
    options = SamplingOptions(
        never_token=stop_at_token if never_end else None,
        temperature=temperature,
        top_k=_top_k_option(sampling_keep_top_k, vocab_size or vocab_dim.size),
        max_top_k=max_top_k,
        use_entmax=bool(sampling_use_entmax),
        entmax_alpha=entmax_alpha,
        vocab_size=vocab_size,
    )
    options.check()

    def per_row(value, dtype, name):
        """Imported once, outside the loop; numbers stay numbers."""
        if value is None or isinstance(value, numbers.Real):
            return value
        return settle(import_rows(mesh, value, dtype, rows, name))

    for name, dtype in (("never_token", tf.int32), ("temperature", tf.float32), ("top_k", tf.int32),
                        ("entmax_alpha", tf.float32)):  # fmt: skip
        setattr(options, name, per_row(getattr(options, name), dtype, name))
    stop_at_token = per_row(stop_at_token, tf.int32, "stop_at_token")
    max_steps = per_row(max_steps, tf.int32, "max_steps")
    seed = settle(import_seed(mesh, seed, rows))
    stream = row_index(mesh, rows) if stream is None else import_rows(mesh, stream, tf.int32, rows, "stream")
    stream = settle(stream)
    other_features, encoder_output, encoder_sequence_id, encoder_inputs, encoder_layer_outputs, shared_params = (
        _settle_all(x)
        for x in (
            other_features, encoder_output, encoder_sequence_id, encoder_inputs, encoder_layer_outputs, shared_params
        )
    )  # fmt: skip

    other_features = _cut_memory(other_features, whole_length_dim, length)

    # The prompts, and only they: what stands behind them becomes padding.
    if not has_partial_sequences:
        prompt_lengths = 0
    elif prompt_lengths is None:
        is_token = mtf.not_equal(partial_sequences, padding_id)
        prompt_lengths = mtf.reduce_sum(mtf.to_int32(is_token), reduced_dim=whole_length_dim)
    prompt_lengths = mtf.broadcast(import_rows(mesh, prompt_lengths, tf.int32, rows, "prompt_lengths"), rows)
    bos = import_rows(mesh, bos_id, tf.int32, rows, "bos_id")

    def clean(ids, at, length, bos):
        ids = tf.where_v2(at < length, ids, padding_id)
        return tf.where_v2(tf.logical_and(tf.equal(length, 0), tf.equal(at, 0)), bos, ids)

    whole_range = mtf.range(mesh, whole_length_dim, tf.int32)
    whole_ids = cwise_broadcast(clean, [partial_sequences, whole_range, prompt_lengths, bos])
    ids, length_range = resize(whole_ids, whole_length_dim, length), mtf.range(mesh, length_dim, tf.int32)
    initial_position = cwise_broadcast(lambda n: tf.maximum(n, 1), [prompt_lengths])

    read_priority = write_priority = cwise_broadcast(
        lambda at, n: tf.where_v2(at > n, at, 0), [length_range, initial_position], ids.shape
    )
    constant_states = []

    def context(mode, position, **kwargs):
        return DecodeContext(
            mesh=mesh,
            batch_dims=batch_dims,
            variable_dtype=variable_dtype,
            mode=mode,
            position=position,
            new_states=[],
            initial_position=initial_position,
            encoder_output=encoder_output,
            encoder_sequence_id=encoder_sequence_id,
            encoder_inputs=encoder_inputs,
            encoder_layer_outputs=encoder_layer_outputs,
            constant_states=constant_states,
            shared_params=shared_params,
            **kwargs,
        )

    def call_model(ids, ctx):
        with tf.variable_scope("gpt2", reuse=tf.AUTO_REUSE):
            logits, _, _ = model({"inputs": ids}, other_features, params, mesh, variable_dtype, context=ctx)
        return logits

    initial_states = []
    if not slow:
        prompt_dim = mtf.Dimension(length_dim.name, prompt_length)
        prompts, priority = (resize(x, length_dim, prompt_length) for x in (ids, read_priority))
        first_part = context(
            "first_part",
            mtf.range(mesh, prompt_dim, tf.int32),
            length_dim=prompt_dim,
            position_is_default=True,
            inputs=prompts,
            read_priority=priority,
            write_priority=priority,
        )
        call_model(prompts, first_part)
        initial_states = first_part.new_states
        constant_states[:] = _settle_all(constant_states)

    def is_over(position):
        """Whether a row that is to write at `position` has no token left to write."""

        def tf_fn(position, initial, *limit):
            over = position >= length_dim.size
            return tf.logical_or(over, position - initial >= limit[0]) if limit else over

        limit = [] if max_steps is None else [import_rows(mesh, max_steps, tf.int32, rows, "max_steps")]
        return cwise_broadcast(tf_fn, [position, initial_position, *limit], rows, tf.bool)

    def body(*tensors):
        loop = _LoopState.of(*tensors)
        if slow:
            logits = take(call_model(loop.ids, None), loop.position - 1, length_dim)
            states = []
        else:
            ctx = context(
                "incremental",
                loop.position,
                length_dim=length_dim,
                write_priority=write_priority,
                states=loop.states,
                may_overwrite_states=True,
                inputs=loop.ids,
                read_priority=take(read_priority, loop.position, length_dim),
            )
            logits = call_model(loop.ids, ctx)
            logits = mtf.reshape(logits, rows + vocab_dim)  # without its sequence dim of 1
            states = ctx.new_states
        token = next_token(logits, vocab_dim, options, seed, stream, loop.position - initial_position)

        def write(ids, at, position, done, token):
            return tf.where_v2(tf.logical_and(tf.equal(at, position), tf.logical_not(done)), token, ids)

        ids = cwise_broadcast(write, [loop.ids, length_range, loop.position, loop.done, token], loop.ids.shape)
        position = cwise_broadcast(
            lambda position, done: position + tf.cast(tf.logical_not(done), tf.int32), [loop.position, loop.done]
        )
        ended = cwise_broadcast(lambda token: tf.equal(token, INVALID), [token], output_dtype=tf.bool)
        if stop_at_token is not None:
            ended = mtf.logical_or(ended, mtf.equal(token, stop_at_token))
        done = mtf.logical_or(mtf.logical_or(loop.done, ended), is_over(position))
        return _LoopState(position, ids, done, states).tensors()

    done = is_over(initial_position)
    if prompt_length < whole_length_dim.size:

        def refuse(ids, at, n):  # max_length full is full, not too long
            return tf.where_v2(tf.logical_and(tf.equal(at, n), n > prompt_length), INVALID, ids)

        ids = cwise_broadcast(refuse, [ids, length_range, initial_position], ids.shape)
        done = cwise_broadcast(lambda d, n: tf.logical_or(d, n > prompt_length), [done, initial_position])
    start = _LoopState(initial_position, ids, done, initial_states)
    outputs = mtf.while_loop(
        lambda position, ids, done, *_: mtf.logical_not(mtf.reduce_all(done)), body, start.tensors()
    )
    ids = outputs[1]
    if length < whole_length_dim.size:
        ids = cwise_broadcast(
            lambda ids, whole, at: tf.where_v2(at < length, ids, whole),
            [resize(ids, length_dim, whole_length_dim.size), whole_ids, whole_range],
        )
    return _shift_left(ids, initial_position, padding_id) if remove_partial_sequences else ids


def _length(name, value, limit):
    if value is None:
        return limit
    if not isinstance(value, numbers.Integral) or not 1 <= value <= limit:
        raise ValueError(f"{name}={value!r}; a whole number from 1 to {limit} is needed")
    return int(value)


def _cut_memory(other_features, length_dim, length):
    """GPT-Neo's features for a memory of that length at most."""
    memory_dim, bias = other_features.get("memory_length_dim"), other_features.get("attn_bias")
    if memory_dim is None or memory_dim.size <= length:
        return other_features
    other_features = {**other_features, "memory_length_dim": mtf.Dimension(memory_dim.name, length)}
    if bias is not None:
        for d in (memory_dim, length_dim):
            bias = resize(bias, d, length) if d in bias.shape.dims else bias
        other_features["attn_bias"] = settle(bias)
    return other_features


def _settle_all(x):
    """Settles every tensor in nested dicts, lists and tuples; the rest stays as it is."""
    if isinstance(x, mtf.Tensor):
        return settle(x)
    if isinstance(x, dict):
        return {k: _settle_all(v) for k, v in x.items()}
    if type(x) in (list, tuple):  # not mtf.Dimension, which is a tuple too
        return type(x)(_settle_all(v) for v in x)
    return x


def _vocab_size(params, vocab_dim):
    """The model's vocabulary where `vocab_dim` is a padded one, else None."""
    size = params.get("n_vocab")
    if size is None or size == vocab_dim.size:
        return None
    if not 1 <= size < vocab_dim.size:
        raise ValueError(f"n_vocab={size}, but the vocabulary's dimension has {vocab_dim.size} entries")
    return size


def _top_k_option(k, vocab_size):
    if not isinstance(k, numbers.Real):
        return k
    if k == -1:
        return None
    if k == -2:
        return max(1, vocab_size // 10)
    if k < 1 or k != int(k):
        raise ValueError(f"sampling_keep_top_k={k}; a whole number of at least 1, -1 (off) or -2 (a tenth) is needed")
    return int(k)


def _shift_left(ids, by, padding_id):
    """ids [batch…, length] without the first `by` [batch…] of each row."""
    *batch_dims, length_dim = ids.shape.dims
    shifted_dim = mtf.Dimension("shifted_" + length_dim.name, length_dim.size)
    source = cwise_broadcast(
        tf.add, [mtf.range(ids.mesh, shifted_dim, tf.int32), by], mtf.Shape(batch_dims + [shifted_dim])
    )
    shifted = take(ids, source, length_dim)
    shifted = cwise_broadcast(
        lambda x, at: tf.where_v2(at < length_dim.size, x, padding_id), [shifted, source], name="remove_prompts"
    )
    return mtf.rename_dimension(shifted, shifted_dim.name, length_dim.name)
