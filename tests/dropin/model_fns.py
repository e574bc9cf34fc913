"""model_fn, which the Estimator calls to build a graph for training and one for predicting."""

from collections import defaultdict

import mesh_tensorflow as mtf
import tensorflow.compat.v1 as tf
from own_models import attention_model, averaging_model
from tensorflow.python.ops import resources
from tensorflow.python.tpu import tpu_estimator

from gpt_neo_sampling.models import gpt2
from gpt_neo_sampling.models.utils import biasmask_attn_weights, entmax, sample_categorical
from gpt_neo_sampling.sample import sample_autoregressive

MODELS = {"GPT2": gpt2.model, "attention": attention_model, "averaging": averaging_model}


def model_fn(features, labels, mode, params):
    params = defaultdict(lambda: None, params)
    predicting = mode == tf.estimator.ModeKeys.PREDICT
    params["mode"] = "predict" if predicting else "train"
    model = MODELS[params["model"]]

    mesh_shape = mtf.convert_to_shape(params["mesh_shape"])
    layout = params["layout"]
    if predicting:  # a batch of prompts may be too small to be split
        layout = ",".join(rule for rule in layout.split(",") if not rule.startswith("batch:"))
    devices = [f"cpu:{i}" for i in range(mesh_shape.size)]
    mesh_impl = mtf.placement_mesh_impl.PlacementMeshImpl(mesh_shape, mtf.convert_to_layout_rules(layout), devices)
    graph = mtf.Graph()
    mesh = mtf.Mesh(graph, "my_mesh")
    variable_dtype = mtf.VariableDType(master_dtype=tf.float32, slice_dtype=tf.float32, activation_dtype=tf.float32)

    batch_dim = mtf.Dimension("batch", params["predict_batch_size" if predicting else "train_batch_size"])
    sequence_dim = mtf.Dimension("sequence", params["n_ctx"])
    memory_length_dim = mtf.Dimension("memory_length", params["n_ctx"])
    mtf_features = {
        name: mtf.import_fully_replicated(
            mesh, tf.reshape(tf.cast(x, tf.int32), [batch_dim.size, sequence_dim.size]),
            mtf.Shape([batch_dim, sequence_dim]), name=name,
        )
        for name, x in (("inputs", features), ("labels", labels)) if x is not None
    }  # fmt: skip
    other_features = {
        "attn_bias": biasmask_attn_weights(mesh, sequence_dim, memory_length_dim, variable_dtype),
        "embd_dim": mtf.Dimension("embd", params["n_embd"]),
        "vocab_dim": mtf.Dimension("vocab", params["n_vocab"]),
        "embed_sequence_dim": mtf.Dimension("embed_sequence", params["n_ctx"]),
        "memory_length_dim": memory_length_dim,
    }

    if predicting:
        own = {} if params["model"] == "GPT2" else {"model": model}
        samples = {
            name: sample_autoregressive(
                partial_sequences=mtf_features["inputs"],
                other_features=other_features,
                params=params,
                stop_at_token=params["eos_id"],
                max_steps=params["predict_max_steps"],
                variable_dtype=variable_dtype,
                **keywords,
                **own,
            )
            for name, keywords in params["samples"].items()
        }
        with tf.variable_scope("gpt2", reuse=tf.AUTO_REUSE):
            logits, _, _ = model(mtf_features, other_features, params, mesh, variable_dtype)
        samples["drawn"] = sample_categorical(entmax(logits))  # what could follow each token of the prompts
        samples = {name: mtf.anonymize(x) for name, x in samples.items()}
        lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=True)

        def scaffold_fn():
            return tf.train.Scaffold(
                local_init_op=tf.group(
                    tf.train.Scaffold.default_local_init_op(),
                    lowering.copy_masters_to_slices(),
                    name="mtf_local_init_op",
                ),
                ready_op=tf.concat(
                    [tf.report_uninitialized_variables(), resources.report_uninitialized_resources()],
                    axis=0,
                    name="mtf_ready_op",
                ),
            )

        return tpu_estimator.TPUEstimatorSpec(
            mode=mode,
            predictions={name: lowering.export_to_tf_tensor(x) for name, x in samples.items()},
            scaffold_fn=scaffold_fn,
            prediction_hooks=[mtf.MtfRestoreHook(lowering)],
        )

    def outputs_of(mtf_features):
        with tf.variable_scope("gpt2"):
            logits, loss, loss_batch = model(mtf_features, other_features, params, mesh, variable_dtype)
        return {"logits": logits, "loss": loss, "loss_batch": loss_batch}

    if params["num_microbatches"] > 1:
        gradients, outputs = mtf.serialize_training_step(
            mtf_features, outputs_of, batch_dim, params["num_microbatches"]
        )
    else:
        with mtf.utils.outside_all_rewrites():
            outputs = outputs_of(mtf_features)
        variables = [v.outputs[0] for v in graph.trainable_variables]
        gradients = mtf.gradients([outputs["loss"]], variables)
    optimizer = mtf.optimize.AdamWeightDecayOptimizer(
        learning_rate=mtf.import_fully_replicated(mesh, tf.constant(params["lr"]), mtf.Shape([]), name="lr"),
        weight_decay_rate=params["weight_decay"],
        exclude_from_weight_decay=["norm", "bias"],
    )
    update_ops = optimizer.apply_grads(_clipped(gradients, params["gradient_clipping"]), graph.trainable_variables)

    lowering = mtf.Lowering(graph, {mesh: mesh_impl}, autostack=True)
    loss = tf.cast(lowering.export_to_tf_tensor(outputs["loss"]), tf.float32)
    train_ops = [lowering.lowered_operation(op) for op in update_ops]
    train_ops.append(tf.assign_add(tf.train.get_global_step(), 1))
    with mtf.utils.outside_all_rewrites():
        restore_hook = mtf.MtfRestoreHook(lowering)
        saver = tf.train.Saver(tf.global_variables(), sharded=True, save_relative_paths=True)
        tf.add_to_collection(tf.GraphKeys.SAVERS, saver)
        saver_hook = tf.train.CheckpointSaverHook(
            params["model_path"],
            save_steps=params["steps_per_checkpoint"],
            saver=saver,
            listeners=[mtf.MtfCheckpointSaverListener(lowering)],
        )
        return tpu_estimator.TPUEstimatorSpec(
            mode, loss=loss, train_op=tf.group(train_ops), training_hooks=[restore_hook, saver_hook]
        )


def _clipped(gradients, most):
    """The gradients, scaled down if their global norm is above `most`."""
    norm = mtf.sqrt(mtf.add_n([mtf.reduce_sum(mtf.square(g)) for g in gradients]))
    factor = most / mtf.maximum(norm, most)
    return [g * factor for g in gradients]
