"""The command line, in this process and a few times in its own, as a user runs it."""

import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import logging
import os
import pathlib
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import processes
import pytest
from conftest import DATA
from helpers_checkpoint import spoiled

from gpt_neo_sampling import TextGenerator
from gpt_neo_sampling._compat import tf
from gpt_neo_sampling.cli import main as cli
from gpt_neo_sampling.cli.echo import Echo

GLOBAL = DATA / "gpt_neo_checkpoints" / "global"


def run(*args, **kwargs):
    """The installed command, in its own process."""
    command = [sys.executable, "-m", "gpt_neo_sampling.cli.main", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def main(capfd, *args):
    """The same in this process: (status, stdout, stderr)."""
    try:
        status = cli.main([str(a) for a in args])
    except SystemExit as e:
        status = e.code
    captured = capfd.readouterr()
    return status, captured.out, captured.err


@functools.cache
def generator(*args, **kwargs):
    return from_pretrained(*args, **kwargs)


from_pretrained = TextGenerator.from_pretrained


@pytest.fixture
def shared(monkeypatch):
    """Commands with the same model share one generator, whose graphs are built once."""
    monkeypatch.setattr(TextGenerator, "from_pretrained", generator)


def to_stop_token(tokens, stop=1):
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


@pytest.mark.parametrize("name", ["global", pytest.param("rotary", marks=pytest.mark.slow)])
def test_json_of_golden_prompts(capfd, shared, name):
    folder = DATA / "gpt_neo_checkpoints" / name
    golden = np.load(folder / "golden.npz")
    prompts = [" ".join(map(str, row[:n])) for row, n in zip(golden["prompts"], golden["lengths"])]
    status, out, err = main(capfd, "generate", "--model", folder, "--prompt-ids", *prompts, "--temperature", 0,
                            "--max-new-tokens", 20, "--json")  # fmt: skip
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "samples": [
            {
                "prompt_tokens": row[:n].tolist(),
                "tokens": to_stop_token(row[n : n + 20].tolist()),
                "text": None,
                "finish_reason": "stop" if 1 in row[n : n + 20] else "length",
            }
            for row, n in zip(golden["greedy_fast"], golden["lengths"])
        ]
    }


EMMA = ["generate", "--prompt", "The family of Dashwood", "--max-new-tokens", "12"]


def test_text_alone_goes_to_stdout(capfd, shared):
    status, out, err = main(capfd, *EMMA, "--seed", 11)
    assert (status, err) == (0, "The family of Dashwood\n")
    again = json.loads(main(capfd, *EMMA, "--seed", 11, "--json")[1])["samples"]
    assert out == again[0]["text"] + "\n"
    _, fresh, err = main(capfd, *EMMA)
    assert err.startswith("seed ")
    seed = err.split()[1]
    assert main(capfd, *EMMA, "--seed", seed)[1] == fresh


def test_plain_arguments_are_prompts(capfd, shared, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"She was\n")))
    texts = ["The family of Dashwood", "She was"]
    options = ["--seed", 11, "--max-new-tokens", 12, "--json"]
    by_option = main(capfd, "generate", "--prompt", *texts, *options)
    assert main(capfd, "generate", texts[0], "-", *options) == by_option
    assert main(capfd, "inspect", texts[0]) == main(capfd, "inspect", "--prompt", texts[0])
    assert main(capfd, "score", *texts) == main(capfd, "score", "--text", *texts)


def test_a_prompt_that_its_text_does_not_follow_ends_its_line(capfd, shared):
    """stdout and stderr go to two places: the prompt appears once, and nothing tells samples apart but their lines."""
    args = ["--max-new-tokens", 2, "--seed", 11, "--num-samples", 2]
    _, as_json, _ = main(capfd, "generate", "Emma\n", "She", *args, "--json")
    texts = [sample["text"] + "\n" for sample in json.loads(as_json)["samples"]]
    assert main(capfd, "generate", "Emma\n", "She", *args) == (0, "".join(texts), "Emma\nShe\n")


