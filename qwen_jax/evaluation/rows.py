"""Rows of the files that benchmarks are published in; what a row lacks is named with its file and line."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import files


@dataclasses.dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        where: file and line, for messages.
        fields: its values by name.
    """

    where: str
    fields: Mapping[str, Any]

    def error(self, expected: str) -> ValueError:
        """An error that names the row and says what was expected."""
        return ValueError(f"{self.where}: expected {expected}")

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A field.

        Raises:
            ValueError: it is not there, or of another type.
        """
        if name not in self.fields:
            raise self.error(f"a field {name!r}, found {', '.join(map(str, self.fields)) or 'none'}")
        value = self.fields[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(one.__name__ for one in kinds)
            raise self.error(f"{name!r} of type {names}, found {_shown(value)}")
        return value

    def text(self, name: str) -> str:
        """A field of text that is not blank."""
        value = self.get(name, str)
        if not value.strip():
            raise self.error(f"text in {name!r}, found none")
        return value

    def texts(self, name: str, count: int | None = None) -> list[str]:
        """A field that is a list of texts, of `count` if given."""
        value = self.get(name, list)
        if not all(isinstance(one, str) for one in value) or count not in (None, len(value)):
            raise self.error(f"{'' if count is None else f'{count} '}texts in {name!r}, found {_shown(value)}")
        return value

    def one_of(self, name: str, options: Iterable[Any]) -> Any:
        """A field that is one of the options, of the same type."""
        options, value = list(options), self.fields.get(name)
        if not any(type(value) is type(option) and value == option for option in options):
            raise self.error(f"{name!r} to be one of {', '.join(map(str, options))}, found {_shown(value)}")
        return value

    def row(self, name: str) -> "Row":
        """A field that is an object."""
        return Row(self.where, self.get(name, dict))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def json_rows(file: Path) -> Iterator[Row]:
    """The objects of a file of JSON lines, or of one JSON array; lines count from 1, items from 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is no JSON object, or there is none.
    """
    found = False
    for where, value in files.read_json_rows(file):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, found {_shown(value)}")
        found = True
        yield Row(where, value)
    if not found:
        raise ValueError(f"{file} has no rows: is it cut?")


def json_items(file: Path, name: str) -> Iterator[Row]:
    """The objects of the list `name` in a file of one JSON object; items count from 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON, has no such list, or the list holds something else or nothing.
    """
    try:
        content = files.read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}: is the file cut?") from error
    items = content.get(name) if isinstance(content, dict) else None
    if not isinstance(items, list) or not items:
        raise ValueError(f"{file}: expected an object with a list {name!r}, found {_shown(content)}")
    for index, fields in enumerate(items):
        if not isinstance(fields, dict):
            raise ValueError(f"{file}: item {index}: expected an object, found {_shown(fields)}")
        yield Row(f"{file}: item {index}", fields)


def json_object(file: Path) -> Row:
    """The one object of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON, or something else than an object.
    """
    try:
        content = files.read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}: is the file cut?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {_shown(content)}")
    return Row(str(file), content)


def json_objects(file: Path) -> Iterator[Row]:
    """The objects of a file that has them one after the other, over several lines each, or in one JSON array.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something in it is no JSON object (the message has the line where it begins), or there is none.
    """
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        yield from json_rows(file)
        return
    decoder, place = json.JSONDecoder(), 0
    while (place := place + len(text[place:]) - len(text[place:].lstrip())) < len(text):
        where = f"{file}:{text.count(chr(10), 0, place) + 1}"
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}: is the file cut?") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, found {_shown(value)}")
        yield Row(where, value)
    if not place:
        raise ValueError(f"{file} has no rows: is it cut?")


def text_lines(file: Path) -> Iterator[Row]:
    """The lines of a text file in UTF-8, as the field `text`; they count from 1, and blank ones are none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not UTF-8, does not end with a line end, or has no line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from error
    lines = text.split("\n")
    if not text.strip() or lines[-1]:
        raise ValueError(f"{file}:{len(lines)}: expected a line end at the end of the file: is the file cut?")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Row(f"{file}:{number}", {"text": line})


def csv_rows(file: Path, columns: Sequence[str], header: bool = True) -> Iterator[Row]:
    """The rows of a file of comma-separated values in UTF-8; rows count from 1, the header too.

    Args:
        columns: names that the header must have; without a header, all columns in their order.
        header: whether the first row has the names of the columns.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not UTF-8 or ends within quotes, a row has another number of columns, or there is none.
    """
    names, number = (None if header else list(columns)), 0
    with io.TextIOWrapper(files.open_file(file), encoding="utf-8-sig", newline="") as lines:
        try:
            for number, values in enumerate(csv.reader(lines, strict=True), 1):
                where = f"{file}: row {number}"
                if names is None:
                    names = values
                    if missing := [column for column in columns if column not in names]:
                        raise ValueError(f"{where}: no column {', '.join(missing)}; expected {', '.join(columns)}")
                    continue
                if len(values) != len(names):
                    raise ValueError(f"{where}: expected {len(names)} columns, found {len(values)}")
                yield Row(where, dict(zip(names, values, strict=True)))
        except csv.Error as error:
            raise ValueError(f"{file}: row {number + 1}: {error}: is the file cut?") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 past row {number}: {error}") from error
    if number < 1 + header:
        raise ValueError(f"{file} has no rows: is it cut?")


def numbered(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Row]:
    """Rows that are in no file, such as those of a TFDS dataset; they count from 0."""
    for index, fields in enumerate(rows):
        yield Row(f"{name}: row {index}", fields)


def first_rows(file: Path, rows: Iterable[Row], count: int) -> list[Row]:
    """The first rows of a file, as solved examples.

    Raises:
        ValueError: there are fewer.
    """
    found = list(itertools.islice(rows, count))
    if len(found) < count:
        raise ValueError(f"{file}: {len(found)} rows, but {count} solved examples are needed: is the file cut?")
    return found


def labels(file: Path, rows: Sequence[Row], options: Collection[str]) -> list[str]:
    """The labels of a file with one a line, for the rows of the file beside it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: there is not one label for each row, or another one than the options.
    """
    found = file.read_text(encoding="utf-8-sig").split("\n")
    found = [label.strip() for label in (found[:-1] if found[-1] == "" else found)]
    for number, label in enumerate(found, 1):
        if label not in options:
            raise ValueError(f"{file}:{number}: expected one of {', '.join(options)}, found {label!r}")
    if len(found) != len(rows):
        raise ValueError(f"{file}: {len(found):,} labels for {len(rows):,} rows beside it: is one of the files cut?")
    return found
