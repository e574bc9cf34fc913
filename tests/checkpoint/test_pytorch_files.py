"""pytorch_model.bin: read as PyTorch wrote it, and never run.

tests/data/pytorch/*.bin are from torch.save (PyTorch 2.13, either format), of
TINY's random weights: kernels not contiguous, ln_f's two vectors in one storage,
a parameter, the tied output, mask buffers. trainer_*.bin are what a training loop saves of the same.
"""

import collections
import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import DATA
from helpers_checkpoint import TINY, TINY_HF, all_equal, as_hugging_face, make_hugging_face, random_weights, write_json

from gpt_neo_sampling.checkpoint import CheckpointError, open_checkpoint

PYTORCH = DATA / "pytorch"


class Name:
    """Pickles as a bare name."""

    def __init__(self, module, name):
        self.name = f"{module}\n{name}\n".encode()


class Pickler(pickle._Pickler):
    """Pickles a Name, a storage (class, key, size), and a Call of a Name."""

    def persistent_id(self, value):
        return ("storage", Name("torch", value[0]), value[1], "cpu", value[2]) if isinstance(value, Storage) else None

    def save(self, value, *args, **kwargs):
        if isinstance(value, Name):
            self.write(pickle.GLOBAL + value.name)
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, *args, **kwargs)


Storage = collections.namedtuple("Storage", "kind key size")
Call = collections.namedtuple("Call", "function arguments")


def tensor(storage, offset, shape, strides):
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, {}))


def pickled(value, protocol=2):
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def write_zip(path, value, storages=None, compression=zipfile.ZIP_STORED, protocol=2):
    """Writes a file as torch.save does: `value` pickled, and storages, arrays by key."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled(value, protocol))
        archive.writestr("archive/byteorder", "little")
        for key, array in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


KINDS = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F64": "DoubleStorage"}


def write_pytorch(path, tensors, protocol=2, beside=lambda value: value):
    """The same of tensors as `as_hugging_face` gives them. beside: makes what is written of the dict of them."""
    value, storages = {}, {}
    for i, (name, (dtype, array)) in enumerate(tensors.items()):
        strides = tuple(s // array.itemsize for s in array.strides)
        value[name] = tensor(Storage(KINDS[dtype], str(i), array.size), 0, array.shape, strides)
        storages[str(i)] = array
    write_zip(path, beside(value), storages, protocol=protocol)


def folder_of(tmp_path, change=None, file="zip.bin"):
    folder = tmp_path / "m"
    folder.mkdir()
    write_json(folder / "config.json", TINY_HF)
    shutil.copy(PYTORCH / file, folder / "pytorch_model.bin")
    if change:
        change(folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("file", ["zip.bin", "legacy.bin"])
def test_files_that_pytorch_wrote(tmp_path, file):
    with open_checkpoint(folder_of(tmp_path, file=file)) as checkpoint:
        all_equal(checkpoint, random_weights(TINY))


@pytest.mark.parametrize("scope", ["transformer.", ""])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_shards_and_dtypes(tmp_path, dtype, scope):
    tensors = as_hugging_face(random_weights(TINY), dtype, scope)
    expected = open_checkpoint(make_hugging_face(tmp_path / "safe", tensors=tensors))
    folder = tmp_path / "m"
    folder.mkdir()
    write_json(folder / "config.json", TINY_HF)
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    for file in files:
        write_pytorch(folder / file, {n: t for n, t in tensors.items() if weight_map[n] == file})
    all_equal(open_checkpoint(folder), {n: expected.read(n) for n in expected.names()})


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickles_of_other_protocols(tmp_path, protocol):
    """torch.save takes pickle_protocol."""
    folder = folder_of(tmp_path)
    write_pytorch(folder / "pytorch_model.bin", as_hugging_face(random_weights(TINY)), protocol)
    all_equal(open_checkpoint(folder), random_weights(TINY))


@pytest.mark.parametrize("file", ["trainer_zip.bin", "trainer_legacy.bin"])
def test_files_of_a_training_loop(tmp_path, file, caplog):
    """A file that PyTorch wrote, of a compiled float64 model in DataParallel, with Adam's state and more."""
    with open_checkpoint(folder_of(tmp_path, file=file)) as checkpoint:
        all_equal(checkpoint, random_weights(TINY))
    assert "the weights are read from its key 'state_dict'; ignored: epoch, loss, optimizer, rng" in caplog.text
    assert "dropped from tensor names: module., _orig_mod." in caplog.text
    assert "float64 variables are rounded to float32" in caplog.text


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_weights_under_a_key(tmp_path, key, caplog):
    folder = folder_of(tmp_path)
    tensors = as_hugging_face(random_weights(TINY))
    milestones = {"milestones": Call(Name("collections", "Counter"), ({30: 1, 60: 1},)), "base_lrs": [0.1]}
    write_pytorch(folder / "pytorch_model.bin", tensors, beside=lambda value: {key: value, "schedule": milestones})
    all_equal(open_checkpoint(folder), random_weights(TINY))
    assert f"from its key '{key}'; ignored: schedule" in caplog.text


