"""Input files of a curation run: which files a folder or glob names, and which of them are left out."""

import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_jax import files as all_files
from qwen_jax.files import as_path, as_pattern, is_remote

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
        files: paths, or URLs of objects of a bucket, with sizes in bytes, in order.
        left_out: paths of files in the folders that are not read, with the reason, in order.
    """

    name: str
    base: str
    files: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...] = ()


def relative(path: str, base: str) -> str:
    """A path below the folder `base`, with slashes; the same for local files and objects in a bucket (`readable`)."""
    if is_remote(path):
        return path.removeprefix(base).lstrip("/")
    return readable(Path(path).relative_to(base).as_posix())


def readable(name: str) -> str:
    """The name of a local file as text: bytes that are not UTF-8 become escapes such as `\\xb0`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def list_source(name: str, patterns: Sequence[str]) -> Source:
    """Files of a source.

    Args:
        name: of the source.
        patterns: folders, globs and paths, or URLs of them in a bucket. Of a folder, the files whose suffix
            `file_format` knows are read; the others and hidden ones are left out. A path of an existing file is never
            read as a glob.

    Raises:
        FileNotFoundError: nothing matches.
        ValueError: a glob matches a file whose suffix says nothing about its format, the name cannot be a folder, or
            files are on local disks and in buckets.
    """
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        raise ValueError(f"source {name!r}: its name becomes a folder, so use letters, digits, '-', '_' and '.'")
    found: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for pattern in patterns:
        pattern = as_pattern(pattern, f"source {name!r}")
        folder, sizes = _remote_files(pattern) if is_remote(pattern) else _local_files(pattern)
        files = []
        for path in sizes:
            if folder and any(part.startswith(".") for part in relative(path, folder).split("/")):
                left_out[path] = "hidden"
            elif file_format(path) is not None:
                files.append(path)
            elif folder:
                left_out[path] = "unknown_suffix"
            else:
                raise ValueError(f"{path}: unknown suffix; a corpus has files of {SHOWN_SUFFIXES}")
        if not files:
            seen_from = "" if is_remote(pattern) else f" (seen from {os.getcwd()})"
            raise FileNotFoundError(
                f"source {name!r}: no file matches {pattern!r}{seen_from}: expected a folder or glob with files of "
                f"{SHOWN_SUFFIXES}"
            )
        found |= {path: sizes[path] for path in files}
    base = _common_folder(name, list(found))
    others = sorted((path, reason) for path, reason in left_out.items() if path not in found)
    return Source(name, base, tuple(sorted(found.items())), tuple(others))


def _common_folder(name: str, paths: list[str]) -> str:
    schemes = {path.partition("://")[0] if is_remote(path) else "" for path in paths}
    if len(schemes) > 1:
        raise ValueError(
            f"source {name!r} has files on local disks and in buckets, or in buckets of two kinds: give each a source "
            "of its own"
        )
    start = f"{scheme}://" if (scheme := schemes.pop()) else ""
    return start + os.path.commonpath([os.path.dirname(path.removeprefix(start)) for path in paths])


def _local_files(pattern: str) -> tuple[str | None, dict[str, int]]:
    """The folder that the pattern names, if it does, and the files with their sizes, in order."""
    folder = os.path.abspath(pattern) if os.path.isdir(pattern) else None
    if folder is not None:
        paths = list(_walk(folder))
    else:
        paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted(os.path.abspath(path) for path in paths if os.path.isfile(path))
    return folder, {path: os.path.getsize(path) for path in paths}


def _remote_files(pattern: str) -> tuple[str | None, dict[str, int]]:
    """As `_local_files`, in a bucket."""
    path = as_path(pattern)
    assert isinstance(path, all_files.RemotePath)
    below = all_files.sizes_below(path)
    found = below or all_files.sizes_of(path)
    return str(path) if below else None, {str(one): size for one, size in found.items()}


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
