"""A prompts file: its lines, its batches, and what a run leaves wherever it ends."""

import fcntl
import json
import os
import pathlib
import re
import resource
import signal
import sys
import types

import numpy as np
import pytest
from helpers_model import config, random_weights

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import kill_and_resume
import processes

from gpt_neo_sampling import InvalidDistributionError, Sample, TextGenerator, generate_file
from gpt_neo_sampling.checkpoint import write_mesh_tf_checkpoint
from gpt_neo_sampling.cli import main as cli
from gpt_neo_sampling.generation import prompts_file
from gpt_neo_sampling.generation.generator import MAX_BATCH, Interrupted


class Death(BaseException):
    """An exception that the library does not catch."""


class Stub:
    """A generator whose tokens encode the request, and that dies or is interrupted in a given call."""

    dtype = "float32"
    jit_compile = False
    mesh = types.SimpleNamespace(cluster=None)
    params = {"n_ctx": 100}
    replaces_rows = False

    def __init__(self, dies_at=None, interrupted_at=None):
        self.checkpoint = types.SimpleNamespace(fingerprint=lambda: "stub")
        self.calls, self.dies_at, self.interrupted_at = [], dies_at, interrupted_at

    def encode(self, prompt):
        return [ord(c) for c in prompt] if isinstance(prompt, str) else prompt

    def check(self, prompts, max_new_tokens=(None,), **options):
        values = {"max_new_tokens": np.array([max_new_tokens[0] or 3])}
        samples = options.get("num_return_sequences", 1)
        return types.SimpleNamespace(values=values, num_return_sequences=samples, greedy=False, steps=frozenset())

    def generate(self, prompts, *, stream, seed, max_new_tokens, streamer, num_return_sequences=1, **options):
        if len(self.calls) == self.dies_at:
            raise Death
        top_k = options.get("top_k", [None] * len(prompts))
        samples = [
            Sample(prompt, [seed[i], stream[i] + n, max_new_tokens[i]], str(top_k[i]))
            for i, prompt in enumerate(prompts) for n in range(num_return_sequences)
        ]  # fmt: skip
        if len(self.calls) == self.interrupted_at:
            raise Interrupted([None, *samples[1:-1], None])
        self.calls.append(prompts)
        return samples


@pytest.fixture
def files(tmp_path):
    """(a prompts file of 100 lines with two groups and several lengths and random streams; the output's path)."""
    lines = [{"prompt_ids": [7] * (1 + i * 37 % 60), "id": i} for i in range(100)]
    for line in lines[::3]:
        line.update(num_return_sequences=2, top_k=line["id"] + 1)
    lines[50].update(seed=-5, max_new_tokens=9)
    return write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"


@pytest.fixture(scope="module")
def demo():
    return TextGenerator.from_pretrained()


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_has_its_options_its_stream_and_its_place(files):
    done = generate_file(Stub(), *files, seed=4, temperature=0.5)
    assert done == (100, 100, 4)
    stream = 0
    for i, (line, given) in enumerate(zip(read(files[1]), read(files[0]))):
        n = given.get("num_return_sequences", 1)
        tokens = [given.get("seed", 4), stream, given.get("max_new_tokens", 3)]
        assert line == {
            "index": i, "prompt_ids": given["prompt_ids"], "id": i,
            "samples": [
                {"prompt_tokens": given["prompt_ids"], "tokens": [tokens[0], tokens[1] + j, tokens[2]],
                 "text": str(given.get("top_k")), "finish_reason": "length"}
                for j in range(n)
            ],
        }  # fmt: skip
        stream += n


def test_batches_are_alike_and_not_too_large(files):
    stub = Stub()
    generate_file(stub, *files, seed=4)
    assert sum(map(len, stub.calls)) == 100
    sizes = [len(call) for call in stub.calls]
    assert sorted(sizes) == sorted([16, 16, 2, 32, 32, 2])
    # in place of some 60 positions a row, a batch spans those of a third or half of the records in its group
    assert all(max(map(len, call)) - min(map(len, call)) <= 32 for call in stub.calls)


def test_more_samples_than_a_batch_has_rows(files):
    write(files[0], *[{"prompt": "a", "num_return_sequences": MAX_BATCH + 1}] * 2)
    stub = Stub()
    generate_file(stub, *files, seed=1)
    assert [len(call) for call in stub.calls] == [1, 1]
    assert [len(line["samples"]) for line in read(files[1])] == [MAX_BATCH + 1] * 2


