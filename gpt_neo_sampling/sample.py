"""The decode loop: GPT-Neo's `sample_autoregressive`.

The loop knows no model. It takes a callable with GPT-Neo's model signature,
hands it a context, and draws from the logits that come back.
"""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_neo_sampling._compat import mtf, static_value, tf
from gpt_neo_sampling._types import Params, RowValue, Tensor, Unpack, is_int, is_real
from gpt_neo_sampling.mesh.compiled import compiled
from gpt_neo_sampling.mesh.ops import (
    check_tensor,
    cwise_broadcast,
    force_allreduce,
    from_loop,
    import_rows,
    repeat,
    resize,
    row_index,
    take,
    to_loop,
)
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.decoding_context import Decoder, Model, cut_memory, map_tensors
from gpt_neo_sampling.models.utils import feature_dim
from gpt_neo_sampling.sampling.controls import (
    ENTMAX_TEMPERATURE,
    MOST_TOP_LOGPROBS,
    SOFTMAX_TEMPERATURE,
    ControlKeywords,
    History,
    SamplingOptions,
    check_bool,
    check_int,
)
from gpt_neo_sampling.sampling.next_token import Drawn, answers_of, draw_token, initial_states
from gpt_neo_sampling.sampling.other_names import explained
from gpt_neo_sampling.sampling.random import import_seed, unfolded

INVALID = -1  # the token of a row whose distribution is not one

# What some options of `TextGenerator.generate` are called here.
_GENERATE_NAMES = {
    "max_new_tokens": "max_steps",
    "eos_token_id": "stop_at_token",
    "top_k": "sampling_keep_top_k",
    "stop_strings": "stopping_criteria",
    "greedy": "temperature=0",
    "dtype": "variable_dtype",
}

StoppingCriteria = Callable[[mtf.Tensor, mtf.Tensor], mtf.Tensor]  # (ids, position) to 1.0 for rows that are done


@dataclasses.dataclass
class _Prompts:
    """The prompts, each followed by padding.

    An empty one becomes its bos_id; if that is outside the vocabulary, invalid_token, with which the row is done.
    """

    whole_ids: mtf.Tensor  # int32 [rows, whole length]
    ids: mtf.Tensor  # int32 [rows, length]; the same, cut to max_length
    lengths: mtf.Tensor  # int32 [rows]; at least 1
    begin: mtf.Tensor | None  # int32 [rows]; lengths, but 0 for an invalid_token; None if there cannot be one

    @property
    def removable(self) -> mtf.Tensor:
        """How many tokens remove_partial_sequences takes off each row: int32 [rows]. It keeps an invalid_token."""
        return self.lengths if self.begin is None else self.begin

    def repeated(self, dim: mtf.Dimension, times: int) -> "_Prompts":
        """Each prompt `times` times in a row along `dim`."""
        tensors = [self.whole_ids, self.ids, self.lengths, self.begin]
        return _Prompts(*map_tensors(functools.partial(repeat, dim=dim, times=times), tensors))


@dataclasses.dataclass
class _LoopState:
    """The loop variables of `sample_autoregressive`."""

    position: mtf.Tensor  # int32 [rows]; where the row's next token goes
    ids: mtf.Tensor  # int32 [rows, length]; prompts, new tokens, padding
    done: mtf.Tensor  # bool [rows]; the row writes no more
    answers: list[mtf.Tensor]  # [rows, length] like ids, or with more dims: see `answers_of`
    control_states: list[mtf.Tensor]  # [rows], of the controls that keep one: see `initial_states`
    states: list[mtf.Tensor]  # the model's own, as its last call recorded them

    def tensors(self) -> list[mtf.Tensor]:
        # mtf's while_loop would carry a sum that is not reduced yet as it is, so each is reduced here
        rest = (self.done, *self.answers, *self.control_states, *self.states)
        return [force_allreduce(self.position), to_loop(self.ids), *map(force_allreduce, rest)]


