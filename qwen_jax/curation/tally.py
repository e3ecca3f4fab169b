"""Account of the bytes and records of one input file: read, or left out for a reason."""

import os

# Outcome of records that were decoded and passed to the next stage.
READ = "read"
# Reasons for which a reader could not decode a part of a file. The others are decisions: `not_a_page`, `too_large`.
UNREADABLE = frozenset({"broken_record", "unreadable_file", "bad_json"})


class Tally:
    """Outcomes of one file: every byte belongs to one of them.

    Attributes:
        size: bytes of the file.
        outcomes: `read` or a reason to [records, bytes]; the bytes add up to `size` once the file is finished.
    """

    def __init__(self, size: int):
        self.size = size
        self.outcomes: dict[str, list[int]] = {}
        self._position = 0

    def up_to(self, position: int, outcome: str, records: int = 1) -> None:
        """Assigns the bytes between the last position and this one to `outcome`, with this number of records."""
        # Behind damage a decompressor may go back, and a file may have grown since it was listed.
        position = max(self._position, min(position, self.size))
        counts = self.outcomes.setdefault(outcome, [0, 0])
        counts[0] += records
        counts[1] += position - self._position
        self._position = position

    def finish(self, outcome: str, records: int = 0) -> None:
        """Assigns the rest of the file to `outcome`."""
        if records or self._position < self.size:
            self.up_to(self.size, outcome, records)

    @property
    def unread(self) -> int:
        """Bytes that could not be read."""
        return sum(counts[1] for reason, counts in self.outcomes.items() if reason in UNREADABLE)

    @classmethod
    def of(cls, path: str) -> "Tally":
        """A tally of the file as large as it is now."""
        return cls(os.path.getsize(path))
