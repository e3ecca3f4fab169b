"""Input files of a curation run: which files a folder or glob names, and which of them are left out."""

import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence

from qwen_jax.files import as_pattern

WARC, HTML, TEXT, LINES, PARQUET = "warc", "html", "text", "lines", "parquet"
_FORMATS = {
    WARC: (".warc", ".warc.wet", ".wet"),
    HTML: (".html", ".htm", ".xhtml"),
    TEXT: (".txt", ".md", ".rst"),
    LINES: (".jsonl", ".ndjson"),
}
COMPRESSED = (".gz", ".zst")
# A bare .json file is mostly one value over many lines: settings, not documents.
_COMPRESSED_LINES = tuple(".json" + suffix for suffix in COMPRESSED)
SHOWN_SUFFIXES = (
    ".warc, .wet, .html, .htm, .xhtml, .txt, .md, .rst, .jsonl, .ndjson (each also .gz or .zst), .json.gz, .json.zst, "
    ".parquet"
)


def file_format(path: str) -> str | None:
    """The format that the suffix of a file names, in any case, or None."""
    name = os.path.basename(path).lower()
    if name.endswith(".parquet"):
        return PARQUET
    if name.endswith(_COMPRESSED_LINES):
        return LINES
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return next((kind for kind, suffixes in _FORMATS.items() if name.endswith(suffixes)), None)


@dataclasses.dataclass(frozen=True)
class Source:
    """A named part of the corpus.

    Attributes:
        name: in ids, folders of the output and weights.
        base: folder that paths in ids are relative to.
        files: with sizes in bytes, in order.
        left_out: paths of files in the folders that are not read, with the reason, in order.
    """

    name: str
    base: str
    files: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...] = ()


def list_source(name: str, patterns: Sequence[str]) -> Source:
    """Files of a source.

    Args:
        name: of the source.
        patterns: folders, globs and paths. Of a folder, the files whose suffix `file_format` knows are read; the others
            and hidden ones are left out. A path of an existing file is never read as a glob.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: a glob matches a file whose suffix says nothing about its format, or the name cannot be a folder.
    """
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        raise ValueError(f"source {name!r}: its name becomes a folder, so use letters, digits, '-', '_' and '.'")
    found, left_out = set(), {}
    for pattern in patterns:
        pattern = as_pattern(pattern, f"source {name!r}")
        if os.path.isdir(pattern):
            files = []
            for path in _walk(pattern):
                if any(part.startswith(".") for part in os.path.relpath(path, pattern).split(os.sep)):
                    left_out[path] = "hidden"
                elif file_format(path) is None:
                    left_out[path] = "unknown_suffix"
                else:
                    files.append(path)
        else:
            files = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
            files = [path for path in files if os.path.isfile(path)]
            unknown = sorted(path for path in files if file_format(path) is None)
            if unknown:
                raise ValueError(f"{unknown[0]}: unknown suffix; a corpus has files of {SHOWN_SUFFIXES}")
        if not files:
            raise FileNotFoundError(
                f"source {name!r}: no file matches {pattern!r} (seen from {os.getcwd()}): expected a folder or glob "
                f"with files of {SHOWN_SUFFIXES}"
            )
        found.update(os.path.abspath(path) for path in files)
    base = os.path.commonpath([os.path.dirname(path) for path in found])
    others = sorted((os.path.abspath(path), reason) for path, reason in left_out.items())
    return Source(
        name,
        base,
        tuple((path, os.path.getsize(path)) for path in sorted(found)),
        tuple(pair for pair in others if pair[0] not in found),
    )


def _walk(folder: str) -> Iterator[str]:
    """All files below a folder, linked folders included, but each folder once."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        identity = os.path.realpath(here)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        for name in names:
            path = os.path.join(here, name)
            if os.path.isfile(path):
                yield path


def _raise(error: OSError) -> None:
    raise error
