"""Prompts from a file, samples to a file; a run may be killed at any moment and started again.

On one CPU records run in pools, where each sample that ends makes room for the next (`row_pool`), and elsewhere in
batches. Only the prompts and the options decide the pools or batches and their order, and lines are written as soon as
their samples, or their batch, are finished. A restarted run looks which whole lines the output has. Records that are
missing run again, and a batch of which some are missing runs as a whole: the same graphs and the same random streams
give the same tokens. At the end the lines are put in the order of the prompts, so the file does not depend on where
runs were interrupted.
"""

import codecs
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

from gpt_neo_sampling import _json
from gpt_neo_sampling._atomic_files import write_whole
from gpt_neo_sampling._types import StrPath
from gpt_neo_sampling._version import VERSION
from gpt_neo_sampling.checkpoint.base import read_json
from gpt_neo_sampling.generation.generator import (
    MAX_BATCH,
    Interrupted,
    InvalidDistributionError,
    Sample,
    TextGenerator,
)
from gpt_neo_sampling.generation.options import ONLY_PYTHON, PER_PROMPT, GenerationOptions
from gpt_neo_sampling.sampling.controls import INT32_MAX
from gpt_neo_sampling.sampling.other_names import explained

# the options of a record, and of a run: functions cannot be stored, and random streams are assigned here
OPTIONS = tuple(f.name for f in dataclasses.fields(GenerationOptions) if f.name not in (*ONLY_PYTHON, "stream"))
SIDECAR = ".run"  # suffix of the file beside the output that stores the run's settings
HASHED = ("prompts_file", "model")  # settings stored as a hash
SHORT = 256  # positions of rows that need not be told apart by length
PROMPT_KEYS = ("prompt", "prompt_ids")

log = logging.getLogger(__name__)


class FileRun(NamedTuple):
    """A finished run.

    Attributes:
      prompts: int, the number of prompts in the file.
      written: int, the number of lines that this call wrote; the others were there already.
      seed: int, for the prompts without a seed of their own.
    """

    prompts: int
    written: int
    seed: int


@dataclasses.dataclass(frozen=True)
class _Record:
    """A line of the prompts file, checked."""

    index: int  # of its line, from 0
    given: dict[str, Any]  # "id", "prompt" and "prompt_ids", as far as the line has them
    prompt: list[int]
    options: dict[str, Any]  # of generate, none None; defaults that depend on the prompt or other options filled in
    stream: int  # the random stream of its first sample: the number of samples before it in the file
    steps: list[Any]  # names of its sampling steps, which decide the graph

    @property
    def n_samples(self) -> int:
        return self.options["num_return_sequences"]


