"""A model's tokenizer: tokenizer.json, or GPT-2's vocab.json and merges.txt."""

import contextlib
import functools
import importlib.util
import json
import logging
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt_neo_sampling._install import install_line
from gpt_neo_sampling._types import Tokenizer
from gpt_neo_sampling.checkpoint.base import LONGEST_TEXT, Checkpoint, CheckpointError, check_file, one_line, read_json

log = logging.getLogger(__name__)

_ADDED_TOKENS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
# All files that may belong to a tokenizer, for copying a model
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", *_ADDED_TOKENS)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a checkpoint.

    tokenizer.json describes it fully; anything that only the files beside it say,
    and that would change ids, is logged. vocab.json and merges.txt describe a
    byte-level BPE (Radford et al. 2019); tokens that must not be split, such as
    <|endoftext|>, are then read from added_tokens.json, special_tokens_map.json and
    tokenizer_config.json, if these exist.

    Args:
      checkpoint: a `Checkpoint`.

    Returns:
      a tokenizers.Tokenizer, or None if the model comes without one. It may have more
      tokens than the model; prompts cannot use those.

    Raises:
      CheckpointError: if a file cannot be read, or the package tokenizers is not
        installed.
    """
    single, pair = checkpoint.tokenizer_file, checkpoint.tokenizer_files
    if (file := tokenizer_source(checkpoint)) is None:
        return None
    try:
        import tokenizers
    except ImportError:
        raise CheckpointError(_missing_package(file)) from None
    try:
        if single is None and pair is not None:
            tokenizer = _byte_level_bpe(tokenizers, *pair)
        else:
            check_file(file, LONGEST_TEXT)
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except (CheckpointError, KeyboardInterrupt):
        raise
    except BaseException as e:  # the library raises bare Exception, and BaseException where its Rust panics
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {e}") from None
    if single is not None:
        _note_beside(tokenizer, single)
    # a tokenizer.json may ask for these, which would silently shorten or pad prompts
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_source(checkpoint: Checkpoint) -> Path | None:
    """The file that a model's tokenizer is read from, or the first of two; None for a model without one."""
    return checkpoint.tokenizer_file or (checkpoint.tokenizer_files and checkpoint.tokenizer_files[0])


def can_load_tokenizer() -> bool:
    """Whether the package that reads tokenizers is installed."""
    return importlib.util.find_spec("tokenizers") is not None


def why_no_tokenizer(checkpoint: Checkpoint) -> str:
    """What is missing for a model's text, where there is no tokenizer for it."""
    if (file := tokenizer_source(checkpoint)) is not None:
        return f"{file} was not loaded" if can_load_tokenizer() else _missing_package(file)
    name = checkpoint.tokenizer_name
    wanted = f" (its dataset config names {name}, which is not downloaded)" if name else ""
    return f"{checkpoint.folder} has no tokenizer.json, nor vocab.json and merges.txt{wanted}"


def _missing_package(file: Path) -> str:
    return f"{file} needs the package tokenizers ({install_line('tokenizers')})"


def _note_beside(tokenizer: Tokenizer, file: Path) -> None:
    """Logs what only the files beside a tokenizer.json say, where it would give transformers other ids."""
    config_file = file.parent / "tokenizer_config.json"
    try:
        config = read_json(config_file) if config_file.is_file() else {}
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        ignored = [f"token {text}" for _, text, _, _ in _added_tokens(file.parent, config) if text not in known]
    except (AttributeError, TypeError, ValueError) as e:
        log.warning("%s: the files beside it cannot be read and are ignored: %s", file, one_line(e))
        return
    ignored += ["split_special_tokens"] if config.get("split_special_tokens") else []
    if config.get("add_prefix_space"):
        splitting = json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])
        ignored += [] if '"add_prefix_space": true' in splitting else ["add_prefix_space"]
    if ignored:
        log.warning("%s: settings of the files beside it that would change ids are ignored: %s",
                    file, one_line(", ".join(ignored)))  # fmt: skip