def test_options_of_ids_and_texts(monkeypatch):
    """As GenerationOptions takes them."""
    from gpt_neo_sampling.cli import arguments, parser

    line = [
        "generate", "a", "--sequence-bias", "5 6=-1", "7=2", "--bad-words-ids", "5", "6 7", "--bad-words", "a\\nb",
        "--suppress-tokens", "3", "--allowed-token-ids", "1", "2", "--exponential-decay-length-penalty", "5,1.1",
        "--dry-multiplier", "0.5", "--dry-sequence-breakers", "\\n", "x", "--forced-eos-token-id", "0",
    ]  # fmt: skip
    options = arguments.sampling_of(parser.parser().parse_args(line))
    given = {name: value for name, value in options.items() if value not in (None, {})}
    assert given == {
        "sequence_bias": {(5, 6): -1.0, (7,): 2.0}, "bad_words_ids": [[5], [6, 7]], "bad_words": ["a\nb"],
        "suppress_tokens": [3], "allowed_token_ids": [1, 2], "exponential_decay_length_penalty": (5.0, 1.1),
        "dry_multiplier": 0.5, "dry_sequence_breakers": ["\n", "x"], "forced_eos_token_id": [0],
    }  # fmt: skip


def test_a_stop_string_may_be_a_newline(capfd, shared):
    args = ["generate", "Elizabeth", "--seed", 3]
    whole, stopped = (main(capfd, *args, *more)[1] for more in ([], ["--stop-strings", r"\n"]))
    assert "\n" in whole[:-1] and stopped == whole[: whole.index("\n") + 1]


def test_a_stream_is_that_sample_alone(capfd, shared):
    args = ["generate", "Emma", "--seed", 5, "--max-new-tokens", 12]
    several = main(capfd, *args, "--num-samples", 3, "--json")[1]
    (alone,) = json.loads(main(capfd, *args, "--stream", 2, "--json")[1])["samples"]
    assert alone == json.loads(several)["samples"][2]


@pytest.mark.slow
def test_a_fresh_interpreter_prints_the_same(capfd, shared):
    done = run(*EMMA, "--seed", "11")
    assert (done.returncode, done.stdout, done.stderr) == main(capfd, *EMMA, "--seed", 11)


def test_without_a_tokenizer_the_ids_are_printed(capfd, shared):
    args = ["generate", "--model", GLOBAL, "--prompt-ids", "5 6", "7,8", "--num-samples", 2, "--max-new-tokens", 4]
    args += ["--seed", 1]
    _, as_json, _ = main(capfd, *args, "--json")
    status, out, err = main(capfd, *args)
    assert status == 0
    assert [list(map(int, line.split())) for line in out.splitlines()] == [
        s["tokens"] for s in json.loads(as_json)["samples"]
    ]


def test_jit_compile_prints_the_same(capfd, monkeypatch):
    given = []
    monkeypatch.setattr(TextGenerator, "from_pretrained", lambda *a, **k: given.append(k) or generator(*a, **k))
    args = ["generate", "--model", GLOBAL, "--prompt-ids", "5 6", "--max-new-tokens", 9, "--seed", 1]
    assert main(capfd, *args, "--jit-compile") == main(capfd, *args)
    assert [k["jit_compile"] for k in given] == [True, False]


def test_samples_are_in_the_order_of_the_prompts(capfd, shared):
    args = [
        "generate",
        "--model",
        GLOBAL,
        "--prompt-ids",
        "5",
        "6",
        "--num-samples",
        2,
        "--max-new-tokens",
        3,
        "--json",
    ]
    _, out, _ = main(capfd, *args)
    assert [s["prompt_tokens"] for s in json.loads(out)["samples"]] == [[5], [5], [6], [6]]


@pytest.mark.parametrize("options", [["--entmax"], ["--entmax", "1.3"]])
def test_entmax_alone_is_alpha_1_3(capfd, shared, options):
    args = ["generate", "--model", GLOBAL, "--prompt-ids", "5", "--seed", 4, "--json"]
    _, out, _ = main(capfd, *args, *options)
    _, explicit, _ = main(capfd, *args, "--entmax", "1.3")
    _, other, _ = main(capfd, *args, "--entmax", "2")
    assert out == explicit != other