def generate_file(
    generator: TextGenerator, prompts_file: StrPath, output: StrPath, *, seed: int | None = None, **options: Any
) -> FileRun:
    """Continues the prompts of one file and writes the samples to another.

    Each line of the prompts file that is not blank is a JSON object with "prompt" (a text) or
    "prompt_ids" (a list of token ids); optionally "id", any value, which is copied
    to the output; and options of `TextGenerator.generate` by their names, which
    override those given here (null: as if given nowhere). Each line of the output
    is an object of

      "index": the prompt's line, from 0
      "id", "prompt", "prompt_ids": copied, if given
      "samples": a list of num_return_sequences objects, each a `Sample`

    in the order of the prompts once all are there, before that in the order in
    which they were finished. Where the model runs on one CPU, a line is on disk once
    a quarter of the rows have ended since the last ones were written; elsewhere, and
    for at most 32 samples, as soon as its batch is finished, longest first.

    Started again with the same arguments, however it ended, it continues where it
    stopped: no line is lost, duplicated or half written, and the file becomes the
    same to the byte (with the same devices: see docs/own-models.md on other layouts). The
    run's settings are stored beside the output, in a file of its name with ".run"
    appended; keep it as long as the output.

    Args:
      generator: a `TextGenerator`.
      prompts_file: a path; UTF-8, one prompt a line.
      output: a path of a new file, an empty one, or one that an earlier run left.
      seed: int, for all prompts without a seed of their own. A prompt's first
        random stream is the number of samples before it in the file, so its draws
        do not depend on its batch. None for the seed that the run was begun with;
        a new run draws one.
      **options: as for `generate`.

    Returns:
      a FileRun.

    Raises:
      TypeError: for an unknown option.
      ValueError: before anything is run, if a line or an option is not allowed
        (the message names file, line, what was given and what is allowed), or the
        output was begun with other settings or by something else.
      OSError: if the output cannot be written, or another process is writing it.
      InvalidDistributionError, ClusterError, KeyboardInterrupt: as `generate`;
        finished batches are on disk.
    """
    if isinstance(options.get("sequence_bias"), dict):  # JSON has no keys that are lists
        options["sequence_bias"] = [[list(ids), bias] for ids, bias in options["sequence_bias"].items()]
    seed, options = _plain(seed), _plain(options)
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise TypeError(f"not an option for a file: {', '.join(unknown)}; {explained(unknown[0], OPTIONS)}")
    options = {name: value for name, value in options.items() if value is not None}
    # checked before the file is read; how many new tokens fit depends on each prompt
    generator.check([[0]], **_columns([{"max_new_tokens": INT32_MAX, **options, "seed": seed}]))
    output = Path(output).resolve()
    data = _read(prompts_file)
    if os.path.exists(output) and output.samefile(prompts_file):
        raise ValueError(f"{output} is the prompts file; give another output")
    records = _records(generator, data, prompts_file, options)
    settings = {
        "prompts_file": hashlib.sha256(data).hexdigest(),
        "model": generator.checkpoint.fingerprint(),
        "dtype": generator.dtype,
        "jit_compile": generator.jit_compile,
        "version": VERSION,
        **options,
    }
    with _locked(output) as (file, is_new):
        try:
            seed = _begin(file, output, settings, seed)
        except BaseException:
            if is_new:
                output.unlink(missing_ok=True)
            raise
        done = _resume(file, output, {record.index for record in records})
        missing = len(records) - len(done)
        try:
            if missing:
                parts = _pools(records) if generator.replaces_rows else _batches(records)
                _run(generator, parts, seed, file, output, done)
        except KeyboardInterrupt as e:
            e.args = (f"{len(done)} of {len(records)} prompts are done; the same command continues {output}",)
            raise
        _put_in_order(file, output)
    return FileRun(len(records), missing, seed)


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, for JSON."""
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


# ------------------------------------------------------------ prompts


def _read(path: StrPath) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None


def _records(generator: TextGenerator, data: bytes, source: StrPath, options: dict[str, Any]) -> list[_Record]:
    """The lines of a prompts file as _Records; `options` are those of the whole run."""
    all_lines = enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"))
    lines = [(index, line) for index, line in all_lines if line.strip()]
    if not lines:
        raise ValueError(f'{source} is empty; one JSON object a line is needed, such as {{"prompt": "Emma"}}')
    records, stream, cut, n_ctx = [], 0, [], generator.params["n_ctx"]
    for index, line in lines:
        try:
            given, own = _parse(line)
            own = {name: value for of in (options, own) for name, value in of.items() if value is not None}
            prompt = generator.encode(given["prompt"] if "prompt" in given else given["prompt_ids"])
            request = generator.check([prompt], **_columns([own]))
            values = request.values
            own["max_new_tokens"] = min(values["max_new_tokens"].item(), max(1, n_ctx - len(prompt)))
            if own["max_new_tokens"] < values["max_new_tokens"]:
                cut.append(index + 1)
            n_samples = own["num_return_sequences"] = request.num_return_sequences
            if stream + n_samples - 1 > INT32_MAX:
                raise ValueError(f"its {n_samples} samples bring the file above {INT32_MAX + 1}, the most allowed")
        except ValueError as e:
            raise ValueError(f"{source}, line {index + 1}: {e}") from None
        records.append(_Record(index, given, prompt, own, stream, [request.greedy, *sorted(request.steps)]))
        stream += n_samples
    if cut:
        log.warning(
            "with their new tokens %d prompts exceed the context, first that of line %d; generation stops at its end, "
            "%d",
            len(cut), cut[0], n_ctx,
        )  # fmt: skip
    return records


def _columns(options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The options of several prompts as those of one call of generate. Options that are not per row must be equal."""
    names = {name for own in options for name in own}
    return {n: [own.get(n) for own in options] if n in PER_PROMPT else options[0][n] for n in names}


