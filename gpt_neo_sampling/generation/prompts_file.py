"""Prompts from a file, samples to a file, in batches: a run that may end at any moment and be started again.

The order in which records are run follows from the prompts and the options alone, and a batch is written when it
is finished. A run that is started again reads off the output which lines are there whole. A batch that is there in
part is run again as a whole: the same graph and the same streams give the same tokens. At the end the lines are put
in the order of the prompts, so the file does not depend on where runs ended.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import secrets
import stat
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

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
from gpt_neo_sampling.generation.options import PER_PROMPT, GenerationOptions
from gpt_neo_sampling.sampling.controls import INT32_MAX

# what a record, and a run, may ask for: functions cannot be remembered, and streams are given out here
OPTIONS = tuple(f.name for f in dataclasses.fields(GenerationOptions) if f.name not in ("logits_processors", "stream"))
SIDECAR = ".run"  # what the name of the file beside the output has more
HASHED = ("prompts_file", "model")  # what it holds as a hash
PROMPT_KEYS = ("prompt", "prompt_ids")

log = logging.getLogger(__name__)


class FileRun(typing.NamedTuple):
    """A run that is finished.

    Attributes:
      prompts: int, how many the file has.
      written: int, how many of their lines this call wrote; the others were there.
      seed: int, that of the prompts without one of their own.
    """

    prompts: int
    written: int
    seed: int


@dataclasses.dataclass(frozen=True)
class _Record:
    """A line of the prompts file, checked."""

    index: int  # of its line, from 0
    given: dict[str, Any]  # its "id", "prompt" and "prompt_ids", those that it has
    prompt: list[int]
    options: dict[str, Any]  # of generate's, none None; what depends on the prompt or on others, as a number
    stream: int  # of its first sample: how many samples the records before it have
    steps: list[Any]  # of sampling that it has, by name: what its graph is built of

    @property
    def samples(self) -> int:
        return self.options["num_return_sequences"]

    @property
    def most_tokens(self) -> int:
        return self.samples * self.options["max_new_tokens"]


def generate_file(
    generator: TextGenerator, prompts_file: StrPath, output: StrPath, *, seed: int | None = None, **options: Any
) -> FileRun:
    """Continues the prompts of a file, and writes what comes out to another.

    A prompt is a line of JSON, an object with "prompt" (a text) or "prompt_ids"
    (a list of token ids); if wanted "id", any value, which is handed through; and
    options of `TextGenerator.generate` by its names, which go before those given
    here (null: as if not given at all). A line of the output is an object of

      "index": the prompt's line, from 0
      "id", "prompt", "prompt_ids": as they were given, those that were
      "samples": a list of num_return_sequences objects, each a `Sample`

    in the order of the prompts when all are there, and until then in that of the
    batches (longest first, which makes a batch that does not fit into memory the
    first). Lines are on disk as soon as their batch is finished.

    Started again with the same arguments, after whatever end, it goes on where it
    stopped: no line is lost, doubled or half written, and the file becomes the
    same to the byte (with the same devices: see the README on other layouts). What
    it was begun with is remembered in a file beside it, `output` with ".run"
    at the end, which should be kept as long as the output is.

    Args:
      generator: a `TextGenerator`.
      prompts_file: a path; UTF-8, a prompt a line.
      output: a path: of a new file, an empty one, or one that an earlier run left.
      seed: int, of all prompts that have none of their own; a prompt's first
        stream of random numbers is the number of samples before it in the file,
        so it draws the same in whatever batch. None for the one that the
        run was begun with, or at its beginning for a fresh one.
      **options: as for `generate`.

    Returns:
      a FileRun.

    Raises:
      TypeError: for an option that there is not.
      ValueError: before anything is run, if a line or an option is not allowed
        (the message names file, line, what was given and what is allowed), or the
        output was begun with other ones or is no run's.
      OSError: if the output cannot be written, or is being written by another
        process.
      InvalidDistributionError, ClusterError, KeyboardInterrupt: as `generate`;
        what is finished is on disk.
    """
    seed, options = _plain(seed), _plain(options)
    unknown = options.keys() - set(OPTIONS)
    if unknown:
        raise TypeError(f"no option of a file's run: {', '.join(sorted(unknown))}; allowed: {', '.join(OPTIONS)}")
    options = {name: value for name, value in options.items() if value is not None}
    # before the file is looked at; how many new tokens fit is a matter of each line's prompt
    generator.check([[0]], **_columns([{"max_new_tokens": INT32_MAX, **options, "seed": seed}]))
    output = Path(output).resolve()
    data = _read(prompts_file)
    if os.path.exists(output) and output.samefile(prompts_file):
        raise ValueError(f"{output} is the file of the prompts; give another output")
    records = _records(generator, data, prompts_file, options)
    batches = _batches(records)
    settings = {
        "prompts_file": hashlib.sha256(data).hexdigest(),
        "model": generator.checkpoint.fingerprint(),
        "dtype": generator.dtype,
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
        done = _resume(file, output, len(records))
        missing = len(records) - len(done)
        try:
            if missing:
                _run(generator, batches, seed, file, output, done)
        except KeyboardInterrupt:
            log.warning("stopped; %d of %d prompts are done, and the same command goes on with %s",
                        len(done), len(records), output)  # fmt: skip
            raise
        _put_in_order(file, output)
    return FileRun(len(records), missing, seed)


def _plain(value: Any) -> Any:
    """Numbers of NumPy's as Python's, which JSON takes."""
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
    """The lines of a prompts file as _Records; `options` are the run's."""
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f'{source} is empty; a JSON object a line is needed, as {{"prompt": "Emma"}}')
    records, stream, cut, n_ctx = [], 0, [], generator.params["n_ctx"]
    for index, line in enumerate(lines):
        try:
            given, own = _parse(line)
            own = {name: value for name, value in {**options, **own}.items() if value is not None}
            prompt = generator.encode(given["prompt"] if "prompt" in given else given["prompt_ids"])
            request = generator.check([prompt], **_columns([own]))
            values = request.values
            own["max_new_tokens"] = min(values["max_new_tokens"].item(), max(1, n_ctx - len(prompt)))
            if own["max_new_tokens"] < values["max_new_tokens"]:
                cut.append(index + 1)
            samples = own["num_return_sequences"] = request.num_return_sequences
            if stream + samples - 1 > INT32_MAX:
                raise ValueError(f"with its {samples} samples the file has more than {INT32_MAX + 1}, the most allowed")
        except ValueError as e:
            raise ValueError(f"{source}, line {index + 1}: {e}") from None
        records.append(_Record(index, given, prompt, own, stream, [request.greedy, *sorted(request.steps)]))
        stream += records[-1].samples
    if cut:
        log.warning(
            "with their new tokens %d prompts pass the context's end, line %d's first; generation stops there, at %d",
            len(cut), cut[0], n_ctx,
        )  # fmt: skip
    return records


