"""GPT-Neo's own format: what is read, and what is written."""

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import reference
from helpers_checkpoint import (
    MESH_TF,
    TINY,
    TINY_NAMES,
    all_equal,
    bfloat16_rounded,
    make_mesh_tf,
    random_weights,
    save_variables,
    without,
    write_json,
)

from gpt_neo_sampling._compat import quiet_logging, tf
from gpt_neo_sampling.checkpoint import (
    CheckpointError,
    mesh_tf,
    open_checkpoint,
    write_mesh_tf_checkpoint,
)

# ------------------------------------------------------- reading, mesh-TF


def test_the_checkpoint_file_decides_the_step(tmp_path):
    folder = tmp_path / "model"
    weights = {step: random_weights(TINY, seed=step) for step in (9, 10)}
    for step in (10, 9):  # 9 is written last, so the file names it
        write_mesh_tf_checkpoint(folder, TINY, weights[step], step=step)
    all_equal(open_checkpoint(folder), weights[9])
    for line in (
        'model_checkpoint_path: "gs://bucket/models/x/model.ckpt-10"',
        r'model_checkpoint_path: "C:\\x\\model.ckpt-10"',
    ):
        (folder / "checkpoint").write_text(f'{line}\nall_model_checkpoint_paths: "model.ckpt-9"\n')
        all_equal(open_checkpoint(folder), weights[10])
    (folder / "checkpoint").unlink()
    all_equal(open_checkpoint(folder), weights[10])  # the highest number, not the last in the alphabet


def test_a_config_of_another_name(tmp_path):
    folder = make_mesh_tf(tmp_path / "model")
    (folder / "config.json").rename(folder / "GPT3_XL.json")
    write_json(folder / "tokenizer.json", {"model": {}})
    write_json(folder / "list.json", ["n_embd"])
    checkpoint = open_checkpoint(folder)
    assert checkpoint.params["n_embd"] == 8
    assert checkpoint.tokenizer_file == folder / "tokenizer.json"
    write_json(folder / "config.json", {"name": "of something else"})
    assert open_checkpoint(folder).params == checkpoint.params
    write_json(folder / "config.json", {**TINY, "extra": [1]})  # now this is the one
    assert open_checkpoint(folder).params["extra"] == [1]


def test_optimizer_state_is_passed_over(tmp_path):
    weights = random_weights(TINY)
    variables = {"gpt2/" + n: v for n, v in weights.items()}
    for name, value in list(variables.items()):
        variables[name + "/adam_m"] = variables[name + "/adam_v"] = np.zeros_like(value)
        variables[name + "_slot_vr"] = variables[name + "_slot_vc"] = np.zeros(value.shape[:1], np.float32)
    variables["gpt2/wte/vr"] = variables["gpt2/wte/vc"] = np.zeros(3, np.float32)
    variables["global_step"] = np.int64(3)
    all_equal(open_checkpoint(save_variables(tmp_path / "model", variables)), weights)


def test_keys_of_hugging_face_s_configs_are_not_read(tmp_path):
    """Hugging Face's keys are not read, as in GPT-Neo, whose models have one epsilon, one width and one table."""
    folder = make_mesh_tf(tmp_path / "m")
    before = open_checkpoint(folder).params
    others = {"layer_norm_epsilon": 1e-12, "intermediate_size": 16, "tie_word_embeddings": False}
    write_json(folder / "config.json", {**TINY, **others})
    assert open_checkpoint(folder).params == before


def test_float64_variables(tmp_path, caplog):
    weights = {n: v.astype(np.float64) + 1e-12 for n, v in random_weights(TINY).items()}
    checkpoint = open_checkpoint(save_variables(tmp_path / "m", {"gpt2/" + n: v for n, v in weights.items()}))
    all_equal(checkpoint, {n: v.astype(np.float32) for n, v in weights.items()})
    assert "30 float64 variables are rounded to float32: " in caplog.text


def test_float16_variables(tmp_path):
    weights = {n: v.astype(np.float16) for n, v in random_weights(TINY).items()}
    all_equal(open_checkpoint(save_variables(tmp_path / "m", {"gpt2/" + n: v for n, v in weights.items()})), weights)