def _parse(line: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is copied to the output, options) of a line."""
    try:
        record = json.loads(line.decode(), parse_constant=_not_json, parse_float=_float, object_pairs_hook=_object)
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8: {e}") from None
    except RecursionError:
        raise ValueError("lists or objects are nested too deep") from None
    except json.JSONDecodeError as e:
        if not line.lstrip().startswith(b"{"):  # plain text, as a rule
            raise ValueError(f"not JSON; {_as_it_should_be(line.decode())}") from None
        raise ValueError(f"not JSON: {e}") from None
    if not isinstance(record, dict):
        wanted = _as_it_should_be(record if isinstance(record, str) else "Emma")
        raise ValueError(f"a JSON {type(record).__name__}; an object is needed: {wanted}")
    keys = (*PROMPT_KEYS, "id", *OPTIONS)
    unknown = set(record) - set(keys)
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}; {explained(min(unknown), keys)}")
    if len(record.keys() & set(PROMPT_KEYS)) != 1:
        raise ValueError("either prompt or prompt_ids is needed")
    for key, kind in (("prompt", str), ("prompt_ids", list)):
        if key in record and not isinstance(record[key], kind):
            raise ValueError(f"{key}={record[key]!r}; a {'text' if kind is str else 'list of token ids'} is needed")
    record.get("prompt", "").encode()  # raises for half of a surrogate pair
    given = {key: value for key, value in record.items() if key not in OPTIONS}
    options = {key: value for key, value in record.items() if key in OPTIONS}
    if isinstance(options.get("logit_bias"), dict):  # whose keys are strings in JSON
        plain = {str(int(k)) if k.isdecimal() else k for k in options["logit_bias"]}
        if plain != set(options["logit_bias"]):
            raise ValueError(f"logit_bias={options['logit_bias']!r}; token ids without leading zeros are needed")
        options["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in options["logit_bias"].items()}
    return given, options


def _as_it_should_be(text: str) -> str:
    """What to say about a line that is a text alone."""
    text = text.strip()
    text = text if len(text) <= 40 else text[:40] + "…"
    return f"a line should look like {json.dumps({'prompt': text}, ensure_ascii=False)}"


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), -float("inf")):
        raise ValueError(f"{text} is too large for a number of 64 bits")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {max(keys, key=keys.count)!r} twice")
    return record


def _groups(records: list[_Record]) -> list[list[_Record]]:
    """The records by what the prompts of one call must share."""
    groups: dict[str, list[_Record]] = {}
    for record in records:
        shared = {name: value for name, value in record.options.items() if name not in PER_PROMPT}
        # grouped by sampling steps too, so that few graphs are built, one after another
        groups.setdefault(_json.dumps([record.steps, shared], sort_keys=True), []).append(record)
    return list(groups.values())


class _Part(NamedTuple):
    """Records that run together. They, and their order, depend on the records of the file alone."""

    records: list[_Record]
    is_pool: bool

    def missing(self, done: set[int]) -> list[_Record]:
        """Those that run, with `done` the indices of what has run; of a batch all, so that its graph is the same."""
        missing = [record for record in self.records if record.index not in done]
        return missing if self.is_pool or not missing else self.records


def _pools(records: list[_Record]) -> list[_Part]:
    """The records by the graph that they run in, in the order in which they begin. Where none would wait for a row, a
    batch does the same with one graph less.

    A graph has as many positions as its longest row, so rows of less than half of that have one of their own, unless
    all are so short that building it takes longer than it saves. Prompts of similar length are read together.
    """

    def length(record: _Record) -> int:
        return len(record.prompt) + record.options["max_new_tokens"]

    parts = []
    for group in _groups(records):
        group.sort(key=length, reverse=True)
        while group:
            longest = length(group[0])
            n = sum(2 * length(record) > longest or longest <= SHORT for record in group)
            pool, group = group[:n], group[n:]
            pool.sort(key=lambda r: (len(r.prompt).bit_length(), r.options["max_new_tokens"]), reverse=True)
            parts.append(_Part(pool, is_pool=n * pool[0].n_samples > MAX_BATCH))
    return parts


def _batches(records: list[_Record]) -> list[_Part]:
    """The batches in the order they run, each for one call of generate.

    A batch runs as many steps, in a graph of as many positions, as its longest row needs, so records of similar
    length go together.
    """
    batches = []
    for group in _groups(records):
        group.sort(key=lambda r: (r.options["max_new_tokens"], len(r.prompt)), reverse=True)
        size = max(1, MAX_BATCH // group[0].n_samples)
        batches += [_Part(group[begin : begin + size], is_pool=False) for begin in range(0, len(group), size)]
    return batches


# ------------------------------------------------------------ the run


def _run(
    generator: TextGenerator, parts: list[_Part], seed: int, file: io.FileIO, output: Path, done: set[int]
) -> None:
    """Appends the lines of the records whose index is not in `done`, and adds it."""
    total = sum(len(part.records) for part in parts)
    missing = [part.missing(done) for part in parts]
    with tqdm(desc=output.name, total=sum(map(_max_tokens, missing)), unit=" tokens", disable=None) as progress:
        run = _Run(generator, seed, file, done, total, progress)
        progress.set_postfix_str("building the graph")
        for part, records in zip(parts, missing):
            if records and part.is_pool:
                run.pool(part.records, {record.index for record in records})
            elif records:
                run.batch(records)
    if run.error:
        raise run.error


def _max_tokens(records: Iterable[_Record]) -> int:
    return sum(record.n_samples * record.options["max_new_tokens"] for record in records)


@dataclasses.dataclass
class _Run:
    """Where the lines go, and the bar."""

    generator: TextGenerator
    seed: int
    file: io.FileIO
    done: set[int]
    total: int  # records
    progress: Any
    error: InvalidDistributionError | None = None  # the first; the other records continue
    has_begun: bool = False  # a token has come

    def show_done(self) -> None:
        self.progress.set_postfix_str(f"{len(self.done)} of {self.total} prompts")

    def on_token(self, *_: object) -> None:
        if not self.has_begun:
            self.has_begun = True
            self.progress.unpause()  # what is left is estimated from here on: a graph takes seconds
            self.show_done()
        self.progress.update()

    def options(self, records: list[_Record]) -> dict[str, Any]:
        """Of one call of the generator."""
        return _columns([{"seed": self.seed, **record.options, "stream": record.stream} for record in records])

    def batch(self, batch: list[_Record]) -> None:
        """Runs records in one call, and writes the lines of all."""
        begin = self.progress.n
        # on a cluster neither tokens nor Ctrl-C are seen before the batch ends
        streamer = None if self.generator.mesh.cluster else self.on_token
        try:
            samples: Sequence[Sample | None] = self.generator.generate(
                [record.prompt for record in batch], streamer=streamer, **self.options(batch)
            )
        except Interrupted as e:
            _write(self.file, batch, e.samples, self.done)
            raise
        except InvalidDistributionError as e:
            self.note(e, batch, e.sample or 0)
            samples = e.samples
        _write(self.file, batch, samples, self.done)
        tokens = sum(len(sample.tokens) for sample in samples if sample)
        self.progress.total += tokens - _max_tokens(batch)
        self.progress.update(begin + tokens - self.progress.n)
        self.show_done()

    def pool(self, pool: list[_Record], missing: set[int]) -> None:
        """Runs those records of a pool whose index is in `missing`, and writes each one's line as it ends."""
        wanted = [i for i, record in enumerate(pool) if record.index in missing]
        samples: dict[int, dict[int, Sample]] = collections.defaultdict(dict)  # of records that lack some yet
        errors = {}
        for ended in self.generator.generate_each(
            [record.prompt for record in pool], wanted, streamer=self.on_token, **self.options(pool)
        ):
            whole = []
            for index, sample in ended:
                i, number = divmod(index, pool[0].n_samples)
                if isinstance(sample, InvalidDistributionError):
                    errors[index] = sample
                    continue
                samples[i][number] = sample
                if len(samples[i]) == pool[i].n_samples:
                    whole.append(i)
            records = [pool[i] for i in whole]
            found = [sample for i in whole for _, sample in sorted(samples.pop(i).items())]
            _write(self.file, records, found, self.done)
            self.progress.total += sum(len(sample.tokens) for sample in found) - _max_tokens(records)
            self.show_done()
        if errors:
            index, error = min(errors.items())
            self.note(error, pool, index)

    def note(self, error: InvalidDistributionError, records: list[_Record], index: int) -> None:
        """Keeps the run's first error; index: of the sample among those of the records."""
        row, sample = divmod(index, records[0].n_samples)
        where = f"the prompt of line {records[row].index + 1}: sample {sample}, step {error.step}"
        self.error = self.error or InvalidDistributionError(f"{where}: {error.reason}")