def _columns(options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The options of several prompts as those of one call of generate. What is no row option is the same in all."""
    names = {name for own in options for name in own}
    return {n: [own.get(n) for own in options] if n in PER_PROMPT else options[0][n] for n in names}


def _parse(line: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is handed through, options) of a line, its options as they stand there."""
    try:
        record = json.loads(line.decode(), parse_constant=_not_json, parse_float=_float, object_pairs_hook=_object)
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8: {e}") from None
    except RecursionError:
        raise ValueError("lists or objects within each other too deep") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}; an object is needed")
    unknown = set(record) - {*PROMPT_KEYS, "id", *OPTIONS}
    if unknown:
        raise ValueError(f"{min(unknown)!r} is none of {', '.join((*PROMPT_KEYS, 'id', *OPTIONS))}")
    if len(record.keys() & set(PROMPT_KEYS)) != 1:
        raise ValueError("one of prompt and prompt_ids is needed")
    for key, kind in (("prompt", str), ("prompt_ids", list)):
        if key in record and not isinstance(record[key], kind):
            raise ValueError(f"{key}={record[key]!r}; a {'text' if kind is str else 'list of token ids'} is needed")
    record.get("prompt", "").encode()  # raises for half of a surrogate pair
    given = {key: value for key, value in record.items() if key not in OPTIONS}
    options = {key: value for key, value in record.items() if key in OPTIONS}
    if isinstance(options.get("logit_bias"), dict):  # JSON has no other keys than texts
        plain = {str(int(k)) if k.isdecimal() else k for k in options["logit_bias"]}
        if plain != set(options["logit_bias"]):
            raise ValueError(f"logit_bias={options['logit_bias']!r}; token ids are written without zeros before them")
        options["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in options["logit_bias"].items()}
    return given, options


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), -float("inf")):
        raise ValueError(f"{text} is larger than any number of 64 bits")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"an object with a key twice: {', '.join(key for key, _ in pairs)}")
    return record


