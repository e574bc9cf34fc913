"""What the command line takes: values that begin with "-", plain arguments, what was meant by a mistyped word."""

import io
import types

import pytest
from test_cli import main

from gpt_neo_sampling.cli import arguments
from gpt_neo_sampling.cli.argument_parser import unescaped
from gpt_neo_sampling.cli.parser import parser


def parsed(*args):
    """The values that these arguments give, beside the defaults."""
    args = parser().parse_args(args)
    defaults = vars(parser().parse_args([args.command, *(["a", "b"] if args.command == "convert" else [])]))
    return {name: value for name, value in vars(args).items() if value != defaults[name]}


@pytest.mark.parametrize(
    "line, wanted",
    [
        (["--presence-penalty", "-1e-3"], {"presence_penalty": -1e-3}),
        (["--presence-penalty", "-.5", "--frequency-penalty=-2"], {"presence_penalty": -0.5, "frequency_penalty": -2}),
        (["--prompt", "-hello", "--seed", "-5"], {"prompt": ["-hello"], "seed": -5}),
        (["--prompt", "a", "-h b", "--greedy"], {"prompt": ["a", "-h b"], "do_sample": "false"}),
        (["--prompt", "-"], {"prompt": ["-"]}),
        (["--prompt", "--"], {"prompt": ["--"]}),
        (["--prompt", "--so it was", "--", "more"], {"prompt": ["--so it was"], "plain": ["more"]}),
        (["--prompt", ""], {"prompt": [""]}),
        (["--prompt=--seed", "b"], {"prompt": ["--seed"], "plain": ["b"]}),
        (["--model", "-x=y"], {"model": "-x=y"}),
        (["--model", "--models"], {"model": "--models"}),
        (["--stop-strings", "---", "-", "-x"], {"stop_strings": ["---", "-", "-x"]}),
        (["--stop-strings", "--", "--seed", "1"], {"stop_strings": ["--"], "seed": 1}),
        (["--stop-strings", "--seed", "1"], {"stop_strings": [], "seed": 1}),
        (["--stop-strings", "a", "--stop-strings", "b"], {"stop_strings": ["a", "b"]}),
        (["--eos-token-id", "-1", "--entmax", "-5", "--seed", "1"],
         {"eos_token_id": [-1], "entmax_alpha": -5, "seed": 1}),
        (["--entmax", "--", "Emma"], {"entmax_alpha": 1.3, "plain": ["Emma"]}),
        (["--entmax", "--greedy", "Emma"], {"entmax_alpha": 1.3, "do_sample": "false", "plain": ["Emma"]}),
        (["--logit-bias", "13=-2.5", "--logit-bias", "14=1"], {"logit_bias": ["13=-2.5", "14=1"]}),
        (["Emma", "--seed", "1", "Tom", "-"], {"plain": ["Emma", "Tom", "-"], "seed": 1}),
        (["--", "-hello", "--seed"], {"plain": ["-hello", "--seed"]}),
        (["-hello world"], {"plain": ["-hello world"]}),
    ],
)  # fmt: skip
def test_values(line, wanted):
    assert parsed("generate", *line) == wanted


def test_values_of_other_commands():
    assert parsed("convert", "a", "--dtype", "bfloat16", "b") == {"dtype": "bfloat16"}
    assert parsed("inspect", "-1", "--continuation", "-x") == {"plain": "-1", "continuation": "-x"}
    assert parsed("score", "--text", "-a", "---") == {"text": ["-a", "---"]}