def _write(file: io.FileIO, batch: list[_Record], samples: Sequence[Sample | None], done: set[int]) -> None:
    """Appends the lines of a batch that have all their samples and are not in `done` yet."""
    lines = []
    for i, record in enumerate(batch):
        own = [s for s in samples[i * record.n_samples : (i + 1) * record.n_samples] if s is not None]
        if record.index not in done and len(own) == record.n_samples:
            line = {"index": record.index, **record.given, "samples": [sample.as_dict() for sample in own]}
            lines.append(_json.dumps(line).encode() + b"\n")
            done.add(record.index)
    _append(file, b"".join(lines))


# --------------------------------------------------------- the output


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[tuple[io.FileIO, bool]]:
    """(the file, open for reading and appending and locked against other processes; whether it is new)."""
    import fcntl  # Windows has none

    while True:
        try:
            was_there = path.exists()
            file = open(path, "a+b", buffering=0)
        except OSError as e:
            raise ValueError(f"{path} cannot be written: {e.strerror}") from None
        with file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{path} is not a regular file; one is needed, so that a run can continue it")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"{path} is being written by another process") from None
            # the last owner of the lock may just have replaced the file
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file, not was_there
                return


def _begin(file: io.FileIO, output: Path, settings: dict[str, Any], seed: int | None) -> int:
    """Begins an empty output, or checks that another was begun with the same settings. Returns the seed."""
    sidecar = output.with_name(output.name + SIDECAR)
    try:
        stored = read_json(sidecar) if sidecar.exists() else {}
    except OSError as e:  # too long a name, where the output's is not
        raise ValueError(f"{sidecar} cannot be written: {e.strerror}") from None
    settings = {name: value for name, value in settings.items() if value is not None}
    settings = json.loads(_json.dumps({**settings, "seed": stored.get("seed") if seed is None else seed}))
    if stored == settings:
        return settings["seed"]
    if os.fstat(file.fileno()).st_size:
        if not stored:
            raise ValueError(f"{output} exists, but {sidecar.name} is not beside it; give a new output")
        differing = [
            f"another {name}" if name in HASHED else f"{name}={stored.get(name)!r} (now {settings.get(name)!r})"
            for name in {**stored, **settings} if stored.get(name) != settings.get(name)
        ]  # fmt: skip
        raise ValueError(f"{output} was begun with {', '.join(differing)}; give the same, or remove it to start over")
    settings["seed"] = secrets.randbits(32) if seed is None else seed
    # on disk before the first line is
    _replace(sidecar, [_json.dumps(settings, indent=1).encode() + b"\n"])
    return settings["seed"]


