"""Writes docs/performance.md and its pictures from benchmarks/results/*.json.

    python tools/performance_page.py            # page and pictures
    python tools/performance_page.py --check    # is the page up to date? Exit code 1 if not; writes nothing

The page has a table for each benchmark, which says of every row whether the machine was quiet, and of every missed aim
what limits it; and a roofline for each machine whose rows say how many operations and bytes a unit takes.
"""

import argparse
import sys
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import performance_pictures as pictures
from performance_records import Benchmark, Machine, Row, Run, read_all, rows_with_work

from qwen_jax import files
from qwen_jax.command_line import path_argument, run

ROOT = Path(__file__).resolve().parents[1]
PAGE, IMAGES = "performance.md", "images"
AIMS = "performance_aims.png"
HEAD = """# Performance against peers

*Made by `python tools/performance_page.py` from `benchmarks/results/*.json`: edit those.* Each row compares both sides
on one machine, with the same weights or data; notes on them, and what was tried, are in
[benchmarks/RESULTS.md](../benchmarks/RESULTS.md). **ratio** is ours over the peer's: of speeds more is better, of
times and memory less. **CPU** is the ratio by CPU seconds, in the same sense. A row of a loaded machine says so: its
wall times are long, and its ratio may be that of the other work. A missed aim is bold, and what limits it follows the
table.
"""


def number(value: float) -> str:
    """A figure with as many digits as a reader wants."""
    if value >= 1e6:
        return f"{value / 1e6:,.4g}M"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def values(found: tuple[float, ...]) -> str:
    """One value, or low and high bound."""
    return " to ".join(map(number, found)) or "–"


def aim(row: Row) -> str:
    """The aim, and whether it was met."""
    if row.wanted is None:
        return ""
    words = f"{'≥' if row.better == 'more' else '≤'} {row.wanted:g}"
    return f"{words}, met" if row.met else f"**{words}, missed**"


def state(measured: Run) -> str:
    """How the machine was, in a word."""
    return "loaded" if measured.load.startswith("load") else measured.load.split()[0].replace("not", "not timed")


def cells(measured: Run, row: Row) -> dict[str, str]:
    """Column -> text."""
    ratio = ", ".join(f"{one:.2f}" if one >= 0.1 else f"{one:.2g}" for one in row.ratio)
    sides = {name: [one for one in both if one] for name, both in row.also.items()}
    return {
        "what": f"{row.case} ({row.measure})",
        "qwen_jax": values(row.ours),
        "peer": row.peer_name or "",
        "peer's": values(row.peer) if row.peer_name else "",
        "ratio": f"**{ratio}**" if row.met is False and ratio else ratio,
        "CPU": f"{row.ratio_by_cpu:.2f}" if row.ratio_by_cpu else "",
        "aim": aim(row),
        "machine": state(measured),
        "also, ours / peer's": "; ".join(f"{name} {' / '.join(both)}" for name, both in sides.items()),
    }


def table(measured: Run, machine: str) -> list[str]:
    """Lines of one run: how it was measured, the rows without columns that are empty, and what limits missed ones."""
    how = [
        f"{measured.date}, {machine}, **{measured.load}**",
        f"`{measured.command}`",
        measured.commit,
        measured.versions,
    ]
    lines = ["", " · ".join(how)] + (["", measured.about] if measured.about else [])
    rows = [cells(measured, row) for row in measured.rows]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    rules = [":--" if name in ("what", "peer", "aim", "machine", "also, ours / peer's") else "--:" for name in columns]
    lines += ["", f"| {' | '.join(columns)} |", f"|{'|'.join(rules)}|"]
    lines += [f"| {' | '.join(row[name] for name in columns)} |" for row in rows]
    limits: dict[str, list[str]] = {}
    for row in measured.rows:
        if row.met is False:
            what = f"{row.case} ({row.measure})"
            limits.setdefault(row.limit or "", []).append(f"{what} against {row.peer_name}" if row.peer_name else what)
    if limits:
        lines += ["", "What limits the missed ones:", ""]
        lines += [f"- {'; '.join(dict.fromkeys(cases))}: {limit}." for limit, cases in limits.items()]
    return lines


def summary(benchmarks: list[Benchmark]) -> list[str]:
    """Aims met and missed by benchmark."""
    lines = [
        "",
        "| benchmark | newest | rows | aims met | missed | rows of a loaded machine |",
        "|---|---|--:|--:|--:|--:|",
    ]
    sums = [0, 0, 0, 0]
    for benchmark in benchmarks:
        rows = [(measured, row) for measured in benchmark.runs for row in measured.rows]
        counts = [
            len(rows),
            sum(row.met is True for _, row in rows),
            sum(row.met is False for _, row in rows),
            sum(measured.load.startswith("load") for measured, _ in rows),
        ]
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        newest = max(measured.date for measured in benchmark.runs)
        lines.append(f"| [{benchmark.title}](#{benchmark.name}) | {newest} | {' | '.join(map(str, counts))} |")
    return [*lines, f"| all | | {' | '.join(map(str, sums))} |"]


