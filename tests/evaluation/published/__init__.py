"""Hand-made files of benchmarks in their publishers' layouts, a few rows each.

Each module of this package has functions that write the files of a benchmark into a folder, and `FILES`, which names
them. `tests/evaluation/test_benchmarks.py` runs all registered benchmarks on them.
"""

import csv
import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from qwen_jax.evaluation.benchmark import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Files of a benchmark.

    Attributes:
      write: writes them into the benchmark's folder, which is there.
      examples: number of examples that are read from them.
      left_out: number of rows, or subjects, that are left out.
      shot: text that stands in the prompt once for each solved example and once for the question.
      file: one of the files with questions, for damage.
      wrong: (text of this file, what stands there instead): a field or column that is not as published. All occurrences
        are replaced.
      right: for texts that a model writes, a right one; None: the target itself.
      false: a wrong one that an answer is found in.
      oracle: the score of right answers to all.
      data: what the copy in the shared data gives: (examples, rows left out), their sum, or an error; None: there is no
        copy.
      tfds: rows of its TFDS dataset by split, with labels by name or number; each becomes an example.
    """

    write: Callable[[Path], None]
    examples: int
    left_out: int = 0
    shot: str
    file: str
    wrong: tuple[str, str]
    right: Callable[[Example], str] = lambda example: str(example.target)
    false: Callable[[Example], str] = lambda example: "-17"
    oracle: float = 100
    data: tuple[int, int] | int | str | None = None
    missing: Callable[[], str | None] = lambda: None
    slow: bool = False
    tfds: Mapping[str, Sequence[Mapping]] = dataclasses.field(default_factory=dict)


def write_json_lines(file: Path, rows: Iterable[Mapping]) -> None:
    """JSON lines, in folders that are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(file: Path, value: object) -> None:
    """One JSON value, in folders that are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, ensure_ascii=False, indent=4), encoding="utf-8")


def write_csv(file: Path, rows: Iterable[Sequence]) -> None:
    """Comma-separated values, in folders that are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines, lineterminator="\n").writerows(rows)


FILES: dict[str, Published] = {}
for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    FILES |= importlib.import_module(f"{__name__}.{_module}").FILES
