"""The samples of many prompts through one graph of a few rows: a sample that ends gives its row to the next.

The graph runs in segments. A segment ends when a quarter of the rows are done; then these are handed over, the next
prompts are read, by a graph of its own, and the next segment goes on with all rows where they stand. A row's tokens
depend on its own prompt, options, stream and step alone, so they are the same in any company.

The model's states are arrays of this process, which TensorFlow reads and overwrites where they lie: for one CPU.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gpt_neo_sampling._types import Streamer
from gpt_neo_sampling.checkpoint.base import aligned_empty
from gpt_neo_sampling.generation.request import Request
from gpt_neo_sampling.generation.session import (
    FirstPassKey,
    FirstPassProgram,
    Graphs,
    RowArrays,
    SegmentProgram,
    program_key,
    prompt_length_of,
    round_up_power,
)
from gpt_neo_sampling.generation.streaming import IncrementalDetokenizer, Watcher
from gpt_neo_sampling.sampling.next_token import answers_of

MEMORY_AXIS = 2  # of a state, [rows, heads, memory_length, features_per_head]


class Drawn(NamedTuple):
    """A sample whose last token was drawn, or that has no distribution for the next."""

    sample: int  # its index in the request
    tokens: np.ndarray  # int32 [new tokens]
    answers: list[np.ndarray]  # [new tokens, …]: see `answers_of`


class RowPool:
    """One run of the samples of a request."""

    def __init__(
        self,
        graphs: Graphs,
        request: Request,
        detokenizer: Callable[[list[int]], IncrementalDetokenizer | None],
        on_token: Streamer | None,
        most_rows: int,
    ) -> None:
        """
        Args:
          graphs: `Graphs` on one CPU.
          request: a `Request`. The graphs' sizes follow from all of it, whichever of its prompts are run.
          detokenizer: a function of a prompt, a list of ids, to what `Watcher` takes.
          on_token: as for `Watcher`, with the index of the sample for the row; or None.
          most_rows: int, of the graph.
        """
        self._graphs, self._request, self._detokenizer, self._on_token = graphs, request, detokenizer, on_token
        n_samples = request.num_return_sequences
        wanted = request.values["max_new_tokens"].tolist()
        self._limits = [min(n, request.n_ctx - len(p)) for p, n in zip(request.prompts, wanted)]
        key = program_key(request, request.prompts, self._limits, 1, graphs.mesh)
        batch = min(most_rows, round_up_power(len(request.prompts) * n_samples))
        self._key = dataclasses.replace(key, batch=batch, prompt_length=1)
        self._pause_at = max(1, batch // 4)  # rows that are done
        self._first_pass_batch = max(1, most_rows // 4)  # one graph for requests of any number of rows
        self._indices: list[int | None] = [None] * batch  # of the sample in each row
        self._detokenizers: list[IncrementalDetokenizer | None] = [None] * batch
        self._rows = RowArrays(
            prompt_indices=np.zeros(batch, int),
            streams=np.zeros(batch, np.int32),
            prompt_lengths=np.ones(batch, np.int32),
            limits=np.zeros(batch, np.int32),
            n_drawn=np.zeros(batch, np.int32),
            done=np.ones(batch, bool),
            ids=np.zeros([batch, key.length], np.int32),
            answers=[
                np.zeros([batch, key.length, *shape.to_integer_list], dtype.as_numpy_dtype)
                for dtype, shape in answers_of(key.return_logprobs, key.top_logprobs).values()
            ],
            control_states=[np.zeros(batch, np.float32) for _ in range(key.n_control_states)],
            states=[],
        )

    def run(self, prompts: Iterable[int]) -> Iterator[list[Drawn]]:
        """Runs all samples of the prompts with these indices, in this order.

        Yields:
          lists of `Drawn`, as they end.

        Raises:
          KeyboardInterrupt: at Ctrl-C, after yielding those that have ended.
        """
        n_samples = self._request.num_return_sequences
        waiting = collections.deque(p * n_samples + n for p in prompts for n in range(n_samples))
        full = [index for index in waiting if not self._limits[index // n_samples]]  # whose prompt fills the context
        if full:
            yield [Drawn(index, np.zeros(0, np.int32), [x[0, :0] for x in self._rows.answers]) for index in full]
            waiting = collections.deque(index for index in waiting if self._limits[index // n_samples])
        while waiting or not self._rows.done.all():
            free = np.flatnonzero(self._rows.done).tolist()
            self._begin(free, [waiting.popleft() for _ in free[: len(waiting)]])
            watcher = self._run_segment()
            ended = np.flatnonzero(watcher.finished | watcher.invalid).tolist()
            if watcher.interrupted:
                ended = np.flatnonzero(watcher.finished).tolist()
            yield [self._drawn(row) for row in ended]
            if watcher.interrupted:
                raise KeyboardInterrupt
            self._rows.done[ended] = True

    def _begin(self, free: list[int], indices: list[int]) -> None:
        """Puts the samples with these indices into free rows, and reads their prompts."""
        request, rows = self._request, self._rows
        by_length: dict[int, dict[int, list[int]]] = {}  # length of the pass -> prompt -> rows
        for row, index in zip(free, indices):
            p, number = divmod(index, request.num_return_sequences)
            prompt = request.prompts[p]
            self._indices[row], self._detokenizers[row] = index, self._detokenizer(prompt)
            rows.prompt_indices[row], rows.streams[row] = p, request.values["stream"][p] + number
            rows.prompt_lengths[row], rows.limits[row] = len(prompt), self._limits[p]
            rows.n_drawn[row], rows.done[row] = 0, False
            rows.ids[row] = 0
            rows.ids[row, : len(prompt)] = prompt
            for answer in rows.answers:
                answer[row] = 0
            # each prompt's by its own length, so that its numbers have the same last bits in any company
            length = min(prompt_length_of(prompt, request.n_ctx), self._key.length)
            by_length.setdefault(length, {}).setdefault(p, []).append(row)
        for length, rows_of in by_length.items():
            waiting = list(rows_of)
            for begin in range(0, len(waiting), self._first_pass_batch):
                self._read(waiting[begin : begin + self._first_pass_batch], length, rows_of)

    def _read(self, prompts: list[int], length: int, rows_of: dict[int, list[int]]) -> None:
        """Fills the states of the prompts' rows."""
        key = FirstPassKey(self._first_pass_batch, length)
        found = self._graphs.run(FirstPassProgram, key, [self._request.prompts[p] for p in prompts])
        if not self._rows.states:
            self._rows.states = [self._empty(state, length) for state in found]
        for state, new in zip(self._rows.states, found):
            size = new.shape[MEMORY_AXIS]
            for p, read in zip(prompts, new):
                for row in rows_of[p]:
                    state[row, :, :size] = read
                    state[row, :, size:] = 0  # an earlier row's may be NaN

    def _empty(self, state: np.ndarray, length: int) -> np.ndarray:
        """Memory for a state of all rows; `state` is one of a first pass of this length."""
        _, heads, size, features = state.shape
        return aligned_empty([self._key.batch, heads, size - length + self._key.length, features], state.dtype)

    def _run_segment(self) -> Watcher:
        """Runs the rows until a quarter of them are done. Returns what watched them."""
        rows, stop_tokens = self._rows, self._request.stop_tokens
        watched = [(d, limit, stop_tokens) for d, limit in zip(self._detokenizers, rows.limits.tolist())]
        watcher = Watcher(watched, self._on_token and self._hand_on, rows.n_drawn, self._pause_at)
        (ids, *more), _ = self._graphs.run(
            SegmentProgram, self._key, self._request, rows, around=watcher.run, watcher=watcher
        )
        rows.n_drawn = watcher.n_drawn
        rows.ids[:] = ids
        for all_steps, new in zip(rows.answers, more):
            all_steps += new
        rows.control_states = more[len(rows.answers) :]
        return watcher

    def _hand_on(self, row: int, token: int, text: str | None, is_last: bool) -> None:
        assert self._on_token is not None
        index = self._indices[row]
        assert index is not None
        self._on_token(index, token, text, is_last)

    def _drawn(self, row: int) -> Drawn:
        rows, index = self._rows, self._indices[row]
        assert index is not None
        begin = rows.prompt_lengths[row]
        new = slice(begin, begin + rows.n_drawn[row])
        return Drawn(index, rows.ids[row, new].copy(), [x[row, new].copy() for x in rows.answers])