def test_a_death_in_any_batch(files):
    source, output = files
    generate_file(Stub(), source, output.with_name("undisturbed"), seed=4)
    for call, lines in enumerate([0, 16, 32, 34, 66, 98]):
        with pytest.raises(Death):
            generate_file(Stub(dies_at=call), source, output, seed=4)
        assert len(read(output)) == lines
        generate_file(Stub(), source, output, seed=4)
        assert output.read_bytes() == output.with_name("undisturbed").read_bytes()
        output.unlink()


@pytest.mark.parametrize("finished", [False, True])
def test_an_output_cut_at_any_byte(tmp_path, monkeypatch, finished):
    """The file as it is after a kill in the middle of a write, or after a power failure."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # some thousand times
    source = write(tmp_path / "in.jsonl", *({"prompt": "a" * n, "id": n} for n in (1, 2, 3)))
    output = tmp_path / "out.jsonl"
    generate_file(Stub(), source, output, seed=4)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    left = whole if finished else b"".join(lines[::-1])
    for end in range(len(left) + 1):
        for lost in {0, min(end, 20)}:  # bytes that were never written
            output.write_bytes(left[: end - lost] + b"\0" * lost + left[end:] if lost else left[:end])
            generate_file(Stub(), source, output, seed=4)
            assert output.read_bytes() == whole


def test_a_death_between_the_last_line_and_its_place(files, monkeypatch):
    source, output = files
    generate_file(Stub(), source, output.with_name("undisturbed"), seed=4)

    def die(old, new):
        if new == output:
            raise Death
        rename(old, new)

    rename = os.replace
    with monkeypatch.context() as patched, pytest.raises(Death):
        patched.setattr(os, "replace", die)
        generate_file(Stub(), source, output, seed=4)
    assert output.read_bytes() != output.with_name("undisturbed").read_bytes()
    stub = Stub()
    assert generate_file(stub, source, output).written == 0 and not stub.calls
    assert output.read_bytes() == output.with_name("undisturbed").read_bytes()
    assert sorted(os.listdir(output.parent)) == [
        "in.jsonl", "out.jsonl", "out.jsonl.run", "undisturbed", "undisturbed.run"
    ]  # fmt: skip


@pytest.mark.parametrize("which", [[0, 4], pytest.param([0, 1, 2, 3, 4], marks=pytest.mark.slow)])
def test_lines_are_what_each_prompt_gives_alone(files, demo, monkeypatch, which):
    """Also if the model's default is not to sample, an option that a call has for all its prompts."""
    requests = [
        {},
        {"temperature": 0.8, "seed": 5},
        {"top_p": 0.9, "repetition_penalty": 1.2},
        {"do_sample": False},
        {"entmax_alpha": 1.5, "num_return_sequences": 3, "logit_bias": {"13": 5.5}, "bad_words_ids": [[7]],
         "eos_token_id": [14, 15], "stop_strings": ["e"], "max_new_tokens": 4, "return_logprobs": True},
    ]  # fmt: skip
    requests = [requests[i] for i in which]
    prompts = ["Emma was " + "very " * i for i in range(len(requests))]
    write(files[0], *({"prompt": prompt, **options} for prompt, options in zip(prompts, requests)))
    monkeypatch.setitem(demo.checkpoint.generation_defaults, "do_sample", False)
    generate_file(demo, *files, max_new_tokens=6, seed=4)
    requests[-1]["logit_bias"] = {13: 5.5}
    stream = 0
    for line, prompt, options in zip(read(files[1]), prompts, requests):
        # with a streamer, as the file has it: the same graphs
        options = {"stream": stream, "seed": 4, "max_new_tokens": 6, "streamer": lambda *_: None, **options}
        alone = demo.generate(prompt, **options)
        for sample, expected in zip(line["samples"], [sample.as_dict() for sample in alone]):
            for name in {"logprobs", "draw_logprobs"} & set(expected):  # other sizes, other last bits
                np.testing.assert_allclose(sample.pop(name), expected.pop(name), rtol=1e-4)
            assert sample == expected
        stream += len(alone)


def test_new_tokens_end_at_the_context(files, demo, caplog):
    write(files[0], {"prompt_ids": [5]}, *({"prompt_ids": [5] * n, "max_new_tokens": 9} for n in (250, 256)))
    generate_file(demo, *files, max_new_tokens=1, eos_token_id=-1, seed=1)
    assert [len(line["samples"][0]["tokens"]) for line in read(files[1])] == [1, 6, 0]
    assert "2 prompts exceed the context, first that of line 2" in caplog.text


