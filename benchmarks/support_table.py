"""Which Python, TensorFlow and mesh-tensorflow the package works with: each cell installed by pip and run.

    python benchmarks/support_table.py [--python PATH …] [--tensorflow 2.12 …] [--mesh-tensorflow 0.1.18 …]
                                       [--output FILE] [--logs FOLDER]

Builds the wheel of the last commit. For each Python and TensorFlow it makes a virtual environment, has pip install the
wheel there with nothing else said than TensorFlow's and mesh-tensorflow's versions, and runs TESTS against it,
away from the source tree, once for each mesh-tensorflow. What pip says where parts do not fit goes into the table.
"--tensorflow least" is the least version of TensorFlow, and of all else that pyproject.toml gives one for.

The table goes to stdout, notes to stderr; FILE (default: benchmarks/results/support-DATE.json) holds the exact
versions, counts and seconds of each cell. Cells that an existing FILE has are kept unless they are run again, so
a table may be made in parts. The exit status is 1 where a test failed.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

import common

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TENSORFLOWS = ("2.12", "2.15", "2.18", "2.21")
LEAST = "least"  # in the place of a TensorFlow
MESH_TENSORFLOWS = ("0.1.18", "0.1.21")
EXTRAS = "cli,plot"
PACKAGES = (
    "tensorflow",
    "mesh-tensorflow",
    "numpy",
    "tqdm",
    "tokenizers",
    "safetensors",
    "matplotlib",
    "huggingface-hub",
)
TEST_NEEDS = ("pytest>=7", "scipy", "hypothesis")
SECONDS = 3600  # for the tests of one cell, with what they wait for

# One or more tests that go through each module, and through what differs between releases: private names, dtypes,
# protobuf, the graph optimizer, sessions of several devices, functions, files. Each compares with golden data
# or with the float64 reference.
TESTS = """
tests/test_package.py::test_import_makes_mesh_tensorflow_importable_and_is_silent
tests/test_package.py::test_no_harm_is_done
tests/mesh/test_mtf_ops.py::test_take
tests/mesh/test_mtf_ops.py::test_scatter_add
tests/mesh/test_mtf_ops.py::test_write_at
tests/mesh/test_mtf_ops.py::test_force_allreduce_in_a_loop
tests/mesh/test_mtf_ops.py::test_threefry
tests/mesh/test_mtf_ops.py::test_top_k
tests/models/test_layers.py
tests/sampling/test_draws.py::test_exact_softmax_weights
tests/sampling/test_draws.py::test_exact_entmax_of_a_small_vocabulary
tests/sampling/test_utils.py::test_draw_is_the_same_on_every_layout
tests/sampling/test_utils.py::test_entmax_on_every_layout
tests/sampling/test_utils.py::test_biasmask_attn_weights
tests/sampling/test_utils.py::test_parse_inputs
tests/sampling/test_masks.py::test_half_precision
tests/sampling/test_penalties.py::test_penalties
tests/sampling/test_penalties.py::test_logit_bias
tests/models/test_gpt2.py::test_logits_of_the_checkpoints
tests/models/test_gpt2.py::test_incremental_logits
tests/models/test_gpt2.py::test_loss
tests/test_sample.py::test_one_request_of_each_kind_against_the_simulation
tests/checkpoint/test_checkpoint.py
tests/checkpoint/test_mesh_tf_checkpoint.py
tests/checkpoint/test_hugging_face_checkpoint.py
tests/checkpoint/test_pytorch_files.py::test_files_that_pytorch_wrote
tests/checkpoint/test_hub.py
tests/checkpoint/test_tokenizer.py
tests/checkpoint/test_convert.py::test_there_and_back_keeps_every_bit
tests/generation/test_generate.py::test_golden_greedy_tokens_of_mesh_tf_checkpoints
tests/generation/test_generate.py::test_golden_greedy_tokens_of_a_hugging_face_folder
tests/generation/test_generate.py::test_sampled_tokens_are_those_of_numpy
tests/generation/test_generate.py::test_dtype[bfloat16-2]
tests/generation/test_score.py::test_golden_logits
tests/generation/test_streaming.py::test_streamed_tokens_and_text_are_the_samples
tests/generation/test_prompts_file.py::test_an_output_cut_at_any_byte
tests/inspection/test_inspection.py::test_picture
tests/inspection/test_inspection.py::test_chain_of_a_model_is_the_references
tests/inspection/test_inspection.py::test_command_prints_json
tests/cli/test_cli.py::test_json_of_golden_prompts[global]
tests/cli/test_cli.py::test_the_command_is_installed
tests/mesh/test_mesh.py::test_the_commands_output_is_that_of_one_device
tests/mesh/test_cluster.py::test_a_program_that_is_a_task_itself
tests/sampling/test_xla.py::test_entmax_sums_to_one_and_invalid_rows_are_nan
tests/generation/test_export.py::test_tokens_are_those_of_generate
tests/test_dropin.py::test_program[GPT2]
""".split()


class Failed(Exception):
    """A command that did not succeed; the message is what is to be said of it in the table."""


def run(command, log=None, **options):
    """Output of a command, which goes to the file `log` too. Raises: Failed, with the line that says why."""
    command = list(map(str, command))
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if log:
        log.write_text(f"$ {' '.join(command)}\n{done.stdout}")
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Failed(next((line for line in lines if line.startswith("ERROR")), lines[-1]))
    return done.stdout


def interpreters(paths):
    """{"3.10": its command} of those that are given, or else of PYTHONS on PATH."""
    found = {}
    for python in paths or [f"python{version}" for version in PYTHONS]:
        try:
            version = run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
        except (OSError, Failed) as error:
            if paths:
                raise SystemExit(f"{python}: {error}") from None
            print(f"{python} is not there: left out", file=sys.stderr)
        else:
            found[version] = python
    return found


def source_and_wheel(folder):
    """(the last commit's files without the package, the wheel that they build)"""
    source, wheels = folder / "source", folder / "wheel"
    source.mkdir()
    archive = subprocess.run(["git", "-C", common.REPOSITORY, "archive", "HEAD"], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, source])
    (source / "gpt_neo_sampling").rename(folder / "package")
    return source, next(wheels.glob("*.whl"))


