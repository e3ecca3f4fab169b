"""Tokenizer files in the layout of Hugging Face from a `.tiktoken` file, and back, with the same ids."""

import os
from pathlib import Path

from qwen_jax import files
from qwen_jax.conversion.huggingface import CONFIG_FILE, read_json
from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.merges import derive_merges
from qwen_jax.data.tokenizer import CONTROL_TOKENS, Tokenizer, check_ranks, write_ranks

RANKS_FILE = "qwen.tiktoken"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# The two files of the slow tokenizer class; only the name of the class says how it splits text.
VOCABULARY_FILE, MERGES_FILE, ADDED_FILE = "vocab.json", "merges.txt", "added_tokens.json"
TOKENIZER_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_ADVICE = "pass the .tiktoken file of the model instead"

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


# The same text for trl's assistant_only_loss; `generation` marks what carries loss: the assistant's content and its
# `<|im_end|>` (`loss_on='report'` of our tasks). The line end after it is an expression, because transformers removes
# one that follows a block. No folder gets this template: servers with plain Jinja refuse the tag.
TRAINING_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' -}}",
    "{{- '<|im_start|>' + turn['role'] + '\\n' -}}"
    "{%- if turn['role'] == 'assistant' -%}"
    "{% generation %}{{- turn['content'] + '<|im_end|>' -}}{% endgeneration %}"
    "{%- else -%}"
    "{{- turn['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\\n' -}}",
)


def _byte_characters() -> list[str]:
    """The printable character of each byte in byte-level vocabularies (the table of GPT-2).

    Visible Latin-1 characters stand for themselves; the others, in order, for U+0100 and on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 0x100 + hidden.index(byte)) for byte in range(256)]


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def _written(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def tokenizer_json(tokenizer: Tokenizer, rows: int | None = None, vision: bool = False) -> dict:
    """The content of tokenizer.json: NFC, Qwen's pattern, byte-level BPE, control tokens.

    Args:
      rows: number of vocabulary rows of the model; control tokens without a row are left out. None: all of them.
      vision: whether the 9 tokens of Qwen-VL for pictures, references and boxes are among them.

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
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in _control(tokenizer, rows, vision)],
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


def _control(tokenizer: Tokenizer, rows: int | None, vision: bool) -> list[tuple[str, int]]:
    every = {**tokenizer.control_tokens, **(tokenizer.vision_tokens if vision else {})}
    return [(name, i) for name, i in every.items() if rows is None or i < rows]


def tokenizer_config(tokenizer: Tokenizer, context_length: int, rows: int | None = None, vision: bool = False) -> dict:
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
        "added_tokens_decoder": {str(i): {"content": name, **flags} for name, i in _control(tokenizer, rows, vision)},
        "chat_template": CHAT_TEMPLATE,
    }


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, context_length: int, rows: int | None = None, vision: bool = False
) -> None:
    """Writes tokenizer.json, tokenizer_config.json and a copy of the `.tiktoken` file into an existing folder.

    Args:
      rows, vision: see `tokenizer_json`.

    Raises:
      ValueError: see `derive_merges`.
    """
    content = tokenizer_json(tokenizer, rows, vision)
    # Without line breaks: the file has 300,000 entries.
    files.write_json(folder / TOKENIZER_FILE, content, indent=None)
    files.write_json(folder / TOKENIZER_CONFIG_FILE, tokenizer_config(tokenizer, context_length, rows, vision))
    files.copy_file(tokenizer.path, folder / RANKS_FILE)


def recover_ranks(folder: str | os.PathLike, scratch: str | os.PathLike) -> Path | None:
    """The `.tiktoken` file of a folder in an external format.

    Args:
      folder: holds qwen.tiktoken, tokenizer.json, vocab.json with merges.txt, or none of them.
      scratch: existing folder for the file, if the source holds another one.

    Returns:
      Its path, or None if the folder has no tokenizer.

    Raises:
      ValueError: the tokenizer is not Qwen's, so ids would differ. The message names the file of `folder`.
    """
    folder = files.as_path(folder)
    if (folder / RANKS_FILE).is_file():
        return here(folder / RANKS_FILE, scratch)
    if (path := folder / TOKENIZER_FILE).is_file():
        content = read_json(path)
    elif (path := folder / VOCABULARY_FILE).is_file():
        content = _content_of_two_files(folder)
    else:
        return None
    ranks = ranks_of(path, content)
    named = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
    for i, name in enumerate(CONTROL_TOKENS, start=len(ranks)):
        # Later models of the family give other names to the ids after the first three, so only a clash is an error.
        if named.get(name, i) != i:
            raise ValueError(f"{path}: {name} has id {named[name]}, expected {i}: its control tokens are not Qwen's")
    written = Path(scratch) / RANKS_FILE
    write_ranks(ranks, written)
    return written


