"""Benchmarks with two files for each subject, one of solved examples and one of questions (MMLU, C-Eval, CMMLU)."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from qwen_jax.evaluation.benchmark import LeftOut
from qwen_jax.evaluation.rows import Row, first_rows


@dataclasses.dataclass(frozen=True)
class Subjects:
    """Where the files of subjects lie.

    Attributes:
        shots: path of the solved examples under the benchmark's folder, with {} for the subject.
        questions: path of the questions, likewise.
        names: all subjects of the publication.
        rows: reads a file.
    """

    shots: str
    questions: str
    names: Sequence[str]
    rows: Callable[[Path], Iterable[Row]]

    def read(self, folder: Path, num_shots: int) -> Iterator[tuple[str, list[Row], list[Row]]]:
        """(subject, its solved examples, its questions), for each subject that has files, by name.

        Raises:
            FileNotFoundError: no subject has files, or one has only one of the two; the message names the other.
            ValueError: a file has fewer than `num_shots` solved examples, or a row cannot be read.
        """
        found = self._found(folder)
        if not found:
            raise FileNotFoundError(
                f"{folder}: no file of any subject; expected {self.shots.format('SUBJECT')} and "
                f"{self.questions.format('SUBJECT')}"
            )
        for subject in sorted(found):
            shots, questions = folder / self.shots.format(subject), folder / self.questions.format(subject)
            for file, other in ((shots, questions), (questions, shots)):
                if not file.is_file():
                    raise FileNotFoundError(f"{file}: no such file, beside {other.relative_to(folder)}")
            yield subject, first_rows(shots, self.rows(shots), num_shots), list(self.rows(questions))

    def missing(self, folder: Path) -> Iterator[LeftOut]:
        """The subjects of the publication that have no files here."""
        found = self._found(folder)
        for subject in self.names:
            if subject not in found:
                yield LeftOut(where=str(folder / self.questions.format(subject)), reason="no files of this subject")

    def _found(self, folder: Path) -> set[str]:
        found = set()
        for pattern in (self.shots, self.questions):
            before, after = pattern.split("{}")
            for file in folder.glob(pattern.format("*")):
                path = file.relative_to(folder).as_posix()
                found.add(path.removeprefix(before).removesuffix(after))
        return found
