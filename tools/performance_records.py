"""Measured comparisons: what `benchmarks/results/*.json` holds, read and checked.

CONTRIBUTING.md ("How to record a benchmark") gives the fields. A figure is written there by hand once;
docs/performance.md and its pictures are made from it.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MACHINES = "machines.json"
LOADS = re.compile(r"quiet\b|load \d|not timed$")
ROUNDING = (
    0.1  # a recorded ratio may be the median of the rounds' ratios: so much may lie between it and that of the medians
)


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations and bytes of main memory for one unit that a row counts (a token), or for the step that it times."""

    operations: float
    bytes: float
    counted: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      case: what was done.
      measure: unit of `ours` and `peer`.
      better: "more" or "less".
      ours, peer: measured values; two where there are a low and a high bound. None: the ratio alone was noted, or there
        is no peer.
      ratio: ours over the peer's, of each value.
      wanted: the least (or most) ratio that was aimed at; without a peer, the least (or most) of `ours`.
      limit: why the aim was missed.
      also: other figures, ours and the peer's, as text.
    """

    case: str
    measure: str
    better: str
    ours: tuple[float, ...]
    peer: tuple[float, ...]
    peer_name: str | None
    ratio: tuple[float, ...]
    ratio_by_cpu: float | None
    wanted: float | None
    limit: str | None
    also: dict[str, tuple[str, str]]
    work: Work | None

    @property
    def met(self) -> bool | None:
        """Whether the aim was reached; None without one."""
        if self.wanted is None:
            return None
        value = (self.ratio or self.ours)[0]
        return value >= self.wanted if self.better == "more" else value <= self.wanted

    def operations_per_second(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """What `ours` or `peer` comes to, by `work`."""
        assert self.work is not None
        if self.better == "more":
            return tuple(value * self.work.operations for value in values)
        return tuple(self.work.operations / value for value in values)


@dataclasses.dataclass(frozen=True)
class Run:
    """Rows measured by one command."""

    date: str
    machine: str
    load: str
    command: str
    commit: str
    versions: str
    about: str | None
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One file."""

    name: str
    order: int
    title: str
    about: str
    history: str
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine or device, and its limits.

    Attributes:
      roofs: most operations per second, by what they are.
      bandwidth: most bytes per second of main memory; None where it was not measured.
      source: where the limits are from.
      estimated: nothing ran there.
    """

    name: str
    title: str
    roofs: dict[str, float]
    bandwidth: float | None
    source: str
    estimated: bool


def _fields(kind: type, found: dict, where: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected the fields of a {kind.__name__.lower()}, found {found!r:.60}")
    missing, unknown = set(needed) - set(found), set(found) - {*needed, *optional}
    if missing or unknown:
        wrong = [f"{name!r} is missing" for name in sorted(missing)]
        wrong += [f"{name!r} is unknown" for name in sorted(unknown)]
        raise ValueError(f"{where}: {', '.join(wrong)}; CONTRIBUTING.md lists the fields")


def _numbers(found, where: str) -> tuple[float, ...]:
    values = () if found is None else tuple(found) if isinstance(found, list) else (found,)
    if any(isinstance(one, bool) or not isinstance(one, int | float) or not one > 0 for one in values):
        raise ValueError(f"{where}: expected positive numbers, found {found!r}")
    return values


def _ratio(found: dict, ours: tuple[float, ...], peer: tuple[float, ...], where: str) -> tuple[float, ...]:
    """The recorded ratio, which has to agree with the values, or else theirs."""
    given = _numbers(found.get("ratio"), f"{where}, ratio")
    if ours and peer and len(ours) != len(peer):
        raise ValueError(f"{where}: ours has {len(ours)} value(s), the peer {len(peer)}")
    own = tuple(a / b for a, b in zip(ours, peer, strict=True)) if ours and peer else ()
    for said, is_so in zip(given, own, strict=False):
        if abs(said / is_so - 1) > ROUNDING:
            raise ValueError(f"{where}: ratio {said} is not that of the values, {is_so:.3f}")
    return given or own


def read_row(found: dict, where: str) -> Row:
    """Checks one row.

    Raises:
      ValueError: a field is missing, unknown or wrong, or an aim was missed and `limit` does not say why.
    """
    optional = ("peer", "peer_name", "ratio", "ratio_by_cpu", "wanted", "limit", "also", "work")
    _fields(Row, found, where, ("case", "measure", "better", "ours"), optional)
    where = f"{where}, {found['case']!r}"
    if found["better"] not in ("more", "less"):
        raise ValueError(f'{where}: better is "more" or "less", found {found["better"]!r}')
    ours, peer = (_numbers(found.get(side), f"{where}, {side}") for side in ("ours", "peer"))
    work = found.get("work")
    if work is not None:
        _fields(Work, work, f"{where}, work", ("operations", "bytes", "counted"))
        work = Work(**work)
    row = Row(
        case=found["case"],
        measure=found["measure"],
        better=found["better"],
        ours=ours,
        peer=peer,
        peer_name=found.get("peer_name"),
        ratio=_ratio(found, ours, peer, where),
        ratio_by_cpu=found.get("ratio_by_cpu"),
        wanted=found.get("wanted"),
        limit=found.get("limit"),
        also={name: (values[0], values[1]) for name, values in found.get("also", {}).items()},
        work=work,
    )
    if not row.ours and not row.ratio:
        raise ValueError(f"{where}: neither ours nor a ratio is given")
    if (row.peer or row.ratio) and not row.peer_name:
        raise ValueError(f"{where}: peer_name is missing")
    if row.met is False and not row.limit:
        raise ValueError(f"{where}: the aim {row.wanted} is missed; `limit` has to say why")
    return row


def read_benchmark(path: Path, machines: dict[str, Machine]) -> Benchmark:
    """Reads one file.

    Raises:
      ValueError: it is not JSON, or a field is missing, unknown or wrong.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    _fields(Benchmark, found, str(path), ("order", "title", "about", "history", "runs"))
    runs = []
    for number, run in enumerate(found["runs"], 1):
        where = f"{path}, run {number}"
        _fields(Run, run, where, ("date", "machine", "load", "command", "commit", "versions", "rows"), ("about",))
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"]):
            raise ValueError(f"{where}: date is YYYY-MM-DD, found {run['date']!r}")
        if run["machine"] not in machines:
            raise ValueError(f"{where}: {MACHINES} has no machine {run['machine']!r}, only {', '.join(machines)}")
        if not LOADS.match(run["load"]):
            raise ValueError(f'{where}: load is "quiet", "load 8 to 11" or "not timed", found {run["load"]!r}')
        rows = tuple(read_row(row, f"{where}, row {index}") for index, row in enumerate(run["rows"], 1))
        runs.append(Run(**{"about": None, **run, "rows": rows}))
    head = {name: found[name] for name in ("order", "title", "about", "history")}
    return Benchmark(name=path.stem, runs=tuple(runs), **head)