def test_logits_that_are_nan_are_named_by_line(files):
    def generate(prompts, num_return_sequences=1, **options):
        if faulty:
            return Stub.generate(stub, prompts, num_return_sequences=num_return_sequences, **options)
        faulty.append(prompts)
        # of the third of the longest that have two each
        error = InvalidDistributionError("", sample=5, step=3, reason="NaN")
        error.samples = [None] * len(prompts) * num_return_sequences
        raise error

    stub, faulty = Stub(), []
    stub.generate = generate
    with pytest.raises(InvalidDistributionError, match="^the prompt of line 43: sample 1, step 3: NaN$"):
        generate_file(stub, *files)


def test_what_is_on_disk_before_what(files, monkeypatch):
    calls = []

    def noted(name, of, fn):
        def call(*args):
            path = re.sub(r"\.(out\..*)\.[0-9a-f]{32}\.partial$", r"\1.partial", os.path.basename(of(*args)))
            calls.append(f"{name} {path}")
            return fn(*args)

        monkeypatch.setattr(os, name, call)

    noted("fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"), os.fsync)
    noted("replace", lambda old, new: new, os.replace)
    generate_file(Stub(), *files)

    def replaced(name):
        return [f"fsync {name}.partial", f"replace {name}", f"fsync {files[0].parent.name}"]

    assert calls == [*replaced("out.jsonl.run"), *["fsync out.jsonl"] * 6, *replaced("out.jsonl")]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bar_where_stderr_is_a_terminal(files, monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with pytest.raises(Death):
        generate_file(Stub(dies_at=2), *files)
    generate_file(Stub(), *files)
    out, err = capsys.readouterr()
    assert out == ""
    shown = [] if not is_terminal else ["out.jsonl: ", "32 of 100 prompts", "100%", " tokens/s", "100 of 100 prompts"]
    assert [text for text in shown if text in err] == shown
    assert is_terminal or err == ""


def test_the_bar_says_what_takes_long_before_the_first_token(files, monkeypatch, capsys):
    """And leaves it out of its estimate of what is left."""

    class Streaming(Stub):
        def generate(self, prompts, *, streamer, **options):
            for _ in prompts:
                streamer(0, 1, None, False)
            return super().generate(prompts, streamer=streamer, **options)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    unpaused = []
    monkeypatch.setattr(prompts_file.tqdm, "unpause", lambda bar: unpaused.append(bar.n))
    generate_file(Streaming(), *files)
    shown = re.findall("building the graph|[0-9]+ of 100 prompts", capsys.readouterr().err)
    assert shown[:2] == ["building the graph", "0 of 100 prompts"] and shown.count(shown[0]) == 1
    assert unpaused == [0]


def test_a_seed_that_was_chosen_is_kept(files):
    source, output = files
    with pytest.raises(Death):
        generate_file(Stub(dies_at=0), source, output)
    seeds = {generate_file(Stub(), source, output).seed for _ in range(2)}
    assert len(seeds) == 1 and read(output)[0]["samples"][0]["tokens"][0] in seeds
    assert generate_file(Stub(), source, output.with_name("other")).seed not in seeds


@pytest.mark.parametrize("call, lines", [(0, 14), (1, 16 + 14), (3, 34 + 30)])
def test_an_interrupt_keeps_what_is_finished(files, call, lines):
    source, output = files
    generate_file(Stub(), source, output.with_name("undisturbed"), seed=4)
    with pytest.raises(KeyboardInterrupt, match=f"{lines} of 100 prompts are done"):
        generate_file(Stub(interrupted_at=call), source, output, seed=4)
    assert len(read(output)) == lines
    assert generate_file(Stub(), source, output, seed=4).written == 100 - lines
    assert output.read_bytes() == output.with_name("undisturbed").read_bytes()


BAD_LINES = [
    (b"It was \xe2\x80\x9cit\xe2\x80\x9d " + b"x" * 99, 'not JSON; a line should look like {"prompt": "It was “it” xx'),
    (b"5 17 101", 'not JSON; a line should look like {"prompt": "5 17 101"}'),
    (b'{"prompt": "a"', "not JSON"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN is not JSON"),
    (b'["a"]', 'a JSON list; an object is needed: a line should look like {"prompt": "Emma"}'),
    (b'"a"', 'a JSON str; an object is needed: a line should look like {"prompt": "a"}'),
    (b'{"prompt": "a", "temprature": 1}', "unknown key 'temprature'; did you mean temperature?"),
    (b'{"prompt": "a", "warmth": 1}', "unknown key 'warmth'; allowed: prompt, prompt_ids, id, "),
    (b'{"prompt": "a", "max_length": 9}', "unknown key 'max_length'; max_new_tokens counts the new tokens alone"),
    (b'{"prompt": "a", "prompt": "b"}', "an object has the key 'prompt' twice"),
    (b'{"id": 1}', "either prompt or prompt_ids is needed"),
    (b'{"prompt": "a", "prompt_ids": [1]}', "either prompt or prompt_ids is needed"),
    (b'{"prompt": 5}', "prompt=5; a text is needed"),
    (b'{"prompt_ids": "5"}', "prompt_ids='5'; a list of token ids is needed"),
    (b'{"prompt": "a", "stream": 1}', "unknown key 'stream'"),
    (b'{"prompt": "a\\ud800"}', "surrogates not allowed"),
    (b"[" * 100_000, "too deep"),
]
BAD_REQUESTS = [
    (b'{"prompt_ids": [1, 2048]}', "2048 is outside the vocabulary; 0 to 2047"),
    (b'{"prompt_ids": [1, null]}', "None is outside the vocabulary"),
    (b'{"prompt": "%s"}' % (b"word " * 400), "at most 256"),
    (b'{"prompt": "a", "temperature": -1}', "temperature=-1"),
    (b'{"prompt": "a", "temperature": [0.5]}', "temperature=[0.5]"),
    (b'{"prompt": "a", "top_k": 0.5}', "top_k=0.5"),
    (b'{"prompt": "a", "do_sample": "false"}', "do_sample='false'"),
    (b'{"prompt": "a", "eos_token_id": 1099511627776}', "eos_token_id=1099511627776"),
    (b'{"prompt": "a", "logit_bias": {"1": 1, "01": 5}}', "without leading zeros"),
    (b'{"prompt_ids": [true]}', "token id True"),
    (b'{"prompt": "a", "num_return_sequences": 0}', "num_return_sequences=0"),
    (b'{"prompt": "a", "seed": 1e99}', "seed=1e+99"),
    (b'{"prompt": "a", "entmax_alpha": 3}', "entmax_alpha=3"),
    (b'{"prompt": "a", "logit_bias": {"5": -1%s}}' % (b"0" * 400), "; a finite number of 32 bits, or -inf, is needed"),
    (b'{"prompt": "a", "num_return_sequences": 2147483647}', "above 2147483648, the most allowed"),
]


@pytest.mark.parametrize("line, message", BAD_LINES + BAD_REQUESTS)
def test_a_bad_line_is_named_before_anything_is_run(files, demo, line, message):
    source, output = files
    source.write_bytes(b'{"prompt": "a"}\n{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=re.escape(f"{source}, line 3: ") + ".*" + re.escape(message)):
        generate_file(demo, source, output)
    assert os.listdir(source.parent) == ["in.jsonl"]


def test_a_byte_order_mark_windows_lines_and_no_newline_at_the_end(files):
    files[0].write_bytes(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n{"prompt": "c", "id": [null]}')
    assert generate_file(Stub(), *files).written == 2
    assert [(line["prompt"], line.get("id")) for line in read(files[1])] == [("a\u2028b", None), ("c", [None])]


def test_blank_lines_are_passed_over(files):
    """They count: an index is a line's, and so is the number in an error. Streams and the order are as without them."""
    source, output = files
    lines = [b'{"prompt": "a", "num_return_sequences": 2}', b"", b" \t\r", b'{"prompt": "b"}', b"", b'{"prompt": "c"}']
    generate_file(Stub(), write_bytes(source, [line for line in lines if line.strip()]), output, seed=4)
    without = read(output)
    source, output = source.with_name("blank.jsonl"), output.with_name("blank")
    with pytest.raises(Death):
        generate_file(Stub(dies_at=1), write_bytes(source, lines), output, seed=4)
    assert generate_file(Stub(), source, output, seed=4)[:2] == (3, 2)
    found = read(output)
    assert [line.pop("index") for line in found] == [0, 3, 5]
    assert [line.pop("index") for line in without] == [0, 1, 2] and found == without
    output.write_bytes(output.read_bytes() + b'{"index": 1}\n')
    with pytest.raises(ValueError, match="line 4: no index of a prompt; the file was changed"):
        generate_file(Stub(), source, output, seed=4)
    with pytest.raises(ValueError, match="is empty"):
        generate_file(Stub(), write_bytes(source, [b"", b" "]), output.with_name("other"))


def write_bytes(path, lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_null_is_as_if_not_given(files):
    """What the run has then holds."""
    write(files[0], {"prompt": "a", "top_k": 7}, {"prompt": "b", "top_k": None}, {"prompt": "c"})
    generate_file(Stub(), *files, top_k=5)
    assert [line["samples"][0]["text"] for line in read(files[1])] == ["7", "5", "5"]


def test_what_the_output_was_not_begun_with_is_refused(files):
    source, output = files
    generate_file(Stub(), source, output, seed=4, top_k=5)
    written = output.read_bytes()

    def refused(message, generator=None, **options):
        with pytest.raises(ValueError, match=message):
            generate_file(generator or Stub(), source, output, **{"seed": 4, "top_k": 5, **options})
        assert output.read_bytes() == written

    refused(r"begun with top_k=5 \(now 6\); give the same, or remove it", top_k=6)
    refused(r"begun with top_k=5 \(now None\)", top_k=None)
    refused(r"begun with temperature=None \(now 1.0\)", temperature=1.0)
    refused(r"begun with seed=4 \(now 0\)", seed=0)
    other = Stub()
    other.checkpoint.fingerprint = lambda: "other"
    refused("begun with another model; give", generator=other)
    source.write_bytes(source.read_bytes() + b'{"prompt": "a"}\n')
    refused("begun with another prompts_file; give")
    output.unlink()
    assert generate_file(Stub(), source, output, seed=1).written == 101  # nothing is left to be refused


def test_lines_that_no_run_wrote_are_refused(files):
    source, output = files
    generate_file(Stub(), source, output, seed=4)
    written = output.read_bytes()
    first = written.splitlines(keepends=True)[0]
    indices = [b'{"index": %s}\n' % index for index in (b"100", b"null", b"[0]", b"{}", b"true", b"0.0")]
    for line in (first, b"\n", b"a note\n", b"[]\n", b"[" * 100_000 + b"\n", *indices):
        output.write_bytes(written + line)
        with pytest.raises(ValueError, match="line 101: .*the file was changed"):
            generate_file(Stub(), source, output, seed=4)
        assert output.read_bytes() == written + line


def test_outputs_that_cannot_be(files):
    source, output = files
    output.write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists, but out.jsonl.run is not beside it"):
        generate_file(Stub(), source, output)
    assert output.read_bytes() == b"mine"
    source.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        generate_file(Stub(), source, output)


def test_files_of_other_names_are_left_alone(files):
    source, output = files
    others = [output.with_name(name) for name in ("out.jsonl.partial", "out.jsonl.run.partial")]
    for other in others:
        other.write_text("mine")
    generate_file(Stub(), source, output)
    assert [other.read_text() for other in others] == ["mine"] * 2
    assert len(list(source.parent.iterdir())) == 5


@pytest.mark.slow
def test_limits_that_each_line_has_of_its_own(tmp_path, demo):
    """Options are checked before the file is read, but not against a number of new tokens that no line has."""
    prompts = write(tmp_path / "in.jsonl", {"prompt": "Emma", "max_new_tokens": 70})
    generate_file(demo, prompts, tmp_path / "out.jsonl", min_new_tokens=66, seed=1)
    (line,) = read(tmp_path / "out.jsonl")
    assert len(line["samples"][0]["tokens"]) >= 66


def test_one_process_at_a_time(files):
    source, output = files
    with open(output, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="is being written by another process"):
            generate_file(Stub(), source, output)
    assert generate_file(Stub(), source, output).written == 100


@pytest.mark.parametrize("room", [100, 2_000, 10_000, 20_000, 25_000])
def test_a_full_disk(files, room):
    """No file can grow beyond `room` bytes, so the run's settings or its lines do not fit."""
    source, output = files
    generate_file(Stub(), source, output.with_name("undisturbed"), seed=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="out.jsonl.* cannot be written: File too large"):
            generate_file(Stub(), source, output, seed=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    generate_file(Stub(), source, output, seed=4)
    assert output.read_bytes() == output.with_name("undisturbed").read_bytes()
    assert not [name for name in os.listdir(output.parent) if "partial" in name]


def test_the_command_says_the_seed_that_it_chose(tmp_path, capfd, demo, monkeypatch):
    monkeypatch.setattr(TextGenerator, "from_pretrained", lambda *_, **__: demo)
    source = write(tmp_path / "in.jsonl", {"prompt": "Emma", "max_new_tokens": 3}, {"prompt": "She"})
    command = ["generate", "--prompts-file", str(source), "--max-new-tokens", "4", "--output"]
    outputs = [tmp_path / name for name in ("a", "b")]
    assert cli.main([*command, str(outputs[0])]) == 0
    out, err = capfd.readouterr()
    seed, done = err.splitlines()
    assert (out, done) == ("", f"{outputs[0]}: 2 prompts, 2 of them done now")
    word, number = seed.split()
    assert word == "seed" and cli.main([*command, str(outputs[1]), "--seed", number]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert capfd.readouterr().err == f"{outputs[1]}: 2 prompts, 2 of them done now\n"


def test_the_command_killed_and_interrupted(tmp_path):
    """SIGKILL behind the first of three batches, Ctrl-C behind the next: the file is that of an undisturbed run.

    Each batch has a graph of its own, which takes far longer to build than a signal to come.
    """
    rng = np.random.default_rng(20261123)
    options = [{}, {"temperature": 0.5, "max_new_tokens": 9}, {"top_k": 7, "seed": 3}, {"num_return_sequences": 3}, {}]
    records = [{"id": i, "prompt_ids": rng.integers(2, 127, 1 + i % 12).tolist(), **options[i % 5]} for i in range(40)]
    source, output, undisturbed = write(tmp_path / "in.jsonl", *records), tmp_path / "out.jsonl", tmp_path / "whole"

    model = tmp_path / "model"
    params = config(["global"], n_vocab=127, n_ctx=48)
    del params["mode"]
    write_mesh_tf_checkpoint(model, params, random_weights(params))

    def start(output):
        return processes.Command(*kill_and_resume.arguments(source, output), "--model", model)

    with start(undisturbed) as whole:
        with start(output) as first:
            status, _ = kill_and_resume.end_at(first, output, 1, 0.1)
        assert status == -signal.SIGKILL
        there = output.stat().st_size
        with start(output) as second:
            status, err = kill_and_resume.end_at(second, output, there + 1, 0.1, signal.SIGINT)
        assert status == 130 and "Traceback" not in err, err
        assert "of 40 prompts are done; the same command continues" in err.splitlines()[-1]
        _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0 and err.endswith(f"{undisturbed}: 40 prompts, 40 of them done now\n")
    assert 0 < there < output.stat().st_size < undisturbed.stat().st_size
    assert len(read(output)) < 40
    with start(output) as again:
        assert again.wait(timeout=300) == 0
    assert output.read_bytes() == undisturbed.read_bytes()


def test_a_prompt_without_a_distribution_leaves_the_others(tmp_path, demo):
    """All tokens of the second line are masked: the other lines are written, however often it is tried."""
    banned = [[t] for t in range(2048) if t != 12]
    bad = {"prompt_ids": [5, 12], "bad_words_ids": banned, "no_repeat_ngram_size": 1}
    prompts, output = write(tmp_path / "in.jsonl", {"prompt": "Emma"}, bad, {"prompt": "She"}), tmp_path / "out.jsonl"
    for _ in range(2):
        with pytest.raises(InvalidDistributionError, match="the prompt of line 2: sample 0, step 0"):
            generate_file(demo, prompts, output, seed=1, max_new_tokens=4, eos_token_id=-1)
        assert sorted(json.loads(line)["index"] for line in output.read_text().splitlines()) == [0, 2]


def test_sequence_biases_of_a_run_and_of_a_line(demo, tmp_path):
    """As a dict, whose keys JSON has none of, as JSON has them, and from the command line; a resumed run knows them."""
    (tmp_path / "in.jsonl").write_text(
        '{"prompt_ids": [5, 12]}\n{"prompt_ids": [5, 12], "sequence_bias": [[[7], 99]]}\n'
    )
    for _ in range(2):
        generate_file(
            demo, tmp_path / "in.jsonl", tmp_path / "out", seed=1, max_new_tokens=2, sequence_bias={(12, 9): 99.0}
        )
    first, second = (json.loads(line)["samples"][0]["tokens"] for line in (tmp_path / "out").read_text().splitlines())
    assert first[0] == 9 and second == [7, 7]
