"""GPT-Neo's own code, as it is and with this library in place of its sampling: its tests, and one small model.

    python tests/gpt_neo.py FOLDER [--keep FOLDER]

FOLDER is a copy of github.com/EleutherAI/gpt-neo, commit 23485e3. Copies of it are made and changed as
docs/gpt-neo-scripts.md says:

    own       nothing
    model=    its own model in this library's loop: sample_autoregressive(…, model=gpt2.model)
    library   this library's loop and model

Each runs test_models.py (library without the moe_layers that its params name), and trains a small model with main.py.
Then each evaluates the first one's checkpoint and predicts from it, greedily: losses and ids must be equal. A table
goes to stdout; --keep keeps the copies, with the output of what was run. The exit status is 1 where something differs.

`make test-gpt-neo GPT_NEO=FOLDER` runs it, in TensorFlow 2.12 with what the extra gpt-neo installs.
"""

import argparse
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = ROOT / "gpt_neo_sampling" / "demo" / "tokenizer.json"
STEPS, BATCH, REPEATS = 80, 4, 3  # of training; rows of a prompt; times that all prompts are read
CONFIG = {
    "n_vocab": 2048, "n_ctx": 128, "n_embd": 128, "n_head": 4, "n_layer": 2,
    "attention_types": [[["global", "local"], 1]], "local_attention_radius": 32, "activation_function": "gelu",
    "embed_dropout": 0, "attn_dropout": 0, "res_dropout": 0, "scale_by_depth": True, "scale_by_in": False,
    "opt_name": "adam", "lr": 0.003, "lr_decay": "cosine", "warmup_steps": 5, "beta1": 0.9, "beta2": 0.95,
    "epsilon": 1e-8, "weight_decay": 0.1, "gradient_clipping": 1.0, "recompute_grad": False,
    "train_batch_size": 8, "eval_batch_size": 8, "predict_batch_size": BATCH, "train_steps": STEPS, "eval_steps": 4,
    "predict_steps": 0, "iterations": STEPS // 2, "datasets": ["small"], "mesh_shape": "all:1", "layout": "batch:all",
}  # fmt: skip
DATASET = {"n_vocab": 2048, "path": "small_*.tfrecords", "eval_path": "small_*.tfrecords",
           "tokenizer_path": str(TOKENIZER), "eos_id": 0, "padding_id": 2048}  # fmt: skip
TEXT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. " * 24
PROMPTS = ("Permission is", "granted, free of charge, to", TEXT, "to any person obtaining a copy of this")

# --- What is changed: {way: {file: [(line, what becomes of it)]}} -------------------------------------------------

SAMPLE = "from sample import sample_autoregressive"
GREEDY = "import functools; sample_autoregressive = functools.partial(sample_autoregressive, temperature=0.0)"
LOOP = "from gpt_neo_sampling.sample import sample_autoregressive"
OWN_MODEL = (
    f"{LOOP}; from models.gpt2 import gpt2; "
    "import functools; sample_autoregressive = functools.partial(sample_autoregressive, model=gpt2.model)"
)
MODEL = ("from models.gpt2 import gpt2", "from gpt_neo_sampling.models import gpt2")


def from_library(line):
    return line, line.replace("from models.utils", "from gpt_neo_sampling.models.utils")


BIASMASK = from_library("from models.utils import biasmask_attn_weights")
UTILS = from_library("from models.utils import biasmask_attn_weights, entmax, sample_categorical")
LOSS = from_library("from models.utils import parse_inputs, entmax_cross_entropy_with_logits")
WAYS = {
    "own": {"model_fns.py": [(SAMPLE, f"{SAMPLE}; {GREEDY}")]},
    "model=": {
        "model_fns.py": [(SAMPLE, f"{OWN_MODEL}; {GREEDY}"), BIASMASK],
        "models/gpt2/gpt2.py": [LOSS],
        "test_models.py": [(SAMPLE, OWN_MODEL), UTILS],
    },
    "library": {
        "model_fns.py": [(SAMPLE, f"{LOOP}; {GREEDY}"), BIASMASK, MODEL],
        "test_models.py": [(SAMPLE, LOOP), UTILS, MODEL, ('    "moe_layers": (1,),', "")],
    },
}
OTHERS = [way for way in WAYS if way != "own"]


def changed_copy(source, folder, changes):
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git"))
    for name, lines in changes.items():
        text = (folder / name).read_text()
        for old, new in lines:
            text, n = re.subn(f"^{re.escape(old)}$", new, text, flags=re.M)
            if n != 1:
                raise SystemExit(f"{source}/{name} has {n} lines {old!r}; one, as in commit 23485e3, is needed")
        (folder / name).write_text(text)


# --- In a copy, a process of its own ----------------------------------------------------------------------------------


def run_main(arguments):
    """main.py, reading the prompts in prompts/ one after another. What it predicts goes to predictions.json too: all
    rows, and the seconds after which each came."""
    sys.path.insert(0, "")
    import main
    import tensorflow.compat.v1 as tf

    read_prompt, write_text = main.pred_input, main.handle_pred_output

    def read_prompts(params, logger, enc, path_to_prompt):
        parts = [read_prompt(params, logger, enc, str(path)) for path in sorted(pathlib.Path("prompts").iterdir())]
        return functools.reduce(lambda a, b: a.concatenate(b), parts).repeat(REPEATS)

    def write_rows(predictions, *args, **kwargs):
        rows, seconds = [], []
        for prediction in predictions:
            rows.append(prediction)
            seconds.append(time.perf_counter())
        found = {name: [row[name].tolist() for row in rows] for name in ("inputs", "outputs")}
        pathlib.Path("predictions.json").write_text(json.dumps({**found, "seconds": seconds}))
        write_text(rows, *args, **kwargs)

    main.pred_input, main.handle_pred_output = read_prompts, write_rows
    tf.disable_v2_behavior()
    sys.argv = ["main.py", "--model", "small", "--gpu_ids", "device:CPU:0", "--steps_per_checkpoint", str(STEPS)]
    sys.argv += arguments
    main.main(main.parse_args())