def environment():
    """This process's, without what would let a cell see other packages than its own."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}


def installed(python):
    """Exact versions in a virtual environment."""
    code = (
        "import importlib.metadata as m, json, platform; print(json.dumps({'python': platform.python_version(), **"
        f"{{p: m.version(p) for p in {(*PACKAGES, 'protobuf', 'gpt_neo_sampling')}}}}}))"
    )
    return json.loads(run([python, "-c", code], env=environment()))


def least_versions():
    """What pip is to install for the least versions that pyproject.toml allows, of the dependencies and of EXTRAS."""
    text = (common.REPOSITORY / "pyproject.toml").read_text()
    found = dict(re.findall(r'"([a-z-]+)>=([0-9.]+)"', text))
    return [f"{package}=={found[package]}" for package in PACKAGES]


def tested(python, source, logs, name, under):
    """Counts and seconds of TESTS, and the first failure's line."""
    report = logs / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [*under, python, "-m", "pytest", "-q", "-rs", "--durations=20", f"--junitxml={report}", *TESTS]
    try:
        run(command, logs / f"{name}.log", cwd=source, env=environment(), timeout=SECONDS)
        error = None
    except Failed as failure:
        error = str(failure)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {SECONDS} s"}
    if not report.exists():  # the process died
        return {"error": error}
    (suite,) = ElementTree.parse(report).iter("testsuite")
    cases = list(suite.iter("testcase"))
    bad = [(case, mark) for case in cases for mark in case if mark.tag in ("failure", "error")]
    skipped = [mark.get("message") for case in cases for mark in case if mark.tag == "skipped"]
    result = {"passed": len(cases) - len(bad) - len(skipped), "failed": len(bad), "skipped": len(skipped)}
    result.update(seconds=round(float(suite.get("time"))), why_skipped=sorted(set(skipped)))
    if bad:
        error = f"{bad[0][0].get('name')}: {(bad[0][1].get('message') or '').splitlines()[0]}"
    return result if error is None else {**result, "error": error}


