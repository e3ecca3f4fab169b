"""The stages of curation, one function for each piece of work, as workers run them.

A piece reads files and writes a file or folder that appears whole or not at all, so an existing one is done; a folder
of a bucket is done when its ledger is there. Workers exchange data through these files alone, and no result depends on
the order or the place of the work.

    work/extract/<unit>/   documents.jsonl.zst  dropped.jsonl.zst  ledger.json  and arrays, one row a document:
                           where (file, record), lengths, digests sorted with rows, keys sorted with rows, shingles
    work/exact/<part>.npy            [documents, 2]: dropped, kept
    work/candidates/<band>-<part>.npy  [pairs, 2]
    work/edges/<unit>.npy            [pairs, 2] that reach the threshold
    work/clusters.npy  clusters.json [documents, 2]: dropped, kept
    work/select/<unit>/    documents.jsonl.zst  dropped.jsonl.zst  ledger.json
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax import files
from qwen_jax.curation import (
    contamination,
    dedup,
    html,
    language,
    normalize,
    quality,
    readers,
    sampling,
    scoring,
    sources,
    storage,
)
from qwen_jax.curation.contamination import ContaminationConfig
from qwen_jax.curation.ledger import Ledger
from qwen_jax.curation.tally import Tally

_UNIT_BITS = 40  # a document's number is unit << 40 | row
_RANGE = 2.0**64
_SHOWN_CLUSTERS, _SHOWN_MEMBERS = 8, 4
DOCUMENTS, DROPPED, LEDGER = "documents.jsonl.zst", "dropped.jsonl.zst", "ledger.json"


@dataclasses.dataclass(frozen=True)
class CurationConfig:
    """Settings of a curation run. All of them enter its fingerprint.

    Attributes:
        text_field: field of JSON lines, column of Parquet.
        max_document_bytes: larger records are not read.
        languages: ISO 639-1 codes that are kept; None keeps all.
        min_language_probability: documents of a less certain language are dropped.
        language_groups: code to the codes that count as it: Cantonese and Wu as Chinese. Empty keeps them apart.
        exact: whether documents with the same tokens are dropped.
        fuzzy: near-duplicates; None turns it off.
        rules: language to `quality.Rules`; `default_rules` are for the others, None for none.
        scores: see `scoring.ScoreFilter`.
        contamination: see `contamination.ContaminationConfig`.
        weights: source to the average number of copies written; 1 for sources that are not named.
        seed: of sampling.
        documents_per_part: number of documents that deduplication holds at a time, per band; the default takes about
            1 GB of memory.
        unit_bytes: bytes up to which small files form one piece of work, and one file of the output; None takes a 64th
            of the corpus, from 1 to 64 MB.
    """

    text_field: str = "text"
    max_document_bytes: int = 10_000_000
    languages: tuple[str, ...] | None = ("en", "zh")
    min_language_probability: float = 0.5
    language_groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=lambda: dict(language.GROUPS))
    exact: bool = True
    fuzzy: dedup.FuzzyConfig | None = dedup.FuzzyConfig()
    rules: Mapping[str, quality.Rules] = dataclasses.field(
        default_factory=lambda: {"en": quality.Rules(), "zh": quality.CHINESE}
    )
    default_rules: quality.Rules | None = None
    scores: tuple[scoring.ScoreFilter, ...] = ()
    contamination: ContaminationConfig = ContaminationConfig()
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    documents_per_part: int = 16_000_000
    unit_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """Files of one source that are worked on together.

    Attributes:
        source: name of the source.
        base: folder of the source.
        files: paths.
        sizes: of the files in bytes, when they were listed.
        priority: position of the source, from 0.
    """

    source: str
    base: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    priority: int

    def relative(self, file: int) -> str:
        """Path of a file below the folder of the source."""
        return sources.relative(self.files[file], self.base)

    def document_id(self, file: int, record: int) -> str:
        """Such as `web/2023/part-3.warc.gz#17`: source, path below the folder of the source, record from 0."""
        return f"{self.source}/{self.relative(file)}#{record}"


@dataclasses.dataclass(frozen=True)
class Work:
    """Description of a run for its workers.

    Attributes:
        run: unlike that of any other run, also of one in the same folder.
    """

    folder: Path
    config: CurationConfig
    units: tuple[Unit, ...]
    run: str

    def extracted(self, unit: int) -> Path:
        """Folder of the extracted documents of a unit."""
        return self.folder / "extract" / f"{unit:06d}"

    def selected(self, unit: int) -> Path:
        """Folder of the selected documents of a unit."""
        return self.folder / "select" / f"{unit:06d}"

    def exact(self, part: int) -> Path:
        """The exact duplicates of a part of the digests."""
        return self.folder / "exact" / f"{part:06d}.npy"

    def candidates(self, band: int, part: int) -> Path:
        """The pairs that a part of a band proposes."""
        return self.folder / "candidates" / f"{band:03d}-{part:06d}.npy"

    def edges(self, unit: int) -> Path:
        """The near-duplicates whose first document is in a unit."""
        return self.folder / "edges" / f"{unit:06d}.npy"

    @property
    def clusters(self) -> Path:
        """Sizes and examples of clusters of near-duplicates, written after `clusters.npy`."""
        return self.folder / "clusters.json"

    def array(self, unit: int, name: str) -> np.ndarray:
        """An array of an extracted unit."""
        return storage.load_array(self.extracted(unit) / f"{name}.npy")

    def row(self, unit: int, name: str, row: int) -> np.ndarray:
        """One row of an array of an extracted unit."""
        return storage.load_row(self.extracted(unit) / f"{name}.npy", row)

    def for_each_unit(self, read: Callable[[int], Any]) -> list:
        """`read` of all units, in order; many at a time from a bucket, where waiting takes most of the time."""
        return self.for_each(read, range(len(self.units)))

    def for_each(self, read: Callable[[Any], Any], items: Iterable) -> list:
        """`read` of each item, as `for_each_unit`."""
        return files.in_parallel(read, list(items)) if files.is_remote(self.folder) else [read(one) for one in items]


def extract(work: Work, number: int) -> None:
    """Reads a unit: text out of pages, language, and data for deduplication."""
    unit, config = work.units[number], work.config
    with files.new_folder(work.extracted(number), last=LEDGER) as folder:
        ledger = Ledger(len(work.units))
        with storage.LineWriter(folder / DOCUMENTS) as kept, storage.LineWriter(folder / DROPPED) as dropped:
            sketcher = _Sketcher(folder, work.extracted(number), config.fuzzy or dedup.FuzzyConfig())
            for where, row in _extracted(unit, config, ledger, dropped):
                kept.write(row)
                sketcher.add(where, row["text"])
            sketcher.close()
        _write_ledger(folder, ledger, {DOCUMENTS: kept.lines, DROPPED: dropped.lines})


def _write_ledger(folder: Path, ledger: Ledger, lines: Mapping[str, int]) -> None:
    """Writes the ledger of a piece, with lines, size and checksum of its files."""
    made = {}
    for name, count in lines.items():
        if count:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            made[name] = {"lines": count, "bytes": (folder / name).stat().st_size, "sha256": digest}
    files.write_json(folder / LEDGER, ledger.to_json() | {"files": made}, sort_keys=True)


def _extracted(unit: Unit, config: CurationConfig, ledger: Ledger, dropped) -> Iterator[tuple[tuple[int, int], dict]]:
    for file, path in enumerate(unit.files):
        tally, before = Tally(unit.sizes[file]), unit.document_id(file, 0).removesuffix("0")
        records = readers.read(path, text_field=config.text_field, max_bytes=config.max_document_bytes, tally=tally)
        for index, record in enumerate(records):
            url = record.url
            if url.startswith(unit.base):
                # The same corpus in another folder gives the same bytes.
                url = url[len(unit.base) :].lstrip("/")
            row: dict[str, Any] = {
                "id": f"{before}{index}",
                "url": html.printable(url),
                "source": unit.source,
            }

            def drop(stage, reason, size, row=row, **more):
                ledger.drop(stage, reason, size)
                row = {**row, **more, "stage": stage, "reason": reason, "bytes": size}
                dropped.write(row)
                ledger.sample(f"{stage}: {reason}", row)

            ledger.enter("read", record.size)
            if record.problem:
                drop("read", record.problem, record.size)
                continue
            ledger.keep("read", record.size)
            ledger.enter("extract", record.size)
            try:
                row["text"] = _text(record, ledger)
            except html.Unreadable as error:
                drop("extract", str(error), record.size)
                continue
            size = len(row["text"].encode())
            ledger.keep("extract", size)
            ledger.enter("language", size)
            row["language"], row["language_probability"] = language.identify(row["text"], config.language_groups)
            ledger.count("language", row["language"])
            if config.languages is not None and row["language"] not in config.languages:
                drop("language", "other_language", size, row)
            elif row["language_probability"] < config.min_language_probability:
                drop("language", "uncertain_language", size, row)
            else:
                ledger.keep("language", size)
                yield (file, index), row
        ledger.file(unit.source, unit.relative(file), tally)


def _text(record: readers.Record, ledger: Ledger) -> str:
    text = record.payload
    if isinstance(text, bytes):
        text, encoding = html.decode(text, record.charset, is_html=record.is_html)
        ledger.count("encoding", encoding + (", with errors" if "\ufffd" in text else ""))
    text = html.extract(text) if record.is_html else html.printable(text).strip()
    if not any(map(str.isalnum, text)):
        raise html.Unreadable("no_text")
    return text


class _Sketcher:
    """Writes the arrays of a unit, taking texts in batches, into a folder that becomes `final`."""

    def __init__(self, folder: Path, final: Path, config: dedup.FuzzyConfig):
        self._folder, self._final, self._config = folder, final, config
        self._batch, self._size = [], 0
        self._where, self._lengths, self._digests, self._keys, self._counts = [], [], [], [], []
        self._shingles = (folder / "shingles.u32").open("wb")

    def add(self, where: tuple[int, int], text: str) -> None:
        self._where.append(where)
        self._lengths.append(len(text))
        self._batch.append(text)
        self._size += len(text)
        if self._size >= 1 << 20:
            self._flush()

    def _flush(self) -> None:
        if self._batch:
            made = dedup.sketch(self._batch, self._config)
            self._digests.append(made.digests)
            self._keys.append(made.keys)
            self._counts.append(np.diff(made.offsets))
            self._shingles.write(made.shingles.tobytes())
        self._batch, self._size = [], 0

    def close(self) -> None:
        self._flush()
        self._shingles.close()
        count = len(self._where)
        digests = np.concatenate([np.zeros((0, 2), np.uint64), *self._digests])
        keys = np.concatenate([np.zeros((self._config.bands, 0), np.uint64), *self._keys], axis=1)
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        rows = np.argsort(keys, axis=1, kind="stable")
        for name, array in {
            "where": np.array(self._where, np.int64).reshape(count, 2),
            "lengths": np.array(self._lengths, np.int64),
            "digests": digests[order],
            "digest_rows": order.astype(np.int64),
            "keys": np.take_along_axis(keys, rows, 1),
            "key_rows": rows.astype(np.int64),
            "offsets": np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *self._counts]))]),
        }.items():
            storage.save_array(self._folder / f"{name}.npy", array)
            storage.keep_array(self._final / f"{name}.npy", array)


def _slice(sorted_keys: np.ndarray, part: int, parts: int) -> slice:
    """Where the keys of a part lie: parts cut the range of 64 bits evenly."""
    low, high = (np.uint64(min(int(edge * _RANGE / parts), 2**64 - 1)) for edge in (part, part + 1))
    begin = np.searchsorted(sorted_keys, low)
    return slice(begin, len(sorted_keys) if part + 1 == parts else np.searchsorted(sorted_keys, high))


def exact(work: Work, part: int, parts: int) -> None:
    """Finds documents with equal digests; keeps the one that `dedup.representatives` says."""

    def read(number: int):
        digests = work.array(number, "digests")
        here = _slice(digests[:, 0], part, parts)
        rows = work.array(number, "digest_rows")[here]
        numbers = (np.uint64(number) << np.uint64(_UNIT_BITS)) | rows.astype(np.uint64)
        lengths = work.array(number, "lengths")[rows]
        return digests[here], numbers, lengths, np.full(len(rows), work.units[number].priority)

    found = work.for_each_unit(read)
    digests, numbers, lengths, priorities = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(numbers)
    digests, numbers, lengths, priorities = digests[order], numbers[order], lengths[order], priorities[order]
    _, group = np.unique(digests, axis=0, return_inverse=True)
    keep = numbers[dedup.representatives(group.ravel(), priorities, lengths)]
    pairs = np.stack([numbers, keep], 1)[numbers != keep]
    storage.save_array(work.exact(part), pairs)


def _dropped(arrays: list[np.ndarray], number: int) -> dict[int, int]:
    """Row to the number of the document kept in its place, for a unit; arrays are sorted by the document dropped."""
    found = {}
    low, high = (np.uint64(edge << _UNIT_BITS) for edge in (number, number + 1))
    for pairs in arrays:
        begin, end = np.searchsorted(pairs[:, 0], low), np.searchsorted(pairs[:, 0], high)
        found.update((int(one) & ((1 << _UNIT_BITS) - 1), int(kept)) for one, kept in pairs[begin:end])
    return found


def _exact_arrays(work: Work, parts: int) -> list[np.ndarray]:
    return work.for_each(storage.load_array, map(work.exact, range(parts))) if work.config.exact else []


def candidates(work: Work, band: int, part: int, parts: int) -> None:
    """Pairs that one band proposes, among documents that are no exact duplicates."""
    decisions = _exact_arrays(work, parts)

    def read(number: int):
        sorted_keys = work.row(number, "keys", band)
        here = _slice(sorted_keys, part, parts)
        rows = work.row(number, "key_rows", band)[here]
        offsets = work.array(number, "offsets")
        gone = np.fromiter(_dropped(decisions, number), np.int64)
        live = ~np.isin(rows, gone) & (offsets[rows + 1] > offsets[rows])
        return sorted_keys[here][live], (np.uint64(number) << np.uint64(_UNIT_BITS)) | rows[live].astype(np.uint64)

    keys, numbers = (np.concatenate(column) for column in zip(*work.for_each_unit(read), strict=True))
    order = np.argsort(numbers)
    pairs = dedup.candidate_pairs(keys[order], numbers[order])
    storage.save_array(work.candidates(band, part), pairs)


def edges(work: Work, number: int, parts: int) -> None:
    """Checks the pairs whose first document is in a unit: those that reach the threshold stay."""
    assert work.config.fuzzy is not None  # without it the pipeline leaves this stage out
    low, high = (np.uint64(edge << _UNIT_BITS) for edge in (number, number + 1))

    def read(path: Path) -> np.ndarray:
        array = storage.load_array(path)
        return array[np.searchsorted(array[:, 0], low) : np.searchsorted(array[:, 0], high)]

    paths = (work.candidates(band, part) for band in range(work.config.fuzzy.bands) for part in range(parts))
    pairs = work.for_each(read, paths)
    proposed = dedup.unique_pairs(np.concatenate([np.zeros((0, 2), np.uint64), *pairs]))

    def shingles_of(documents: np.ndarray):
        units = documents >> np.uint64(_UNIT_BITS)

        def read(unit: int):
            rows = (documents[units == unit] & np.uint64((1 << _UNIT_BITS) - 1)).astype(np.int64)
            offsets = work.array(unit, "offsets")
            slices = list(zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True))
            return storage.load_slices(work.extracted(unit) / "shingles.u32", slices), offsets[rows + 1] - offsets[rows]

        found = work.for_each(read, np.unique(units).tolist())  # documents are ascending
        return np.concatenate([part for parts, _ in found for part in parts]), np.concatenate([one for _, one in found])

    similar = dedup.similarities(proposed, shingles_of) >= work.config.fuzzy.threshold
    storage.save_array(work.edges(number), proposed[similar])


def clusters(work: Work) -> None:
    """Connected components of all pairs, and the document kept of each. Memory: some 100 bytes for a pair."""
    pairs = work.for_each_unit(lambda number: storage.load_array(work.edges(number)))
    documents, component = dedup.components(np.concatenate([np.zeros((0, 2), np.uint64), *pairs]))
    units = (documents >> np.uint64(_UNIT_BITS)).astype(np.int64)
    rows = (documents & np.uint64((1 << _UNIT_BITS) - 1)).astype(np.int64)
    lengths, priorities = np.zeros(len(documents), np.int64), np.zeros(len(documents), np.int64)
    for number in np.unique(units):
        here = units == number
        lengths[here] = work.array(int(number), "lengths")[rows[here]]
        priorities[here] = work.units[number].priority
    kept = documents[dedup.representatives(component, priorities, lengths)]
    representatives, sizes = np.unique(kept, return_counts=True)
    order = np.lexsort((representatives, -sizes))
    chosen = {int(representatives[place]) for place in order[:_SHOWN_CLUSTERS]}
    chance = sorted(range(len(order)), key=lambda place: sampling.uniform(str(representatives[place]), "cluster"))
    chosen |= {int(representatives[place]) for place in chance[:_SHOWN_CLUSTERS]}
    shown = {}
    for representative in sorted(chosen):
        members = documents[kept == representative]
        others = [int(one) for one in members if int(one) != representative][: _SHOWN_MEMBERS - 1]
        shown[str(representative)] = {"size": len(members), "members": [representative, *others]}
    values, numbers = np.unique(sizes, return_counts=True)
    summary = {"sizes": {str(size): int(number) for size, number in zip(values, numbers, strict=True)}, "shown": shown}
    storage.save_array(work.folder / "clusters.npy", np.stack([documents, kept], 1)[documents != kept])
    storage.save_json(work.clusters, summary)


def select(work: Work, number: int, parts: int) -> None:
    """Selects documents of a unit: drops those that duplication, rules, scores, benchmarks and sampling exclude."""
    unit, config = work.units[number], work.config
    with files.new_folder(work.selected(number), last=LEDGER) as folder:
        ledger = Ledger(len(work.units))
        with storage.LineWriter(folder / DOCUMENTS) as kept, storage.LineWriter(folder / DROPPED) as dropped:
            judge = _Judge(work, number, parts, ledger)
            for index, row in enumerate(storage.read_lines(work.extracted(number) / DOCUMENTS)):
                size = len(row["text"].encode())
                stage, reason, more = judge(index, row, size)
                if stage is not None and reason is not None:  # both, or neither
                    ledger.drop(stage, reason, size)
                    row = {**row, **more, "stage": stage, "reason": reason, "bytes": size}
                    dropped.write(row)
                    ledger.sample(f"{stage}: {reason}", row)
                    continue
                row |= more
                ledger.sample("kept", row)
                ledger.count("kept_language", row["language"])
                ledger.count("kept_source", unit.source)
                copies = sampling.copies(row["id"], config.weights.get(unit.source, 1.0), config.seed)
                ledger.count("written_documents", unit.source, copies)
                ledger.count("written_bytes", unit.source, copies * size)
                for copy in range(copies):
                    kept.write(row | ({"copy": copy} if copies > 1 else {}))
        _write_ledger(folder, ledger, {DOCUMENTS: kept.lines, DROPPED: dropped.lines})


class _Judge:
    """Decides on the documents of a unit, in order of `ledger.STAGES`."""

    def __init__(self, work: Work, number: int, parts: int, ledger: Ledger):
        self._work, self._number, self._ledger = work, number, ledger
        self._exact = _dropped(_exact_arrays(work, parts), number)
        self._fuzzy, self._shown = {}, {}
        if work.config.fuzzy is not None:
            self._fuzzy = _dropped([storage.load_array(work.folder / "clusters.npy")], number)
            for representative, cluster in storage.load_json(work.clusters)["shown"].items():
                self._shown |= {member: representative for member in cluster["members"]}
        self._benchmarks = storage.load_array(work.folder / "benchmarks.npy")

    def __call__(self, index: int, row: dict, size: int) -> tuple[str | None, str | None, dict]:
        """Stage and reason of the drop, or None and None; and further fields of the document."""
        shown = self._shown.get((self._number << _UNIT_BITS) | index)
        if shown is not None:
            self._ledger.sample(f"cluster: {shown}", row)
        more: dict = {}
        tokens = functools.cache(lambda: normalize.tokenize([row["text"]]))
        for stage, check in (
            ("exact", lambda: self._duplicate(self._exact, index, more)),
            ("fuzzy", lambda: self._duplicate(self._fuzzy, index, more)),
            ("rules", lambda: self._rules(row, tokens(), more)),
            ("scores", lambda: self._scores(row, more)),
            ("contamination", lambda: self._contamination(tokens(), more)),
            ("sampling", lambda: self._sampling(row)),
        ):
            self._ledger.enter(stage, size)
            reason = check()
            if reason is not None:
                return stage, reason, more
            self._ledger.keep(stage, size)
        return None, None, more

    def _duplicate(self, dropped: Mapping[int, int], index: int, more: dict) -> str | None:
        if index not in dropped:
            return None
        unit, row = dropped[index] >> _UNIT_BITS, dropped[index] & ((1 << _UNIT_BITS) - 1)
        more["duplicate_of"] = self._work.units[unit].document_id(*self._work.array(unit, "where")[row].tolist())
        return "duplicate" if dropped is self._exact else "near_duplicate"

    def _rules(self, row: dict, tokens: normalize.Tokens, more: dict) -> str | None:
        values = quality.statistics(row["text"], row["language"], tokens)
        # Scores are computed here too, so that the histograms show all documents that the rules saw.
        more["scores"] = {
            one.name: round(float(one.scorer(row["text"])), 6)
            for one in self._work.config.scores
            if one.wants(row["language"])
        }
        self._ledger.value(row["id"], row["language"], values | more["scores"])
        rules = self._work.config.rules.get(row["language"], self._work.config.default_rules)
        reason = rules.broken(values) if rules is not None else None
        if reason is not None:
            more["statistics"] = values
        return reason

    def _scores(self, row: dict, more: dict) -> str | None:
        for one in self._work.config.scores:
            if one.name in more["scores"] and (reason := one.broken(more["scores"][one.name])):
                return reason
        return None

    def _contamination(self, tokens: normalize.Tokens, more: dict) -> str | None:
        config = self._work.config.contamination
        count = contamination.shared(tokens, self._benchmarks, config)
        if count < config.min_shared:
            return None
        more["shared_ngrams"] = count
        return "in_benchmark"

    def _sampling(self, row: dict) -> str | None:
        weight = self._work.config.weights.get(row["source"], 1.0)
        return None if sampling.copies(row["id"], weight, self._work.config.seed) else "not_sampled"
