"""The tokenizer of a model: tokenizer.json, or GPT-2's vocab.json and merges.txt."""

import contextlib
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpt_neo_sampling._types import Tokenizer
from gpt_neo_sampling.checkpoint.base import LONGEST_TEXT, Checkpoint, CheckpointError, check_file, read_json

_ADDED_TOKENS = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
# Everything that may belong to a tokenizer, for what copies a model.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", *_ADDED_TOKENS)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a checkpoint.

    tokenizer.json holds all of it. vocab.json and merges.txt are byte-level BPE's
    (Radford et al. 2019); tokens that must not be cut, such as <|endoftext|>,
    are then those of added_tokens.json, special_tokens_map.json and
    tokenizer_config.json, where these are there.

    Args:
      checkpoint: a `Checkpoint`.

    Returns:
      a tokenizers.Tokenizer, or None if the model comes without one.

    Raises:
      CheckpointError: if a file cannot be read, the tokenizer does not fit the
        model, or the package tokenizers is not installed.
    """
    single, pair = checkpoint.tokenizer_file, checkpoint.tokenizer_files
    file = single or (pair and pair[0])
    if file is None:
        return None
    try:
        import tokenizers
    except ImportError:
        raise CheckpointError(f"{file} needs the package tokenizers: pip install 'gpt_neo_sampling[cli]'") from None
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
    # which a tokenizer.json may ask for, and which would cut prompts, or add to them, without a word
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size, n_vocab = tokenizer.get_vocab_size(), checkpoint.params["n_vocab"]
    if size > n_vocab:
        raise CheckpointError(f"{file} has {size} tokens; the model's vocabulary has {n_vocab}")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= n_vocab:
        raise CheckpointError(f"{file} has the token {largest}; the model's vocabulary ends at {n_vocab - 1}")
    return tokenizer


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text; a ValueError where the tokenizer cannot."""
    with _one_line_errors(f"encode {text[:60]!r}"):
        return tokenizer.encode(text).ids


def decoded(tokenizer: Tokenizer, ids: Iterable[int], **options: bool) -> str:
    """The text of ids; a ValueError where the tokenizer cannot."""
    ids = list(ids)
    with _one_line_errors(f"decode {ids[:8]}"):
        return tokenizer.decode(ids, **options)


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
    for id_, text, is_special in _added_tokens(vocab_file.parent, config):
        token = tokenizers.AddedToken(text, special=is_special, normalized=False)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
        if id_ is not None and tokenizer.token_to_id(text) != id_:
            raise CheckpointError(
                f"{vocab_file.parent}: {text} is to be token {id_}, but is token {tokenizer.token_to_id(text)}"
            )
    return tokenizer


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int | None, str, bool]]:
    """(id or None, text, whether decoding leaves it out) of each token that is added, by id."""
    tokens: dict[str, tuple[int | None, bool]] = {}
    for id_, entry in (config.get("added_tokens_decoder") or {}).items():
        tokens[entry["content"]] = (int(id_), bool(entry.get("special")))
    added_file, special_file = (folder / name for name in _ADDED_TOKENS[:2])
    for text, id_ in (read_json(added_file) if added_file.is_file() else {}).items():
        tokens.setdefault(text, (id_, False))
    for entries in (config, read_json(special_file) if special_file.is_file() else {}):
        for key, entry in entries.items():
            if key.endswith("_token") or key == "additional_special_tokens":
                for token in entry if isinstance(entry, list) else [entry]:
                    content = token.get("content") if isinstance(token, dict) else token
                    if isinstance(content, str):
                        tokens[content] = (tokens.get(content, (None,))[0], True)
    by_id = sorted(tokens.items(), key=lambda token: (token[1][0] is None, token[1][0] or 0))
    return [(id_, text, is_special) for text, (id_, is_special) in by_id]
