"""Prompts in, text out: a model on disk, its graphs and its session."""

import dataclasses
import logging
import numbers
import pathlib
import secrets

import numpy as np

from gpt_neo_sampling._compat import mtf, probe_devices, quiet_logging, tf
from gpt_neo_sampling.checkpoint import CheckpointError, aligned, load_tokenizer, open_checkpoint, progress_bar
from gpt_neo_sampling.cluster import ClusterError
from gpt_neo_sampling.draws import padded_size
from gpt_neo_sampling.mesh import device_mesh, round_up
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.utils import DEFAULT_ALPHA, biasmask_attn_weights
from gpt_neo_sampling.sample import INVALID, SamplingOptions, sample_autoregressive

DEMO_FOLDER = pathlib.Path(__file__).parent / "demo"
DEFAULT_NEW_TOKENS = 64
MAX_BATCH = 32  # rows of a request that one graph takes; a larger one goes through in parts
MAX_PROGRAMS = 8  # graphs kept; one more, and all are dropped and the weights read again
LOAD_BYTES = 2**25  # weights read before they are handed to TensorFlow
SHORTEST = 32  # positions of the smallest graph
NO_STOP_TOKEN = -1  # no id is drawn that equals it
DTYPES = ("float32", "bfloat16")  # of weights and activations

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Sample:
    """One continuation of one prompt."""

    prompt_tokens: list  # of int; an empty prompt is the model's first token
    tokens: list  # of int, new tokens only; ends with the stop token if one was drawn
    text: str | None  # of the new tokens, without special ones; None without a tokenizer


class InvalidDistributionError(ArithmeticError):
    """The model gave logits that no token can be drawn from (NaN, say)."""


@dataclasses.dataclass(frozen=True)
class _ProgramKey:
    """What a graph is built for: its sizes, and the steps of sampling that it has."""

    batch: int
    prompt_length: int
    length: int  # prompt and new tokens
    greedy: bool
    use_entmax: bool
    max_top_k: int | None  # None: no top-k step


class _Program:
    """One decode graph: placeholders for the request, and the tokens that come out."""

    def __init__(self, key, params, n_vocab, mesh_impl, variable_dtype):
        """n_vocab: entries of the vocabulary's dimension, padding included."""
        self.ids = tf.placeholder(tf.int32, [key.batch, key.length])
        self.prompt_lengths = tf.placeholder(tf.int32, [key.batch])
        self.max_steps = tf.placeholder(tf.int32, [key.batch])
        self.stream = tf.placeholder(tf.int32, [key.batch])
        self.seed = tf.placeholder(tf.int32, [])
        self.stop_at_token = tf.placeholder(tf.int32, [])
        self.temperature = tf.placeholder(tf.float32, [])
        self.top_k = tf.placeholder(tf.int32, [])
        self.entmax_alpha = tf.placeholder(tf.float32, [])

        mesh = mtf.Mesh(mtf.Graph(), "mesh")
        batch_dim = mtf.Dimension("batch", key.batch)
        sequence_dim = mtf.Dimension("sequence", key.length)
        memory_dim = mtf.Dimension("memory_length", key.length)
        other_features = {
            "embd_dim": mtf.Dimension("embd", params["n_embd"]),
            "vocab_dim": mtf.Dimension("vocab", n_vocab),
            "embed_sequence_dim": mtf.Dimension("embed_sequence", params["n_ctx"]),
            "memory_length_dim": memory_dim,
            "attn_bias": biasmask_attn_weights(mesh, sequence_dim, memory_dim, variable_dtype),
        }
        tokens = sample_autoregressive(
            mtf.import_tf_tensor(mesh, self.ids, [batch_dim, sequence_dim]),
            other_features,
            params,
            stop_at_token=self.stop_at_token,
            max_steps=self.max_steps,
            temperature=0 if key.greedy else self.temperature,
            variable_dtype=variable_dtype,
            sampling_keep_top_k=-1 if key.max_top_k is None else self.top_k,
            max_top_k=key.max_top_k,
            sampling_use_entmax=key.use_entmax,
            entmax_alpha=self.entmax_alpha if key.use_entmax else DEFAULT_ALPHA,
            seed=self.seed,
            stream=self.stream,
            prompt_lengths=self.prompt_lengths,
            max_prompt_length=key.prompt_length,
        )
        lowering = mtf.Lowering(mesh.graph, {mesh: mesh_impl}, autostack=False)
        self.tokens = lowering.export_to_tf_tensor(tokens)
        self.weights = {v.name.removeprefix("gpt2/"): (v.shape, slices) for v, slices in lowering.variables.items()}