def roofline(machine: Machine, found: list[tuple[Benchmark, Run, Row]]) -> list[str]:
    """A picture, and its points as a table."""
    state = "estimated: nothing ran there" if machine.estimated else "measured"
    lines = ["", f"### {machine.title}", "", f"![Roofline of {machine.title}](images/roofline_{machine.name}.png)", ""]
    memory = (
        f"; main memory {machine.bandwidth / 1e9:,.0f} GB/s" if machine.bandwidth else "; main memory was not measured"
    )
    roofs = ", ".join(f"{name} {pictures.rate(most)}" for name, most in machine.roofs.items())
    lines += [f"Points are {state}. Limits: {roofs}{memory} ({machine.source}).", ""]
    lines += [
        "| | what | operations per byte | limit there | qwen_jax | of the limit | peers | of the limit |",
        "|--:|---|--:|--:|--:|--:|---|--:|",
    ]
    for index, (benchmark, rows) in enumerate(pictures.points(found), 1):
        first = rows[0]
        assert first.work is not None
        intensity = first.work.operations / first.work.bytes
        limit = pictures.roof(machine, intensity, pictures.roof_of(machine, first))
        ours = first.operations_per_second(first.ours)
        peers = [(row.peer_name, row.operations_per_second(row.peer)) for row in rows if row.peer]
        names = ", ".join(f"{name} {' to '.join(map(pictures.rate, reached))}" for name, reached in peers)
        shares = ", ".join(" to ".join(f"{one / limit:.0%}" for one in reached) for _, reached in peers)
        reached = " to ".join(map(pictures.rate, ours))
        share = " to ".join(f"{one / limit:.0%}" for one in ours)
        what = f"{index} | {pictures.short(benchmark, first)} | {intensity:.3g} | {pictures.rate(limit)}"
        lines.append(f"| {what} | {reached} | {share} | {names} | {shares} |")
    counted = dict.fromkeys(row.work.counted for _, _, row in found if row.work)
    return [*lines, "", f"Counted: {'. '.join(counted)}."]


def page(machines: dict[str, Machine], benchmarks: list[Benchmark]) -> str:
    """The whole of docs/performance.md."""
    lines = [HEAD, f"![How far each row is from its aim](images/{AIMS})", ""]
    lines.append("Each dot is a row of the tables below that has an aim. Right of the line the aim is met.")
    lines += summary(benchmarks)
    rooflines = [roofline(one, found) for one in machines.values() if (found := list(rows_with_work(benchmarks, one)))]
    if rooflines:
        lines += ["", "## Rooflines", *(line for one in rooflines for line in one)]
    for benchmark in benchmarks:
        history = f"../benchmarks/{benchmark.history}"
        lines += ["", f'<a id="{benchmark.name}"></a>', "", f"## {benchmark.title}", ""]
        lines.append(f"{benchmark.about} [Notes on it]({history}).")
        for measured in benchmark.runs:
            lines += table(measured, machines[measured.machine].title)
    return "\n".join(lines) + "\n"


def out_of_date(docs: Path, text: str, machines: dict[str, Machine], benchmarks: list[Benchmark]) -> list[str]:
    """Files of the page that the records would change."""
    page_file, images = docs / PAGE, docs / IMAGES
    found = [] if page_file.exists() and page_file.read_text(encoding="utf-8") == text else [PAGE]
    wanted = {AIMS: pictures.aims_data(benchmarks)}
    for machine in machines.values():
        if rows := list(rows_with_work(benchmarks, machine)):
            wanted[f"roofline_{machine.name}.png"] = pictures.roofline_data(machine, rows)
    return found + [
        f"{IMAGES}/{name}"
        for name, data in wanted.items()
        if pictures.drawn_from(images / name) != pictures.digest(data)
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line; exit code 1 if --check finds the page out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=path_argument, default=ROOT / "benchmarks/results", help="folder of the records"
    )
    parser.add_argument("--docs", type=path_argument, default=ROOT / "docs", help="folder that gets page and images/")
    parser.add_argument("--check", action="store_true", help="say what is out of date, and write nothing")
    arguments = parser.parse_args(argv)
    machines, benchmarks = read_all(arguments.results)
    text = page(machines, benchmarks)
    stale = out_of_date(arguments.docs, text, machines, benchmarks)
    if arguments.check:
        for name in stale:
            print(f"{arguments.docs / name} is out of date: run python tools/performance_page.py")
        return 1 if stale else 0
    images = arguments.docs / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    pictures.draw_aims(benchmarks, images / AIMS)
    for machine in machines.values():
        if found := list(rows_with_work(benchmarks, machine)):
            pictures.draw_roofline(machine, found, images / f"roofline_{machine.name}.png")
    files.write_text(arguments.docs / PAGE, text)
    print(f"wrote {arguments.docs / PAGE} and its pictures; changed: {', '.join(stale) or 'nothing'}")
    return 0


if __name__ == "__main__":
    run(main)
