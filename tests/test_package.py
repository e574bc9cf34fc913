"""What importing the package changes, each in a fresh process; and the package as shipped."""

import email
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
import zlib

import pytest
from conftest import DATA
from test_cli import main

import gpt_neo_sampling
from gpt_neo_sampling._install import install_line


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_import_makes_mesh_tensorflow_importable_and_is_silent():
    done = run(
        "import os, gpt_neo_sampling, mesh_tensorflow as mtf\n"
        "assert mtf.Dimension('x', 2).size == 2\n"
        "import sys; assert 'mesh_tensorflow.transformer' not in sys.modules\n"
        "assert 'TF_CPP_MIN_LOG_LEVEL' not in os.environ or os.environ['TF_CPP_MIN_LOG_LEVEL'] == '1'\n"
    )
    assert done.stdout == done.stderr == ""


def test_import_leaves_tensorflow_as_it_was():
    run(
        "import os, tensorflow as tf\n"
        "import tensorflow.compat.v1 as tf1\n"
        "from tensorflow.python.framework import ops\n"
        "look = lambda: (tf.executing_eagerly(), tf1.control_flow_v2_enabled(), tf1.resource_variables_enabled(),\n"
        "                hasattr(tf1, 'estimator'), hasattr(ops, 'register_tensor_conversion_function'),\n"
        "                tf1.get_seed(None), tf1.get_logger().level, dict(os.environ))\n"
        "before = look()\n"
        "import gpt_neo_sampling\n"
        "assert look() == before, (before, look())\n"
    )


AFTER_TENSORFLOW = {
    # On TensorFlow 2.13 and later a bare import fails; ours works after it all the same.
    "a failed import of mesh-tensorflow": (
        "try:\n"
        "    import mesh_tensorflow\n"
        "except (ImportError, AttributeError):\n"
        "    pass\n"
        "import gpt_neo_sampling, mesh_tensorflow\n"
        "mesh_tensorflow.Graph()\n"
    ),
    # As mesh-tensorflow 0.1.18 leaves them on TensorFlow 2.18.
    "names that a failed import left with gin": (
        "import gin\n"
        "gin.external_configurable(lambda: None, name='rewrite_stack_variables', module='mesh_tensorflow.ops.Graph')\n"
        "gin.external_configurable(lambda: None, name='rewrite_stack_variables', module='mesh_tensorflow.ops')\n"
        "import gpt_neo_sampling\n"
        "assert not gin.config._INTERACTIVE_MODE\n"
    ),
    "the caller's graph and seeds": (
        "import tensorflow.compat.v1 as tf, random\n"
        "import numpy as np\n"
        "from gpt_neo_sampling import TextGenerator\n"
        "random.seed(1); np.random.seed(1)\n"
        "states = random.getstate(), np.random.get_state()[1].tolist()\n"
        "with tf.Graph().as_default() as graph:\n"
        f"    generator = TextGenerator.from_pretrained({str(DATA / 'hf_gpt_neo_tiny')!r})\n"
        "    generator.generate([[5, 6]], max_new_tokens=2)\n"
        "    assert tf.get_default_graph() is graph and not graph.get_operations()\n"
        "assert (random.getstate(), np.random.get_state()[1].tolist()) == states\n"
    ),
}


@pytest.mark.slow
def test_no_harm_is_done():
    """In either direction, each in a process forked from one with TensorFlow."""
    run(
        "import os, sys, traceback, tensorflow\n"
        f"for name, code in {AFTER_TENSORFLOW!r}.items():\n"
        "    if os.fork() == 0:\n"
        "        try:\n"
        "            exec(code, {})\n"
        "        except BaseException:\n"
        "            print(name, traceback.format_exc(), file=sys.stderr, flush=True)\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    if os.wait()[1]:\n"
        "        sys.exit(1)\n"
    )


def test_public_names_are_there():
    for name in gpt_neo_sampling.__all__:
        assert getattr(gpt_neo_sampling, name).__doc__


ROOT = pathlib.Path(__file__).parents[1]
OPTIONAL = ("tokenizers", "safetensors", "huggingface_hub", "matplotlib")  # what comes with an extra


def test_the_base_install_samples_the_bundled_model(monkeypatch, capfd, caplog):
    """By token ids; what is missing is said once, and a text gets the line that installs it."""
    for package in OPTIONAL:
        monkeypatch.setitem(sys.modules, package, None)
    ids = ("generate", "--prompt-ids", "5 17", "--greedy", "--max-new-tokens", 3)
    status, out, _ = main(capfd, *ids, "--json")
    (sample,) = json.loads(out)["samples"]
    assert status == 0 and len(sample["tokens"]) == 3 and sample["text"] is None
    (note,) = caplog.messages
    assert re.search(r"tokenizer\.json needs the package tokenizers \(.*pip install .*\); samples are token ids", note)
    assert main(capfd, *ids)[1].split() == [str(token) for token in sample["tokens"]]
    for text in (("--prompt", "Emma"), ("--prompt-ids", "5", "--stop-strings", "x")):
        status, out, err = main(capfd, "generate", *text)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "needs the package tokenizers (" in err and "); give " in err


