"""From a crawl to a training set (report section 2.1).

Stages follow one another; within a stage, pieces of work (`qwen_jax.curation.stages`) are dealt to workers
(`qwen_jax.workers`: processes of this machine, or an engine of Apache Beam), which see one folder. What a piece makes
appears whole, so a run that was killed goes on with the pieces that are missing, and the bytes written depend neither
on the number of workers nor on interruptions.

    output/documents/<source>/*.jsonl.zst   documents kept: text, url, source, language, scores; read by `local_files`
    output/dropped/<source>/*.jsonl.zst     documents dropped, with stage and reason
    output/manifest.json                    counts of each stage, files with checksums, the configuration
    output/report.html                      for reading by hand
    output/work/                            removed at the end unless it is to be kept
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.curation import contamination, report, stages, storage
from qwen_jax.curation.ledger import Ledger
from qwen_jax.curation.sources import PARQUET, Source, file_format, list_source, readable
from qwen_jax.curation.tally import UNREADABLE
from qwen_jax.workers import Workers, open_workers

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
MANIFEST, REPORT = "manifest.json", "report.html"
_PLAN = "plan.json"
_PRELOADED = "qwen_jax.curation.preloaded"
# Without `unit_bytes`, a corpus has some 64 pieces, enough for the cores of one machine, of these sizes.
_PIECES, _MIN_UNIT, _MAX_UNIT = 64, 1_000_000, 64_000_000


def curate(
    inputs: Mapping[str, Sequence[str]],
    output: str | os.PathLike,
    config: stages.CurationConfig = stages.CurationConfig(),
    *,
    num_workers: int = 1,
    beam_options: Sequence[str] = (),
    keep_work: bool = False,
) -> dict:
    """Runs the pipeline, or the rest of an interrupted run.

    Args:
        inputs: name of a source to its folders and globs. Of duplicates in several sources, the one in the source
            that is named first is kept.
        output: a folder that all workers see, or one in a bucket (`gs://…`, `s3://…`), as inputs may be.
        config: languages, rules, scores and other settings.
        num_workers: worker processes on this machine; 1 works in this process.
        beam_options: such as `--runner=FlinkRunner`, in the place of workers on this machine.
        keep_work: leave `output/work` there.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: no input, or no benchmark or model file.
        ValueError: something in the configuration, or `output` was made from another corpus or configuration.
        RuntimeError: the counts of some stage do not add up.
    """
    output = files.as_path(output, "output")
    output = output if files.is_remote(output) else Path(os.path.abspath(output))
    sources = [list_source(name, patterns) for name, patterns in inputs.items()]
    _check(config, sources)
    description = _describe(sources, config)
    if (output / MANIFEST).is_file():
        manifest = files.read_json(output / MANIFEST)
        _check_same(output, manifest, description)
        logger.info("%s is complete already", output)
        if not keep_work:
            files.remove_tree(output / "work")  # the run was killed while it cleaned up
        return manifest
    work = stages.Work(output / "work", config, _units(sources, config.unit_bytes), uuid.uuid4().hex)
    storage.keep_objects_of(work.run)
    _check_output(output, work.folder, description)
    # Wrong options are refused before anything is written.
    with open_workers(num_workers, beam_options, (_PRELOADED,)) as workers, files.locked(work.folder):
        begun = _prepare(work, description)
        _run_stages(work, _Runner(work, workers, begun))
        manifest = _finish(work, output, description)
    if not keep_work:
        files.remove_tree(work.folder)
    return manifest


def check_read(manifest: dict, max_unread_share: float) -> None:
    """Refuses a run that could not read more than this share of the bytes of some input file.

    Raises:
        ValueError: names the worst of these files.
    """
    found = [
        (one["unread"] / one["bytes"] if one["bytes"] else 1.0, one["source"], one["path"], one["outcomes"])
        for one in manifest["damaged_files"]
    ]
    found = sorted((one for one in found if one[0] > max_unread_share), reverse=True, key=lambda one: one[0])
    if found:
        share, source, path, outcomes = found[0]
        reasons = ", ".join(sorted(set(outcomes) & UNREADABLE))
        accepted = min(1, round(share + 0.005, 2))
        raise ValueError(
            f"{len(found)} input file{'s' * (len(found) > 1)} could not be read by more than {max_unread_share:.3g} of "
            f"the bytes, worst {source}/{path} ({share:.1%}: {reasons}); the output is complete but lacks them: see "
            f"report.html, mend or remove the files, or accept it with --max_unread_share={accepted:g}"
        )


def _check_output(output: Path, work: Path, description: dict) -> None:
    """Raises unless `output` is new or holds an interrupted run of the same description: nothing else is touched."""
    if (work / _PLAN).is_file():
        _check_same(output, files.read_json(work / _PLAN), description)
        logger.info("%s: going on with an interrupted run", output)
        return
    found = (
        {path.name for path in output.iterdir()} - {work.name} if files.is_remote(output) or output.exists() else set()
    )
    found |= {path.name for path in work.glob("[!.]*")}
    if found:
        raise ValueError(f"{output} holds {min(found)} and no run of curation: give an --output that is new or empty")


def _prepare(work: stages.Work, description: dict) -> bool:
    """Writes the plan and what all pieces need; returns whether an earlier run has begun: it may have made pieces."""
    # Benchmarks that cannot be read must not leave a plan, which would bind the folder to them.
    benchmarks = work.folder / "benchmarks.npy"
    begun = (work.folder / _PLAN).is_file()
    if not begun or not benchmarks.is_file():
        index = contamination.index(work.config.contamination)
        # In this order: a folder without a plan must be empty.
        files.write_json(work.folder / _PLAN, description, sort_keys=True)
        storage.save_array(benchmarks, index)
    return begun


def _check(config: stages.CurationConfig, sources: Sequence[Source]) -> None:
    unknown = sorted(set(config.weights) - {source.name for source in sources})
    if unknown:
        names = ", ".join(source.name for source in sources)
        raise ValueError(f"weights name a source {unknown[0]!r} that is no input; there are {names}")
    for name, weight in config.weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of source {name} is {weight}, expected a number of at least 0")
    for name, members in config.language_groups.items():
        for code in config.languages or ():
            if code in members:
                advice = "make_config.language_groups={} keeps them apart"
                raise ValueError(f"languages has {code!r}, which counts as {name!r}: {advice}")
    names = [one.name for one in config.scores]
    if len(set(names)) < len(names):
        raise ValueError(f"two scores have one name: {', '.join(names)}")
    for one in config.scores:
        one.scorer("a text that shows, before hours of work, whether the model can be read")


def _describe(sources: Sequence[Source], config: stages.CurationConfig) -> dict:
    """Inputs and settings of a run; equal descriptions give equal bytes."""
    listing: dict[str, list[list]] = {
        source.name: [[os.path.relpath(path, source.base), size] for path, size in source.files] for source in sources
    }
    models = {}
    for one in config.scores:
        path = getattr(one.scorer, "path", None)
        if path is not None and files.as_path(path).is_file():
            models[one.name] = _sha256(files.as_path(path))
    settings = _plain(config)
    settings["contamination"]["files"] = [os.path.basename(path) for path in config.contamination.files]
    benchmarks = [_sha256(Path(path)) for path in config.contamination.files]
    digest = hashlib.sha256(json.dumps([listing, settings, models, benchmarks], sort_keys=True).encode()).hexdigest()
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": digest,
        "inputs": {name: {"files": len(files), "bytes": sum(s for _, s in files)} for name, files in listing.items()},
        "files_left_out": {
            source.name: [[readable(os.path.relpath(path, source.base)), reason] for path, reason in source.left_out]
            for source in sources
        },
        "listing": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        "config": settings,
    }


def _plain(value: object) -> Any:
    """A configuration as JSON; of files, only the names."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(fields.get("path"), str):
            fields["path"] = os.path.basename(fields["path"])
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_same(output: Path, found: dict, expected: dict) -> None:
    if found["fingerprint"] == expected["fingerprint"]:
        return
    what = [name for name in ("inputs", "listing", "config") if found.get(name) != expected[name]]
    changed = {"inputs": "another corpus", "listing": "another corpus", "config": "another configuration"}
    reason = " and ".join(dict.fromkeys(changed[name] for name in what)) or "other model or benchmark files"
    raise ValueError(f"{output} was made from {reason}: give another --output, or delete that folder to make it anew")