def here(ranks: Path, scratch: str | os.PathLike) -> Path:
    """A local path of a `.tiktoken` file: itself, or a copy in the existing folder `scratch`."""
    if not files.is_remote(ranks):
        return ranks
    files.copy_file(ranks, Path(scratch) / RANKS_FILE)
    return Path(scratch) / RANKS_FILE


def _content_of_two_files(folder: Path) -> dict:
    """The content of tokenizer.json for a folder with vocab.json and merges.txt."""
    merges = folder / MERGES_FILE
    if not merges.is_file():
        raise FileNotFoundError(f"{folder} has a {VOCABULARY_FILE} without {MERGES_FILE}: download it, or {_ADVICE}")
    settings = _optional(folder / TOKENIZER_CONFIG_FILE)
    kind = settings.get("tokenizer_class")
    if kind is None and _optional(folder / CONFIG_FILE).get("model_type") == "qwen2":
        kind = TOKENIZER_CLASSES[0]  # which transformers takes for this model
    known = kind in TOKENIZER_CLASSES
    added = {name: i for name, i in _optional(folder / ADDED_FILE).items() if isinstance(i, int)}
    for i, entry in (settings.get("added_tokens_decoder") or {}).items():
        added[entry["content"]] = int(i)
    # The first line of a file that transformers writes is `#version: 0.2`; the pair `# version…` is no such line.
    lines = merges.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return {
        "model": {
            "type": "BPE",
            "vocab": read_json(folder / VOCABULARY_FILE),
            "merges": lines[lines[0].startswith("#version") :],
        },
        "added_tokens": [{"content": name, "id": i} for name, i in added.items()],
        "normalizer": "NFC" if known else kind,
        "pre_tokenizer": Tokenizer.PATTERN if known else kind,
    }


def _optional(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def ranks_of(path: Path, content: dict) -> dict[bytes, int]:
    """The ranks of the vocabulary in the content of a tokenizer.json; errors name `path`.

    Raises:
      ValueError: the tokenizer is not Qwen's, so ids would differ.
    """
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{path}: the model is {model.get('type')!r}, expected byte-level BPE: {_ADVICE}")
    splits, normalizers = _strings(content.get("pre_tokenizer")), _strings(content.get("normalizer"))
    if Tokenizer.PATTERN not in splits or "NFC" not in normalizers:
        raise ValueError(f"{path}: text is not normalized and split as Qwen does it (NFC, its pattern): {_ADVICE}")
    control = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
    ranks = {}
    for written, rank in model["vocab"].items():
        if written in control:
            continue
        try:
            ranks[bytes(_BYTES[character] for character in written)] = rank
        except KeyError as error:
            raise ValueError(f"{path}: token {written!r} is not written in byte-level characters: {_ADVICE}") from error
    if first := sorted((i, name) for name, i in control.items() if i < len(ranks)):
        raise ValueError(
            f"{path}: its control tokens come before those of text ({first[0][1]} has id {first[0][0]}, text has "
            f"{len(ranks)} tokens): Qwen's come after them, and so the ids would differ"
        )
    check_ranks(ranks, path)
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges") or ()]
    if merges != [(_written(left), _written(right)) for left, right in derive_merges(ranks, path)]:
        raise ValueError(f"{path}: its merges are not those of its ranks, so tiktoken would give other ids: {_ADVICE}")
    return ranks


def _strings(node) -> set[str]:
    """All strings in a nested JSON value."""
    if isinstance(node, str):
        return {node}
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return {text for child in children for text in _strings(child)}