def test_one_damaged_tensor_leaves_the_others(tmp_path):
    """Each tensor is read alone; TensorFlow verifies the checksum of what it reads."""
    folder = make_mesh_tf(tmp_path / "model")
    expected = random_weights(TINY)
    data = folder / "model.ckpt-0.data-00000-of-00001"
    blob = data.read_bytes()
    place = blob.index(expected["wte"].tobytes())
    data.write_bytes(blob[:place] + bytes(8) + blob[place + 8 :])
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.read("wpe"), expected["wpe"])
    with pytest.raises(CheckpointError, match="gpt2/wte in .*model.ckpt-0 cannot be read: .*[Cc]hecksum"):
        checkpoint.read("wte")


def test_a_folder_whose_name_is_a_pattern(tmp_path):
    """TensorFlow treats paths as glob patterns."""
    folder = make_mesh_tf(tmp_path / "a [b]" / "c*")
    with open_checkpoint(folder) as checkpoint:
        all_equal(checkpoint, random_weights(TINY))


# ------------------------------------------------------------------ writing


@pytest.mark.parametrize("rotary", [False, True])
def test_float32_round_trip_is_exact(tmp_path, rotary):
    params = {**TINY, "rotary_emb": rotary, "embed_dropout": 0.1}
    weights = random_weights(params)
    odd = np.array([np.inf, -0.0, 1e-45, 3.4e38, np.pi, -np.inf, 1e-30, 7], np.float32)
    weights["ln_f/g"] = odd
    write_mesh_tf_checkpoint(tmp_path / "a" / "b", params, weights, step=12)
    checkpoint = open_checkpoint(tmp_path / "a" / "b")
    all_equal(checkpoint, weights)
    assert checkpoint.read("ln_f/g").tobytes() == odd.tobytes()
    assert checkpoint.params == {**params, "attention_types": ["global", "local"]}
    assert checkpoint.generation_defaults == {"eos_token_id": 4, "pad_token_id": 11}


def test_bfloat16_round_trip_rounds_to_nearest_even(tmp_path):
    weights = random_weights(TINY)
    one = np.array([1], np.float32).view(np.uint32)[0]
    # Halfway up to odd, halfway up from odd, just below and above halfway; and negated.
    halves = np.array([one + 0x8000, one + 0x18000, one + 0x7FFF, one + 0x8001], np.uint32).view(np.float32)
    weights["ln_f/b"] = np.concatenate([halves, -halves])
    up = np.float32(2**-7)
    rounded = np.array([1, 1 + 2 * up, 1, 1 + up], np.float32)
    write_mesh_tf_checkpoint(tmp_path / "m", TINY, weights, dtype="bfloat16", step=2)
    checkpoint = open_checkpoint(tmp_path / "m")
    all_equal(checkpoint, {n: bfloat16_rounded(v) for n, v in weights.items()})
    np.testing.assert_array_equal(checkpoint.read("ln_f/b"), np.concatenate([rounded, -rounded]))
    values = sum(v.size for v in weights.values())
    assert (tmp_path / "m" / "model.ckpt-2.data-00000-of-00001").stat().st_size == 2 * values


def test_files_that_are_written(tmp_path):
    folder = tmp_path / "m"
    write_mesh_tf_checkpoint(folder, TINY, random_weights(TINY), step=5)
    assert sorted(os.listdir(tmp_path)) == ["m"]
    assert sorted(os.listdir(folder)) == [
        "checkpoint", "config.json", "model.ckpt-5.data-00000-of-00001", "model.ckpt-5.index",
    ]  # fmt: skip
    assert (folder / "checkpoint").read_text().splitlines()[0] == 'model_checkpoint_path: "model.ckpt-5"'
    config = json.loads((folder / "config.json").read_text())
    assert reference.expand_attention_types(config["attention_types"]) == ["global", "local"]
    assert {k: v for k, v in config.items() if k != "attention_types"} == {
        k: v for k, v in TINY.items() if k != "attention_types"
    }
    with quiet_logging():
        reader = tf.train.NewCheckpointReader(str(folder / "model.ckpt-5"))
    assert set(reader.get_variable_to_shape_map()) == {"gpt2/" + n for n in TINY_NAMES}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    shutil.move(folder, tmp_path / "moved")
    all_equal(open_checkpoint(tmp_path / "moved"), random_weights(TINY))


def test_params_of_an_open_checkpoint_can_be_written(tmp_path):
    with open_checkpoint(MESH_TF / "local") as golden:
        weights = {n: golden.read(n) for n in golden.names()}
        write_mesh_tf_checkpoint(tmp_path / "m", golden.params, weights)
    again = open_checkpoint(tmp_path / "m")
    all_equal(again, weights)
    assert again.params == golden.params