@pytest.mark.parametrize(
    "line, message",
    [
        ("generate a --top-kk 3", "unrecognized arguments: --top-kk; did you mean --top-k? (see "),
        ("generate --top_k=3", "unrecognized arguments: --top_k=3; did you mean --top-k? (see "),
        ("generate -temperature 0.5", "unrecognized arguments: -temperature; did you mean --temperature? (see "),
        ("generate a -hello", "unrecognized arguments: -hello; as a text: -- -hello (see "),
        ("generate --prompt a -temperature 0.5", "unrecognized arguments: -temperature; did you mean --temperature? "),
        ("generate --temp 1", "unrecognized arguments: --temp; did you mean --temperature? (see "),
        ("generate --tokens 1", "; did you mean --max-new-tokens or --min-new-tokens or "),
        ("generate --top 1", "; did you mean --top-h or --top-k or --top-p? (see "),
        ("generate a --greedy=true", "argument --greedy: it takes no value, but is given as --greedy=true"),
        ("generate --qqqq", "unrecognized arguments: --qqqq (see gpt-neo-sampling generate --help)"),
        ("export --outptu x", "unrecognized arguments: --outptu; did you mean --output? (see "),
        ("serve x", "unrecognized arguments: x (see "),
        ("generat", "invalid choice: 'generat'; did you mean generate? (choose from generate, score, "),
        ("generate a --dtype bfloat", "invalid choice: 'bfloat'; did you mean bfloat16? (choose from float32, "),
        ("generate a --prompt", "argument --prompt: expected at least one argument"),
        ("generate a --top-k", "argument --top-k: expected one argument"),
        ("generate a --top-k -- b", "argument --top-k: expected one argument"),
        ("generate a --entmax b", "argument --entmax-alpha/--entmax: invalid float value: 'b'"),
        ("generate a --greedy --do-sample true", "argument --do-sample: not allowed with argument --greedy"),
        # other libraries' names
        ("generate a --max-length 5", "unrecognized arguments: --max-length; --max-new-tokens counts the new "),
        ("generate a --num-beams=4", "unrecognized arguments: --num-beams=4; beam search is not built; --num-re"),
        ("generate a --num_beams 4", "unrecognized arguments: --num_beams; beam search is not built"),
        ("generate --input-ids 5", "unrecognized arguments: --input-ids; --prompt-ids takes token ids (see "),
        ("inspect --pretrained-model-name-or-path a", "-path; --model takes it (see "),
        ("generate --streamer a", "; streamers are for Python"),
        ("generate --token a", "; Hugging Face's own token is used"),
        ("inspect a --max-length 5", "unrecognized arguments: --max-length"),
    ],
)  # fmt: skip
def test_errors_say_what_was_meant(capfd, line, message):
    status, out, err = main(capfd, *line.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert "--max-new-tokens" not in err or line.startswith("generate")


@pytest.mark.parametrize(
    "typed, text",
    [
        (r"\n", "\n"), (r"a\tb\r\n", "a\tb\r\n"), (r"\\n", r"\n"), (r"\\\n", "\\\n"), (r"\section", r"\section"),
        ("\\", "\\"), ("\n", "\n"), (r"\\\\", r"\\"),
    ],
)  # fmt: skip
def test_escapes(typed, text):
    assert unescaped(typed) == text
    assert parsed("generate", "--stop-strings", typed)["stop_strings"] == [text]


def taken(*args):
    args = parser().parse_args(args)
    arguments.check(args)
    arguments.take_texts(args)
    return args


def test_texts_have_escapes_only_if_asked_for():
    assert taken("generate", r"a\n").prompt == [r"a\n"]
    assert taken("generate", "--prompt", r"a\n", "b", "-e").prompt == ["a\n", "b"]
    assert taken("generate", "-e", r"a\n").prompt == ["a\n"]
    args = taken("inspect", r"a\n", "--escape", "--continuation", r"\t")
    assert (args.prompt, args.continuation) == ("a\n", "\t")
    assert taken("score", "-e", "--text", r"\\n").text == [r"\n"]


@pytest.mark.parametrize("given, text", [(b"Emma\n", "Emma"), (b"a\r\n\r\n", "a\r\n"), (b"\xef\xbb\xbfa\\n", r"a\n")])
def test_stdin(monkeypatch, given, text):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(given), isatty=lambda: False))
    assert taken("generate", "x", "-", "-e").prompt == ["x", text]


def test_stdin_that_cannot_be_read(monkeypatch):
    for stdin, message in [
        (types.SimpleNamespace(buffer=io.BytesIO(b"Zo\xeb")), "stdin: 'utf-8' codec can't decode"),
        (None, "stdin is closed"),
    ]:
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(ValueError, match=message):
            taken("inspect", "-")


@pytest.mark.parametrize(
    "ids, note",
    [
        (["5", "17", "101"], '--prompt-ids 5 17 101 is 3 prompts of one id each; one prompt of these ids is '
                             '--prompt-ids "5 17 101"'),
        (["5 17", "101"], None),
        (["5"], None),
        (["5 17 101"], None),
    ],
)  # fmt: skip
def test_single_ids_are_noted(ids, note):
    assert list(arguments.notes(parser().parse_args(["generate", "--prompt-ids", *ids]))) == [note][: note is not None]
    notes = list(arguments.notes(parser().parse_args(["score", "--text-ids", *ids])))
    assert notes == [note.replace("prompt", "text")][: note is not None] if note else not notes