def encoded(tokenizer: Tokenizer, text: str, is_begin: bool = True) -> list[int]:
    """The ids of a text, with `is_begin` after those that the tokenizer puts first; a ValueError if it fails."""
    with _one_line_errors(f"encode {text[:60]!r}"):
        return tokenizer.encode(text, add_special_tokens=is_begin).ids


def decoded(tokenizer: Tokenizer, ids: Iterable[int], **options: bool) -> str:
    """The text of ids; a ValueError if the tokenizer fails."""
    ids = list(ids)
    with _one_line_errors(f"decode {ids[:8]}"):
        return tokenizer.decode(ids, **options)


@functools.lru_cache(maxsize=8)
def tokens_with(tokenizer: Tokenizer, texts: tuple[str, ...], n_vocab: int) -> list[int]:
    """The ids of all tokens that hold one of the texts, a list; tokens that are only part of a character hold none."""
    with _one_line_errors("decode its tokens"):
        each = tokenizer.decode_batch([[i] for i in range(n_vocab)], skip_special_tokens=False)
    return [i for i, token in enumerate(each) if any(text in token for text in texts)]


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # see load_tokenizer
        raise ValueError(f"the model's tokenizer cannot {what}: {e}") from None


def _byte_level_bpe(tokenizers: types.ModuleType, vocab_file: Path, merges_file: Path) -> Tokenizer:
    for file in (vocab_file, merges_file):
        check_file(file, LONGEST_TEXT)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab_file), str(merges_file)))
    config_file = vocab_file.parent / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    with_space = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=with_space)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for id_, text, is_special, flags in _added_tokens(vocab_file.parent, config):
        token = tokenizers.AddedToken(text, special=is_special, **flags)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
        if id_ is not None and tokenizer.token_to_id(text) != id_:
            raise CheckpointError(
                f"{vocab_file.parent}: {text} should be token {id_}, but is token {tokenizer.token_to_id(text)}"
            )
    if config.get("add_bos_token"):
        bos = _content(config.get("bos_token")) or "<|endoftext|>"  # GPT-2's
        if (id_ := tokenizer.token_to_id(bos)) is None:
            raise CheckpointError(f"{config_file}: add_bos_token is true, but the vocabulary has no {bos!r}")
        template = tokenizers.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, id_)]
        )
        tokenizer.post_processor = template
    ignored = [key for key in _NOT_HONOURED if config.get(key)]
    if ignored:
        log.warning("%s: settings that would change ids are ignored: %s", config_file, ", ".join(ignored))
    return tokenizer


# further keys of a tokenizer_config.json that change the ids of a text
_NOT_HONOURED = ("add_eos_token", "do_lower_case", "split_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def _content(entry: Any) -> str | None:
    """The text of a token in a config, where it is a string or an object."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int | None, str, bool, dict[str, bool]]]:
    """(id or None, text, whether decoding skips it, flags of AddedToken) of each added token, sorted by id."""
    ids: dict[str, int | None] = {}
    special: set[str] = set()
    flags: dict[str, dict[str, bool]] = {}

    def add(entry: Any, id_: int | None = None, is_special: bool = False) -> None:
        if (text := _content(entry)) is None:
            return
        ids[text] = id_ if ids.get(text) is None else ids[text]
        if is_special:
            special.add(text)
        if isinstance(entry, dict):
            flags.setdefault(text, {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry})

    for id_, entry in (config.get("added_tokens_decoder") or {}).items():
        add(entry, int(id_), bool(entry.get("special")))
    added_file, special_file = (folder / name for name in _ADDED_TOKENS[:2])
    for text, id_ in (read_json(added_file) if added_file.is_file() else {}).items():
        add(text, id_)
    for entries in (config, read_json(special_file) if special_file.is_file() else {}):
        for key, entry in entries.items():
            if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
                named = isinstance(entry, dict) and "content" not in entry  # {name: token}
                for token in entry.values() if named else entry if isinstance(entry, list) else [entry]:
                    add(token, is_special=True)
    by_id = sorted(ids, key=lambda text: (ids[text] is None, ids[text] or 0))
    return [(ids[t], t, t in special, {"normalized": False, **flags.get(t, {})}) for t in by_id]
