"""A model as a SavedModel: tokens from plain TensorFlow, without this package."""

import functools
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_neo_sampling import _json
from gpt_neo_sampling._compat import mtf, probe_devices, tensorflow, tf
from gpt_neo_sampling._types import DType, StrPath
from gpt_neo_sampling.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from gpt_neo_sampling.checkpoint.base import check_new_folder, one_line, staging_folder
from gpt_neo_sampling.checkpoint.convert import files_beside
from gpt_neo_sampling.checkpoint.generation import ID_KEYS
from gpt_neo_sampling.checkpoint.tokenizer import can_load_tokenizer
from gpt_neo_sampling.generation.decode_graph import (
    DEMO_FOLDER,
    NO_STOP_TOKEN,
    Model,
    ProgramInputs,
    ProgramKey,
    add_variables,
    build,
    fill_variables,
    first_token_of,
    opened,
    stop_tokens_of,
    variable_dtype_of,
)
from gpt_neo_sampling.generation.options import DEFAULT_MAX_TOP_K, EXPORTABLE
from gpt_neo_sampling.generation.request import default_breakers
from gpt_neo_sampling.mesh.devices import device_mesh
from gpt_neo_sampling.mesh.gpu import portable
from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.sample import INVALID
from gpt_neo_sampling.sampling.controls import NUMBERS, check_int
from gpt_neo_sampling.sampling.defaults import DEFAULT_ALPHA, ENTMAX_TEMPERATURE, SOFTMAX_TEMPERATURE

# Two, as softmax drawn as entmax of α = 1 takes 1.8 times as long (125M's shape, batch 8).
SIGNATURES = {  # name -> its options besides top-k
    tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY: [],
    "entmax": ["entmax_alpha"],
}
MAX_BATCH = 2**16
log = logging.getLogger(__name__)


