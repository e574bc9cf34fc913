"""What a shell is told that may come next."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("argcomplete")


def completions(line, *path):
    """As bash asks: the answer comes on file descriptor 8."""
    env = {**os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
           "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
           "PYTHONPATH": os.pathsep.join([*path, *sys.path])}  # fmt: skip
    command = ["sh", "-c", 'exec "$@" 8>&1 9>&2', "sh", sys.executable, "-m", "gpt_neo_sampling.cli"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    return done.stdout.split("\n")


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("", {"generate", "score", "inspect", "export", "convert", "serve"}),
        ("generate Emma --seed -5 --dty", {"--dtype"}),
        ("generate --dtype ", {"float32", "bfloat16"}),
        ("export --output a --controls top_", {"top_n_sigma", "top_h", "top_p"}),
    ],
)
def test_commands_options_and_names(tmp_path, words, wanted):
    """Without TensorFlow, whose import takes seconds."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow is imported')")
    found = completions("gpt-neo-sampling " + words, str(tmp_path))
    assert wanted <= set(found)
    if words.endswith("_") or words.endswith("--dty"):
        assert wanted == set(found)
