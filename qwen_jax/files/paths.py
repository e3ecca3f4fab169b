"""Paths as people give them, on local disks and in buckets."""

import contextlib
import dataclasses
import functools
import glob
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, cast, get_args

from . import objects

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_COLLAPSED = re.compile(r"(gs|s3):/(?!/)")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_WILDCARDS = "*?["
_MAGIC = re.compile(r"[*?[]")
_MANY = 8


class NotLocalError(ValueError, TypeError):
    """A path in a bucket where only a local one will do. A TypeError, too, as of any object that is no path."""


@dataclasses.dataclass(frozen=True, order=True)
class RemotePath:
    """An object of a bucket, or a folder of objects, with the interface of `pathlib.Path`; `str` gives the URL.

    A folder is there while an object is in it: `mkdir` does nothing. There are no renames, and `__fspath__` raises, so
    that no function of the standard library takes the URL for a local name.

    Attributes:
      scheme: "gs" or "s3".
      bucket: its name.
      key: of the object in the bucket, without a slash at either end; "" is the bucket itself.
    """

    scheme: str
    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __fspath__(self) -> str:
        """Raises the error of a path for which only local files are meant."""
        raise NotLocalError(
            f"{self} is in a bucket, and here files of a local disk are meant: give a local path, or copy it"
        )

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.key)

    def __truediv__(self, other: str | os.PathLike) -> "RemotePath":
        name = os.fspath(other).strip("/")
        if not name or name == ".":
            return self
        return dataclasses.replace(self, key=_checked_key(f"{self.key}/{name}" if self.key else name, str(self)))

    def joinpath(self, *others: str | os.PathLike) -> "RemotePath":
        """The path with other parts after it."""
        return functools.reduce(lambda path, one: path / one, others, self)

    @property
    def name(self) -> str:
        """The last part."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The suffix of the last part, with its dot."""
        return self._pure.suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes of the last part."""
        return self._pure.suffixes

    @property
    def parts(self) -> tuple[str, ...]:
        """The bucket's URL and the parts of the key."""
        return (f"{self.scheme}://{self.bucket}", *self._pure.parts)

    @property
    def parent(self) -> "RemotePath":
        """The folder that it lies in; that of a bucket is the bucket."""
        return dataclasses.replace(self, key=self.key.rpartition("/")[0])

    @property
    def parents(self) -> list["RemotePath"]:
        """All folders that it lies in, the nearest first."""
        found, path = [], self
        while path.key:
            path = path.parent
            found.append(path)
        return found

    def with_name(self, name: str) -> "RemotePath":
        """The path with another last part."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "RemotePath":
        """The path with another suffix."""
        return self.with_name(str(PurePosixPath(self.name).with_suffix(suffix)))

    def relative_to(self, other: "RemotePath") -> PurePosixPath:
        """The rest of the key below the folder `other`.

        Raises:
          ValueError: it is not below it.
        """
        if (self.scheme, self.bucket) != (other.scheme, other.bucket):
            raise ValueError(f"{self} is not in the folder {other}")
        return self._pure.relative_to(other.key or ".")

    def is_relative_to(self, other: object) -> bool:
        """Whether it is the folder `other`, or below it."""
        if not isinstance(other, RemotePath) or (self.scheme, self.bucket) != (other.scheme, other.bucket):
            return False
        return self._pure.is_relative_to(other.key or ".")

    def absolute(self) -> "RemotePath":
        """Itself."""
        return self

    resolve = expanduser = absolute

    def as_posix(self) -> str:
        """The URL."""
        return str(self)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder appears with its first object."""

    def stat(self) -> os.stat_result:
        """Size (`st_size`) and time (`st_mtime`) of an object."""
        return _status(objects.head(self))

    def is_file(self) -> bool:
        """Whether there is such an object."""
        if not self.key:
            return False
        try:
            objects.head(self)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether an object lies below it; of a bucket, whether it exists.

        Raises:
          FileNotFoundError: there is no such bucket.
        """
        return objects.any_below(self) or not self.key

    def exists(self) -> bool:
        """Whether it is an object or a folder.

        Raises:
          FileNotFoundError: there is no such bucket.
        """
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """False: buckets have no links."""
        return False

    def iterdir(self) -> Iterator["RemotePath"]:
        """What lies directly in the folder, in the order of names."""
        folders, names = objects.list_folder(self)
        yield from (self / name for name in sorted({*folders, *names}))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Objects and folders below it that match, in the order of names."""
        matches, seen = _matcher(pattern, hidden=True), set()
        if "/" not in pattern and pattern != "**":
            yield from (one for one in self.iterdir() if matches(one.name))
            return
        for found in objects.list_objects(self):
            path = dataclasses.replace(self, key=found["path"])
            for one in (path, *path.parents):
                if one in seen or one == self or not one.is_relative_to(self):
                    continue
                seen.add(one)
                if matches(str(one.relative_to(self))):
                    yield one

    def rglob(self, pattern: str) -> Iterator["RemotePath"]:
        """As `glob`, at any depth."""
        yield from self.glob(f"**/{pattern}")

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None):
        """The object, opened for reading.

        Raises:
          FileNotFoundError: there is none.
          ValueError: another mode than "r" or "rb"; objects are written whole, by `files.new_file`.
        """
        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"{self}: an object cannot be opened with mode {mode!r}; write it by files.new_file")
        from .reading import RemoteFile, take_begun

        size = RemoteFile.BLOCK if buffering <= 0 else buffering
        file = take_begun(cast(Path, self)) if buffering <= 0 else None
        file = file or io.BufferedReader(RemoteFile(self, size), size)
        return file if mode == "rb" else io.TextIOWrapper(file, encoding=encoding or "utf-8", errors=errors)

    def read_bytes(self) -> bytes:
        """The whole object."""
        return objects.get(self)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes) -> int:
        """Writes the object whole."""
        objects.put(self, bytes(data))
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        """Writes the object whole."""
        return self.write_bytes(text.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the object."""
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(f"{self}: no such object")
        objects.delete(self, [self.key])


# Types of parameters for a path, or for a folder or glob: on the command line, their values are never read as numbers.
# The mark is for `is_path_type`.
_PATH_MARK = "qwen_jax path"
PathLike = Annotated[str | os.PathLike, _PATH_MARK]
Pattern = Annotated[str | os.PathLike, _PATH_MARK]


def is_path_type(hint) -> bool:
    """Whether a type annotation is `PathLike` or `Pattern`, or has one of them in it, as `PathLike | None`."""
    return _PATH_MARK in getattr(hint, "__metadata__", ()) or any(map(is_path_type, get_args(hint)))


def is_remote(path: object) -> bool:
    """Whether a path, or the text of one, is in a bucket."""
    return isinstance(path, RemotePath) or (isinstance(path, str) and _URL.match(path) is not None)


def as_path(given: PathLike, name: str = "path") -> Path:
    """The path that a person gave: a local one with `~` and `~user` for home folders, or `gs://…` or `s3://…`.

    The latter is a `RemotePath`. The annotation says `Path`, whose interface it has, so that functions annotated so
    take both.

    Args:
      name: name of the flag, macro or parameter in the message.

    Raises:
      ValueError: `given` is no path (a number of a gin file without quotes, nothing), there is no such user, or the
        URL has another scheme, no bucket, or an empty part.
    """
    if isinstance(given, RemotePath):
        return cast(Path, given)
    text = as_pattern(given, name)
    return cast(Path, _parsed(text, name)) if is_remote(text) else Path(text)


def as_pattern(given: Pattern, name: str = "path") -> str:
    """As `as_path`, for a folder or glob, as text; only the home folder is replaced."""
    if isinstance(given, RemotePath):
        return str(given)
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        shown = "nothing" if given == "" else f"{given!r} ({type(given).__name__})"
        raise ValueError(f"{name}: expected a path, found {shown}; in gin files and Python, a path stands in quotes")
    text = os.path.expanduser(os.fspath(given))
    if collapsed := _COLLAPSED.match(text):
        raise ValueError(f"{name}: {text}: write {collapsed[1]}:// with two slashes")
    if is_remote(text):
        return str(_parsed(text, name))
    if text.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(f"{name}: {text}: there is no home folder {user}; write ./{text} for a folder of that name")
    return text


def _parsed(text: str, name: str) -> RemotePath:
    found = _URL.fullmatch(text)
    assert found is not None  # `is_remote`
    scheme, rest = found.groups()
    if scheme not in objects.SCHEMES:
        known = " or ".join(f"{one}://" for one in objects.SCHEMES)
        raise ValueError(f"{name}: {text}: unknown scheme {scheme}://; write {known}, or a local path")
    bucket, _, key = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        shown = f"no bucket named {bucket!r}" if bucket else "no bucket"
        raise ValueError(f"{name}: {text}: {shown} can exist: write {scheme}://BUCKET/FOLDER")
    return RemotePath(scheme, bucket, _checked_key(key.removesuffix("/"), f"{name}: {text}"))


def _checked_key(key: str, where: str) -> str:
    if key and (bad := [part for part in key.split("/") if part in ("", ".", "..")]):
        what = "two slashes in a row" if bad[0] == "" else f"a part {bad[0]!r}"
        raise ValueError(f"{where}: a path in a bucket has {what}: remove it, for a bucket would keep it in the name")
    return key


def find(pattern: Pattern) -> list[Path]:
    """Files, and folders, that match a glob (`*`, `?`, `[…]`, and `**` for folders at any depth), sorted by their text.

    As in a shell, only a pattern with a leading dot matches hidden names. In a bucket, only objects match, and one
    that has the pattern as its name matches alone.

    Raises:
      ValueError, OSError: as `as_path`; the bucket cannot be read.
    """
    text = as_pattern(pattern)
    if not is_remote(text):
        return [Path(one) for one in sorted(glob.glob(text, recursive=True))]
    whole = _parsed(text, "path")
    if not _MAGIC.search(whole.key):
        return [cast(Path, whole)] if whole.is_file() else []
    return [cast(Path, one) for one in _matching_objects(whole)]


def sizes_below(folder: RemotePath) -> dict[RemotePath, int]:
    """The objects at any depth below a folder of a bucket, in the order of their keys, with sizes in bytes."""
    return {dataclasses.replace(folder, key=one["path"]): one["size"] for one in objects.list_objects(folder)}


def sizes_of(pattern: RemotePath) -> dict[RemotePath, int]:
    """The objects of a bucket that `find` finds, sorted, with sizes in bytes."""
    if _MAGIC.search(pattern.key):
        return _matching_objects(pattern)
    try:
        return {pattern: objects.head(pattern)["size"]} if pattern.key else {}
    except FileNotFoundError:
        return {}


def sizes_in(folder: PathLike) -> dict[str, int]:
    """Names of the files directly in a folder, sorted, with sizes in bytes; none where there is no such folder."""
    folder = as_path(folder)
    if isinstance(folder, RemotePath):
        return objects.list_folder(folder)[1]
    sizes = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        for one in found:
            with contextlib.suppress(FileNotFoundError):  # another process may rename its temporary files meanwhile
                if one.is_file():
                    sizes[one.name] = one.stat().st_size
    return dict(sorted(sizes.items()))


def are_files(paths: Sequence[Path]) -> list[bool]:
    """Whether each path is a file; for objects of one bucket, by one listing of what lies below their common folder."""
    there = _listed(paths)
    if there is None:
        return _of_each(lambda path: path.is_file(), paths)
    return [str(path) in there for path in paths]


def statuses(paths: Sequence[Path]) -> list[os.stat_result]:
    """`path.stat()` of each file; for several objects of one bucket as `are_files`.

    Raises:
      FileNotFoundError: one is missing.
    """
    # A few are asked for by name: their folder may hold a million others.
    there = _listed(paths) if len(paths) >= _MANY else None
    if there is None:
        return _of_each(lambda path: path.stat(), paths)
    if missing := [path for path in paths if str(path) not in there]:
        raise FileNotFoundError(f"{missing[0]}: no such object")
    return [_status(there[str(path)]) for path in paths]


def _of_each(look: Callable[[Path], Any], paths: Sequence[Path]) -> list:
    """`look` of each path; at the same time where some are in a bucket, which takes its time to answer."""
    return objects.in_parallel(look, list(paths)) if any(map(is_remote, paths)) else [look(path) for path in paths]


def _listed(paths: Sequence[Path]) -> dict[str, dict] | None:
    """What a listing tells of the objects below the common folder of several paths, by URL; None for other paths."""
    if len(paths) < 2 or not all(isinstance(path, RemotePath) for path in paths):
        return None
    remote = cast(Sequence[RemotePath], paths)
    common = remote[0].parent
    while common.key and not all(path.is_relative_to(common) for path in remote):
        common = common.parent
    # A whole bucket is not listed, nor several; and a listing lacks an object with the name of its folder.
    if not common.key or common in remote:
        return None
    start = str(dataclasses.replace(common, key=""))
    return {f"{start}/{one['path']}": one for one in objects.list_objects(common)}


def _status(found: dict) -> os.stat_result:
    when = found["last_modified"].timestamp()
    return os.stat_result((0o100644, 0, 0, 1, 0, 0, found["size"], int(when), int(when), int(when)))


def _matching_objects(whole: RemotePath) -> dict[RemotePath, int]:
    fixed: list[str] = []
    for part in whole.key.split("/"):
        if _MAGIC.search(part):
            break
        fixed.append(part)
    there = sizes_below(dataclasses.replace(whole, key="/".join(fixed)))
    if whole in there:  # a name such as `part[1].jsonl` is itself before it is a pattern
        return {whole: there[whole]}
    matches = _matcher(whole.key)
    return {path: size for path, size in there.items() if matches(path.key)}


def _matcher(pattern: str, hidden: bool = False):
    """A predicate of keys for a glob; `hidden`: wildcards match a leading dot too."""
    visible = "" if hidden else r"(?!\.)"
    parts = pattern.split("/")
    text = ""
    for number, part in enumerate(parts, 1):
        if part == "**":
            text += f"(?:{visible}[^/]+/)*" + (f"{visible}[^/]+" if number == len(parts) else "")
        else:
            text += (
                (visible if part[:1] in _WILDCARDS else "") + _expression(part) + ("/" if number < len(parts) else "")
            )
    expression = re.compile(text, re.DOTALL)
    return lambda key: expression.fullmatch(key) is not None


def _expression(part: str) -> str:
    """The regular expression of one part of a glob."""

    def translate(found: re.Match) -> str:
        one = found[0]
        if one in "*?":
            return "[^/]*" if one == "*" else "[^/]"
        if len(one) > 2 and one.startswith("["):
            inside = re.sub(r"([\\\[&~|])", r"\\\1", one[1:-1])
            return f"[^/{inside[1:]}]" if inside[0] == "!" else f"[{inside}]"
        return re.escape(one)

    return re.sub(r"\*|\?|\[!?\]?[^\]]*\]|.", translate, part, flags=re.DOTALL)