def export_saved_model(
    folder: StrPath,
    model: StrPath | None = None,
    *,
    revision: str | None = None,
    batch: int,
    length: int,
    prompt_length: int | None = None,
    max_top_k: int = DEFAULT_MAX_TOP_K,
    controls: Sequence[str] = (),
    dtype: DType | None = None,
) -> None:
    """Writes a model as a SavedModel, which `tf.saved_model.load` and TensorFlow's servers run.

    It has two signatures, "serving_default" (softmax) and "entmax". Numbers
    marked † are scalar or [batch]; a session and TensorFlow Serving may leave
    them out for the default, `tf.saved_model.load` wants all inputs.

        prompts           int32 [batch, any width]; prompts, and anything after them
        prompt_lengths    int32 [batch]; 0 for the model's first token
        seed              † int64, its low 32 bits; no default
        stream            † int32; with the seed it chooses the random numbers; 0, 1, 2, … for the rows
        max_new_tokens    † int32; as many as `length` has room for
        temperature       † float32; 0 is greedy; 0.9, entmax 1.0
        top_k             † int32; below 1 is off; off
        entmax_alpha      † float32, from 1 to 2, "entmax" only; 1.3
        eos_token_id      † int32; −1 is none; the model's own (of several, the first: the others always count)
        each of controls  † float32, or int32 where it is a whole number; what changes nothing, or its default

    and gives

        tokens            int32 [batch, length]; prompts, new tokens (the stop token among them), padding
        lengths           int32 [batch]; how many of a row are not padding

    The tokens are those of `TextGenerator.generate` for the same options; of a
    generation_config.json only the token ids are taken over. A row
    with a number out of range, or whose logits are NaN, gets −1 in place of its
    next token and ends there; one whose prompt is too long, has ids outside the
    vocabulary, or is empty for a model whose first token is outside it or not named,
    is −1 throughout.

    Args:
      folder: a path, not there yet or an empty folder. It gets the files of the
        model's tokenizer, if there are any, in assets.extra, beside export.json,
        which says what was exported.
      model: what `open_checkpoint` takes; None for the model that comes
        with the package.
      revision: as for `open_checkpoint`.
      batch: int, rows of a request; at most 65,536.
      length: int, the longest row, prompt and new tokens; at most the model's n_ctx.
      prompt_length: int, the longest prompt; `length` by default. The pass over the
        prompts takes as long for shorter ones.
      max_top_k: int, the largest top_k.
      controls: names of further options that requests may have, of EXPORTABLE; each
        costs some time in every step, asked for or not. dry_multiplier has the
        sequence breakers that a request has which names none.
      dtype: as for `TextGenerator.from_pretrained`.

    Raises:
      CheckpointError: (a ValueError) if `model` cannot be read as a model.
      ConnectionError, OSError: as `open_checkpoint`, and if `folder` cannot be written.
      ValueError: for a size out of range, a model with options that are not
        supported, or a `folder` that holds something.
    """
    folder = check_new_folder(folder)
    variable_dtype = variable_dtype_of(dtype)
    with open_checkpoint(DEMO_FOLDER if model is None else model, revision) as checkpoint:
        gpt2.check_params(checkpoint.params)
        check_int("batch", batch, 1, MAX_BATCH)
        check_int("length", length, 2, checkpoint.params["n_ctx"])
        prompt_length = length if prompt_length is None else prompt_length
        check_int("prompt_length", prompt_length, 1, length)
        check_int("max_top_k", max_top_k, 1, checkpoint.params["n_vocab"])
        controls = tuple(dict.fromkeys(controls))  # each once
        for name in controls:
            if name not in EXPORTABLE:
                raise ValueError(f"controls: {name!r}; allowed: {', '.join(EXPORTABLE)}")
            if NUMBERS[name].of and not set(NUMBERS[name].of) & set(controls):
                raise ValueError(f"controls: {name!r} without {' or '.join(NUMBERS[name].of)}, which it belongs to")
        sizes = {"batch": batch, "length": length, "prompt_length": prompt_length, "max_top_k": max_top_k}
        asked = {**checkpoint.generation_defaults, **checkpoint.ignored_generation_options}
        shown = ", ".join(f"{key}={value!r}" for key, value in asked.items() if key not in ID_KEYS)
        if shown:
            log.warning("the options of generation_config.json are not exported; requests have to give them: %s",
                        one_line(shown))  # fmt: skip
        with staging_folder(folder) as staging:
            _write(staging, checkpoint, sizes, controls, variable_dtype)
            _write_extras(staging / "assets.extra", checkpoint, {**sizes, "controls": list(controls)}, variable_dtype)
            os.replace(staging, folder)


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    sizes: dict[str, Any],
    controls: Sequence[str],
    variable_dtype: mtf.VariableDType,
) -> None:
    probe_devices()
    graph, mesh = tf.Graph(), device_mesh()
    params = dict(checkpoint.params, mode="predict", use_tpu=False, transposed_weights=False)
    model = Model(params, params["n_vocab"], mesh.impl(), variable_dtype)
    arrays = _breakers(checkpoint) if "dry_multiplier" in controls else {}
    with opened(graph, portable()):
        weights = add_variables(model)
        with mesh.session(graph) as session:
            fill_variables(checkpoint, weights, model, session.run)
            signatures = {
                name: _signature(
                    ProgramKey(**sizes, steps=frozenset(["top_k", *more, *controls]), arrays=frozenset(arrays)),
                    checkpoint,
                    model,
                    arrays,
                )
                for name, more in SIGNATURES.items()
            }
            builder = tf.saved_model.Builder(str(folder))
            builder.add_meta_graph_and_variables(
                session, [tf.saved_model.SERVING], signatures, strip_default_attrs=True, clear_devices=True
            )
            builder.save()


