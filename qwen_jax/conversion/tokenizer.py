"""Tokenizer files of Hugging Face's layout from a `.tiktoken` file, and back, with the same ids.

tiktoken joins whichever neighbours make the token of lowest rank; `tokenizers` follows an explicit list of merges. In
a vocabulary that byte-pair encoding produced, each token has one last merge: the two parts that are left when its
bytes are encoded with lower ranks only. These merges in the order of rank give the same ids for every text.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from qwen_jax import files
from qwen_jax.conversion.external import listing
from qwen_jax.conversion.huggingface import read_json
from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.tokenizer import Tokenizer, write_ranks

RANKS_FILE = "qwen.tiktoken"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

CHAT_TEMPLATE = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for turn in messages -%}"
    "{{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- endif -%}"
)


def _byte_characters() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte (that of GPT-2).

    Visible Latin-1 characters stand for themselves; the others, in order, for U+0100 and on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 0x100 + hidden.index(byte)) for byte in range(256)]


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def _written(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def derive_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The last merge of every token of more than one byte, in the order of rank.

    Raises:
      ValueError: byte-pair encoding with these ranks never makes some token, so no merge can; they are named.
    """
    merges, unreachable = [], []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _encode_below(token, rank, ranks)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            unreachable.append(f"{token!r} (rank {rank}, stays {' + '.join(map(repr, parts))})")
    if unreachable:
        raise ValueError(
            f"{len(unreachable)} tokens cannot be written as merges, because no sequence of merges of lower rank makes "
            f"them: {listing(unreachable)}. Build the vocabulary by byte-pair encoding"
        )
    return merges


def _encode_below(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """`token` encoded with the ranks below `limit`: the lowest first, the leftmost of equals."""
    parts = [token[i : i + 1] for i in range(len(token))]
    joined = [ranks.get(token[i : i + 2], limit) for i in range(len(token) - 1)]
    while joined and (lowest := min(joined)) < limit:
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del joined[i]
        for j in (i - 1, i):
            if 0 <= j < len(joined):
                joined[j] = ranks.get(parts[j] + parts[j + 1], limit)
    return parts


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The content of tokenizer.json: NFC, Qwen's pattern, byte-level BPE, control tokens.

    Raises:
      ValueError: see `derive_merges`.
    """
    ranks = tokenizer.mergeable_ranks
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in tokenizer.control_tokens.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": Tokenizer.PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {_written(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])},
            # The older of the two notations: versions of `tokenizers` from before 0.20 read no other.
            "merges": [f"{_written(left)} {_written(right)}" for left, right in derive_merges(ranks)],
        },
    }


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict:
    """The content of tokenizer_config.json: a class of transformers itself, and the ChatML template."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "unk_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {str(i): {"content": name, **flags} for name, i in tokenizer.control_tokens.items()},
        "chat_template": CHAT_TEMPLATE,
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and a copy of the `.tiktoken` file into an existing folder.

    Raises:
      ValueError: see `derive_merges`.
    """
    content = tokenizer_json(tokenizer)
    # Without line breaks: the file has 300,000 entries.
    files.write_json(folder / TOKENIZER_FILE, content, indent=None)
    files.write_json(folder / TOKENIZER_CONFIG_FILE, tokenizer_config(tokenizer, context_length))
    shutil.copyfile(tokenizer.path, folder / RANKS_FILE)


def recover_ranks(folder: str | os.PathLike, scratch: str | os.PathLike) -> Path | None:
    """The `.tiktoken` file of a folder in an external format.

    Args:
      folder: holds qwen.tiktoken or tokenizer.json, or neither.
      scratch: existing folder into which the file is written if it has to be made from tokenizer.json.

    Returns:
      Its path, or None if the folder has no tokenizer.

    Raises:
      ValueError: tokenizer.json is not Qwen's tokenizer: the ids would differ.
    """
    folder = Path(folder)
    if (folder / RANKS_FILE).is_file():
        return folder / RANKS_FILE
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    ranks = ranks_of(path, read_json(path))
    written = Path(scratch) / RANKS_FILE
    write_ranks(ranks, written)
    named = {entry["content"]: entry["id"] for entry in read_json(path).get("added_tokens") or ()}
    for name, i in Tokenizer(written).control_tokens.items():
        # Later models of the family give other names to the ids after the first three, so only a clash is an error.
        if named.get(name, i) != i:
            raise ValueError(f"{path}: {name} has id {named[name]}, expected {i}: its control tokens are not Qwen's")
    return written


def ranks_of(path: Path, content: dict) -> dict[bytes, int]:
    """The ranks that the content of a tokenizer.json stands for; `path` is named in errors.

    Raises:
      ValueError: it is not Qwen's tokenizer: the ids would differ.
    """
    model = content.get("model") or {}
    advice = "pass the .tiktoken file of the model instead"
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{path}: the model is {model.get('type')!r}, expected byte-level BPE: {advice}")
    splits, normalizers = _strings(content.get("pre_tokenizer")), _strings(content.get("normalizer"))
    if Tokenizer.PATTERN not in splits or "NFC" not in normalizers:
        raise ValueError(f"{path}: text is not normalised and split as Qwen does it (NFC, its pattern): {advice}")
    control = {entry["content"] for entry in content.get("added_tokens") or ()}
    ranks = {}
    for written, rank in model["vocab"].items():
        if written in control:
            continue
        try:
            ranks[bytes(_BYTES[character] for character in written)] = rank
        except KeyError as error:
            raise ValueError(f"{path}: token {written!r} is not written in byte-level characters: {advice}") from error
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges") or ()]
    if merges != [(_written(left), _written(right)) for left, right in derive_merges(ranks)]:
        raise ValueError(f"{path}: its merges are not those of its ranks, so tiktoken would give other ids: {advice}")
    return ranks


def _strings(node) -> set[str]:
    """All strings in a nested JSON value."""
    if isinstance(node, str):
        return {node}
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return {text for child in children for text in _strings(child)}
