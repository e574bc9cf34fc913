"""`TextGenerator`: prompts in, samples out."""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from gpt_neo_sampling._types import DType, Prompt, Prompts, Streamer, StrPath, Tokenizer, is_int
from gpt_neo_sampling.checkpoint import Checkpoint, CheckpointError, load_tokenizer, open_checkpoint
from gpt_neo_sampling.checkpoint.base import one_line
from gpt_neo_sampling.checkpoint.tokenizer import can_load_tokenizer, encoded, tokenizer_source, why_no_tokenizer
from gpt_neo_sampling.generation.decode_graph import DEMO_FOLDER, first_token_of
from gpt_neo_sampling.generation.options import TOKEN_OPTIONS, GenerationOptions
from gpt_neo_sampling.generation.request import Request, checked_request, models_stop_strings
from gpt_neo_sampling.generation.row_pool import RowPool
from gpt_neo_sampling.generation.scoring import ScoreProgram, TextScore, score_texts
from gpt_neo_sampling.generation.session import (
    ChainProgram,
    DecodeProgram,
    Graphs,
    WatchedProgram,
    program_key,
    score_key,
)
from gpt_neo_sampling.generation.streaming import IncrementalDetokenizer, Watcher
from gpt_neo_sampling.inspection import ChainStep
from gpt_neo_sampling.mesh.cluster import Cluster
from gpt_neo_sampling.mesh.devices import DeviceMesh, device_mesh
from gpt_neo_sampling.sample import INVALID
from gpt_neo_sampling.sampling.controls import INT32_MAX, check_bool
from gpt_neo_sampling.sampling.next_token import answers_of
from gpt_neo_sampling.sampling.other_names import explained, explains_names

MAX_BATCH = 32  # rows of one graph; a larger request takes several runs
OPTION_NAMES = [f.name for f in dataclasses.fields(GenerationOptions)]

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Sample:
    """One continuation of one prompt.

    Attributes:
      prompt_tokens: list of ids; for an empty prompt, the model's first token.
      tokens: list of the new ids only; ends with the stop token if one was drawn.
      text: str of the new tokens, without special ones; None without a tokenizer.
      finish_reason: "length"; or "stop" for a stop token or a stop string (the text
        ends before the stop string).
      logprobs: list of the natural logarithms of the model's own probabilities, one
        for each new token; None unless `return_logprobs` asks for them.
      draw_logprobs: the same of the probabilities that the tokens were drawn with.
      ranks: list of each new token's rank under the model's own distribution, 1 for the
        likeliest; None unless `top_logprobs` asks for it.
      top_logprobs: list, for each new token a list of pairs of a token's id and its
        logarithm: the model's likeliest, the first of equal ones first.
      prompt_logprobs: list of the logarithms of the prompt's tokens, None for the
        first, which nothing precedes; None unless `return_prompt_logprobs` asks for it.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str | None
    finish_reason: str = "length"
    logprobs: list[float] | None = None
    draw_logprobs: list[float] | None = None
    ranks: list[int] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    prompt_logprobs: list[float | None] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a dict of the fields, without the log-probabilities that were not asked for."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None or name == "text"}


class InvalidDistributionError(ArithmeticError):
    """The model gave logits that no token can be drawn from (NaN, say).

    From `generate`, `sample` is the index of the first sample that had them, `step` the index of the new token that
    could not be drawn, and `samples` a list of the other samples in order, with None where drawing failed. `reason`
    says what may be wrong.
    """

    def __init__(
        self, message: str, sample: int | None = None, step: int | None = None, reason: str | None = None
    ) -> None:
        super().__init__(message)
        self.sample, self.step, self.reason = sample, step, reason
        self.samples: list[Sample | None] = []


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. `samples` is a list of the finished samples in order, with None for the others."""

    def __init__(self, samples: list[Sample | None]) -> None:
        super().__init__()
        self.samples = samples