def cells_of(version, python, tensorflow, mesh_tensorflows, source, wheel, logs, under):
    """The cells of one Python and TensorFlow."""
    with tempfile.TemporaryDirectory(prefix="support-") as folder:
        own = pathlib.Path(folder) / "bin" / "python"
        run([python, "-m", "venv", folder], env=environment())
        for mesh_tensorflow in mesh_tensorflows:
            name = f"python{version}-tensorflow{tensorflow}-mtf{mesh_tensorflow}"
            cell = {"python": version, "tensorflow": tensorflow, "mesh-tensorflow": mesh_tensorflow}
            print(f"{datetime.datetime.now():%H:%M:%S} {name}", file=sys.stderr)
            wanted = [f"tensorflow=={tensorflow}.*", f"mesh-tensorflow=={mesh_tensorflow}"]
            wanted = [f"{wheel}[{EXTRAS}]", *(least_versions() if tensorflow == LEAST else wanted)]
            pip = [own, "-m", "pip", "install", "--no-compile", "--disable-pip-version-check", *wanted, *TEST_NEEDS]
            try:
                run(pip, logs / f"{name}-pip.log", env=environment())
            except Failed as failure:
                yield {**cell, "not_installed": str(failure)}
            else:
                yield {**cell, "versions": installed(own), **tested(own, source, logs, name, under)}


def table(cells):
    """Markdown: a line for each Python and TensorFlow, a column for each mesh-tensorflow."""
    by_pair = {}
    for cell in cells:
        by_pair.setdefault((cell["python"], cell["tensorflow"]), {})[cell["mesh-tensorflow"]] = cell
    releases = sorted({cell["mesh-tensorflow"] for cell in cells})
    heads = ["Python", "TensorFlow", "NumPy", "protobuf", *(f"mesh-tensorflow {release}" for release in releases)]
    lines = [heads, ["---"] * len(heads)]
    for pair, pair_cells in sorted(by_pair.items(), key=lambda item: [numbers(part) for part in item[0]]):
        versions = next((cell["versions"] for cell in pair_cells.values() if "versions" in cell), {})
        names = [versions.get(p, part) for p, part in zip(("python", "tensorflow"), pair)]
        parts = [versions.get(p, "") for p in ("numpy", "protobuf")]
        lines.append([*names, *parts, *(text(pair_cells.get(release)) for release in releases)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def numbers(version):
    return [int(n) for n in re.findall(r"\d+", version)]


def text(cell):
    if cell is None:
        return "not run"
    if "not_installed" in cell:
        return "pip: " + re.sub(r"ERROR: | \(from versions.*", "", cell["not_installed"])
    if "passed" not in cell:
        return f"**{cell['error'][:100]}**"
    counts = [f"{cell[kind]} {kind}" for kind in ("passed", "failed", "skipped") if cell[kind] or kind == "passed"]
    return ", ".join(counts) + (f": **{cell['error'][:100]}**" if "error" in cell else f" ({cell['seconds']} s)")


def key(cell):
    return cell["python"], cell["tensorflow"], cell["mesh-tensorflow"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", metavar="PATH", help=f"default: python{', '.join(PYTHONS)} on PATH")
    parser.add_argument("--tensorflow", nargs="+", metavar="VERSION", default=TENSORFLOWS)
    parser.add_argument("--mesh-tensorflow", nargs="+", metavar="VERSION", default=MESH_TENSORFLOWS)
    default = common.FOLDER / "results" / f"support-{datetime.datetime.now():%Y-%m-%d-%H%M%S}.json"
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", default=default)
    parser.add_argument("--logs", type=pathlib.Path, metavar="FOLDER", help="of pip and pytest (default: FILE.logs)")
    parser.add_argument("--under", type=str.split, metavar="COMMAND", default=[], help='of tests, say "taskset -c 0"')
    args = parser.parse_args(argv)
    logs = args.logs or args.output.with_suffix(".logs")
    logs.mkdir(parents=True, exist_ok=True)
    logs = logs.resolve()
    cells = {key(cell): cell for cell in json.loads(args.output.read_text())["cells"]} if args.output.exists() else {}
    commit = common.commit()
    with tempfile.TemporaryDirectory(prefix="support-source-") as folder:
        source, wheel = source_and_wheel(pathlib.Path(folder))
        for version, python in interpreters(args.python).items():
            for tensorflow in args.tensorflow:
                mesh_tensorflows = MESH_TENSORFLOWS[:1] if tensorflow == LEAST else args.mesh_tensorflow
                pair = (version, python, tensorflow, mesh_tensorflows)
                for cell in cells_of(*pair, source, wheel, logs, args.under):
                    cells[key(cell)] = {**cell, "commit": commit}
                    result = {"machine": common.machine(), "tests": TESTS, "cells": list(cells.values())}
                    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(cells.values()))
    return int(any("error" in cell for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
