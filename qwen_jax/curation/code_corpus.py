"""Repositories to a corpus of source code: documents with metadata, without duplicates, every other file accounted for.

An input is a folder of repositories, or a tar of them (also .gz, .bz2, .xz, .zst). The output appears whole or not at
all:

    documents/part-00000.jsonl.zst   {"text", "repository", "path", "language", "license"} a line
    left_out.jsonl                   {"repository", "path", "reason"} a line, also for links
    manifest.json                    settings and counts: files = documents + left out

Of files that are equal, or near-duplicates (`qwen_jax.curation.dedup`), the first stays. Texts are kept on disk
meanwhile; their sketches (some 4 bytes for each token) are in memory.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
import zstandard

from qwen_jax import files
from qwen_jax.curation import dedup, licenses
from qwen_jax.curation.source_code import SourceRules, language_of

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
DOCUMENTS, LEFT_OUT, MANIFEST = "documents", "left_out.jsonl", "manifest.json"


class File(NamedTuple):
    """A file of a repository; `data` is None for links and devices."""

    repository: str
    path: str
    data: bytes | None


@dataclasses.dataclass(frozen=True)
class CodeConfig:
    """How a corpus is made.

    Attributes:
        depth: folders that name a repository: 1 for NAME/…, 2 for OWNER/NAME/….
        licenses: SPDX names that are taken; None: any, and those that are not known.
        rules: which files are left out.
        fuzzy: definition of near-duplicates; None: only equal files are duplicates.
        part_bytes: text of a file of documents, before compression.
    """

    depth: int = 1
    licenses: frozenset[str] | None = licenses.PERMISSIVE
    rules: SourceRules = SourceRules()
    fuzzy: dedup.FuzzyConfig | None = dedup.FuzzyConfig()
    part_bytes: int = 256_000_000

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}: at least one folder names a repository")


def read_repositories(source: Path, depth: int, max_bytes: int) -> Iterator[File]:
    """All files and links of the repositories in a folder or a tar; of a larger file, `max_bytes` + 1 bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, the tar is damaged (the message names the last member), or a file lies above the
            repositories.
    """
    if source.is_dir():
        found = _of_folder(source, max_bytes + 1)
    elif source.name.lower().endswith(TAR_SUFFIXES):
        found = _of_tar(source, max_bytes + 1)
    elif source.exists():
        raise ValueError(f"{source}: expected a folder of repositories, or a file of {', '.join(TAR_SUFFIXES)}")
    else:
        raise FileNotFoundError(f"{source}: no such folder or tar of repositories")
    for name, data in found:
        parts = PurePosixPath(name).parts
        if len(parts) <= depth:
            where = "/".join(["REPOSITORY"] if depth == 1 else ["OWNER", *["NAME"] * (depth - 1)])
            raise ValueError(f"{source}: {name} lies in no repository: expected {where}/… (--depth is {depth})")
        yield File("/".join(parts[:depth]), "/".join(parts[depth:]), data)


def _of_folder(folder: Path, limit: int) -> Iterator[tuple[str, bytes | None]]:
    for where, folders, names in os.walk(folder):
        folders.sort()
        linked = [name for name in folders if (Path(where) / name).is_symlink()]
        for name in sorted([*names, *linked]):
            path = Path(where) / name
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or not path.is_file():
                yield name, None
                continue
            with open(path, "rb") as file:
                yield name, file.read(limit)


def _of_tar(source: Path, limit: int) -> Iterator[tuple[str, bytes | None]]:
    last = "its beginning"
    try:
        with contextlib.ExitStack() as opened:
            if source.name.lower().endswith(".zst"):
                stream = opened.enter_context(files.open_decompressed(source))
                tar = opened.enter_context(tarfile.open(fileobj=stream, mode="r|"))
            else:
                tar = opened.enter_context(tarfile.open(source, mode="r|*"))
            for member in tar:
                last = member.name
                if member.isdir() or member.type in (tarfile.XGLTYPE, tarfile.XHDTYPE):
                    continue
                content = tar.extractfile(member) if member.isreg() else None
                data = None if content is None else content.read(limit)
                if data is not None and len(data) < min(member.size, limit):
                    raise EOFError("cut off within a file")
                yield str(PurePosixPath(member.name)).removeprefix("/"), data
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{source}: not a whole tar, damaged after {last}: {error}") from error


def repository_licenses(source: Path, config: CodeConfig) -> dict[str, str | None]:
    """SPDX expression of each repository, or None; see `licenses.of_repository`."""
    roots: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for file in read_repositories(source, config.depth, config.rules.max_bytes):
        root = roots[file.repository]
        if "/" not in file.path and file.data is not None and licenses.is_read(file.path):
            root[file.path] = file.data.decode("utf-8", "replace")
    return {name: licenses.of_repository(root) for name, root in roots.items()}


def make_corpus(sources: Sequence[Path], output: Path, config: CodeConfig = CodeConfig()) -> dict:
    """Makes the corpus of `sources` in the folder `output`.

    Returns:
        The manifest.

    Raises:
        OSError: an input cannot be read, or the output not be written.
        ValueError: an input is not as expected (see `read_repositories`), two of them have a repository of one name,
            nothing is left, or the output exists.
    """
    if output.exists():
        raise ValueError(f"{output} is there already: remove it, or choose another folder")
    found: dict[str, str | None] = {}
    for source in sources:
        more = repository_licenses(source, config)
        if both := sorted(found.keys() & more.keys()):
            raise ValueError(f"{source}: the repository {both[0]} is in an earlier input too")
        found |= more
    with files.new_folder(output) as folder:
        counts = collections.Counter[str]()
        with (
            open(folder / "staged.jsonl", "w+", encoding="utf-8") as staged,
            open(folder / LEFT_OUT, "w", encoding="utf-8") as left_out,
        ):
            leave_out = _LeavesOut(left_out, counts)
            stays = _stage(sources, found, config, staged, leave_out)
            staged.seek(0)
            documents = _write(folder / DOCUMENTS, zip(staged, stays, strict=True), leave_out, config.part_bytes)
        (folder / "staged.jsonl").unlink()
        if not documents["documents"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
            raise ValueError(f"no file is left of {len(found):,} repositories: {reasons or 'there are none'}")
        names = None if config.licenses is None else sorted(config.licenses)
        manifest = {
            "settings": dataclasses.asdict(config) | {"licenses": names},
            "repositories": len(found),
            "files": documents["documents"] + counts.total(),
            **documents,
            "left_out": dict(counts.most_common()),
        }
        files.write_json(folder / MANIFEST, manifest)
    return manifest


class _LeavesOut:
    """Writes and counts files that are left out."""

    def __init__(self, file: IO[str], counts: collections.Counter[str]):
        self._file, self._counts = file, counts

    def __call__(self, repository: str, path: str, reason: str) -> None:
        row = {"repository": repository, "path": path, "reason": reason}
        # Names in a tar or on a disk may be no UTF-8; escapes keep them.
        self._file.write(json.dumps(row) + "\n")
        self._counts[reason] += 1


def _stage(
    sources: Sequence[Path], found: dict[str, str | None], config: CodeConfig, staged: IO[str], leave_out: _LeavesOut
) -> np.ndarray:
    """Writes the documents that stay but for near-duplicates; bool [documents], whether one is first of its cluster."""
    seen: set[bytes] = set()

    def texts() -> Iterator[str]:
        for source in sources:
            for file in read_repositories(source, config.depth, config.rules.max_bytes):
                document, reason = _document(file, found[file.repository], config)
                digest = hashlib.blake2b(document["text"].encode(), digest_size=16).digest()
                if reason is None and digest in seen:
                    reason = "duplicate"
                if reason is not None:
                    leave_out(file.repository, file.path, reason)
                    continue
                seen.add(digest)
                staged.write(json.dumps(document) + "\n")
                yield document["text"]

    if config.fuzzy is None:
        return np.ones(sum(1 for _ in texts()), bool)
    clusters = dedup.cluster([dedup.sketch(batch, config.fuzzy) for batch in dedup.batches(texts())], config.fuzzy)
    return clusters == np.arange(len(clusters))


def _document(file: File, of_repository: str | None, config: CodeConfig) -> tuple[dict[str, str], str | None]:
    """The document of a file, and why it is left out, or None."""
    reason = "link or device" if file.data is None else config.rules.by_name(file.path)
    if reason is not None or file.data is None:
        return {"text": ""}, reason
    text, reason = config.rules.by_content(file.data)
    license_ = licenses.tag(text[:2000]) or of_repository
    if reason is None and config.licenses is not None and not licenses.is_allowed(license_, config.licenses):
        reason = f"license {license_}" if license_ else "license unknown"
    return {
        "text": text,
        "repository": file.repository,
        "path": file.path,
        "language": language_of(file.path) or "",
        "license": license_ or "",
    }, reason


def _write(folder: Path, staged: Iterable[tuple[str, bool]], leave_out: _LeavesOut, part_bytes: int) -> dict:
    """Writes the documents that stay in parts; counts of them."""
    folder.mkdir()
    languages, license_names = collections.Counter[str](), collections.Counter[str]()
    count, total, part_end = 0, 0, 0
    with contextlib.ExitStack() as part:
        for line, stays in staged:
            document = json.loads(line)
            if not stays:
                leave_out(document["repository"], document["path"], "near-duplicate")
                continue
            if total >= part_end:
                part.close()
                path = folder / f"part-{total // part_bytes:05d}.jsonl.zst"
                lines = part.enter_context(zstandard.open(path, "wt", encoding="utf-8"))
                part_end = (total // part_bytes + 1) * part_bytes
            lines.write(line)
            count += 1
            total += len(document["text"].encode())
            languages[document["language"]] += 1
            license_names[document["license"] or "unknown"] += 1
    return {
        "documents": count,
        "bytes": total,
        "languages": dict(languages.most_common()),
        "licenses": dict(license_names.most_common()),
    }