# --- What is run ------------------------------------------------------------------------------------------------------


def write_data(folder):
    """Records of TEXT's tokens, the configs, and the prompts, for a copy."""
    from tokenizers import Tokenizer

    from gpt_neo_sampling._compat import tf  # imported in silence

    size = CONFIG["n_ctx"] + 1
    ids = Tokenizer.from_file(str(TOKENIZER)).encode(TEXT).ids
    rows = [ids[at : at + size] for at in range(0, len(ids) - size, 8)]
    with tf.io.TFRecordWriter(str(folder / f"small_{len(rows)}.tfrecords")) as writer:
        for row in rows:
            feature = tf.train.Feature(int64_list=tf.train.Int64List(value=row))
            example = tf.train.Example(features=tf.train.Features(feature={"text": feature}))
            writer.write(example.SerializeToString())
    (folder / "configs" / "dataset_configs" / "small.json").write_text(json.dumps(DATASET))
    (folder / "configs" / "small.json").write_text(json.dumps({**CONFIG, "model_path": str(folder / "model")}))
    (folder / "prompts").mkdir()
    for i, prompt in enumerate(PROMPTS):
        (folder / "prompts" / f"{i}.txt").write_text(prompt)


def run(name, folder, *command):
    """(exit status, output, seconds) of a Python command in a copy."""
    print(f"{folder.name}: {name}", file=sys.stderr)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    (folder / f"{name}.log").write_text(done.stdout)
    return done.returncode, done.stdout, time.perf_counter() - begin


def main_py(name, folder, *arguments):
    """The seconds that main.py takes in a copy."""
    status, output, seconds = run(name, folder, __file__, "--inside", *arguments)
    if status:
        raise SystemExit(f"{folder.name}: {name} failed:\n{output[-4000:]}")
    return seconds


def tests_of(folder):
    """pytest's result for test_models.py."""
    _, output, _ = run("tests", folder, "-m", "pytest", "-q", "test_models.py")
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", output.strip().splitlines()[-1])}
    return counts.get("passed", 0), sum(counts.values())


def last_loss(folder):
    return json.loads((folder / "eval_nosacred.jsonl").read_text().splitlines()[-1])["loss"]


def tokens_per_second(predictions):
    """New tokens a second, of all batches but the first, which waits for the graph."""
    inputs, outputs = (np.array(predictions[name]) for name in ("inputs", "outputs"))
    new = ((outputs != DATASET["padding_id"]).sum(1) - (inputs != DATASET["padding_id"]).sum(1))[BATCH:].sum()
    return new / (predictions["seconds"][-1] - predictions["seconds"][BATCH - 1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="a copy of GPT-Neo's repository")
    parser.add_argument("--keep", type=pathlib.Path, metavar="FOLDER", help="a new folder for the copies")
    parser.add_argument(
        "--ways", nargs="+", choices=OTHERS, default=OTHERS, metavar="WAY", help="beside own, of " + ", ".join(OTHERS)
    )
    args = parser.parse_args(argv)
    if not (args.folder / "model_fns.py").is_file():
        parser.error(f"{args.folder} holds no model_fns.py; a copy of github.com/EleutherAI/gpt-neo is needed")
    with tempfile.TemporaryDirectory(prefix="gpt-neo-") as temporary:
        return compare(args.folder, (args.keep or pathlib.Path(temporary)).resolve(), ["own", *args.ways])


def compare(source, work, ways):
    folders = {way: work / way.strip("=") for way in ways}
    rows = {}
    for way, folder in folders.items():
        changed_copy(source, folder, WAYS[way])
        write_data(folder)
        passed, n_tests = tests_of(folder)
        rows[way] = {"tests": f"{passed} of {n_tests}", "passed": passed == n_tests > 0}
        rows[way]["train"] = main_py("train", folder)
        rows[way]["trained"] = last_loss(folder)
    weights = folders["own"] / "model"
    for way, folder in folders.items():
        if way != "own":
            shutil.rmtree(folder / "model")
            shutil.copytree(weights, folder / "model")  # its checkpoints name each other by relative paths
        main_py("eval", folder, "--eval")
        main_py("predict", folder, "--predict")
        predictions = json.loads((folder / "predictions.json").read_text())
        rows[way].update(eval=last_loss(folder), ids=predictions["outputs"], speed=tokens_per_second(predictions))
    own = rows["own"]
    print("| | test_models.py | training, s | loss after it | loss of own's checkpoint | greedy ids of it | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    fine = True
    for way, row in rows.items():
        same_loss = abs(row["eval"] - own["eval"]) <= 1e-5
        n_same = sum(a == b for a, b in zip(row["ids"], own["ids"]))
        fine &= row["passed"] and row["trained"] < 2 and same_loss and n_same == len(own["ids"])
        print(
            f"| {way} | {row['tests']} | {row['train']:.0f} | {row['trained']:.3f} | {row['eval']:.6f} | "
            f"{n_same} of {len(own['ids'])} rows | {row['speed']:.0f} ({row['speed'] / own['speed']:.2f} times) |"
        )
    return int(not fine)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        run_main(sys.argv[2:])
    else:
        sys.exit(main())