def _units(sources: Sequence[Source], unit_bytes: int | None) -> tuple[stages.Unit, ...]:
    units = []
    if unit_bytes is None:  # by the corpus, not by the workers: each unit is a file of the output
        total = sum(size for source in sources for _, size in source.files)
        unit_bytes = min(max(total // _PIECES, _MIN_UNIT), _MAX_UNIT)
    for priority, source in enumerate(sources):
        group, size = [], 0
        for file in source.files:
            group.append(file)
            size += file[1]
            if size >= unit_bytes or file == source.files[-1]:
                units.append(stages.Unit(source.name, source.base, *zip(*group, strict=True), priority))
                group, size = [], 0
    return tuple(units)


def _run_stages(work: stages.Work, run: "_Runner") -> None:
    config, numbers = work.config, range(len(work.units))
    # The largest first, so that no worker begins with one when the others are done.
    by_size = sorted(numbers, key=lambda number: -sum(work.units[number].sizes))
    units = [(number,) for number in by_size]
    run(
        "extract",
        stages.extract,
        units,
        lambda number: work.extracted(number) / stages.LEDGER,
        lambda number: [files.as_path(file) for file in work.units[number].files if file_format(file) != PARQUET],
    )
    total = sum(work.for_each_unit(lambda number: len(work.array(number, "lengths"))))
    parts = max(1, -(-total // config.documents_per_part))
    units = [(number, parts) for number in by_size]
    if config.exact:
        run(
            "exact duplicates",
            stages.exact,
            [(part, parts) for part in range(parts)],
            lambda part, _: work.exact(part),
        )
    if config.fuzzy is not None:
        pieces = [(band, part, parts) for band in range(config.fuzzy.bands) for part in range(parts)]
        run(
            "candidates of near-duplicates",
            stages.candidates,
            pieces,
            lambda band, part, _: work.candidates(band, part),
        )
        run(
            "near-duplicates",
            stages.edges,
            units,
            lambda number, _: work.edges(number),
        )
        if not (run.begun and work.clusters.is_file()):
            stages.clusters(work)
    run(
        "select",
        stages.select,
        units,
        lambda number, _: work.selected(number) / stages.LEDGER,
        lambda number, _: [work.extracted(number) / stages.DOCUMENTS],
    )


class _Runner:
    """Runs the pieces of a stage that are not done.

    Attributes:
        begun: whether pieces may be done; of a new run none is.
    """

    def __init__(self, work: stages.Work, workers: Workers, begun: bool):
        self._work, self._workers, self.begun = work, workers, begun

    def __call__(
        self,
        label: str,
        function: Callable,
        pieces: Sequence[tuple],
        made: Callable[..., Path],
        reads: Callable[..., Sequence[Path]] | None = None,
    ) -> None:
        """Calls `function(work, *piece)` for each piece whose file, `made(*piece)`, is not there.

        `reads` of a piece gives the file that it reads first.
        """
        # A piece is a file of one of these folders, or a folder there.
        for folder in {folder for piece in pieces for folder in list(made(*piece).parents)[:2]}:
            files.remove_unfinished(folder)

        def done(pieces: Sequence[tuple]) -> list[bool]:
            return files.are_files([made(*piece) for piece in pieces])

        made_before = done(pieces) if self.begun else [False] * len(pieces)
        missing = [piece for piece, there in zip(pieces, made_before, strict=True) if not there]
        logger.info("%s: %d of %d pieces to do", label, len(missing), len(pieces))
        started = time.monotonic()
        self._workers(label, functools.partial(_do, function, self._work), missing, done, reads)
        if missing:
            logger.info("%s: done in %.1f s", label, time.monotonic() - started)


def _do(function: Callable, work: stages.Work, *piece) -> None:
    """A piece in a worker, which may have served other runs: a cluster outlives them."""
    storage.keep_objects_of(work.run)
    function(work, *piece)


def _finish(work: stages.Work, output: Path, description: dict) -> dict:
    """Checks the counts, gives the files their places, and writes report and manifest, the manifest last."""
    units = range(len(work.units))
    folders = [folder(number) for folder in (work.extracted, work.selected) for number in units]
    read = work.for_each(lambda folder: files.read_json(folder / stages.LEDGER), folders)
    ledgers = [read[: len(units)], read[len(units) :]]
    ledger = Ledger.merge(one for column in ledgers for one in column)
    ledger.check()
    placed = _place_files(work, output, *ledgers)
    counted = ledger.to_json()
    clusters = storage.load_json(work.clusters) if work.config.fuzzy is not None else None
    manifest = description | {
        "stages": counted["stages"],
        "counters": counted["counters"],
        "bytes_read": counted["inputs"],
        "damaged_files": counted["damaged"],
        "clusters": clusters["sizes"] if clusters else {},
        "benchmark_ngrams": len(storage.load_array(work.folder / "benchmarks.npy")),
        "files": placed,
    }
    with files.new_file(output / REPORT) as temporary:
        temporary.write_text(report.render(ledger, work.config, clusters, description), encoding="utf-8")
    files.write_json(output / MANIFEST, manifest, sort_keys=True)
    return manifest


def _place_files(
    work: stages.Work, output: Path, extracted: Sequence[dict], selected: Sequence[dict]
) -> dict[str, list[dict]]:
    """Links or copies the files of the pieces to their places, and lists them.

    Args:
        extracted, selected: ledgers of the pieces.

    Raises:
        RuntimeError: a file is missing that a piece wrote.
    """
    placed: dict[str, list[dict]] = {"documents": [], "dropped": []}
    files.in_parallel(lambda kind: files.remove_tree(output / kind), list(placed))
    moves, counts = [], {}
    for number, unit in enumerate(work.units):
        shard = counts[unit.source] = counts.get(unit.source, -1) + 1
        for kind, name, made, ledger, step in (
            ("documents", stages.DOCUMENTS, work.selected(number), selected[number], ""),
            ("dropped", stages.DROPPED, work.extracted(number), extracted[number], "-extract"),
            ("dropped", stages.DROPPED, work.selected(number), selected[number], "-select"),
        ):
            if name in ledger["files"]:
                shown = f"{kind}/{unit.source}/part-{shard:06d}{step}.jsonl.zst"
                placed[kind].append({"path": shown, **ledger["files"][name]})
                moves.append((made / name, shown, ledger["files"][name]["lines"]))

    def place(move: tuple[Path, str, int]) -> None:
        source, shown, lines = move
        try:
            storage.place(source, output / shown)
        except FileNotFoundError as error:
            raise RuntimeError(f"{source} is gone, with {lines} lines: delete {output} and start again") from error

    files.in_parallel(place, moves)
    return placed