def test_writing_into_a_folder_keeps_its_other_files(tmp_path):
    folder = make_mesh_tf(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    weights = random_weights(TINY, seed=1)
    write_mesh_tf_checkpoint(folder, TINY, weights, step=2)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer_file is not None and (folder / "model.ckpt-0.index").exists()
    all_equal(checkpoint, weights)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    folder = make_mesh_tf(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(mesh_tf, "_save_part", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            write_mesh_tf_checkpoint(target, TINY, random_weights(TINY, seed=1))
    assert os.listdir(tmp_path) == ["m"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_write_that_stops_half_way_leaves_the_old_model(tmp_path, monkeypatch):
    folder = make_mesh_tf(tmp_path / "m")
    replace = os.replace

    def stop_at_the_index(source, target):
        if Path(target).name == "model.ckpt-1.index":
            raise OSError("stopped")
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_index)
    with pytest.raises(OSError, match="stopped"):
        write_mesh_tf_checkpoint(folder, TINY, random_weights(TINY, seed=1), step=1)
    assert os.listdir(tmp_path) == ["m"]
    all_equal(open_checkpoint(folder), random_weights(TINY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, w: {"dtype": "float16"}, "dtype 'float16'; allowed: 'float32', 'bfloat16'"),
        (lambda p, w: {"step": -1}, "step -1; allowed: a whole number of at least 0"),
        (lambda p, w: {"step": 1.0}, "step 1.0; allowed"),
        (lambda p, w: {"weights": without(w, "h1/attn/q")}, "1 missing: h1/attn/q"),
        (lambda p, w: {"weights": {**w, "gpt2/wte": w["wte"]}}, "1 unexpected: gpt2/wte"),
        (lambda p, w: {"weights": {**w, "wte": w["wte"].T}}, "1 of wrong shape: wte (is [8, 11], should be [11, 8])"),
        (lambda p, w: {"params": without(p, "n_head")}, "params does not give n_head"),
        (lambda p, w: {"params": {**p, "n_head": 3}}, "params: n_embd is 8; allowed: a multiple of n_head=3"),
        (lambda p, w: {"params": {**p, "x": object()}}, "params cannot be written as JSON"),
    ],
)
def test_what_is_not_written(tmp_path, change, message):
    arguments = {"params": TINY, "weights": random_weights(TINY)}
    arguments.update(change(arguments["params"], arguments["weights"]))
    with pytest.raises(CheckpointError) as error:
        write_mesh_tf_checkpoint(tmp_path / "m", **arguments)
    assert message in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_file_is_not_written_over(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(CheckpointError, match="m is a file; allowed: a folder"):
        write_mesh_tf_checkpoint(tmp_path / "m", TINY, random_weights(TINY))
    assert (tmp_path / "m").read_text() == "mine"


# ------------------------------------------------- configs with a model_path


def config_elsewhere(tmp_path, model_path, dataset=None, **changes):
    """The config in configs/, the model in model/, a dataset config in configs/dataset_configs/."""
    folder = make_mesh_tf(tmp_path / "model")
    (folder / "config.json").unlink()
    (tmp_path / "configs" / "dataset_configs").mkdir(parents=True)
    config = {**TINY, "model_path": model_path, "precision": "bfloat16", **changes}
    write_json(tmp_path / "configs" / "small.json", {k: v for k, v in config.items() if v is not None})
    if dataset:
        write_json(tmp_path / "configs" / "dataset_configs" / "pile.json", dataset)
    return tmp_path / "configs" / "small.json"


@pytest.mark.parametrize("form", ["absolute", "../model", "model"])
def test_a_config_names_its_folder(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    config_file = config_elsewhere(tmp_path, str(tmp_path / "model") if form == "absolute" else form)
    with open_checkpoint(str(config_file)) as checkpoint:
        all_equal(checkpoint, random_weights(TINY))
        assert checkpoint.folder.resolve() == tmp_path / "model"
        assert checkpoint.params["precision"] == "bfloat16"


def test_a_config_in_the_models_folder(tmp_path):
    folder = make_mesh_tf(tmp_path / "model")
    all_equal(open_checkpoint(folder / "config.json"), random_weights(TINY))


DATASET = {"n_vocab": 11, "path": "gs://x", "tokenizer_is_pretrained": True, "tokenizer_path": "gpt2",
           "eos_id": 10, "padding_id": 11}  # fmt: skip


@pytest.mark.parametrize("datasets", [["pile"], [["pile", 25, "documents_random", 1.0]], [["books", None], "pile"]])
def test_a_datasets_ids(tmp_path, datasets):
    """As in GPT-Neo, its stop token and padding override the model's config (4 and none); its vocabulary does not."""
    config = config_elsewhere(tmp_path, "../model", DATASET, datasets=datasets, n_vocab=None, padding_id=None)
    checkpoint = open_checkpoint(config)
    assert [checkpoint.params[k] for k in ("n_vocab", "padding_id", "eos_id")] == [11, 11, 10]
    assert checkpoint.generation_defaults == {"eos_token_id": 10, "pad_token_id": 11}
    assert (checkpoint.tokenizer_file, checkpoint.tokenizer_name) == (None, "gpt2")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert open_checkpoint(config).tokenizer_file.resolve() == tmp_path / "model" / "tokenizer.json"


def test_the_last_datasets_ids_and_those_of_a_dataset_that_names_none(tmp_path):
    config = config_elsewhere(tmp_path, "../model", DATASET, datasets=["pile", "books"])
    write_json(tmp_path / "configs" / "dataset_configs" / "books.json", {"n_vocab": 99, "eos_id": 7})
    params = open_checkpoint(config).params
    assert [params[k] for k in ("n_vocab", "padding_id", "eos_id")] == [11, 0, 7]
    write_json(tmp_path / "configs" / "dataset_configs" / "books.json", {})
    assert [open_checkpoint(config).params[k] for k in ("padding_id", "eos_id")] == [0, 1]
    write_json(tmp_path / "configs" / "dataset_configs" / "books.json", {"eos_id": "x"})
    with pytest.raises(CheckpointError, match="books.json: eos_id is 'x'"):
        open_checkpoint(config)


def test_a_datasets_tokenizer_from_the_working_directory(tmp_path, monkeypatch):
    dataset = {**DATASET, "tokenizer_is_pretrained": False, "tokenizer_path": "tokenizers/bpe.json"}
    config = config_elsewhere(tmp_path, "../model", dataset, datasets=["pile"])
    (tmp_path / "work" / "tokenizers").mkdir(parents=True)
    (tmp_path / "work" / "tokenizers" / "bpe.json").write_text("{}")
    assert open_checkpoint(config).tokenizer_name == "tokenizers/bpe.json"
    monkeypatch.chdir(tmp_path / "work")
    assert open_checkpoint(config).tokenizer_file.resolve() == tmp_path / "work" / "tokenizers" / "bpe.json"


def test_a_datasets_tokenizer(tmp_path):
    dataset = {**DATASET, "tokenizer_is_pretrained": False, "tokenizer_path": "../bpe.json"}
    config = config_elsewhere(tmp_path, "../model", dataset, datasets=["pile"])
    (tmp_path / "configs" / "bpe.json").write_text("{}")
    assert open_checkpoint(config).tokenizer_file.resolve() == tmp_path / "configs" / "bpe.json"
    (tmp_path / "configs" / "bpe.json").unlink()
    (tmp_path / "configs" / "bpe.json").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "configs" / "bpe.json" / name).write_text("")
    checkpoint = open_checkpoint(config)
    assert checkpoint.tokenizer_file is None and checkpoint.tokenizer_files[1].name == "merges.txt"


@pytest.mark.parametrize(
    ("model_path", "changes", "message"),
    [
        (
            "gs://neo-models/GPT3_XL",
            {},
            "model_path is gs://neo-models/GPT3_XL, which is not on this machine; download",
        ),
        ("nowhere", {}, "model_path is nowhere; there is no such folder"),
        (3, {}, "model_path is 3; allowed: a folder's path"),
        ("../model", {"n_embd": None}, "has no n_embd"),
        ("../model", {"datasets": [[7]]}, "datasets has [7]; allowed: a name, or [name, …]"),
    ],
)
def test_configs_that_are_refused(tmp_path, model_path, changes, message):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(config_elsewhere(tmp_path, model_path, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_variables_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(mesh_tf, "SHARD_BYTES", 1000)
    folder = tmp_path / "a [b]" / "c*"  # TensorFlow takes what it opens for a glob pattern
    write_mesh_tf_checkpoint(folder, TINY, random_weights(TINY), step=4)
    files = [f for f in os.listdir(folder) if ".data-" in f]
    assert (
        len(files) > 3 and sorted(os.listdir(folder))[0] == "checkpoint" and len(os.listdir(folder)) == len(files) + 3
    )
    all_equal(open_checkpoint(folder), random_weights(TINY))