@pytest.mark.slow
def test_the_contexts_end_is_noted_on_stderr(capfd, shared, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's, beside which the command adds none
    args = ["generate", "--model", GLOBAL, "--prompt-ids", "5 " * 46, "--max-new-tokens", 10, "--seed", 1, "--json"]
    status, out, err = main(capfd, *args)
    assert status == 0
    assert len(json.loads(out)["samples"][0]["tokens"]) <= 2
    assert "note: " in err and "context" in err


def test_score(capfd, shared, tmp_path):
    """One line for each text; with --json the result of TextGenerator.score; a file is one text."""
    texts = ["The family of Dashwood", "had long been settled in Sussex.\r\nÉ"]
    (tmp_path / "text.txt").write_bytes(texts[1].encode())
    wanted = [dataclasses.asdict(s) for s in TextGenerator.from_pretrained().score(texts)]
    status, out, err = main(capfd, "score", "--text", *texts)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"perplexity {s['perplexity']:.6g}  log-probability {s['sum_logprob']:.6g}  tokens {len(s['tokens']) - 1}"
        for s in wanted
    ]
    _, out, _ = main(capfd, "score", "--text", *texts, "--json")
    assert json.loads(out) == {"scores": wanted}
    _, out, _ = main(capfd, "score", "--file", tmp_path / "text.txt", "--stride", 9, "--json")
    (score,) = json.loads(out)["scores"]
    assert score["tokens"] == wanted[1]["tokens"]
    assert score["perplexity"] == pytest.approx(wanted[1]["perplexity"], rel=1e-4)
    _, out, _ = main(capfd, "score", "--model", GLOBAL, "--text-ids", "5 6", "7", "--add-start-token", "--json")
    assert [s["logprobs"].count(None) for s in json.loads(out)["scores"]] == [0, 0]


@pytest.mark.slow
def test_a_bad_value_has_no_traceback_in_a_process_of_its_own():
    done = run("generate", "--prompt", "a", "--top-k", "-1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) <= 2 and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def with_nan(tmp_path_factory):
    return spoiled(tmp_path_factory.mktemp("nan") / "model", "wpe", 3, np.nan)


def assert_nan_is_reported(capfd, model, command, where, printed):
    status, out, err = main(capfd, command[0], "--model", model, *command[1:])
    assert (status, out) == (2, printed)
    assert f"error: {where}: the logits hold NaN" in err
    assert err.endswith("(the weight wpe holds NaN or infinite numbers)\n")
    assert err.removeprefix("5 \n").count("\n") == 1  # behind the prompt whose text was printed


def test_nan_is_reported_with_its_place_and_the_rest_printed(capfd, shared, with_nan):
    command = ["generate", "--prompt-ids", "5 6 7 8", "--prompt-ids", "5", "--seed", 1, "--max-new-tokens", 3]
    options = dict(seed=1, max_new_tokens=3, streamer=lambda *_: None)
    (sound, *_) = generator(GLOBAL).generate([[5]] * 4, stream=1, **options)
    where, text = "prompt 0, sample 0, step 0", " ".join(map(str, sound.tokens))
    assert_nan_is_reported(capfd, with_nan, command, where, text + "\n")
    in_json = json.dumps({"samples": [None, sound.as_dict()]})
    assert_nan_is_reported(capfd, with_nan, [*command, "--json"], where, in_json + "\n")


@pytest.mark.parametrize(
    "command, where",
    [
        (["score", "--text-ids", "5 6 7 8 9"], "text 0"),
        (["inspect", "--prompt-ids", "5 6 7 8", "--top-k", 3], "after 4 tokens, step 'model' of the chain"),
    ],
)
def test_nan_is_reported_with_its_place_by_other_commands(capfd, shared, with_nan, command, where):
    assert_nan_is_reported(capfd, with_nan, command, where, "")


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback():
    command = [sys.executable, "-m", "gpt_neo_sampling.cli.main", "generate", "--model", str(GLOBAL),
               "--prompt-ids", "5", "--num-samples", "4", "--max-new-tokens", "5", "--seed", "1", "--json"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=300) == 1
    assert err == ""


def test_help_names_every_option(capfd):
    status, out, _ = main(capfd, "generate", "--help")
    assert status == 0
    for option in ("--model", "--prompt", "--prompt-ids", "--max-new-tokens", "--temperature", "--top-k", "--entmax",
                   "--seed", "--num-samples", "--json", "--prompts-file", "--output"):  # fmt: skip
        assert option in out


@pytest.mark.slow
def test_the_command_is_installed():
    command = pathlib.Path(sys.executable).parent / "gpt-neo-sampling"
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "generate" in done.stdout


@pytest.mark.parametrize(
    "line, status",
    [
        ("--version", 0),
        ("generate --help", 0),
        ("generate", 2),
        ("generate --prompt x --top-p 2", 2),
        ("generate x --top-kk 2", 2),
        ("generate x --max-length 2", 2),
        ("generate --prompt x --greedy --top-k 5", 2),
        ("generate --prompt x --min-new-tokens 5 --max-new-tokens 4", 2),
        ("generate --prompt-ids 1.5", 2),
        ("generate --prompt x --mesh-shape x:2", 2),
        ("generate --prompt x --logprobs", 2),
        ("inspect --prompt x --plot x.doc", 2),
        ("score --text-ids x", 2),
        ("score --text x --revision main", 2),
        ("serve --cluster nowhere", 2),
    ],
)
def test_answers_that_take_no_tensorflow(line, status):
    """Those that need no model; TensorFlow takes seconds to import."""
    code = (
        "import sys\n"
        "from gpt_neo_sampling.cli.main import main\n"
        f"assert main({line.split()!r}) == {status}\n"
        "assert not {'tensorflow', 'mesh_tensorflow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not status or done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_terminal_shows_the_prompt_before_tensorflow_is_there():
    """And what is being done, until the text takes its place; the seed follows."""
    main_end, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "gpt_neo_sampling.cli", *TERMINAL]
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end) as process:
        os.close(end)
        shown = b""
        with contextlib.suppress(OSError):  # at the end, on Linux
            while piece := os.read(main_end, 1000):
                shown += piece
    os.close(main_end)
    stages = [
        f"\x1b[2m {stage} …\x1b[0m" for stage in ("importing TensorFlow", "loading the model", "building the graph")
    ]
    begin = "It was\r\nthe duty of" + "".join(f"\r\x1b[Kthe duty of{stage}" for stage in (*stages, ""))
    assert process.returncode == 0 and shown.decode().startswith(begin)
    text, seed = re.fullmatch(r"(.+\r\n)seed (\d+)\r\n", shown.decode().removeprefix(begin), re.DOTALL).groups()
    assert text == processes.run(*TERMINAL, "--seed", seed).stdout.replace("\n", "\r\n")


