"""Accounts of all documents: counts of each stage, and small samples for the report, both mergeable over shards."""

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import TypedDict

from qwen_jax.curation.sampling import uniform
from qwen_jax.curation.tally import UNREADABLE, Tally

# In this order, that of the report's section 2.1.
STAGES = ("read", "extract", "language", "exact", "fuzzy", "rules", "scores", "contamination", "sampling")
EXCERPT = 1200
_SAMPLES, _VALUES = 6, 4000


# Of one stage; each pair is documents and bytes.
_Counts = TypedDict("_Counts", {"in": list[int], "kept": list[int], "dropped": dict[str, list[int]]})


class Ledger:
    """Counts of documents and of bytes of text (before extraction: of pages) through the stages.

    Samples are those with the smallest hash of the document's id, so they are random and depend neither on the order
    nor on the number of shards.
    """

    def __init__(self, shards: int = 1):
        """`shards`: number of ledgers of the run; together they hold the statistics of some 4,000 documents."""
        self._limit = min(_VALUES, 40 + 8 * _VALUES // shards)
        self.stages: dict[str, _Counts] = {stage: {"in": [0, 0], "kept": [0, 0], "dropped": {}} for stage in STAGES}
        self.counters: dict[str, Counter] = {}
        self.samples: dict[str, list] = {}
        self.values: list = []
        self.inputs: dict[str, dict] = {}  # source to its bytes and their outcomes, as of a `Tally`
        self.damaged: list[dict] = []  # files that could not be read to the last byte

    def enter(self, stage: str, size: int) -> None:
        """Counts a document of `size` bytes that enters a stage."""
        _add(self.stages[stage]["in"], size)

    def keep(self, stage: str, size: int) -> None:
        """Counts a document of `size` bytes that a stage keeps."""
        _add(self.stages[stage]["kept"], size)

    def drop(self, stage: str, reason: str, size: int) -> None:
        """Counts a document of `size` bytes that a stage drops."""
        _add(self.stages[stage]["dropped"].setdefault(reason, [0, 0]), size)

    def count(self, what: str, value: str, number: int = 1) -> None:
        """Adds to a table of the report, such as `language`."""
        self.counters.setdefault(what, Counter())[value] += number

    def file(self, source: str, path: str, tally: Tally) -> None:
        """Adds a file that was read; `path` is relative to the folder of its source."""
        _add_outcomes(self.inputs, source, tally.size, tally.outcomes)
        if tally.unread or any(tally.outcomes.get(reason, [0])[0] for reason in UNREADABLE):
            outcomes = dict(sorted(tally.outcomes.items()))
            self.damaged.append(
                {"source": source, "path": path, "bytes": tally.size, "unread": tally.unread, "outcomes": outcomes}
            )

    def sample(self, label: str, row: dict) -> None:
        """Offers a document for the samples: `row` has its `id`; texts are cut to an excerpt."""
        order = uniform(row["id"], label)
        held = self.samples.setdefault(label, [])
        if len(held) < _SAMPLES or order < held[-1][0]:
            row = {key: value[:EXCERPT] if isinstance(value, str) else value for key, value in row.items()}
            self.samples[label] = heapq.nsmallest(_SAMPLES, [*held, [order, row]], key=_order)

    def value(self, document_id: str, language: str, values: dict) -> None:
        """Offers the statistics and scores of a document for the histograms."""
        self.values.append([uniform(document_id, "values"), {"id": document_id, "language": language, **values}])
        if len(self.values) >= 2 * self._limit:
            self.values = heapq.nsmallest(self._limit, self.values, key=_order)

    def to_json(self) -> dict:
        """The ledger in the form that `merge` takes."""
        return {
            "stages": self.stages,
            "counters": self.counters,
            "samples": self.samples,
            "values": heapq.nsmallest(self._limit, self.values, key=_order),
            "inputs": self.inputs,
            "damaged": self.damaged,
        }

    @classmethod
    def merge(cls, parts: Iterable[dict]) -> "Ledger":
        """The ledger of all shards."""
        merged = cls()
        for part in parts:
            for stage, counts in part["stages"].items():
                mine = merged.stages[stage]
                for side in ("in", "kept"):
                    mine[side] = [a + b for a, b in zip(mine[side], counts[side], strict=True)]
                for reason, pair in counts["dropped"].items():
                    held = mine["dropped"].get(reason, [0, 0])
                    mine["dropped"][reason] = [a + b for a, b in zip(held, pair, strict=True)]
            for what, counter in part["counters"].items():
                merged.counters.setdefault(what, Counter()).update(counter)
            for label, rows in part["samples"].items():
                held = [*merged.samples.get(label, []), *rows]
                merged.samples[label] = heapq.nsmallest(_SAMPLES, held, key=_order)
            for source, counts in part["inputs"].items():
                _add_outcomes(merged.inputs, source, counts["bytes"], counts["outcomes"])
            merged.damaged += part["damaged"]
            merged.values = heapq.nsmallest(_VALUES, [*merged.values, *part["values"]], key=_order)
        for counts in merged.stages.values():
            counts["dropped"] = dict(sorted(counts["dropped"].items()))
        merged.counters = {what: Counter(dict(sorted(one.items()))) for what, one in sorted(merged.counters.items())}
        merged.samples = dict(sorted(merged.samples.items()))
        for counts in merged.inputs.values():
            counts["outcomes"] = dict(sorted(counts["outcomes"].items()))
        merged.damaged.sort(key=lambda file: (file["source"], file["path"]))
        return merged

    def check(self) -> None:
        """Verifies that no document was lost: kept + dropped = read, and each stage reads what the one before kept.

        The same for the bytes of the input files: read + left out = all.

        Raises:
            RuntimeError: a stage or source does not add up; that is a fault of the program.
        """
        for source, counts in self.inputs.items():
            found = sum(size for _, size in counts["outcomes"].values())
            if found != counts["bytes"]:
                raise RuntimeError(f"source {source}: {counts['bytes']} bytes, {found} of them read or left out")
        before = None
        for stage, counts in self.stages.items():
            # Extraction turns pages into text, and sampling writes copies: there only documents can be compared.
            for place, unit in enumerate(("documents", "bytes")):
                read, kept = counts["in"][place], counts["kept"][place]
                dropped = sum(pair[place] for pair in counts["dropped"].values())
                if read != kept + dropped and not (place and stage == "extract"):
                    raise RuntimeError(f"stage {stage}: {read} {unit} read, {kept} kept and {dropped} dropped")
                if before is not None and read != before[place]:
                    raise RuntimeError(f"stage {stage}: {read} {unit} read, the stage before kept {before[place]}")
            before = counts["kept"]


def _add_outcomes(inputs: dict, source: str, size: int, outcomes: dict) -> None:
    mine = inputs.setdefault(source, {"bytes": 0, "outcomes": {}})
    mine["bytes"] += size
    for outcome, pair in outcomes.items():
        held = mine["outcomes"].setdefault(outcome, [0, 0])
        mine["outcomes"][outcome] = [a + b for a, b in zip(held, pair, strict=True)]


def _add(pair: list, size: int) -> None:
    pair[0] += 1
    pair[1] += size


def _order(row: list) -> tuple:
    return row[0], row[1]["id"]
