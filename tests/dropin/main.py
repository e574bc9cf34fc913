"""A program of the structure of GPT-Neo's: one Estimator that trains, saves and predicts.

    python main.py CONFIG.json PREDICTIONS.json

test_dropin.py runs it. TensorFlow 2.15 is the last one that has the Estimator.
"""

import json
import sys
from collections import defaultdict

import mesh_tensorflow as mtf
import numpy as np
import tensorflow.compat.v1 as tf
from model_fns import model_fn
from tensorflow.python.tpu import tpu_config, tpu_estimator


def train_input(params):
    """Batches of (tokens, next tokens): numbers counting up, in cycles that eos_id ends."""
    rng = np.random.default_rng(params["seed"])
    first = rng.integers(0, params["eos_id"], (params["train_steps"] * params["train_batch_size"], 1))
    numbers = 1 + (first + np.arange(params["n_ctx"] + 1)) % params["eos_id"]
    dataset = tf.data.Dataset.from_tensor_slices((numbers[:, :-1].astype(np.int32), numbers[:, 1:].astype(np.int32)))
    return dataset.batch(params["batch_size"], drop_remainder=True).repeat()


def predict_input(params):
    """The prompts, padded to the model's full length."""
    rows = np.full((len(params["prompts"]), params["n_ctx"]), params["padding_id"], np.int32)
    for row, prompt in zip(rows, params["prompts"]):
        row[: len(prompt)] = prompt
    return tf.data.Dataset.from_tensor_slices(rows).batch(params["batch_size"], drop_remainder=True)


def main(config_path, predictions_path):
    tf.disable_v2_behavior()
    with open(config_path) as f:
        params = defaultdict(lambda: None, json.load(f))
    params["num_cores"] = mtf.convert_to_shape(params["mesh_shape"]).size

    config = tpu_config.RunConfig(
        model_dir=params["model_path"],
        tf_random_seed=params["seed"],
        session_config=tf.ConfigProto(device_count={"CPU": params["num_cores"]}, allow_soft_placement=True),
        save_checkpoints_steps=None,  # model_fn brings the saver
        save_checkpoints_secs=None,
        save_summary_steps=1,
        tpu_config=tpu_config.TPUConfig(num_shards=params["num_cores"], iterations_per_loop=params["iterations"]),
    )
    estimator = tpu_estimator.TPUEstimator(
        use_tpu=params["use_tpu"],
        model_fn=model_fn,
        config=config,
        train_batch_size=params["train_batch_size"],
        predict_batch_size=params["predict_batch_size"],
        params=params,
    )
    estimator.train(train_input, max_steps=params["train_steps"])
    predictions = [{k: v.tolist() for k, v in row.items()} for row in estimator.predict(predict_input)]
    with open(predictions_path, "w") as f:
        json.dump(predictions, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