@dataclasses.dataclass
class _DecodeLoop:
    """What stays the same in all steps, and the functions of `mtf.while_loop`:

        mtf.while_loop(loop.unfinished, loop.step, loop.start())

    The loop variables are the tensors of a `_LoopState`.
    """

    decoder: Decoder
    prompts: _Prompts
    states: list[mtf.Tensor]  # the model's, as the pass over the prompts recorded them
    prompt_length: int  # the longest prompt that the pass over the prompts can read
    vocab_dim: mtf.Dimension
    options: SamplingOptions  # imported
    seed: mtf.Tensor  # as `next_token` takes it
    stream: mtf.Tensor  # int32 [rows]
    max_steps: mtf.Tensor | None  # int32, [rows] or scalar
    stopping_criteria: StoppingCriteria | None
    return_logprobs: bool
    top_logprobs: int
    invalid_token: int
    compiles_steps: bool  # each step by itself

    def __post_init__(self) -> None:
        self._length_dim = self.prompts.ids.shape[-1]
        self._columns = mtf.range(self.prompts.ids.mesh, self._length_dim, tf.int32)  # once, not in every step
        self._limit = self._where_rows_end()
        self._answers = answers_of(self.return_logprobs, self.top_logprobs)
        self._initial_states = initial_states(self.options, self.prompts.ids.mesh, self.prompts.lengths.shape)

    def start(self) -> list[mtf.Tensor]:
        """The loop variables before the first step: the prompts; rows that may get no token are done."""
        prompts = self.prompts
        ids, done = prompts.ids, self._is_full(prompts.lengths)
        if prompts.begin is not None:
            done = cwise_broadcast(lambda done, begin: tf.logical_or(done, tf.equal(begin, 0)), [done, prompts.begin])
        if self.prompt_length < prompts.whole_ids.shape[-1].size:
            ids = self._mark_unread(ids)
            done = cwise_broadcast(lambda done, n: tf.logical_or(done, n > self.prompt_length), [done, prompts.lengths])
        control_states = list(self._initial_states.values())
        return _LoopState(prompts.lengths, ids, done, self.no_answers(), control_states, self.states).tensors()

    def no_answers(self) -> list[mtf.Tensor]:
        """Of rows without new tokens."""
        shape = self.prompts.ids.shape
        return [mtf.zeros(self.prompts.ids.mesh, shape + more, dtype) for dtype, more in self._answers.values()]

    def begun(self, control_states: list[mtf.Tensor], position: mtf.Tensor) -> list[mtf.Tensor]:
        """Those of rows that have new tokens; the initial ones of others."""

        def choose(given: tf.Tensor, initial: tf.Tensor, at: tf.Tensor, begin: tf.Tensor) -> tf.Tensor:
            return tf.where_v2(at > begin, given, initial)

        return [
            cwise_broadcast(choose, [given, initial, position, self.prompts.lengths], initial.shape, tf.float32)
            for given, initial in zip(control_states, self._initial_states.values(), strict=True)
        ]

    def unfinished(self, *tensors: mtf.Tensor) -> mtf.Tensor:
        """Whether any row still writes: bool, scalar."""
        return mtf.logical_not(mtf.reduce_all(self.state(tensors).done))

    def step(self, *tensors: mtf.Tensor) -> list[mtf.Tensor]:
        """Draws a token for each row and writes it, unless the row is done."""
        old = self.state(tensors)
        if self.compiles_steps:
            token, *new_tensors = compiled(tensors[0].mesh, lambda: self._compilable(old))
            new = self.state(new_tensors)
        else:
            token, new = self._extended(old)
        new.done = mtf.logical_or(new.done, self._ends_row(token, new.ids, new.position))
        return new.tensors()

    def _compilable(self, old: _LoopState) -> list[mtf.Tensor]:
        token, new = self._extended(old)
        return [token, *new.tensors()]

    def _extended(self, old: _LoopState) -> tuple[mtf.Tensor, _LoopState]:
        """The token drawn for each row, int32 [rows], and the state with it written; `done` as it was."""
        logits, states = self.decoder.step(old.ids, old.position, old.states)
        drawn = self._draw(logits, old)
        token = drawn.token
        written = token
        if self.invalid_token != INVALID:
            written = cwise_broadcast(lambda t: tf.where_v2(tf.equal(t, INVALID), self.invalid_token, t), [token])
        new = [written, *drawn.answers.values()]
        ids, *answers = (self._write(x, new, old) for x, new in zip([old.ids, *old.answers], new, strict=True))
        position = cwise_broadcast(
            lambda position, done: position + tf.cast(tf.logical_not(done), tf.int32), [old.position, old.done]
        )
        return token, _LoopState(position, ids, old.done, answers, list(drawn.states.values()), states)

    def state(self, tensors: Sequence[mtf.Tensor]) -> _LoopState:
        """The loop variables by name."""
        position, ids, done, *rest = tensors
        end, begin = len(self._answers), len(self._answers) + len(self._initial_states)
        return _LoopState(position, from_loop(ids), done, rest[:end], rest[end:begin], rest[begin:])

    def _draw(self, logits: mtf.Tensor, state: _LoopState) -> Drawn:
        """A token for each row, and what else the step gives."""
        initial = self.prompts.lengths
        history = History(state.ids, state.position, initial, self._limit, state.done)
        step = state.position - initial
        return draw_token(
            logits,
            self.vocab_dim,
            self.options,
            self.seed,
            self.stream,
            step,
            history,
            dict(zip(self._initial_states, state.control_states)),
            return_logprobs=self.return_logprobs,
            top_logprobs=self.top_logprobs,
        )

    def _where_rows_end(self) -> mtf.Tensor | None:
        """Where no token goes any more, int32 [rows], if a control looks at that."""
        if self.options.forced_eos_token_id is None:
            return None
        size = self._length_dim.size
        if self.max_steps is None:
            return mtf.constant(self.prompts.ids.mesh, size, self.prompts.lengths.shape, tf.int32)
        # not by a sum that could overflow
        return cwise_broadcast(
            lambda begin, most: begin + tf.minimum(most, size - begin), [self.prompts.lengths, self.max_steps]
        )

    def _write(self, x: mtf.Tensor, new: mtf.Tensor, state: _LoopState) -> mtf.Tensor:
        """x [rows, length, …] with `new` [rows, …] at each row's position, unless the row is done."""

        def write(x: tf.Tensor, column: tf.Tensor, position: tf.Tensor, done: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
            return tf.where_v2(tf.logical_and(tf.equal(column, position), tf.logical_not(done)), new, x)

        return cwise_broadcast(write, [x, self._columns, state.position, state.done, new], x.shape)

    def _ends_row(self, token: mtf.Tensor, ids: mtf.Tensor, position: mtf.Tensor) -> mtf.Tensor:
        """Whether the token that was drawn, just before `position`, is the row's last: bool [rows]."""
        ended = cwise_broadcast(lambda token: tf.equal(token, INVALID), [token], output_dtype=tf.bool)
        for stop_token in self.options.stop_tokens:
            ended = mtf.logical_or(ended, mtf.equal(token, stop_token))
        if self.stopping_criteria is not None:
            ended = mtf.logical_or(ended, mtf.greater(self.stopping_criteria(ids, position), 0))
        return mtf.logical_or(ended, self._is_full(position))

    def _is_full(self, position: mtf.Tensor) -> mtf.Tensor:
        """Whether the length or max_steps rules out a token at `position`: bool [rows]."""

        def is_full(position: tf.Tensor, initial: tf.Tensor, *limit: tf.Tensor) -> tf.Tensor:
            full = position >= self._length_dim.size
            return tf.logical_or(full, position - initial >= limit[0]) if limit else full

        initial = self.prompts.lengths
        limit = [] if self.max_steps is None else [self.max_steps]
        return cwise_broadcast(is_full, [position, initial, *limit], initial.shape, tf.bool)

    def _mark_unread(self, ids: mtf.Tensor) -> mtf.Tensor:
        """ids with invalid_token after each prompt that is longer than prompt_length.

        A prompt that fills all of max_length has no room after it and stays as it is.
        """

        def mark(ids: tf.Tensor, column: tf.Tensor, n: tf.Tensor) -> tf.Tensor:
            unread = tf.logical_and(tf.equal(column, n), n > self.prompt_length)
            return tf.where_v2(unread, self.invalid_token, ids)

        return cwise_broadcast(mark, [ids, self._columns, self.prompts.lengths], ids.shape)


def sample_autoregressive(
    partial_sequences: mtf.Tensor,
    other_features: dict[str, Any],
    params: Params,
    stop_at_token: RowValue | Sequence[RowValue] | None = 50256,
    max_steps: RowValue | None = None,
    temperature: RowValue | None = None,
    variable_dtype: mtf.VariableDType = mtf.VariableDType(tf.float32),  # noqa: B008  (the original's default)
    encoder_output: Any = None,
    encoder_sequence_id: Any = None,
    encoder_inputs: Any = None,
    shared_params: Any = None,
    has_partial_sequences: bool = True,
    encoder_layer_outputs: Any = None,
    never_end: bool = False,
    remove_partial_sequences: bool = False,
    sampling_keep_top_k: RowValue = -1,
    sampling_use_entmax: bool = False,
    bos_id: RowValue = 50256,
    *,
    model: Model | None = None,
    seed: RowValue | None = None,
    stream: RowValue | None = None,
    prompt_lengths: Tensor | None = None,
    max_top_k: int | None = None,
    max_prompt_length: int | None = None,
    max_length: int | None = None,
    stopping_criteria: StoppingCriteria | None = None,
    num_return_sequences: int = 1,
    return_logprobs: bool = False,
    top_logprobs: int = 0,
    invalid_token: int = INVALID,
    jit_compile: bool = False,
    **controls: Unpack[ControlKeywords],
) -> mtf.Tensor | tuple[mtf.Tensor, ...]:
    """Continues a batch of prompts, one token a row and step.

    A row's prompt is its first tokens; row r writes from its own prompt length
    on. For example, with length 6, padding 0, and stop token 9:

        prompts          5 3 0 0 0 0      7 0 0 0 0 0      4 4 4 4 4 4
        after 1 step     5 3 8 0 0 0      7 9 0 0 0 0      (full: returned as it is)
        after 2          5 3 8 1 0 0      7 9 0 0 0 0      (9 was drawn: done, padding)
        after 4          5 3 8 1 6 2      7 9 0 0 0 0      all done: the loop ends

    In a step each row's logits pass through the controls in the order of `sampling.controls.Controls`: what looks at
    the row so far, the masks of the stop tokens (min_new_tokens, never_end), temperature, the masks of less likely
    tokens, softmax or entmax. The draw is a function of (seed, stream, number of the new token in its row) and so does
    not depend on the layout, on the batch or on the other rows.

    Numbers marked † may also be int32 or float32 tensors, mtf or tf, scalar or
    one a row, so that one built graph serves mixed requests.

    Args:
      partial_sequences: int32 mtf.Tensor [batch…, length]. An id outside the
        vocabulary is kept, and `models.gpt2.model` looks up zeros for it.
      other_features: GPT-Neo's dict, handed to the model; "vocab_dim" is used.
      params: GPT-Neo's config, a dict. "padding_id" is used (0 if absent; it may
        be outside the vocabulary, as GPT-Neo's 50257 is); "slow_sampling": the model
        sees the whole sequence at every step, and no context, where otherwise it
        keeps states; and "n_vocab", if it is there: where the vocabulary's dimension
        is larger, the rest of it is padding that is never drawn.
      stop_at_token: † a row that draws it is done; a list or tuple holds several,
        each of them †. One outside the vocabulary never comes up. None for none.
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
        written at position 0. One outside the vocabulary (the default, in a smaller
        one) is an error if a prompt is empty: at once where prompts or their lengths
        are numbers or constants; where they are fed, such a row begins with −1 and is done.
      model: a callable with the arguments of `models.gpt2.model`, and that by
        default. It is called in the variable scope "gpt2".
      seed: † as in `sample_categorical`; None for a fresh one at each run.
      stream: † int32 [batch…]; a row's index in the request by default.
      prompt_lengths: int32 tensor [batch…]. By default a row's prompt is as
        long as it has tokens other than padding; give the lengths if a prompt
        may contain the padding id.
      max_top_k: an int, needed where sampling_keep_top_k is a tensor: the
        largest value that it may take.
      max_prompt_length: an int: no prompt is longer, so the first pass over the
        prompts reads no more positions. A row whose prompt is longer after all
        gets −1 and is done.
      max_length: an int: no row gets longer, its prompt included, so the model's
        states and its attention need no more positions. Where other_features
        has a "memory_length_dim" and an "attn_bias", the model is handed these
        with as many positions fewer; without max_length, as they are.
      stopping_criteria: a function of (ids, position), ids with a step's tokens
        written and position behind them, that returns a float32 mtf.Tensor
        [batch…]: above 0 for a row that is done.
      num_return_sequences: an int n. Each prompt is continued n times, which
        share its first pass: the last of the batch's dims is n times as large in
        what is returned, where a prompt's rows stand together, and in all that
        is one a row (but prompt_lengths and bos_id, which are a prompt's).
      return_logprobs: whether to return log-probabilities too.
      top_logprobs: with return_logprobs, an int n from 0 to MOST_TOP_LOGPROBS: whether to return each new token's rank
        and the n likeliest tokens too.
      invalid_token: an int: what is written where −1 is said below, for callers
        whose next function takes no −1 (a tokenizer). Such a row is done all the same.
      jit_compile: whether XLA compiles the loop, or with stopping_criteria each of its steps. On a mesh of one CPU or
        GPU, for a model and logits_processors that do not call Python while they run.
      **controls: the fields of `sampling.controls.Controls` but temperature and top_k, each number †; None for one that
        is left out. entmax_alpha is for sampling_use_entmax alone, and 1.3 by default; logit_bias a float32 tensor
        [vocab] or [batch…, vocab], −inf for a token that is never drawn; logits_processors functions of (logits, ids,
        position) that return logits: float32 [batch…, vocab], int32 [batch…, length] and int32 [batch…], where the
        next token goes; what stands in ids from there on is padding.

    Returns:
      int32 mtf.Tensor like partial_sequences: prompts, new tokens (the stop
      token among them) and padding. A row whose distribution is invalid (NaN
      logits) gets −1 at that position and is done. With return_logprobs
      (ids, logprobs, draw_logprobs), float32 and of the same shape: of each new
      token the natural logarithm of its probability under the model's own
      distribution and under the one that it was drawn from; 0 elsewhere. With
      top_logprobs of n (…, ranks, top_ids, top_logprobs) behind these: int32 of the
      same shape, 1 for the likeliest token under the model's own distribution; and
      int32 and float32 [batch…, length, n], the likeliest ones and their
      log-probabilities, of equal ones the lower id first; 0 elsewhere. Where the
      token is −1 they are 0, 0 and NaN.

    Raises:
      ValueError: for a number that is out of range, a wrong shape, or a feature that is missing.
      TypeError: for a keyword that is no control, an argument of another type, or a model that returns something else.

    Example, with a model by which t + 1 follows t (`run` is defined in the docstring
    of `models.utils`):

        >>> def counting(features, other_features, params, mesh, variable_dtype, context=None):
        ...     return mtf.one_hot(features["inputs"] + 1, other_features["vocab_dim"]), None, None
        >>> features, params = {"vocab_dim": mtf.Dimension("vocab", 10)}, {"slow_sampling": True}
        >>> options = dict(model=counting, stop_at_token=9, temperature=0)
        >>> prompts = [[5, 3, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0]]
        >>> run(lambda ids: sample_autoregressive(ids, features, params, **options), prompts, "length")
        array([[5, 3, 4, 5, 6, 7],
               [7, 8, 9, 0, 0, 0]], dtype=int32)
    """
    _check_keywords(controls)
    _check_ids(partial_sequences)
    mesh = partial_sequences.mesh
    *batch_dims, whole_length_dim = partial_sequences.shape.dims
    length = _length("max_length", max_length, whole_length_dim.size)
    prompt_length = _length("max_prompt_length", max_prompt_length, length)
    rows = _repeated_rows(batch_dims, num_return_sequences)
    if temperature is None:
        temperature = ENTMAX_TEMPERATURE if sampling_use_entmax else SOFTMAX_TEMPERATURE
    stop_tokens = _stop_tokens(stop_at_token, never_end)
    check_bool("jit_compile", jit_compile)
    _check_arguments(max_steps, invalid_token, has_partial_sequences, prompt_lengths)
    model = model or gpt2.model
    _check_model(model, other_features, params)

    params = params if isinstance(params, collections.defaultdict) else collections.defaultdict(lambda: None, params)
    padding_id = params.get("padding_id") or 0
    vocab_dim = feature_dim(other_features, "vocab_dim")
    vocab_size = _vocab_size(params, vocab_dim)
    options = SamplingOptions(
        **controls,
        stop_tokens=stop_tokens,
        never_end=never_end,
        temperature=temperature,
        top_k=_top_k_option(sampling_keep_top_k, vocab_size or vocab_dim.size),
        max_top_k=max_top_k,
        use_entmax=bool(sampling_use_entmax),
        vocab_size=vocab_size,
    )
    options.check()
    check_int("top_logprobs", top_logprobs, 0, min(MOST_TOP_LOGPROBS, vocab_size or vocab_dim.size))
    if top_logprobs and not return_logprobs:
        raise ValueError(f"top_logprobs={top_logprobs} needs return_logprobs=True")
    if jit_compile and options.prefix_allowed_tokens_fn is not None:
        raise ValueError("prefix_allowed_tokens_fn with jit_compile: XLA compiles no Python function; leave one out")
    # Imported once here, not in every step.
    options = options.imported(mesh, rows)
    seed = unfolded(force_allreduce(import_seed(mesh, seed, rows)))
    stream = row_index(mesh, rows) if stream is None else import_rows(mesh, stream, tf.int32, rows, "stream")
    if max_steps is not None:
        max_steps = force_allreduce(import_rows(mesh, max_steps, tf.int32, rows, "max_steps"))

    prompt_lengths = prompt_lengths if has_partial_sequences else 0
    vocab_size = vocab_size or vocab_dim.size
    prompts = _prompts(partial_sequences, length, prompt_lengths, padding_id, bos_id, vocab_size, invalid_token)
    encoder = {
        "encoder_output": encoder_output,
        "encoder_sequence_id": encoder_sequence_id,
        "encoder_inputs": encoder_inputs,
        "encoder_layer_outputs": encoder_layer_outputs,
    }
    other_features = cut_memory(other_features, whole_length_dim, length)
    decoder = Decoder(
        model, params, other_features, variable_dtype, prompts.ids.shape[-1], prompts.lengths, shared_params, encoder
    )
    states = decoder.first_pass(prompts.ids, prompt_length)
    if num_return_sequences > 1:
        decoder.repeat(batch_dims[-1], num_return_sequences)
        prompts = prompts.repeated(batch_dims[-1], num_return_sequences)
        states = [repeat(state, batch_dims[-1], num_return_sequences) for state in states]

    loop = _DecodeLoop(
        decoder, prompts, states, prompt_length, vocab_dim, options, seed, unfolded(force_allreduce(stream)), max_steps,
        stopping_criteria, return_logprobs, top_logprobs, invalid_token,
        jit_compile and stopping_criteria is not None,
    )  # fmt: skip
    start = loop.start()

    def run_loop() -> Sequence[mtf.Tensor]:
        return mtf.while_loop(loop.unfinished, loop.step, start)

    end = loop.state(compiled(mesh, run_loop) if jit_compile and not loop.compiles_steps else run_loop())
    results = [_whole(end.ids, prompts.whole_ids)]
    results += [resize(x, prompts.ids.shape[-1], whole_length_dim.size) for x in end.answers]
    if remove_partial_sequences:
        fills = [padding_id, *[0] * len(end.answers)]
        results = [_shift_left(x, prompts.removable, whole_length_dim, fill) for x, fill in zip(results, fills)]
    return tuple(results) if return_logprobs else results[0]


def continue_rows(
    ids: mtf.Tensor,
    prompt_lengths: mtf.Tensor,
    position: mtf.Tensor,
    done: mtf.Tensor,
    states: list[mtf.Tensor],
    decoder: Decoder,
    vocab_dim: mtf.Dimension,
    options: SamplingOptions,
    *,
    seed: RowValue,
    stream: RowValue,
    max_steps: RowValue,
    stopping_criteria: StoppingCriteria | None = None,
    return_logprobs: bool = False,
    top_logprobs: int = 0,
    control_states: list[mtf.Tensor],
) -> tuple[list[mtf.Tensor], list[mtf.Tensor], list[mtf.Tensor]]:
    """Further steps of rows that are at different steps: the loop of `sample_autoregressive`, from any step on.

    Args:
      ids: int32 mtf.Tensor [rows, length]; prompts, the new tokens so far, anything.
      prompt_lengths: int32 mtf.Tensor [rows], at least 1.
      position: int32 mtf.Tensor [rows], where each row's next token goes.
      done: bool mtf.Tensor [rows]; a row that gets no token.
      states: list of mtf.Tensor, the model's after the token before `position`; they are overwritten.
      decoder: a `Decoder` that has made its first pass.
      vocab_dim: mtf.Dimension.
      options: SamplingOptions.
      seed, stream, max_steps, stopping_criteria, return_logprobs, top_logprobs: as for `sample_autoregressive`;
        max_steps counts from the prompt.
      control_states: list of mtf.Tensor [rows], what the last call returned; anything for a row without a new token.

    Returns:
      (results, control_states, states): what `sample_autoregressive` returns, as a list, with its answers about the
      tokens that this call draws and 0 elsewhere; and the states after the last of them.
    """
    mesh, rows = ids.mesh, prompt_lengths.shape
    loop = _DecodeLoop(
        decoder, _Prompts(ids, ids, prompt_lengths, None), states, ids.shape[-1].size, vocab_dim,
        options.imported(mesh, rows), unfolded(import_seed(mesh, seed, rows)),
        unfolded(import_rows(mesh, stream, tf.int32, rows, "stream")),
        import_rows(mesh, max_steps, tf.int32, rows, "max_steps"), stopping_criteria, return_logprobs, top_logprobs,
        INVALID, False,
    )  # fmt: skip
    start = _LoopState(position, ids, done, loop.no_answers(), loop.begun(control_states, position), states)
    end = loop.state(mtf.while_loop(loop.unfinished, loop.step, start.tensors()))
    return [end.ids, *end.answers], end.control_states, end.states


def _check_arguments(
    max_steps: RowValue | None, invalid_token: int, has_partial_sequences: bool, prompt_lengths: Tensor | None
) -> None:
    if is_real(max_steps) and max_steps < 0:
        raise ValueError(f"max_steps={max_steps}; 0 or more is needed")
    if not is_int(invalid_token) or not -(2**31) <= invalid_token < 2**31:
        raise ValueError(f"invalid_token={invalid_token!r}; a whole number of 32 bits is needed")
    if prompt_lengths is not None and not has_partial_sequences:
        raise ValueError("prompt_lengths are given with has_partial_sequences=False, which says that all are 0")


def _check_keywords(given: ControlKeywords) -> None:
    """Raises TypeError for a keyword that is not a control."""
    for name in sorted(given.keys() - ControlKeywords.__annotations__.keys()):
        if name in _GENERATE_NAMES:
            raise TypeError(f"unknown keyword {name}; here it is {_GENERATE_NAMES[name]}")
        own = inspect.signature(sample_autoregressive).parameters.keys() - {"controls"}
        allowed = [*ControlKeywords.__annotations__, *sorted(own)]
        raise TypeError(f"unknown keyword {name}; {explained(name, allowed, lambda n: _GENERATE_NAMES.get(n, n))}")


def _check_ids(ids: mtf.Tensor) -> None:
    check_tensor(ids, "partial_sequences")
    if ids.dtype != tf.int32:
        raise ValueError(f"partial_sequences of dtype {ids.dtype.name}; int32 is needed (mtf.to_int32)")
    if not ids.shape.dims:
        raise ValueError("partial_sequences have no dims; [batch…, length] is needed")


def _check_model(model: Model, other_features: dict[str, Any], params: Params) -> None:
    """Raises TypeError for a model, or what it is called with, of another type than GPT-Neo's."""
    for name, value in (("other_features", other_features), ("params", params)):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}: {type(value).__name__}; GPT-Neo's dict of that name is needed")
    try:
        inspect.signature(model).bind({}, other_features, params, None, None, context=None)
    except TypeError as e:
        named = getattr(model, "__name__", repr(model))
        takes = "(mtf_features, other_features, params, mesh, variable_dtype, context=None)"
        raise TypeError(f"model={named}: {e}; a function of {takes} is needed") from None
    except ValueError:  # one that does not tell its arguments
        pass