def read_machines(path: Path) -> dict[str, Machine]:
    """Reads the machines; limits of absent devices are those of their file in gin/hardware/.

    Raises:
      ValueError: a field is missing or unknown.
    """
    machines = {}
    for name, found in json.loads(path.read_text(encoding="utf-8")).items():
        where = f"{path}, {name!r}"
        _fields(Machine, found, where, ("title",), ("roofs", "bandwidth", "source", "hardware"))
        roofs, bandwidth = dict(found.get("roofs", {})), found.get("bandwidth")
        source = found.get("source", "")
        if hardware := found.get("hardware"):
            text = (ROOT / hardware).read_text(encoding="utf-8")
            values = dict(re.findall(r"^HardwareConfig\.(\w+) = ([\d.]+)$", text, re.MULTILINE))
            roofs = {"bfloat16": float(values["peak_tflops"]) * 1e12}
            bandwidth, source = float(values["hbm_gbps"]) * 1e9, f"the maker's figures in `{hardware}`"
        machines[name] = Machine(name, found["title"], roofs, bandwidth, source, "hardware" in found)
    return machines


def read_all(folder: Path) -> tuple[dict[str, Machine], list[Benchmark]]:
    """Machines and benchmarks of a folder, in the order of the page.

    Raises:
      ValueError: as above.
    """
    machines = read_machines(folder / MACHINES)
    files = sorted(path for path in folder.glob("*.json") if path.name != MACHINES)
    return machines, sorted((read_benchmark(path, machines) for path in files), key=lambda one: (one.order, one.name))


def rows_with_work(benchmarks: list[Benchmark], machine: Machine) -> Iterator[tuple[Benchmark, Run, Row]]:
    """Rows whose operations and bytes are known, of a machine whose limits are."""
    if not machine.roofs:
        return
    for benchmark in benchmarks:
        for run in benchmark.runs:
            if run.machine == machine.name:
                yield from ((benchmark, run, row) for row in run.rows if row.work is not None and row.ours)