TERMINAL = ["generate", "--prompt", "It was\nthe duty of", "--max-new-tokens", "4"]


def test_a_prompt_that_nothing_follows_ends_its_line(monkeypatch):
    """Of a prompt that is wider than the terminal, the last part is printed again, and there is no room for more."""
    monkeypatch.setenv("COLUMNS", "10")
    shown = io.StringIO()
    echo = Echo("Emma\n1234567890語語語語語6", shown)
    echo.status("loading the model …")
    echo.end()
    echo.end()
    assert shown.getvalue() == "Emma\n1234567890語語語語語6" + 2 * "\r\x1b[K6" + "\n"


@pytest.mark.parametrize("module", ["numpy", "tensorflow", "tensorflow.python.framework"])
def test_ctrl_c_while_a_module_is_imported(module):
    code = (
        "import signal, sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class CtrlC(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            sys.meta_path.remove(self)\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "from gpt_neo_sampling.cli.main import main\n"
        "sys.exit(main(['generate', '--prompt', 'Emma']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gpt-neo-sampling: interrupted\n")


def test_a_full_device_is_one_line(capfd, monkeypatch):
    """TensorFlow's message has the place in the graph ahead of it, and hints behind."""
    message = (
        "Graph execution error:\n\nDetected at node 'MatMul' defined at (most recent call last):\n  File \"a.py\"\n"
        "OOM when allocating tensor with shape[64,50257] and type float on /job:localhost/replica:0/task:0/device:GPU:0"
        " by allocator GPU_0_bfc\n\t [[{{node MatMul}}]]\nHint: If you want to see a list of allocated tensors …"
    )

    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, message)

    monkeypatch.setattr(TextGenerator, "from_pretrained", full)
    assert main(capfd, "generate", "--prompt", "Emma") == (
        1, "",
        "gpt-neo-sampling: error: a device does not have enough memory. OOM when allocating tensor with "
        "shape[64,50257] and type float on /job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc\n",
    )  # fmt: skip