def _stop_tokens(stop_at_token: RowValue | Sequence[RowValue] | None, never_end: bool) -> tuple[RowValue, ...]:
    stop_tokens = stop_at_token if isinstance(stop_at_token, (list, tuple)) else [stop_at_token]
    stop_tokens = tuple(t for t in stop_tokens if t is not None)
    if never_end and not stop_tokens:
        raise ValueError(f"never_end=True masks the stop token, but stop_at_token is {stop_at_token}")
    return stop_tokens


def _repeated_rows(batch_dims: list[mtf.Dimension], times: int) -> mtf.Shape:
    """mtf.Shape of the rows: `times` of them for each prompt."""
    if not is_int(times) or times < 1:
        raise ValueError(f"num_return_sequences={times}; a whole number of at least 1 is needed")
    if times == 1:
        return mtf.Shape(batch_dims)
    if not batch_dims:
        raise ValueError(f"num_return_sequences={times}: the prompts need a batch dim")
    *rest, last = batch_dims
    return mtf.Shape([*rest, mtf.Dimension(last.name, last.size * times)])


def _prompts(
    ids: mtf.Tensor,
    length: int,
    lengths: RowValue | None,
    padding_id: int,
    bos_id: RowValue,
    vocab_size: int,
    invalid_token: int,
) -> _Prompts:
    """The prompts alone, with padding behind them; an empty one becomes bos_id.

    Args:
      ids: int32 mtf.Tensor [batch…, whole length].
      length: an int, the most tokens of a row in the loop.
      lengths: a number, an int32 tensor [batch…], or None: the prompts'.
      padding_id, bos_id, invalid_token: as for `sample_autoregressive`.
      vocab_size: an int; a bos_id from there on is outside the vocabulary.

    Raises:
      ValueError: where bos_id is outside the vocabulary and a prompt is known to be empty.
    """
    *batch_dims, whole_length_dim = ids.shape.dims
    rows = mtf.Shape(batch_dims)
    if lengths is None:
        known_ids = static_value(ids)
        known_lengths = None if known_ids is None else (known_ids != padding_id).sum(-1)
        lengths = mtf.reduce_sum(mtf.to_int32(mtf.not_equal(ids, padding_id)), reduced_dim=whole_length_dim)
    else:
        lengths = import_rows(ids.mesh, lengths, tf.int32, rows, "prompt_lengths")
        known_lengths = _known(lengths, rows)
    lengths = mtf.broadcast(lengths, rows)
    bos = import_rows(ids.mesh, bos_id, tf.int32, rows, "bos_id")
    may_be_outside = _may_be_outside(_known(bos, rows), known_lengths, vocab_size)

    def is_outside(bos: tf.Tensor) -> tf.Tensor:
        return tf.logical_or(bos < 0, bos >= vocab_size)

    def clean(ids: tf.Tensor, column: tf.Tensor, length: tf.Tensor, bos: tf.Tensor) -> tf.Tensor:
        if may_be_outside:
            bos = tf.where_v2(is_outside(bos), invalid_token, bos)
        ids = tf.where_v2(column < length, ids, padding_id)
        return tf.where_v2(tf.logical_and(length < 1, tf.equal(column, 0)), bos, ids)

    ids = cwise_broadcast(clean, [ids, mtf.range(ids.mesh, whole_length_dim, tf.int32), lengths, bos])
    begin = None
    if may_be_outside:
        begin = cwise_broadcast(
            lambda n, bos: tf.where_v2(tf.logical_and(n < 1, is_outside(bos)), 0, tf.maximum(n, 1)), [lengths, bos]
        )
    lengths = cwise_broadcast(lambda n: tf.maximum(n, 1), [lengths])
    return _Prompts(ids, resize(ids, whole_length_dim, length), lengths, begin)