def _signature(key: ProgramKey, checkpoint: Checkpoint, model: Model, arrays: dict[str, np.ndarray]) -> Any:
    """A decode graph with its inputs and outputs, as a SignatureDef; arrays: the key's, whose values are fixed."""
    inputs = {
        "prompts": tf.placeholder(tf.int32, [key.batch, None], "prompts"),
        "prompt_lengths": tf.placeholder(tf.int32, [key.batch], "prompt_lengths"),
        "seed": tf.placeholder(tf.int64, None, "seed"),
    }
    # a function made of a loaded graph does not check them itself
    prompts, prompt_lengths = (tf.ensure_shape(inputs[n], inputs[n].shape) for n in ("prompts", "prompt_lengths"))

    def option(name: str, default: Any, dtype: Any = tf.int32) -> tf.Tensor:
        inputs[name] = tf.placeholder_with_default(tf.constant(default, dtype), None, name)
        return per_row(inputs[name])

    def per_row(value: tf.Tensor) -> tf.Tensor:
        return tf.broadcast_to(value, [key.batch])

    try:
        first, shortest = first_token_of(checkpoint), 0
    except ValueError:  # no token to replace an empty prompt by
        first, shortest = 0, 1
    ids, wrong = _prompts(prompts, prompt_lengths, key, checkpoint.params["n_vocab"], shortest)
    max_new_tokens = option("max_new_tokens", key.length)
    max_steps = tf.where_v2(wrong, 0, tf.clip_by_value(max_new_tokens, 0, key.length))
    first_stop, *more_stops = stop_tokens_of(checkpoint) or [NO_STOP_TOKEN]
    stop_tokens = [option("eos_token_id", first_stop), *(tf.fill([key.batch], t) for t in more_stops)]
    is_entmax = "entmax_alpha" in key.steps
    defaults = {name: NUMBERS[name].unset for name in key.steps}
    if is_entmax:
        defaults["entmax_alpha"] = DEFAULT_ALPHA
    program_inputs = ProgramInputs(
        ids=ids,
        prompt_lengths=prompt_lengths,
        max_steps=max_steps,
        stream=option("stream", np.arange(key.batch)),
        seed=tf.cast(per_row(inputs["seed"]), tf.int32),
        stop_tokens=stop_tokens,
        temperature=option("temperature", ENTMAX_TEMPERATURE if is_entmax else SOFTMAX_TEMPERATURE, tf.float32),
        options={
            **{name: option(name, default, NUMBERS[name].dtype) for name, default in sorted(defaults.items())},
            **{name: tf.constant(array) for name, array in arrays.items()},
        },
    )
    (tokens,) = build(key, program_inputs, model, bos_id=first)

    lengths = _lengths(tokens, tf.maximum(prompt_lengths, 1), max_steps, stop_tokens)
    outputs = {
        "tokens": tf.where_v2(wrong[:, tf.newaxis], INVALID, tokens),
        "lengths": tf.where_v2(wrong, key.length, lengths),
    }
    return tf.saved_model.predict_signature_def(inputs, outputs)


def _breakers(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The array of DRY's breakers where a request names none; nothing where there are none."""
    ids = default_breakers(checkpoint, load_tokenizer(checkpoint) if can_load_tokenizer() else None)
    flags = np.isin(np.arange(checkpoint.params["n_vocab"]), ids).astype(np.float32)
    return {"dry_sequence_breakers": flags} if ids else {}


def _prompts(
    prompts: tf.Tensor, prompt_lengths: tf.Tensor, key: ProgramKey, n_vocab: int, shortest: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The prompts as int32 [batch, length], and bool [batch], whether one cannot be continued."""
    width = tf.minimum(tf.shape(prompts)[1], key.length)
    ids = tf.pad(prompts[:, :width], [[0, 0], [0, key.length - width]])
    ids.set_shape([key.batch, key.length])
    inside = tf.range(key.length) < prompt_lengths[:, tf.newaxis]
    outside_vocab = tf.logical_or(ids < 0, ids >= n_vocab)
    wrong = tf.reduce_any(tf.logical_and(inside, outside_vocab), 1)
    wrong_length = tf.logical_or(prompt_lengths < shortest, prompt_lengths > tf.minimum(width, key.prompt_length))
    return ids, tf.logical_or(wrong, wrong_length)


def _lengths(tokens: tf.Tensor, begin: tf.Tensor, max_steps: tf.Tensor, stop_tokens: Sequence[tf.Tensor]) -> tf.Tensor:
    """int32 [batch], where each row ends; its new tokens are at `begin` and after."""
    length = tokens.shape.as_list()[1]
    at = tf.range(length)
    ends = [tf.equal(tokens, t[:, tf.newaxis]) for t in stop_tokens]
    last = functools.reduce(tf.logical_or, ends, tf.equal(tokens, INVALID))
    last = tf.logical_and(last, at >= begin[:, tf.newaxis])
    return tf.minimum(tf.reduce_min(tf.where_v2(last, at + 1, length), 1), begin + max_steps)


def _write_extras(
    folder: Path, checkpoint: Checkpoint, sizes: dict[str, Any], variable_dtype: mtf.VariableDType
) -> None:
    """What TensorFlow does not read, in the place that it leaves for that."""
    folder.mkdir()
    for file, name in files_beside(checkpoint):
        shutil.copyfile(file, folder / name)
    facts = {
        **sizes,
        "eos_token_id": stop_tokens_of(checkpoint),
        "pad_token_id": checkpoint.params.get("padding_id") or 0,
        "dtype": variable_dtype.activation_dtype.name,
        "n_vocab": checkpoint.params["n_vocab"],
        "n_ctx": checkpoint.params["n_ctx"],
        "signatures": list(SIGNATURES),
        "tensorflow_version": tensorflow.__version__,
    }
    (folder / "export.json").write_text(_json.dumps(facts, indent=1) + "\n", encoding="utf-8")
