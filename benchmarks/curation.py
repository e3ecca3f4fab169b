"""Curation from WARC to documents against datatrove, on the same files, in turns in one run.

    python -m venv peer
    peer/bin/pip install 'datatrove[io,processing]==0.10.1' spacy lxml_html_clean faust-cchardet
    python benchmarks/curation.py --peer_python=peer/bin/python                    # 20,000 pages: an hour on two cores
    python benchmarks/curation.py --peer_python=peer/bin/python --pages=2000

The pages are English articles put together from word lists, in the layouts of benchmarks/extraction/; a tenth are
near-copies. datatrove runs as its examples show: WarcReader, Trafilatura, the quality filters of Gopher (with
repetition) and C4, then MinHash deduplication in four steps, on the same number of processes. Ours is
`tools/curate.py` with its defaults, which also identifies languages, removes exact duplicates and writes samples,
histograms and every dropped document. Wall time and CPU time are of whole commands, with start and imports.
"""

import argparse
import gzip
import importlib.metadata
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for _folder in ("", "tools"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / _folder))

import make_crawl  # noqa: E402

from benchmarks.extraction_pages import to_html  # noqa: E402
from qwen_jax.command_line import path_argument  # noqa: E402

_ROOT = Path(__file__).resolve().parents[1]
_LAYOUTS = _ROOT / "benchmarks" / "extraction" / "layouts"
_FILES = 8
_PEER = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader, WarcReader
from datatrove.pipeline.writers import JsonlWriter

if __name__ == "__main__":
    crawl, out, workers, tasks = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

    def run(name, steps, tasks):
        logs = f"{out}/logs/{name}"
        LocalPipelineExecutor(steps, tasks=tasks, workers=workers, logging_dir=logs, skip_completed=False).run()

    filters = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter()]
    steps = [WarcReader(crawl, glob_pattern="*.warc.gz"), Trafilatura(), *filters, JsonlWriter(f"{out}/filtered")]
    run("filter", steps, tasks)
    run("signatures", [JsonlReader(f"{out}/filtered"), MinhashDedupSignature(f"{out}/signatures")], tasks)
    run("buckets", [MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets")], 14)
    run("clusters", [MinhashDedupCluster(f"{out}/buckets", f"{out}/removed")], 1)
    steps = [JsonlReader(f"{out}/filtered"), MinhashDedupFilter(f"{out}/removed"), JsonlWriter(f"{out}/kept")]
    run("write", steps, tasks)
"""


def make_pages(folder: Path, pages: int) -> int:
    """Writes WARC files; returns their size in bytes."""
    generator = random.Random(0)
    layouts = [path.read_text(encoding="utf-8") for path in sorted(_LAYOUTS.glob("*.html"))]
    articles: list[str] = []
    files = [(folder / f"part-{number}.warc.gz").open("wb") for number in range(_FILES)]
    for number in range(pages):
        text = make_crawl.english(generator, generator.randint(12, 60))
        if number % 10 == 9:
            text = make_crawl.edited(generator, generator.choice(articles), 0.03)
        articles.append(text)
        blocks = [("h1", text[:40]), *(("p", line) for line in text.split("\n") if line)]
        page = generator.choice(layouts).replace("CONTENT", to_html(blocks)).encode()
        record = make_crawl.warc_record(f"https://example.org/{number}", page)
        # Without this field the peer asks libmagic.
        record = record.replace(b"\r\n", b"\r\nWARC-Identified-Payload-Type: text/html\r\n", 1)
        files[number % _FILES].write(gzip.compress(record, mtime=0))
    for file in files:
        file.close()
    return sum(path.stat().st_size for path in folder.iterdir())


def measured(command: list[str], log: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command with all processes that it starts."""
    started = time.monotonic()
    cpu: dict[int, float] = {}
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True) as process:
        # Workers of a fork server are nobody's waited-for children, so the times of the session are read now and then.
        while process.poll() is None:
            cpu |= _session(process.pid)
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return time.monotonic() - started, sum(cpu.values())


def _session(session: int) -> dict[int, float]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            found[int(path.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def _lines(folder: Path) -> int:
    return sum(gzip.open(path).read().count(b"\n") for path in folder.rglob("*.jsonl.gz"))


def main() -> None:
    """Prints a line for each program and number of processes, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", type=path_argument, metavar="PYTHON", help="interpreter with datatrove")
    parser.add_argument("--pages", type=int, default=20_000, help="pages of the crawl (default: %(default)s)")
    parser.add_argument("--workers", default="1,2", help="numbers of processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="turns; the fastest counts (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "crawl").mkdir()
        size = make_pages(folder / "crawl", arguments.pages)
        print(f"{arguments.pages:,} pages, {size / 1e6:.1f} MB in {_FILES} files; load {os.getloadavg()[0]:.1f}")
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for turn in range(arguments.rounds):
            for workers in map(int, arguments.workers.split(",")):
                for program in ("qwen_jax", "datatrove")[: 1 + bool(arguments.peer_python)]:
                    out = folder / f"{program}-{workers}-{turn}"
                    if program == "qwen_jax":
                        command = [sys.executable, str(_ROOT / "tools" / "curate.py"), f"--input={folder / 'crawl'}"]
                        command += [f"--output={out}", f"--num_workers={workers}"]
                    else:
                        command = [str(arguments.peer_python), "-c", _PEER, str(folder / "crawl"), str(out)]
                        command += [str(workers), str(_FILES)]
                    found.setdefault((program, workers), []).append(measured(command, folder / "log"))
                    wall, cpu = found[program, workers][-1]
                    kept = ""
                    if program == "datatrove":
                        kept = f", keeps {_lines(out / 'kept'):,}"
                    print(
                        f"{program:9} {workers} processes: {wall:7.1f} s, {arguments.pages / wall:6.0f} pages/s; "
                        f"CPU {cpu:7.1f} s, {arguments.pages / cpu:6.0f} pages a CPU second{kept}",
                        flush=True,
                    )
        version = importlib.metadata.version
        print(f"resiliparse {version('resiliparse')}, py3langid {version('py3langid')}; load {os.getloadavg()[0]:.1f}")
        best = {key: [min(column) for column in zip(*runs, strict=True)] for key, runs in found.items()}
        for (program, workers), (wall, cpu) in best.items():
            if program == "qwen_jax" and ("datatrove", workers) in best:
                peer_wall, peer_cpu = best["datatrove", workers]
                print(
                    f"{workers} processes: {peer_wall / wall:.2f} times datatrove by wall, {peer_cpu / cpu:.2f} by CPU"
                )


if __name__ == "__main__":
    main()