def _known(x: mtf.Tensor, rows: mtf.Shape) -> np.ndarray | None:
    """The values of an option, scalar or [rows], if they are known while the graph is built."""
    return static_value(x) if x.shape in (rows, mtf.Shape([])) else None


def _may_be_outside(bos: np.ndarray | None, lengths: np.ndarray | None, vocab_size: int) -> bool:
    """Whether an empty prompt may have a bos_id outside the vocabulary. Raises ValueError if one certainly has.

    bos and lengths are ndarrays, scalar or [batch…], or None if they are known only when the graph runs.
    """
    outside = np.True_ if bos is None else (bos < 0) | (bos >= vocab_size)
    empty = np.True_ if lengths is None else lengths < 1
    found = outside & empty
    if found.any() and bos is not None and lengths is not None:
        raise ValueError(
            f"bos_id={np.broadcast_to(bos, found.shape)[found][0]} stands for an empty prompt, and is outside the "
            f"vocabulary; 0 to {vocab_size - 1} are allowed"
        )
    return bool(found.any())


def _whole(ids: mtf.Tensor, whole_ids: mtf.Tensor) -> mtf.Tensor:
    """ids [rows, length], continued to the whole length from whole_ids [rows, whole length]."""
    length_dim, whole_dim = ids.shape[-1], whole_ids.shape[-1]
    if whole_dim == length_dim:
        return ids
    return cwise_broadcast(
        lambda ids, whole, at: tf.where_v2(at < length_dim.size, ids, whole),
        [resize(ids, length_dim, whole_dim.size), whole_ids, mtf.range(ids.mesh, whole_dim, tf.int32)],
    )