def test_safetensors_win(tmp_path):
    folder = make_hugging_face(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    all_equal(open_checkpoint(folder), random_weights(TINY))


def test_torch_is_not_imported(tmp_path):
    code = "import sys; from gpt_neo_sampling.checkpoint import open_checkpoint; c = open_checkpoint(sys.argv[1])\n"
    code += "c.read('wte'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(folder_of(tmp_path))], check=True)


def legacy(value):
    def write(path):
        machine = {"little_endian": True, "protocol_version": 1001}
        path.write_bytes(b"".join(pickled(v) for v in (0x1950A86A20F9469CFC6C, 1001, machine, value, [])))

    return write


HOSTILE = {
    "os.system": Call(Name("os", "system"), ("touch made",)),
    "posix.system": Call(Name("posix", "system"), ("touch made",)),
    "builtins.eval": {"wte": Call(Name("builtins", "eval"), ("open('made', 'w')",))},
    "builtins.getattr": Call(Name("builtins", "getattr"), (Name("collections", "OrderedDict"), "__init__")),
    "torch.load": Call(Name("torch", "load"), ("made",)),
    "collections.OrderedDict.fromkeys": Name("collections", "OrderedDict.fromkeys"),
}


@pytest.mark.parametrize("write", [write_zip, lambda path, value: legacy(value)(path)], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_asks_for_more_than_tensors_is_not_run(tmp_path, monkeypatch, name, write):
    folder = folder_of(tmp_path, lambda path: write(path, HOSTILE[name]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"asks for {name}, which tensors do not need, and is not run") as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["m"]


def test_the_hostile_pickles_would_run(tmp_path, monkeypatch):
    """Otherwise the test above could not fail."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled(HOSTILE["os.system"]))
    assert os.listdir(tmp_path) == ["made"]


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def holding(shape=(4,), strides=(1,), offset=0, size=4, stored=4):
    value = {"wte": tensor(Storage("FloatStorage", "0", size), offset, shape, strides)}
    return lambda path: write_zip(path, value, {"0": np.zeros(stored, np.float32)})


DAMAGED = {
    "zip cut short": ("zip.bin", cut(9000), "damaged"),
    "legacy cut in the pickle": ("legacy.bin", cut(900), "damaged"),
    "legacy cut in a storage": ("legacy.bin", cut(-2), "is cut short"),
    "empty": ("zip.bin", cut(0), "damaged"),
    "garbage": ("zip.bin", lambda path: path.write_bytes(b"\x80\x02garbage"), "damaged"),
    "a bare pickle": ("zip.bin", lambda path: path.write_bytes(pickled({"wte": 1})), "it is not one"),
    "not a dict": ("zip.bin", lambda path: write_zip(path, [1]), "it holds a list"),
    "not tensors": (
        "zip.bin",
        lambda path: write_zip(path, {"step": 3}),
        "1 things that are not tensors: step; allowed",
    ),
    "not tensors under a key": (
        "zip.bin",
        lambda path: write_zip(path, {"model": {"step": 3}}),
        "1 things that are not tensors: step; allowed",
    ),
    "weights under two keys": (
        "zip.bin",
        lambda path: write_zip(path, {"model": {}, "state_dict": {}, 7: 1}),
        "3 things that are not tensors: model, state_dict, 7; allowed: a dict of tensors, alone or under one of the "
        "keys state_dict, model_state_dict, model, module",
    ),
    "a name of a tuple": ("zip.bin", lambda path: write_zip(path, {(1, 2): 3}), "a tuple in place of a tensor's name"),
    "outside its storage": ("zip.bin", holding(shape=(5,)), "ends after its storage"),
    "offset outside": ("zip.bin", holding(offset=1), "ends after its storage"),
    "negative stride": ("zip.bin", holding(strides=(-1,)), "a tensor without a storage, offset, shape and strides"),
    "storage cut short": ("zip.bin", holding(size=8), "storage 0 is cut short"),
    "compressed": (
        "zip.bin",
        lambda path: write_zip(path, {}, compression=zipfile.ZIP_DEFLATED),
        "its archive/byteorder is compressed",
    ),
    "Git LFS": (
        "zip.bin",
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "it is a Git LFS pointer, run git lfs pull",
    ),
    "other variables": ("zip.bin", holding(), "30 missing: wte.weight"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path, case):
    file, change, message = DAMAGED[case]
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder_of(tmp_path, change, file))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path / "m") in str(error.value)