class TextGenerator:
    """A GPT-Neo that continues prompts.

    Made by `from_pretrained`. Holds one copy of the weights, and a graph for
    each size of request that it has met, rounded up to a few sizes; at most
    `MAX_PROGRAMS` of them, so that mixed requests do not grow its memory.
    """

    def __init__(self, checkpoint, tokenizer=None, mesh=None, dtype=None):
        """Takes a `Checkpoint`, a `tokenizers.Tokenizer` or None, a `mesh.DeviceMesh`, by default one CPU, and a dtype.

        See `from_pretrained`.
        """
        gpt2.check_params(checkpoint.params)
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.params = dict(checkpoint.params, mode="predict")
        if checkpoint.ignored_generation_options:
            options = (f"{key}={value!r}" for key, value in checkpoint.ignored_generation_options.items())
            log.warning("the model's generation_config.json asks for what is not built and is left out: %s",
                        ", ".join(options))  # fmt: skip
        self.mesh = device_mesh() if mesh is None else mesh
        # memory is as long as the request, rounded up, and at most n_ctx
        sizes = dict(gpt2.splittable_dims(self.params), memory_length=self.params["n_ctx"])
        self.mesh.check(sizes, gpt2.TENSORS)
        vocab_parts = self.mesh.parts("vocab")
        self._variable_dtype = _variable_dtype(dtype)
        self._n_vocab = self.params["n_vocab"] if vocab_parts == 1 else padded_size(self.params["n_vocab"], vocab_parts)
        self._mesh_impl = self.mesh.impl()
        self._session = None
        self._programs = {}

    @classmethod
    def from_pretrained(cls, folder=None, *, dtype=None, mesh_shape=None, layout=None, devices=None, cluster=None):
        """Opens the model in a folder.

        Args:
          folder: a path of a folder with GPT-Neo's mesh-TF checkpoint and its
            JSON config, or with a Hugging Face GPT-Neo, or of a JSON config; None
            for the model that comes with the package. See `open_checkpoint`. A
            tokenizer that comes with the model is used: see `load_tokenizer`.
          dtype: "float32" or "bfloat16", a str or a tf.DType: what weights are
            held in and activations computed in. None is float32, whatever the
            folder stores. bfloat16 halves the memory and gives logits of 8
            significant bits; what is drawn from them is computed in float32
            either way.
          mesh_shape, layout, devices, cluster: see `mesh.device_mesh`; by default
            one CPU. They change where the work is done and not what comes out:
            a vocabulary that a layout does not divide is padded with entries
            that are never drawn, and a batch with rows that are dropped.

        Returns:
          a TextGenerator. The weights are read at the first `generate`.

        Raises:
          CheckpointError: (a ValueError) if the folder cannot be read as a model.
          MeshError: (a ValueError) if the mesh cannot be had, or the layout does
            not fit the model.
          ValueError: if the model has options that are not supported, or for
            another dtype.
        """
        mesh = device_mesh(mesh_shape, layout, devices, cluster)
        checkpoint = open_checkpoint(DEMO_FOLDER if folder is None else folder)
        return cls(checkpoint, load_tokenizer(checkpoint), mesh, dtype)

    def generate(
        self,
        prompts,
        *,
        max_new_tokens=None,
        do_sample=None,
        temperature=None,
        top_k=None,
        entmax_alpha=None,
        seed=None,
        num_return_sequences=1,
        eos_token_id=None,
        pad_token_id=None,
    ):
        """Continues prompts. Argument names are those of Hugging Face's `generate`.

        What is None is the model's own, if its generation_config.json names it
        (see `Checkpoint.generation_defaults`), and else as said here.

        Args:
          prompts: a str or a list of token ids, or a list of either. Strings
            need the model's tokenizer. An empty prompt stands for the model's
            first token (its bos_id, or else its eos_id).
          max_new_tokens: int, at least 1; None for 64 (or up to the model's
            max_length, prompt included). A row ends earlier at the stop token,
            and at the end of the context, with a warning.
          do_sample: False for greedy decoding, the likeliest token each time.
            None for True; a temperature, top_k or entmax_alpha that is given
            samples too, whatever the model's own is.
          temperature: larger is more random; 0 is greedy. None for 0.9 with
            softmax and 1.0 with entmax.
          top_k: draw from the k likeliest tokens alone; None for all.
          entmax_alpha: a number in [1, 2] for α-entmax in place of softmax;
            larger leaves fewer tokens to draw from. None for softmax.
          seed: int; the same seed and prompts give the same tokens. None for
            fresh ones.
          num_return_sequences: int, samples of each prompt.
          eos_token_id: the stop token; None for the model's own, −1 for none.
          pad_token_id: what fills the rows of a batch behind their tokens; it
            does not appear in what is returned. None for the model's own.

        Returns:
          a list of `Sample`, in the order of the prompts; the
          num_return_sequences of one prompt stand together.

        Raises:
          ValueError: for a value that is out of range; the message says what
            was given and what is allowed.
          InvalidDistributionError: if the model gives logits that are NaN.
          ClusterError: (an OSError) if a machine of the cluster is missing or lost.
        """
        prompts = self._encode_prompts(prompts)
        longest = max(len(p) for p in prompts)
        defaults = self.checkpoint.generation_defaults
        if do_sample is None:
            given = any(option is not None for option in (temperature, top_k, entmax_alpha))
            do_sample = given or defaults.get("do_sample", True)
        if do_sample and temperature is None:
            temperature = defaults.get("temperature")
        if top_k is None:
            top_k = defaults.get("top_k") or None  # Hugging Face's 0 is off
        if max_new_tokens is None:
            max_new_tokens = self._default_new_tokens(longest)
        _check_int("max_new_tokens", max_new_tokens, 1)
        _check_int("num_return_sequences", num_return_sequences, 1)
        n_vocab, n_ctx = self.params["n_vocab"], self.params["n_ctx"]
        if top_k is not None:
            _check_int("top_k", top_k, 1)
        for name, value in (("temperature", temperature), ("entmax_alpha", entmax_alpha)):
            if value is not None and not isinstance(value, numbers.Real):
                raise ValueError(f"{name}={value!r}; a number is needed")
        if not do_sample:
            if temperature:
                raise ValueError(f"temperature={temperature} with do_sample=False, which is greedy; leave one out")
            temperature = 0
        use_entmax = entmax_alpha is not None
        if temperature is None:
            temperature = 1.0 if use_entmax else 0.9
        options = SamplingOptions(
            temperature=temperature, use_entmax=use_entmax, entmax_alpha=entmax_alpha if use_entmax else DEFAULT_ALPHA
        )
        options.check()
        if seed is None:
            seed = secrets.randbits(32)
        elif not isinstance(seed, numbers.Integral) or not -(2**31) <= seed < 2**32:
            raise ValueError(f"seed={seed!r}; a whole number from -2**31 to 2**32 - 1 is needed")
        stop_token = self._stop_token(eos_token_id)
        pad = self._padding(pad_token_id)

        if longest > n_ctx:
            raise ValueError(f"a prompt of {longest} tokens is longer than the context; at most {n_ctx} are allowed")
        if longest + max_new_tokens > n_ctx:
            log.warning(
                "%d prompt tokens and %d new ones pass the context's end; generation stops there, at %d",
                longest, max_new_tokens, n_ctx,
            )  # fmt: skip

        rows = [p for p in prompts for _ in range(num_return_sequences)]
        greedy = temperature == 0
        feeds = {
            "seed": np.array(int(seed) % 2**32, np.uint32).view(np.int32),
            "stop_at_token": stop_token,
            "temperature": temperature,
            "top_k": top_k if top_k is not None else 0,
            "entmax_alpha": options.entmax_alpha,
        }
        samples = []
        for begin in range(0, len(rows), MAX_BATCH):
            part = rows[begin : begin + MAX_BATCH]
            limits = [min(max_new_tokens, n_ctx - len(p)) for p in part]
            prompt_length, length = (
                round_up(_round_up_length(longest, n_ctx), self.mesh.parts("memory_length"))
                for longest in (max(map(len, part)), max(len(p) + n for p, n in zip(part, limits)))
            )
            key = _ProgramKey(
                batch=round_up(_round_up_batch(len(part)), self.mesh.parts("batch")),
                prompt_length=prompt_length,
                length=length,
                greedy=greedy,
                use_entmax=use_entmax and not greedy,
                max_top_k=None if greedy else _round_up_top_k(top_k, n_vocab),
            )
            new_tokens = self._run(key, part, limits, begin, feeds, pad)
            for row, (prompt, new) in enumerate(zip(part, new_tokens), begin):
                samples.append(self._sample(row, prompt, new, stop_token))
        return samples

    def close(self):
        """Frees the weights and the graphs; the next `generate` makes them anew."""
        if self._session is not None:
            self._session.close()
        self._session, self._programs = None, {}

    # --- requests

    def _encode_prompts(self, prompts):
        """The prompts as lists of ids, none of them empty."""
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], numbers.Integral)):
            prompts = [prompts]
        if len(prompts) == 0:
            raise ValueError("no prompts; at least one is needed")
        return [self._encode_prompt(p) for p in prompts]

    def _encode_prompt(self, prompt):
        if isinstance(prompt, str):
            if self.tokenizer is None:
                name = self.checkpoint.tokenizer_name
                wanted = f" (its dataset's is {name}, which is not downloaded)" if name else ""
                raise ValueError(
                    f"{self.checkpoint.folder} has no tokenizer.json, nor vocab.json and merges.txt{wanted}; "
                    "give prompts as token ids"
                )
            ids = self.tokenizer.encode(prompt).ids
        else:
            ids = list(prompt)
        n_vocab = self.params["n_vocab"]
        for i in ids:
            if not isinstance(i, numbers.Integral) or not 0 <= i < n_vocab:
                raise ValueError(f"prompt id {i!r} is outside the vocabulary; 0 to {n_vocab - 1} are allowed")
        if not ids:
            defaults = self.checkpoint.generation_defaults
            first = defaults.get("bos_token_id", defaults.get("eos_token_id"))
            if isinstance(first, list):
                first = first[0]
            if first is None or not 0 <= first < n_vocab:
                raise ValueError("an empty prompt, and the model names no first token (bos_id or eos_id)")
            ids = [first]
        return [int(i) for i in ids]

    def _default_new_tokens(self, longest):
        """For prompts of at most `longest` tokens."""
        defaults = self.checkpoint.generation_defaults
        if "max_new_tokens" in defaults or "max_length" not in defaults:
            return defaults.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        if longest >= defaults["max_length"]:
            raise ValueError(
                f"a prompt of {longest} tokens leaves nothing of max_length={defaults['max_length']}, "
                "which the model's generation_config.json gives; give max_new_tokens"
            )
        return defaults["max_length"] - longest

    def _stop_token(self, eos_token_id):
        if eos_token_id is None:
            eos_token_id = self.checkpoint.generation_defaults.get("eos_token_id", NO_STOP_TOKEN)
        if isinstance(eos_token_id, (list, tuple)):
            if len(eos_token_id) != 1:
                raise ValueError(f"eos_token_id={eos_token_id}: one stop token is supported; give eos_token_id=ID")
            eos_token_id = eos_token_id[0]
        _check_int("eos_token_id", eos_token_id, NO_STOP_TOKEN)
        return int(eos_token_id)

    def _padding(self, pad_token_id):
        if pad_token_id is None:
            pad_token_id = self.checkpoint.generation_defaults.get("pad_token_id", 0)
        _check_int("pad_token_id", pad_token_id, 0)
        return int(pad_token_id)

    def _sample(self, row, prompt, new, stop_token):
        new = new.tolist()
        if stop_token in new:
            new = new[: new.index(stop_token) + 1]
        if INVALID in new:
            raise InvalidDistributionError(
                f"sample {row}, step {new.index(INVALID)}: the model's logits are not a distribution (NaN or infinite)"
            )
        return Sample(prompt, new, self._decode(prompt, new))

    def _decode(self, prompt, new):
        if self.tokenizer is None:
            return None
        # Decoded behind its prompt: a character's bytes may lie on both sides.
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode(prompt + new)
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(new)

    # --- graphs

    def _run(self, key, prompts, limits, first_row, feeds, pad):
        """The new tokens of each prompt, arrays as long as its limit."""
        ids = np.full([key.batch, key.length], pad, np.int32)
        lengths = np.ones(key.batch, np.int32)  # rows that only fill the batch: one token, no step
        max_steps = np.zeros(key.batch, np.int32)
        for row, (prompt, limit) in enumerate(zip(prompts, limits)):
            ids[row, : len(prompt)] = prompt
            lengths[row], max_steps[row] = len(prompt), limit
        feeds = {
            **feeds,
            "ids": ids,
            "prompt_lengths": lengths,
            "max_steps": max_steps,
            "stream": np.arange(first_row, first_row + key.batch, dtype=np.int32),
        }
        try:
            program = self._program(key)
            feeds = {getattr(program, name): value for name, value in feeds.items()}
            out = self.mesh.run(self._session, program.tokens, feeds)
        except ClusterError:
            self.close()  # what the processes held is lost: the next request begins anew
            raise
        return [out[row, len(p) : len(p) + n] for row, (p, n) in enumerate(zip(prompts, limits))]

    def _program(self, key):
        """The graph for a key, built in the one tf.Graph that holds the weights."""
        if key in self._programs:
            return self._programs[key]
        if len(self._programs) >= MAX_PROGRAMS:
            self.close()  # nodes cannot be taken out of a graph, only the graph dropped
        first = self._session is None
        if first:
            probe_devices()
        graph = tf.Graph() if first else self._session.graph
        with graph.as_default(), quiet_logging(), self.mesh.place(), tf.variable_scope("", reuse=tf.AUTO_REUSE):
            program = _Program(key, self.params, self._n_vocab, self._mesh_impl, self._variable_dtype)
            if first:
                session = self.mesh.session(graph)
                try:
                    self._load_weights(session, program.weights)
                except BaseException:
                    session.close()
                    raise
                self._session = session
        self._programs[key] = program
        return program

    def _load_weights(self, session, weights):
        """Fills the slices of the variables, a few megabytes at a time.

        mtf's own way, from master variables that are filled first, would hold
        all weights twice. weights: name -> (mtf.Shape, mtf's LaidOutVariable).
        """
        missing = sorted(set(weights) ^ set(self.checkpoint.names()))
        if missing:
            raise CheckpointError(f"{self.checkpoint.folder}: model and checkpoint differ in {', '.join(missing[:5])}")
        # The largest first: what is read stands beside what is filled while that is least.
        names = sorted(weights, key=lambda name: -weights[name][0].size)
        feed, size = {}, 0  # each run of another set of variables costs some 50 ms
        with progress_bar("loading", map(self.checkpoint.shape, names)) as progress:
            for name in names:
                value = self.checkpoint.read(name)
                progress.update(value.nbytes)
                shape, slices = weights[name]
                for processor, variable in enumerate(slices.laid_out_tensor.tensor_list):
                    part = _slice(value, self._mesh_impl.slice_begin(shape, processor), variable.shape.as_list())
                    # the initial value is fed, so it is not computed
                    feed[variable.initializer] = aligned(part, variable.dtype.base_dtype.as_numpy_dtype)
                    size += part.nbytes
                    if size >= LOAD_BYTES:
                        self._fill(session, feed)
                        feed, size = {}, 0
            if feed:
                self._fill(session, feed)

    def _fill(self, session, feed):
        self.mesh.run(session, list(feed), {initializer.inputs[1]: value for initializer, value in feed.items()})


def _slice(value, begin, shape):
    """A slice of an array, with zeros behind its end (the entries of a padded vocabulary)."""
    part = value[tuple(slice(b, b + n) for b, n in zip(begin, shape))]
    return np.pad(part, [(0, n - m) for n, m in zip(shape, part.shape)]) if list(part.shape) != shape else part


def _variable_dtype(dtype):
    name = DTYPES[0] if dtype is None else getattr(dtype, "name", dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    return mtf.VariableDType(tf.as_dtype(name))


def _check_int(name, value, least):
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}; a whole number of at least {least} is needed")


def _round_up_batch(rows):
    return 1 << (rows - 1).bit_length()


def _round_up_length(length, n_ctx):
    """32, 48, 64, 96, 128, …: powers of two and the middles between them."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, n_ctx)


def _round_up_top_k(top_k, n_vocab):
    if top_k is None or top_k >= n_vocab:
        return None
    return next(k for k in (64, 1024, n_vocab) if top_k <= k)
