"""A program that has TensorFlow alone: runs requests on a SavedModel.

    python saved_model_client.py FOLDER < requests.json > answers.json

Requests are a list of [signature, inputs]. Each is answered four times: {"v2": by
tf.saved_model.load, "again": by it when all are done, "threads": by it with all at
once, "v1": in a session}, outputs by name, or the error's type and text.
"""

import concurrent.futures
import json
import sys


class _Absent:
    """Makes imports fail that a machine with only TensorFlow would lack."""

    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("gpt_neo_sampling", "mesh_tensorflow"):
            raise ImportError(f"{name} is not here")


sys.meta_path.insert(0, _Absent())

import tensorflow as tf  # noqa: E402


def answered(run, signature, inputs):
    try:
        return {name: value.tolist() for name, value in run(signature, inputs).items()}
    except Exception as e:  # whatever TensorFlow raises
        return {"error": f"{type(e).__name__}: {e}"}


def main(folder, requests):
    loaded = tf.saved_model.load(folder)

    def v2(signature, inputs):
        function = loaded.signatures[signature]
        spec = function.structured_input_signature[1]
        outputs = function(**{name: tf.constant(value, spec[name].dtype) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    answers = [{"v2": answered(v2, *request)} for request in requests]
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as threads:
        for answer, at_once in zip(answers, threads.map(lambda request: answered(v2, *request), requests)):
            answer["threads"] = at_once
    for answer, request in zip(answers, requests):
        answer["again"] = answered(v2, *request)

    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True  # which "v2" runs with, and which takes long
    with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:
        signatures = tf.compat.v1.saved_model.load(session, ["serve"], folder).signature_def

        def v1(signature, inputs):
            named = signatures[signature]
            outputs = {name: info.name for name, info in named.outputs.items()}
            return session.run(outputs, {named.inputs[name].name: value for name, value in inputs.items()})

        for answer, request in zip(answers, requests):
            answer["v1"] = answered(v1, *request)
    return answers


if __name__ == "__main__":
    json.dump(main(sys.argv[1], json.load(sys.stdin)), sys.stdout)