def test_install_lines_are_for_this_python(monkeypatch):
    """With the least version that pyproject.toml gives."""
    ours, by_name = pathlib.Path(sys.executable).with_name("pip"), f"{sys.executable} -m pip"
    for found, pip in ((ours, "pip"), ("/elsewhere/pip", by_name), (None, by_name)):
        monkeypatch.setattr(shutil, "which", lambda name, found=found: found and str(found))
        assert re.fullmatch(rf"{re.escape(pip)} install 'matplotlib>=[\d.]+'", install_line("matplotlib"))
    assert install_line("nothing").endswith(" install nothing")


TEXTS = [ROOT / "README.md", *(p for f in ("docs", "examples", "gpt_neo_sampling") for p in (ROOT / f).rglob("*"))]


def test_install_lines_of_the_docs_work_in_a_clone():
    """An extra is quoted, for shells that match [], and of the folder: the package may be on no index."""
    texts = {path: path.read_text(encoding="utf-8") for path in TEXTS if path.suffix in (".md", ".py")}
    lines = [(path.name, line) for path, text in texts.items() for line in re.findall(r"pip install ([^\n`]*)", text)]
    assert len(lines) > 8
    wrong = re.compile(r"gpt_neo_sampling|(?<!['\w])[\w.]+\[")
    assert [(name, line) for name, line in lines if wrong.search(line)] == []


# --- Wheel and sdist --------------------------------------------------------------------------

NOT_SHIPPED = (".*", "__pycache__", "build", "dist", "site", "*.egg-info", "*.logs")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder: source/, a copy of the tree; sdist/ and unpacked/; and wheel/, of the sdist."""
    pytest.importorskip("build", reason="needs the package build")
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for setuptools 77")
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]

    def make(what, source):
        done = subprocess.run([*build, folder / what, f"--{what}", source], capture_output=True, text=True)
        output = done.stdout + done.stderr
        assert done.returncode == 0 and "Deprecat" not in output, output

    make("sdist", folder / "source")
    shutil.unpack_archive(next((folder / "sdist").glob("*.tar.gz")), folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    make("wheel", shutil.copytree(unpacked, folder / "building"))
    return folder


def files(folder, within="."):
    paths = (folder / within).rglob("*")
    return {str(path.relative_to(folder)) for path in paths if path.is_file() and "egg-info" not in str(path)}


def wheel_entries(folder):
    """{name: CRC} of the wheel in a folder."""
    with zipfile.ZipFile(*folder.glob("*.whl")) as wheel:
        return {entry.filename: entry.CRC for entry in wheel.infolist()}


def test_the_page_on_an_index(tmp_path):
    """The README, which has no files beside it there: words and paths in place of pictures and links."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for setuptools 77")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    parts = shutil.ignore_patterns("demo", "__pycache__")
    shutil.copytree(ROOT / "gpt_neo_sampling", tmp_path / "gpt_neo_sampling", ignore=parts)
    code = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metadata = email.message_from_string(next(tmp_path.glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))
    assert (metadata["Name"], metadata["Description-Content-Type"]) == ("gpt_neo_sampling", "text/markdown")
    assert metadata["Version"] == gpt_neo_sampling.__version__
    page, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((?!https:)[^)]*\)", page) == [] and "![" not in page
    links = re.findall(r"\[([^\]]*)\]\((?!https:)([^)#]*)", readme)
    assert len(links) > 10 and all((ROOT / path).exists() for _, path in links)
    assert [
        link for link in links if f"{link[0]} [`{link[1]}`]" not in page and f"`{link[1]}`: {link[0]}" not in page
    ] == []
    assert "`pip install 'gpt_neo_sampling[cli]'`" in page  # where there is no clone


@pytest.mark.slow
def test_wheel_and_sdist_are_whole(built):
    wheel = wheel_entries(built / "wheel")
    package = {name: crc for name, crc in wheel.items() if ".dist-info/" not in name}
    source = built / "source"
    assert package == {name: zlib.crc32((source / name).read_bytes()) for name in files(source, "gpt_neo_sampling")}
    assert "gpt_neo_sampling/py.typed" in wheel
    (unpacked,) = (built / "unpacked").iterdir()
    assert files(unpacked) - {"PKG-INFO", "setup.cfg"} == files(built / "source")


@pytest.mark.slow
def test_an_index_takes_both(built):
    pytest.importorskip("twine", reason="needs the package twine")
    distributions = [*(built / "sdist").iterdir(), *(built / "wheel").iterdir()]
    check = [sys.executable, "-m", "twine", "check", "--strict", *distributions]
    done = subprocess.run(check, capture_output=True, text=True)
    assert len(distributions) == 2 and done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_runs_from_where_it_is_installed(built, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", tmp_path]
    subprocess.run([*install, *(built / "wheel").glob("*.whl")], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def command(*args):
        done = subprocess.run([tmp_path / "bin" / "gpt-neo-sampling", *args], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command("--version") == f"gpt-neo-sampling {gpt_neo_sampling.__version__}\n"
    (sample,) = json.loads(command("generate", "--prompt-ids", "5 17", "--max-new-tokens", "3", "--json"))["samples"]
    assert len(sample["tokens"]) == 3 and sample["text"]
    metadata = next(tmp_path.glob("*.dist-info"))
    assert f"Version: {gpt_neo_sampling.__version__}\n" in (metadata / "METADATA").read_text(encoding="utf-8")
    assert (metadata / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