class TextGenerator:
    """A GPT-Neo that continues prompts.

    Made by `from_pretrained`. Holds one copy of the weights, and a graph for each
    size of request so far. Sizes are rounded up to a few, and at most
    `session.MAX_PROGRAMS` graphs are kept, so mixed requests do not grow its memory.

    Any number of threads may use one generator at once, and a streamer may use the
    generator that calls it; no call changes the result of another. Graphs are built
    one at a time and run side by side. TensorFlow hangs in a process forked from one
    that had used it, so there a call raises RuntimeError; start processes with
    multiprocessing's "spawn".

    Attributes:
      checkpoint: the `Checkpoint`.
      tokenizer: a `tokenizers.Tokenizer`, or None.
      mesh: the `DeviceMesh`.
      params: dict, the model's config by GPT-Neo's keys: n_vocab, n_ctx and so on.
      dtype: str, the dtype of activations.
      jit_compile: bool, whether XLA compiles decode loops.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None = None,
        mesh: DeviceMesh | None = None,
        dtype: DType | None = None,
        jit_compile: bool = False,
    ) -> None:
        """
        Args:
          checkpoint: a `Checkpoint`, open.
          tokenizer: the model's `tokenizers.Tokenizer`, or None.
          mesh: a `devices.DeviceMesh`; by default one CPU.
          dtype, jit_compile: as for `from_pretrained`.

        Raises:
          MeshError, ValueError: as `from_pretrained`.
          TypeError: for an argument of another type, such as a folder, which `from_pretrained` opens.
        """
        _check_types(checkpoint, tokenizer, mesh)
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self._lacks_package = tokenizer is None and tokenizer_source(checkpoint) and not can_load_tokenizer()
        self.mesh = device_mesh() if mesh is None else mesh
        check_bool("jit_compile", jit_compile)
        self.jit_compile = jit_compile
        self._graphs = Graphs(checkpoint, self.mesh, dtype, jit_compile)
        self.params, self.dtype = self._graphs.params, self._graphs.dtype
        if checkpoint.ignored_generation_options:
            options = (f"{key}={value!r}" for key, value in checkpoint.ignored_generation_options.items())
            log.warning("the model's generation_config.json has options that are not supported and are ignored: %s",
                        one_line(", ".join(options)))  # fmt: skip
        _, unusable = models_stop_strings(checkpoint, tokenizer)
        if unusable:
            why = "there is no tokenizer" if tokenizer is None else "no text holds a special token"
            log.warning("stop_strings of the model's generation_config.json are ignored, as %s: %s",
                        why, one_line(", ".join(map(repr, unusable))))  # fmt: skip

    @classmethod
    @explains_names()
    def from_pretrained(
        cls,
        folder: StrPath | None = None,
        *,
        revision: str | None = None,
        dtype: DType | None = None,
        jit_compile: bool = False,
        mesh_shape: Any = None,
        layout: Any = None,
        devices: str | Sequence[str] | None = None,
        cluster: str | Cluster | None = None,
    ) -> "TextGenerator":
        """Opens the model in a folder, or of a name on the Hugging Face hub.

        Args:
          folder: path of a folder with a GPT-Neo mesh-TF checkpoint and its JSON
            config, of a folder with a Hugging Face GPT-Neo, or of a JSON config; or a
            model's name, "owner/name", which is fetched into the hub's cache; None for the
            model that comes with the package. See `open_checkpoint`; for the tokenizer
            beside the model, see `load_tokenizer`: where the package tokenizers is not
            installed, there is none, and prompts and samples are token ids.
          revision: a branch, a tag or a commit of a model by name; None for its main
            branch.
          dtype: "float32" or "bfloat16", a str or a tf.DType, for weights and
            activations. None means float32, whatever the folder stores. bfloat16
            halves the memory and gives logits of 8 significant bits; sampling is
            computed in float32 either way.
          jit_compile: whether XLA compiles the decode loop, anew for each size of
            request, on one device. With a 125M it pays from some 500 steps of a size
            on. In bfloat16 requests of several rows (prompts, samples) are not
            compiled, and run a few per cent slower than without. Logits may differ in
            their last bits.
          mesh_shape, layout, devices, cluster: see `devices.device_mesh`; by default
            one CPU. They decide where the work is done and do not change the result:
            a vocabulary that a layout does not divide is padded with entries that
            are never drawn, and a batch with rows that are dropped.

        Returns:
          a TextGenerator. The weights are read at the first `generate`.

        Raises:
          CheckpointError: (a ValueError) if the folder cannot be read as a model, or the
            hub has no such name or revision.
          ConnectionError, OSError: if the hub cannot be reached, or its cache written.
          MeshError: (a ValueError) if the devices are not there, or the layout does
            not fit the model; for jit_compile on more than one device.
          ValueError: if the model has options that are not supported, for another
            dtype, or for jit_compile where TensorFlow is built without XLA.
        """
        mesh = device_mesh(mesh_shape, layout, devices, cluster)
        checkpoint = open_checkpoint(DEMO_FOLDER if folder is None else folder, revision)
        tokenizer = load_tokenizer(checkpoint) if can_load_tokenizer() else None
        return cls(checkpoint, tokenizer, mesh, dtype, jit_compile)

    @explains_names(OPTION_NAMES)
    def generate(self, prompts: Prompts, *, streamer: Streamer | None = None, **options: Any) -> list[Sample]:
        """Continues prompts. Argument names are those of Hugging Face's `generate`.

        Args:
          prompts: a str or a list of token ids, or a list of either. Strings
            need the model's tokenizer. An empty prompt stands for the model's
            first token (its bos_id, or else its eos_id).
          streamer: a function of (index, token, text, is_last), called for each new
            token as soon as it is drawn: the index of the sample, the token's id, the
            text that it completes (whole characters only; None without a tokenizer),
            and whether it is the sample's last. It is called in the caller's thread,
            while further tokens are drawn.
          **options: see `GenerationOptions`.

        Returns:
          a list of `Sample`, in the order of the prompts; the
          num_return_sequences of one prompt are adjacent.

        Raises:
          TypeError: for an unknown option.
          ValueError: for a value out of range; the message says what was given and
            what is allowed.
          InvalidDistributionError: if some sample's logits are NaN or infinite, or all
            its tokens are masked; the error holds the other samples, and names
            sample, step, and a weight that is not finite, if there is one.
          ClusterError: (an OSError) if a machine of the cluster is missing or lost.
          RuntimeError: in a process forked from one that had used TensorFlow.
          Interrupted: (a KeyboardInterrupt) at Ctrl-C: within a step if there is a
            streamer, otherwise when the running graph ends.

        Example:

            >>> generator = TextGenerator.from_pretrained()
            >>> samples = generator.generate(["It was a", "Emma"], temperature=[0, 0.7], max_new_tokens=[8, 4], seed=1)
            >>> [sample.text for sample in samples]
            [' great deal too much to be done.', ' could not get a']
        """
        request = self.check(prompts, **options)
        self._note_no_text()
        if not (streamer is None or callable(streamer)):
            raise TypeError(f"streamer={streamer!r}; a function of (index, token, text, is_last) is needed")
        if streamer is not None and self.mesh.cluster is not None:
            raise ValueError("a streamer needs a mesh of this process's own devices, not a cluster")
        self._check_prefix_function(request)
        for length, limit in zip(map(len, request.prompts), request.values["max_new_tokens"]):
            if length + limit > self.params["n_ctx"]:
                log.warning(
                    "%d prompt tokens and %d new ones exceed the context; generation stops at its end, %d",
                    length, limit, self.params["n_ctx"],
                )  # fmt: skip
                break
        n_samples = request.num_return_sequences
        samples: list[Sample | None] = [None] * (len(request.prompts) * n_samples)
        samples_per_run = min(n_samples, MAX_BATCH)  # of one prompt
        prompts_per_run = MAX_BATCH // samples_per_run
        errors = []
        try:
            for begin in range(0, len(request.prompts), prompts_per_run):
                prompt_range = range(begin, min(begin + prompts_per_run, len(request.prompts)))
                for first in range(0, n_samples, samples_per_run):
                    sample_range = range(first, min(first + samples_per_run, n_samples))
                    errors += self._run(request, prompt_range, sample_range, samples, streamer)
        except KeyboardInterrupt:
            raise Interrupted(samples) from None
        if errors:
            errors[0].samples = samples
            raise errors[0]
        return cast(list[Sample], samples)

    def _check_prefix_function(self, request: Request) -> None:
        if request.options.prefix_allowed_tokens_fn is not None:
            if self.mesh.cluster is not None:
                raise ValueError("prefix_allowed_tokens_fn needs a mesh of this process's own devices, not a cluster")
            if self.jit_compile:
                raise ValueError("prefix_allowed_tokens_fn needs jit_compile=False: XLA compiles no Python function")

    @functools.cached_property
    def replaces_rows(self) -> bool:
        """Whether `generate_each` works: on one CPU, whose memory is this process's own."""
        return self.mesh.is_one_cpu()

    def generate_each(
        self, prompts: Prompts, wanted: Iterable[int], *, streamer: Streamer | None = None, **options: Any
    ) -> Iterator[list[tuple[int, Sample | InvalidDistributionError]]]:
        """Continues many prompts through a graph of MAX_BATCH rows; a sample that ends makes room for the next one.

        Args:
          prompts, streamer, **options: as for `generate`. The graph's sizes follow from all prompts.
          wanted: indices of the prompts that are continued, in the order in which they begin.

        Yields:
          lists of pairs, as samples end: the sample's index, as for the streamer, and the `Sample`, or an
          InvalidDistributionError where drawing failed.

        Raises:
          TypeError, ValueError, RuntimeError: as `generate`; RuntimeError unless `replaces_rows`.
          KeyboardInterrupt: at Ctrl-C, after yielding what has ended.
        """
        if not self.replaces_rows:
            raise RuntimeError("generate_each: one CPU of this process is needed (see replaces_rows)")
        request = self.check(prompts, **options)
        if request.options.prefix_allowed_tokens_fn is not None:
            raise ValueError("generate_each has no prefix_allowed_tokens_fn; generate has")
        self._note_no_text()
        pool = RowPool(self._graphs, request, functools.partial(self._detokenizer, request), streamer, MAX_BATCH)
        for ended in pool.run(wanted):
            found: list[tuple[int, Sample | InvalidDistributionError]] = []
            for index, tokens, answers in ended:
                try:
                    found.append((index, self._sample(request, index, tokens, answers)))
                except InvalidDistributionError as e:
                    found.append((index, e))
            yield found

    def check(self, prompts: Prompts, **options: Any) -> Request:
        """Checks arguments as `generate` does, without running the model.

        Args:
          prompts, **options: as for `generate`.

        Returns:
          the `request.Request` that `generate` would run.

        Raises:
          TypeError, ValueError: as `generate`.
        """
        given = GenerationOptions(**options)
        return checked_request(list(map(self.encode, _listed(prompts))), given, self.checkpoint, self.tokenizer)

    def inspect(self, prompt: Prompt, continuation: Prompt = (), **options: Any) -> list[ChainStep]:
        """The distribution of the next token after a prompt, step by step as the options change it.

        Args:
          prompt: a str or a list of token ids.
          continuation: a str or a list of token ids that follow the prompt and count
            as new tokens, for the options that look only at those.
          **options: those of `GenerationOptions` that say how a token is drawn.

        Returns:
          a list of `ChainStep`: the model's own distribution, then the distribution
          after each step that the options ask for, and last the one that a token is
          drawn from ("softmax", "entmax"; for greedy decoding "argmax", with
          probability 1 on one token).

        Raises:
          TypeError, ValueError, InvalidDistributionError, ClusterError: as `generate`.

        Example:

            >>> generator = TextGenerator.from_pretrained()
            >>> for step in generator.inspect("Mr. Darcy looked", temperature=0.7, top_k=40):
            ...     print(f"{step.label:15} {step.support:4} tokens {step.entropy:.2f} bits")
            model           2048 tokens 5.36 bits
            temperature 0.7 2048 tokens 2.97 bits
            top_k 40          40 tokens 2.63 bits
            softmax           40 tokens 2.63 bits
        """
        unknown = sorted(options.keys() - set(TOKEN_OPTIONS))
        if unknown:
            names = ", ".join(unknown)
            raise TypeError(f"not an option for drawing a token: {names}; {explained(unknown[0], TOKEN_OPTIONS)}")
        new = [] if isinstance(continuation, str) and not continuation else self._ids(continuation, is_begin=False)
        options["max_new_tokens"] = INT32_MAX  # how many more may follow does not matter here
        ids, given = self.encode(prompt) + new, GenerationOptions(**options)
        request = checked_request([ids], given, self.checkpoint, self.tokenizer)
        self._check_prefix_function(request)
        key = program_key(request, request.prompts, [0], 1, self.mesh)
        chain = self._graphs.run(ChainProgram, key, request, range(1), range(1), [len(new)])
        steps = [
            ChainStep(name, request.setting(name), p[0, : self.params["n_vocab"]]) for (_, name), p in chain.items()
        ]
        for step in steps:
            if not step.probabilities.sum() > 0.5:  # true of NaN too
                where = f"after {len(request.prompts[0])} tokens, step {step.name!r} of the chain"
                raise InvalidDistributionError(f"{where}: {self._no_distribution}")
        return steps

    def score(self, texts: Prompts, *, add_start_token: bool = False, stride: int | None = None) -> list[TextScore]:
        """How likely texts are under the model's own distribution, without temperature or masks.

        Args:
          texts: as the prompts of `generate`; none empty.
          add_start_token: True to put the model's first token (its bos_id, or else
            its eos_id) before each text, so that the text's first token is scored
            too. Otherwise it is not, as in transformers: nothing precedes it.
          stride: int from 1 to the context's length − 1, for texts that are longer
            than the context, start token included (None: those are an error). They
            are read in windows of the context's length that begin `stride` tokens
            apart. Each token is scored in the first window that has it, so after the
            first window it follows at least context − stride others. A smaller stride
            is slower and gives the model more to go by.

        Returns:
          a list of `TextScore`, in the order of the texts.

        Raises:
          ValueError: for a value out of range, or a text that is too short or too long.
          InvalidDistributionError: if the model gives logits that are NaN or infinite.
          ClusterError: (an OSError) if a machine of the cluster is missing or lost.

        Example:

            >>> generator = TextGenerator.from_pretrained()
            >>> likely, unlikely = generator.score(["It was a truth.", "Truth a was it."])
            >>> f"{likely.perplexity:.0f} {unlikely.perplexity:.0f}"
            '12 765'
        """
        check_bool("add_start_token", add_start_token)
        texts = [self._ids(text) for text in _listed(texts)]
        start = [first_token_of(self.checkpoint)] if add_start_token else []
        scores = score_texts(texts, self._logprobs, self.params["n_ctx"], start, stride)
        for i, score in enumerate(scores):
            if np.isnan(score.sum_logprob):  # then all its tokens are: NaN times 0 reaches the earlier positions too
                raise InvalidDistributionError(f"text {i}: {self._no_distribution}")
        return scores

    def _note_no_text(self) -> None:
        """Says once why samples have no text, where it is for a package that is not installed."""
        if self._lacks_package:
            self._lacks_package = False
            log.warning("%s; samples are token ids without text", why_no_tokenizer(self.checkpoint))

    def close(self) -> None:
        """Frees the weights and the graphs; the next call loads and builds them again."""
        self._graphs.close()

    # --- requests

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt.

        Args:
          prompt: a str or a list of token ids.

        Returns:
          a list of at least one id: an empty prompt gives the model's first token.

        Raises:
          ValueError: as `generate`.
        """
        return self._ids(prompt) or [first_token_of(self.checkpoint)]

    def _ids(self, text: Prompt, is_begin: bool = True) -> list[int]:
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError(f"{why_no_tokenizer(self.checkpoint)}; give token ids")
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise ValueError(f"a text is not Unicode: {e}") from None
            ids = encoded(self.tokenizer, text, is_begin)
        else:
            ids = _list_of(text, "a prompt or text", "a str or a list of token ids")
        n_vocab = self.params["n_vocab"]
        for i in ids:
            if not is_int(i) or not 0 <= i < n_vocab:
                raise ValueError(f"token id {i!r} is outside the vocabulary; 0 to {n_vocab - 1} are allowed")
        return [int(i) for i in ids]

    @functools.cached_property
    def _no_distribution(self) -> str:
        """Why logits may not be a distribution. Reads all weights."""
        try:
            name = self.checkpoint.first_not_finite()
            weights = "all weights are finite" if name is None else f"the weight {name} holds NaN or infinite numbers"
        except CheckpointError as e:
            weights = f"the weights cannot be read: {e}"
        return f"the logits hold NaN or +inf, or every token is masked ({weights})"

    def _sample(self, request: Request, index: int, drawn: np.ndarray, answers: list[np.ndarray]) -> Sample:
        """Sample number `index` of a request, from the ids drawn up to its limit and what the loop says of them."""
        new, prompt = drawn.tolist(), request.prompts[index // request.num_return_sequences]
        end = next((at + 1 for at, token in enumerate(new) if token in request.stop_tokens), None)
        reason = "length" if end is None else "stop"
        new = new[:end]
        if INVALID in new:
            step = new.index(INVALID)
            where = f"prompt {index // request.num_return_sequences}, sample {index}, step {step}"
            reason = self._no_distribution
            raise InvalidDistributionError(f"{where}: {reason}", index, step, reason)
        text = None
        if (detokenizer := self._detokenizer(request, prompt)) is not None:
            text = ""
            for at, token in enumerate(new, 1):
                text += detokenizer.push(token, is_last=at == len(new))
                if detokenizer.stopped:
                    new, reason = new[:at], "stop"
                    break
        names = answers_of(request.options.return_logprobs, request.options.top_logprobs or 0)
        said = {name: answer[: len(new)].tolist() for name, answer in zip(names, answers)}
        if "top_ids" in said:
            said["top_logprobs"] = [list(zip(*pair)) for pair in zip(said.pop("top_ids"), said["top_logprobs"])]
        return Sample(prompt, new, text, reason, **said, prompt_logprobs=self._prompt_logprobs(request, index))

    def _prompt_logprobs(self, request: Request, index: int) -> list[float | None] | None:
        """Of the prompt of sample number `index`; computed once for all samples of a request."""
        if not request.options.return_prompt_logprobs:
            return None
        if request.prompt_logprobs is None:
            several = [prompt for prompt in request.prompts if len(prompt) > 1]
            scores = iter(score_texts(several, self._logprobs, self.params["n_ctx"]))
            request.prompt_logprobs = [next(scores).logprobs if len(p) > 1 else [None] for p in request.prompts]
        found = request.prompt_logprobs[index // request.num_return_sequences]
        if any(p is not None and np.isnan(p) for p in found):
            where = f"prompt {index // request.num_return_sequences}"
            raise InvalidDistributionError(f"{where}: {self._no_distribution}", index, 0, self._no_distribution)
        return found

    def _detokenizer(self, request: Request, prompt: list[int]) -> IncrementalDetokenizer | None:
        return self.tokenizer and IncrementalDetokenizer(self.tokenizer, prompt, request.stop_strings)

    # --- runs

    def _run(
        self,
        request: Request,
        prompt_range: range,
        sample_range: range,
        samples: list[Sample | None],
        streamer: Streamer | None,
    ) -> list[InvalidDistributionError]:
        """Runs one graph for a range of prompts and of their samples. Fills in `samples`; returns their errors."""
        prompts = request.prompts[prompt_range.start : prompt_range.stop]
        wanted = request.values["max_new_tokens"][prompt_range.start : prompt_range.stop].tolist()
        limits = [min(n, self.params["n_ctx"] - len(p)) for p, n in zip(prompts, wanted)]
        indices = [p * request.num_return_sequences + n for p in prompt_range for n in sample_range]
        rows = [(prompt, limit) for prompt, limit in zip(prompts, limits) for _ in sample_range]
        watcher = None
        if self.mesh.cluster is None and (streamer is not None or request.stop_strings):
            watched = [(self._detokenizer(request, prompt), limit, request.stop_tokens) for prompt, limit in rows]
            watcher = Watcher(watched, None if streamer is None else lambda row, *args: streamer(indices[row], *args))
        key = program_key(request, prompts, limits, len(sample_range), self.mesh)
        args = key, request, prompt_range, sample_range, limits
        if watcher is None:
            results = self._graphs.run(DecodeProgram, *args)
        else:
            results = self._graphs.run(WatchedProgram, *args, around=watcher.run, watcher=watcher)
        finished = watcher.finished if watcher is not None and watcher.interrupted else None
        errors = []
        for row, (index, (prompt, limit)) in enumerate(zip(indices, rows)):
            if finished is None or finished[row]:
                new, *answers = (r[row, len(prompt) : len(prompt) + limit] for r in results)
                try:
                    samples[index] = self._sample(request, index, new, answers)
                except InvalidDistributionError as e:
                    errors.append(e)
        if finished is not None:
            raise KeyboardInterrupt
        return errors

    def _logprobs(self, rows: list[list[int]]) -> list[np.ndarray]:
        """For each row of ids, the log-probabilities of all but the first."""
        out = self._graphs.run(ScoreProgram, score_key(rows, self.params["n_ctx"], self.mesh), rows)
        return [logprobs[: len(row) - 1] for logprobs, row in zip(out, rows)]


def _check_types(checkpoint: object, tokenizer: object, mesh: object) -> None:
    """Raises TypeError for what `TextGenerator` is not made of."""
    if isinstance(checkpoint, (str, os.PathLike)):
        folder = os.fspath(checkpoint)
        raise TypeError(f"TextGenerator({folder!r}): a model is opened by TextGenerator.from_pretrained({folder!r})")
    if not isinstance(checkpoint, Checkpoint):
        own = "; a model of your own runs in sample_autoregressive(model=…)" if callable(checkpoint) else ""
        raise TypeError(f"checkpoint: {type(checkpoint).__name__}; a Checkpoint is needed, see open_checkpoint{own}")
    if not (tokenizer is None or hasattr(tokenizer, "id_to_token")):  # tokenizers may not be installed
        allowed = "a tokenizers.Tokenizer is needed, see load_tokenizer (transformers' is its backend_tokenizer)"
        raise TypeError(f"tokenizer: {type(tokenizer).__name__}; {allowed}")
    if not (mesh is None or isinstance(mesh, DeviceMesh)):
        raise TypeError(f"mesh: {type(mesh).__name__}; a DeviceMesh is needed, see device_mesh")


def _listed(texts: Prompts) -> list[Prompt]:
    """A list of texts, each a str or ids, from one text or several."""
    if isinstance(texts, str):
        return [texts]
    texts = _list_of(texts, "prompts or texts", "a str, a list of token ids, or a list of either")
    if not texts:
        raise ValueError("no prompts or texts; at least one is needed")
    return [texts] if is_int(texts[0]) else texts


def _list_of(values: Any, what: str, allowed: str) -> list[Any]:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, (list, tuple, range)):
        raise ValueError(f"{what}: {values!r}; {allowed} is needed")
    return list(values)