def _batches(records: list[_Record]) -> list[list[_Record]]:
    """Lists of records, each a call of generate, in the order they are run in: a function of the records alone.

    Rows of a batch take as many steps, and graphs as many positions, as the longest needs, so likes stand together.
    """
    groups: dict[str, list[_Record]] = {}
    for record in records:
        shared = {name: value for name, value in record.options.items() if name not in PER_PROMPT}
        # and the same steps, so that few graphs are built, and one after the other
        groups.setdefault(_json.dumps([record.steps, shared], sort_keys=True), []).append(record)
    batches = []
    for group in groups.values():
        group.sort(key=lambda r: (r.options["max_new_tokens"], len(r.prompt)), reverse=True)
        size = max(1, MAX_BATCH // group[0].samples)
        batches += [group[begin : begin + size] for begin in range(0, len(group), size)]
    return batches


# ------------------------------------------------------------ the run


def _run(
    generator: TextGenerator, batches: list[list[_Record]], seed: int, file: io.FileIO, output: Path, done: set[int]
) -> None:
    """Appends the lines of the records that are not in the set `done`, and adds these to it."""
    total = sum(map(len, batches))
    batches = [batch for batch in batches if any(record.index not in done for record in batch)]
    most_tokens = [sum(record.most_tokens for record in batch) for batch in batches]
    fault = None
    with tqdm(desc=output.name, total=sum(most_tokens), unit=" tokens", disable=None) as progress:

        def on_token(*args: object) -> None:
            progress.update()

        def show_done() -> None:
            progress.set_postfix_str(f"{len(done)} of {total} prompts")

        show_done()
        for batch, most in zip(batches, most_tokens):
            begin = progress.n
            options = _columns([{"seed": seed, **record.options, "stream": record.stream} for record in batch])
            # on a cluster tokens are not seen before the end of the batch, nor is Ctrl-C
            streamer = None if generator.mesh.cluster else on_token
            try:
                samples: Sequence[Sample | None] = generator.generate(
                    [record.prompt for record in batch], streamer=streamer, **options
                )
            except Interrupted as e:
                _write(file, batch, e.samples, done)
                raise
            except InvalidDistributionError as e:  # the others go on
                row, sample = divmod(e.sample or 0, batch[0].samples)
                where = f"the prompt of line {batch[row].index + 1}: sample {sample}, step {e.step}"
                fault = fault or InvalidDistributionError(f"{where}: {e.reason}")
                samples = e.samples
            _write(file, batch, samples, done)
            tokens = sum(len(sample.tokens) for sample in samples if sample)
            progress.total += tokens - most
            progress.update(begin + tokens - progress.n)
            show_done()
    if fault:
        raise fault


def _write(file: io.FileIO, batch: list[_Record], samples: Sequence[Sample | None], done: set[int]) -> None:
    """Appends lines of a batch to the file, those whose samples are all there and that are not in `done` yet."""
    lines = []
    for i, record in enumerate(batch):
        own = [s for s in samples[i * record.samples : (i + 1) * record.samples] if s is not None]
        if record.index not in done and len(own) == record.samples:
            line = {"index": record.index, **record.given, "samples": [sample.as_dict() for sample in own]}
            lines.append(_json.dumps(line).encode() + b"\n")
            done.add(record.index)
    _append(file, b"".join(lines))


# --------------------------------------------------------- the output


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[tuple[io.FileIO, bool]]:
    """The file for reading and appending, which no other process has; made if it is not there, and whether it was."""
    import fcntl  # Windows has none

    while True:
        try:
            was_there = path.exists()
            file = open(path, "a+b", buffering=0)
        except OSError as e:
            raise ValueError(f"{path} cannot be written: {e.strerror}") from None
        with file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{path} is no regular file; only one can be gone on with")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"{path} is being written by another process") from None
            # a process that had the lock may just have put another file in this one's place
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file, not was_there
                return


def _begin(file: io.FileIO, output: Path, settings: dict[str, Any], seed: int | None) -> int:
    """Begins an output that is empty; checks one that is not against what it was begun with. Returns the seed."""
    sidecar = output.with_name(output.name + SIDECAR)
    try:
        found = read_json(sidecar) if sidecar.exists() else {}
    except OSError as e:  # its name is longer than the output's
        raise ValueError(f"{sidecar} cannot be written: {e.strerror}") from None
    settings = {name: value for name, value in settings.items() if value is not None}
    settings = json.loads(_json.dumps({**settings, "seed": found.get("seed") if seed is None else seed}))
    if found == settings:
        return settings["seed"]
    if os.fstat(file.fileno()).st_size:
        if not found:
            raise ValueError(f"{output} is there already, without {sidecar.name} beside it; give an output that is new")
        differing = [
            f"another {name}" if name in HASHED else f"{name}={found.get(name)!r} (now {settings.get(name)!r})"
            for name in {**found, **settings} if found.get(name) != settings.get(name)
        ]  # fmt: skip
        raise ValueError(f"{output} was begun with {', '.join(differing)}; give the same, or remove it to begin anew")
    settings["seed"] = secrets.randbits(32) if seed is None else seed
    # on disk before the first line is
    _replace(sidecar, [_json.dumps(settings, indent=1).encode() + b"\n"])
    return settings["seed"]


def _resume(file: io.FileIO, output: Path, total: int) -> set[int]:
    """The set of records whose lines are there; cuts off what a death left unfinished behind them."""
    done: set[int] = set()
    whole = 0
    for number, (index, _, end) in enumerate(_lines(file), 1):
        if index is None or index in done or index not in range(total):
            raise ValueError(
                f"{output}, line {number}: {'twice the same' if index in done else 'no'} index of a prompt, 0 to "
                f"{total - 1}; the file was changed: put it back as it was, or remove it to begin anew"
            )
        done.add(index)
        whole = end
    file.truncate(whole)
    return done


def _lines(file: io.FileIO) -> Iterator[tuple[int | None, int, int]]:
    """(index of its prompt, begin, end) of each line that stands whole; None for a line that has no such index."""
    begin = 0
    with open(file.fileno(), "rb", closefd=False) as reader:
        reader.seek(0)
        for line in reader:
            # Killed: a line without its end. Without power: blocks of zeros, which were never written.
            if not line.endswith(b"\n") or b"\0" in line:
                return
            try:
                index = json.loads(line)["index"]
            except (ValueError, LookupError, TypeError, RecursionError):
                index = None
            yield index if type(index) is int else None, begin, begin + len(line)
            begin += len(line)


def _append(file: io.FileIO, data: bytes) -> None:
    """Writes to the disk itself."""
    with _named(file.name):
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())


@contextlib.contextmanager
def _named(path: StrPath) -> Iterator[None]:
    """What goes wrong within, with the file's name: the system's errors of writing have none."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} cannot be written: {e.strerror}; what is finished is kept") from None


def _put_in_order(file: io.FileIO, output: Path) -> None:
    """Sorts the lines by their prompts, in a file that takes the output's place."""
    lines = list(_lines(file))
    if lines != sorted(lines):
        _replace(output, (os.pread(file.fileno(), end - begin, begin) for _, begin, end in sorted(lines)))


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file whole or not at all, to the disk itself."""

    def write(partial: Path) -> None:
        with _named(partial), open(partial, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())

    # one name for one file, so that what a death leaves is written over
    write_whole(path, write, hashlib.sha256(path.name.encode()).hexdigest()[:32])
    with _named(path.parent):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
