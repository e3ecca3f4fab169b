"""Pictures of docs/performance.md: a roofline of each machine, and how far each measured row is from its aim."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from performance_records import Benchmark, Machine, Row, Run
from PIL import Image

from qwen_jax import files

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, BLUE, ORANGE, GREY = "#1d2733", "#1f4e8c", "#c25e00", "#5b6875"
DRAWN = "Drawn from"  # where a picture keeps the digest of its data
STYLE = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.facecolor": "white",
}


def digest(data) -> str:
    """Of JSON data that a picture shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def drawn_from(path: Path) -> str | None:
    """The digest of the data that a picture was drawn from; None where there is no picture."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(DRAWN)


def _save(figure: plt.Figure, path: Path, data) -> None:
    with files.new_file(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png", metadata={DRAWN: digest(data), "Software": None})
    plt.close(figure)


def rate(operations: float) -> str:
    """Operations per second in words."""
    return f"{operations / 1e12:.3g} TFLOP/s" if operations >= 1e12 else f"{operations / 1e9:.3g} GFLOP/s"


def roof(machine: Machine, intensity: float, name: str) -> float:
    """The most operations per second at so many operations per byte."""
    most = machine.roofs[name]
    return min(most, machine.bandwidth * intensity) if machine.bandwidth else most


def roof_of(machine: Machine, row: Row) -> str:
    """Which of the machine's roofs is a row's: that of the type that its case names, or else the first."""
    return next((name for name in machine.roofs if row.case.startswith(name)), next(iter(machine.roofs)))


def short(benchmark: Benchmark, row: Row) -> str:
    """What a mark stands for, for the legend."""
    return f"{benchmark.title.split(',')[0]}: {row.case}" if benchmark.name.startswith("train") else row.case


def points(found: Iterable[tuple[Benchmark, Run, Row]]) -> list[tuple[Benchmark, list[Row]]]:
    """Rows with one value of ours, which differ in their peers, belong together."""
    together: dict[tuple, tuple[Benchmark, list[Row]]] = {}
    for benchmark, run, row in found:
        key = (benchmark.name, run.date, run.command, row.case, row.measure, row.ours)
        together.setdefault(key, (benchmark, []))[1].append(row)
    return list(together.values())


def roofline_data(machine: Machine, found: Sequence[tuple[Benchmark, Run, Row]]) -> list:
    """All that the picture shows."""
    rows = [
        [short(benchmark, row), row.ours, row.peer, row.peer_name, row.work and [row.work.operations, row.work.bytes]]
        for benchmark, _, row in found
    ]
    return [machine.title, machine.roofs, machine.bandwidth, machine.estimated, rows]


def draw_roofline(machine: Machine, found: Sequence[tuple[Benchmark, Run, Row]], path: Path) -> None:
    """Operations per second over operations per byte: limits as lines, numbered points ours, diamonds the peers'."""
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(7, 5.6), layout="constrained")
        groups = points(found)
        at = [rows[0].work.operations / rows[0].work.bytes for _, rows in groups if rows[0].work]
        left, right = min(at) / 4, max(at) * 4
        heights = []
        for name, most in machine.roofs.items():
            color = INK if name == next(iter(machine.roofs)) else GREY
            if machine.bandwidth:
                edge = most / machine.bandwidth
                left, right = min(left, edge / 3), max(right, edge * 3)
                panel.plot([left, edge, right], [left * machine.bandwidth, most, most], color=color, linewidth=2)
                memory = f"{machine.bandwidth / 1e9:,.0f} GB/s"
                panel.annotate(memory, (edge / 1.6, most / 1.6), (9, -9), textcoords="offset points", fontsize=12)
            else:
                panel.plot([left, right], [most, most], color=color, linewidth=2)
            panel.text(
                right / 1.03, most * 1.04, f"{name}: {rate(most)}", ha="right", va="bottom", color=color, fontsize=12
            )
            heights.append(most)
        for number, ((_, rows), x) in enumerate(zip(groups, at, strict=True), 1):
            first = rows[0]
            ours = first.operations_per_second(first.ours)
            panel.plot([x] * len(ours), ours, "o-", color=BLUE, markersize=9, linewidth=3, zorder=3)
            for row in rows:
                peer = row.operations_per_second(row.peer)
                panel.plot([x * 1.1] * len(peer), peer, "D-", color=ORANGE, markersize=7, linewidth=2, zorder=2)
                heights += peer
            name = f"{number}: {first.case}".replace("`", "") if len(groups) < 5 else str(number)
            panel.annotate(name, (x, max(ours)), (-9, 7), textcoords="offset points", ha="right", fontsize=12)
            heights += ours
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlim(left, right)
        panel.set_ylim(min(heights) / 2.5, max(heights) * 1.6)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("operations per byte of main memory")
        panel.set_ylabel("operations per second")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value).removesuffix("LOP/s")))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.grid(alpha=0.3)
        panel.set_title(f"{machine.title}: {'estimated' if machine.estimated else 'measured'}", loc="left")
        peers = ", ".join(dict.fromkeys((row.peer_name or "").split(",")[0] for _, _, row in found if row.peer))
        for marker, color, label in (("o", BLUE, "qwen_jax"), ("D", ORANGE, peers)):
            panel.plot([], [], marker, color=color, label=label, markersize=8)
        panel.legend(loc="lower right", fontsize=12, framealpha=1)
        _save(figure, path, roofline_data(machine, found))


def aims_data(benchmarks: Sequence[Benchmark]) -> list[tuple[str, list[tuple[float, bool]]]]:
    """(title, [(how many times better than its aim, quiet)]) of each benchmark that has aims."""
    found = []
    for benchmark in benchmarks:
        rows = []
        for run in benchmark.runs:
            for row in run.rows:
                if row.wanted is not None:
                    value = (row.ratio or row.ours)[0] / row.wanted
                    rows.append((value if row.better == "more" else 1 / value, not run.load.startswith("load")))
        if rows:
            found.append((benchmark.title.split(",")[0].replace("`", ""), rows))
    return found


def draw_aims(benchmarks: Sequence[Benchmark], path: Path) -> None:
    """A line for each benchmark, a dot for each of its rows: right of the middle the aim is met."""
    data = aims_data(benchmarks)
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(7, 1.3 + 0.62 * len(data)), layout="constrained")
        lowest = min(value for _, rows in data for value, _ in rows)
        highest = max(value for _, rows in data for value, _ in rows)
        panel.set_xscale("log")
        panel.set_xlim(min(lowest / 1.3, 0.4), max(highest * 1.3, 2.5))
        for height, (title, rows) in enumerate(data):
            for value, quiet in rows:
                color = BLUE if value >= 1 else ORANGE
                face = color if quiet else "white"
                panel.plot(value, height, "o", color=color, markerfacecolor=face, markersize=10, markeredgewidth=2)
            panel.text(0.012, height - 0.36, title, transform=panel.get_yaxis_transform(), va="center")
            panel.axhline(height + 0.38, color="#d7dde4", linewidth=1)
        panel.axvline(1, color=INK, linewidth=1.5, zorder=0)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks([tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8) if lowest / 1.3 <= tick <= highest * 1.3])
        panel.set_yticks([])
        panel.set_ylim(len(data) - 0.5, -0.7)
        panel.set_xlabel("times the aim (left: missed, right: met)")
        for color, face, label in ((BLUE, BLUE, "met"), (ORANGE, ORANGE, "missed"), (GREY, "white", "hollow: loaded")):
            panel.plot([], [], "o", color=color, markerfacecolor=face, markersize=9, markeredgewidth=2, label=label)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        _save(figure, path, data)