def _length(name: str, value: Any, limit: int) -> int:
    if value is None:
        return limit
    if not is_int(value) or not 1 <= value <= limit:
        raise ValueError(f"{name}={value!r}; a whole number from 1 to {limit} is needed")
    return int(value)


def _vocab_size(params: Params, vocab_dim: mtf.Dimension) -> int | None:
    """The size of the model's vocabulary if `vocab_dim` is padded beyond it, else None."""
    size = params.get("n_vocab")
    if size is None or size == vocab_dim.size:
        return None
    if not is_int(size) or not 1 <= size < vocab_dim.size:
        raise ValueError(f"n_vocab={size!r}, but the vocabulary's dimension has {vocab_dim.size} entries")
    return size


def _top_k_option(k: RowValue, vocab_size: int) -> RowValue | None:
    if not is_real(k):
        return k
    if k == -1:
        return None
    if k == -2:
        return max(1, vocab_size // 10)
    if k < 1 or k != int(k):
        raise ValueError(f"sampling_keep_top_k={k}; a whole number of at least 1, -1 (off) or -2 (a tenth) is needed")
    return int(k)


def _shift_left(x: mtf.Tensor, by: mtf.Tensor, length_dim: mtf.Dimension, fill: float) -> mtf.Tensor:
    """x [batch…, length, …] without the first `by` [batch…] of each row."""
    shifted_dim = mtf.Dimension("shifted_" + length_dim.name, length_dim.size)
    source = cwise_broadcast(tf.add, [mtf.range(x.mesh, shifted_dim, tf.int32), by], by.shape + shifted_dim)
    shifted = take(x, source, length_dim)
    shifted = cwise_broadcast(
        lambda x, at: tf.where_v2(at < length_dim.size, x, tf.cast(fill, x.dtype)), [shifted, source], shifted.shape
    )
    return mtf.rename_dimension(shifted, shifted_dim.name, length_dim.name)