def _resume(file: io.FileIO, output: Path, indices: set[int]) -> set[int]:
    """Those of the prompts' indices whose lines are there. Truncates the file after them, where a killed run left part
    of a line."""
    done: set[int] = set()
    size = 0
    for number, (index, _, end) in enumerate(_lines(file), 1):
        if index is None or index in done or index not in indices:
            problem = "the index of an earlier line" if index in done else "no index of a prompt"
            raise ValueError(
                f"{output}, line {number}: {problem}; the file was changed: restore it, or remove it to start over"
            )
        done.add(index)
        size = end
    file.truncate(size)
    return done


def _lines(file: io.FileIO) -> Iterator[tuple[int | None, int, int]]:
    """(index of its prompt, begin, end) of each whole line up to the first damaged one; None for a missing index."""
    begin = 0
    with open(file.fileno(), "rb", closefd=False) as reader:
        reader.seek(0)
        for line in reader:
            # A killed process leaves a line without its end; a power failure leaves zeros in place of unwritten blocks.
            if not line.endswith(b"\n") or b"\0" in line:
                return
            try:
                index = json.loads(line)["index"]
            except (ValueError, LookupError, TypeError, RecursionError):
                index = None
            yield index if type(index) is int else None, begin, begin + len(line)
            begin += len(line)


def _append(file: io.FileIO, data: bytes) -> None:
    """Appends, and returns once the data is on disk."""
    with _naming(file.name):
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())


@contextlib.contextmanager
def _naming(path: StrPath) -> Iterator[None]:
    """Adds the file's name to errors of writing, which have none."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} cannot be written: {e.strerror}; finished lines are kept") from None


def _put_in_order(file: io.FileIO, output: Path) -> None:
    """Replaces the output by one with the lines in the order of the prompts."""
    lines = list(_lines(file))
    if lines != sorted(lines):
        _replace(output, (os.pread(file.fileno(), end - begin, begin) for _, begin, end in sorted(lines)))


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file whole or not at all, and returns once it is on disk."""

    def write(partial: Path) -> None:
        with _naming(partial), open(partial, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())

    # always the same temporary name, so that the next run overwrites what a killed one left
    write_whole(path, write, hashlib.sha256(path.name.encode()).hexdigest()[:32])
    with _naming(path.parent):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
