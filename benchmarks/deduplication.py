"""Fuzzy deduplication against datasketch and rensa, from text to clusters, in one run on the same documents and cores.

    python benchmarks/deduplication.py                      # 100,000 documents: about 10 minutes on two cores
    python benchmarks/deduplication.py --documents=10000
    python benchmarks/deduplication.py --documents=20000 --peers=rensa --peer_python=…/bin/python --signatures

Documents are half real (functions and classes of the Python files on this machine, with their texts), half generated
(English and Chinese sentences), and a tenth of all are copies in which 2, 5, 10, 20 or 40% of the words were replaced.
Both programs get the same shingles to find (5 tokens), 20 bands of 6 rows and the same threshold; recall is measured
for both against the exact Jaccard similarity of the planted pairs, computed with Python sets. datasketch is used as its
documentation shows: `MinHash.generator`, `MinHashLSH.insert` and `query`; its candidates are taken as they are, which
gives it the same recall, or are checked by `MinHash.jaccard` too. With two processes, both make sketches in two
processes and clusters in one. rensa, in an environment of its own, is used as deduplication_rensa.py says.
"""

import argparse
import ast
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

for _folder in ("", "tools"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / _folder))

import make_crawl  # noqa: E402
import numpy as np  # noqa: E402
from datasketch import MinHash, MinHashLSH  # noqa: E402
from workers import machine  # noqa: E402

from qwen_jax.command_line import path_argument  # noqa: E402
from qwen_jax.curation import dedup  # noqa: E402

_CONFIG = dedup.FuzzyConfig()
_SCHEME = MinHash(num_perm=1).scheme  # the default one
EQUAL = 0.005  # recall or precision that differ by less are equal
_EDITS = (0.02, 0.05, 0.1, 0.2, 0.4)
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff_]+")


def real_documents(count: int) -> list[str]:
    """Source texts of functions and classes of 400 to 8,000 characters found on this machine."""
    found = []
    roots = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    for path in sorted(file for root in roots for file in Path(root).rglob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        lines = text.split("\n")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                piece = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if 400 <= len(piece) <= 8000:
                    found.append(piece)
        if len(found) >= count:
            break
    return found[:count]


def corpus(count: int) -> tuple[list[str], list[tuple[int, int, float]]]:
    """Documents, shuffled, and the planted pairs: two positions and the share of words replaced."""
    generator = random.Random(0)
    originals = real_documents(count * 45 // 100)
    while len(originals) < count - count // 10:
        make = make_crawl.english if len(originals) % 2 else make_crawl.chinese
        originals.append(make(generator, generator.randint(8, 60)))
    generator.shuffle(originals)
    texts, pairs = list(originals), []
    for number in range(count // 10):
        share = _EDITS[number % len(_EDITS)]
        pairs.append((number, len(texts), share))
        texts.append(make_crawl.edited(generator, originals[number], share))
    places = list(range(len(texts)))
    generator.shuffle(places)
    shuffled = [""] * len(texts)
    for text, place in zip(texts, places, strict=True):
        shuffled[place] = text
    return shuffled, [(places[a], places[b], share) for a, b, share in pairs]


def shingle_set(text: str) -> set[str]:
    """Shingles as anyone would write it."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
    size = _CONFIG.shingle
    return {" ".join(tokens[start : start + size]) for start in range(max(1, len(tokens) - size + 1))}


def datasketch_signatures(texts: list[str]) -> list[np.ndarray]:
    """Hash values of datasketch's MinHash for a batch of texts."""
    encoded = ([shingle.encode() for shingle in shingle_set(text)] for text in texts)
    return [made.hashvalues for made in MinHash.generator(encoded, num_perm=_CONFIG.num_hashes)]


def datasketch_clusters(texts: list[str], pool, check: bool) -> np.ndarray:
    """The same as `dedup.find_clusters`, by datasketch; with or without a check of candidates by estimated Jaccard."""
    mapped = (pool.imap if pool else map)(datasketch_signatures, dedup.batches(iter(texts)))
    index = MinHashLSH(num_perm=_CONFIG.num_hashes, params=(_CONFIG.bands, _CONFIG.rows))
    parent = list(range(len(texts)))

    def find(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    signatures: list[MinHash] = []
    for number, values in enumerate(values for batch in mapped for values in batch):
        signature = MinHash(hashvalues=values, scheme=_SCHEME)
        signatures.append(signature)
        for other in index.query(signature):
            if not check or signature.jaccard(signatures[other]) >= _CONFIG.threshold:
                left, right = find(number), find(other)
                parent[max(left, right)] = min(left, right)
        index.insert(number, signature, check_duplication=False)
    return np.array([find(number) for number in range(len(texts))])


def our_clusters(texts: list[str], pool) -> np.ndarray:
    """`dedup.find_clusters`, with its batches dealt to processes where there are several."""
    if pool is None:
        return dedup.find_clusters(texts, _CONFIG)
    parts = list(pool.imap(_sketch, dedup.batches(iter(texts))))
    return dedup.cluster(parts, _CONFIG)


def _sketch(batch: list[str]) -> dedup.Sketch:
    return dedup.sketch(batch, _CONFIG)


def quality(found: np.ndarray, texts, pairs, truth) -> tuple[float, float]:
    """Recall and precision over planted pairs, against their exact similarity."""
    alike = np.array([similarity >= _CONFIG.threshold for similarity in truth])
    together = np.array([found[a] == found[b] for a, b, _ in pairs])
    return float((together & alike).sum() / alike.sum()), float((together & alike).sum() / max(together.sum(), 1))


@dataclasses.dataclass(frozen=True)
class Found:
    """What a program took, and the number of the first text of the cluster of each text."""

    name: str
    seconds: float
    cpu: float
    clusters: np.ndarray


def measured(name: str, program: Callable, texts: list[str], processes: int) -> Found:
    """Runs a program of this process, with a pool that is started before."""
    pool = multiprocessing.get_context("fork").Pool(processes) if processes > 1 else None
    if pool:
        pool.map(_sketch, [["warm up"]] * processes)
    dedup.find_clusters(["warm up"])
    started, used = time.perf_counter(), sum(os.times()[:4])
    found = program(texts, pool)
    seconds = time.perf_counter() - started
    if pool:
        pool.close()
        pool.join()
    return Found(name, seconds, sum(os.times()[:4]) - used, found)


def rensa(texts: list[str], processes: int, python: str) -> list[Found]:
    """Its clusters, with each way of checking its candidates."""
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "texts.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(text)}\n" for text in texts)
        script = str(Path(__file__).with_name("deduplication_rensa.py"))
        config = {name: getattr(_CONFIG, name) for name in ("threshold", "shingle", "bands", "rows")}
        options = [folder, f"--processes={processes}", f"--config={json.dumps(config)}"]
        subprocess.run([python, script, *options], check=True)
        made = json.loads((Path(folder) / "rensa.json").read_text(encoding="utf-8"))
    return [
        Found(f"rensa {made['version']}, {check}", one["seconds"], one["cpu"], np.array(one["clusters"]))
        for check, one in made["checks"].items()
    ]


def compare(documents: int, processes: int, peers: list[str], peer_python: str) -> None:
    """Prints a row for each program, and ratios to those of equal recall and precision."""
    texts, pairs = corpus(documents)
    sets = [(shingle_set(texts[a]), shingle_set(texts[b])) for a, b, _ in pairs]
    truth = [len(a & b) / len(a | b) for a, b in sets]
    characters = sum(map(len, texts)) / len(texts)
    at_least = sum(similarity >= _CONFIG.threshold for similarity in truth)
    print(
        f"\n{len(texts):,} documents of {characters:,.0f} characters on average, {processes} process(es); "
        f"{len(pairs):,} planted pairs, {at_least:,} of them at {_CONFIG.threshold} or above"
    )
    titles = f"{'seconds':>9} {'CPU s':>9} {'documents/s':>12} {'recall':>8} {'precision':>10} {'clusters':>9}"
    print(f"{'program':23} {titles}")
    found = [measured("qwen_jax", our_clusters, texts, processes)]
    if "datasketch" in peers:
        for name, check in (("datasketch", False), ("datasketch, checked", True)):
            found.append(measured(name, functools.partial(datasketch_clusters, check=check), texts, processes))
    if "rensa" in peers:
        found += rensa(texts, processes, peer_python)
        found.append(measured("qwen_jax, again", our_clusters, texts, processes))
    qualities = [quality(one.clusters, texts, pairs, truth) for one in found]
    for one, (recall, precision) in zip(found, qualities, strict=True):
        clusters = int((np.unique(one.clusters, return_counts=True)[1] > 1).sum())
        figures = (
            f"{one.seconds:>9.1f} {one.cpu:>9.1f} {len(texts) / one.seconds:>12,.0f} {recall:>8.4f} {precision:>10.4f}"
        )
        print(f"{one.name:23} {figures} {clusters:>9,}", flush=True)
    (recall, precision) = qualities[0]
    turns = [one for one in found if one.name.startswith("qwen_jax")]
    seconds, cpu = (sum(getattr(one, name) for one in turns) / len(turns) for name in ("seconds", "cpu"))
    for one, (its_recall, its_precision) in zip(found, qualities, strict=True):
        if one.name.startswith("qwen_jax"):
            continue
        equal = its_recall >= recall - EQUAL and its_precision >= precision - EQUAL
        quality_of_it = "at equal recall and precision" if equal else "which has lower recall or precision"
        speeds = f"{one.seconds / seconds:.1f} times as fast, {one.cpu / cpu:.1f} by CPU time"
        print(f"qwen_jax to {one.name}: {speeds}, {quality_of_it}")


def memory_of_ours(count: int, folder: Path) -> None:
    """From sketches in files to clusters, as the pipeline does it; prints MB of peak memory above the start."""
    generator = np.random.default_rng(0)
    per_document, step = 60, 10_000
    keys = np.lib.format.open_memmap(folder / "keys.npy", "w+", np.uint64, (_CONFIG.bands, count))
    with (folder / "shingles").open("wb") as file:
        before = None
        for start in range(0, count, step):
            size = min(step, count - start)
            sets = np.sort(generator.integers(0, 1 << 32, (size, per_document), np.uint32), axis=1)
            if before is not None:
                sets[: size // 10] = before[: size // 10]  # a tenth is like documents of the batch before
            before = sets
            file.write(sets.tobytes())
            offsets = np.arange(size + 1) * per_document
            signature = dedup.signatures(sets.ravel(), offsets, _CONFIG.num_hashes)
            keys[:, start : start + size] = dedup.band_keys(signature, _CONFIG.bands, _CONFIG.rows)
    keys.flush()
    del keys
    start_mb = _reset_peak()
    shingles = np.memmap(folder / "shingles", np.uint32, "r").reshape(count, per_document)

    def shingles_of(documents):
        return shingles[documents.astype(np.int64)].ravel(), np.full(len(documents), per_document, np.int64)

    numbers = np.arange(count, dtype=np.uint64)
    pairs = np.zeros((0, 2), np.uint64)
    for band in range(_CONFIG.bands):
        mapped = np.load(folder / "keys.npy", mmap_mode="r")
        pairs = dedup.unique_pairs(np.concatenate([pairs, dedup.candidate_pairs(np.array(mapped[band]), numbers)]))
        del mapped
    edges = pairs[dedup.similarities(pairs, shingles_of) >= _CONFIG.threshold]
    documents, _ = dedup.components(edges)
    print(f"{_peak_mb() - start_mb:.0f} {len(documents)}")


def memory_of_datasketch(count: int) -> None:
    """The same number of signatures in datasketch's index; prints MB of peak memory above the start."""
    start_mb = _reset_peak()
    generator = np.random.default_rng(0)
    index = MinHashLSH(num_perm=_CONFIG.num_hashes, params=(_CONFIG.bands, _CONFIG.rows))
    for number in range(count):
        values = generator.integers(0, 1 << 32, _CONFIG.num_hashes, np.uint32)
        index.insert(number, MinHash(hashvalues=values, scheme=_SCHEME), check_duplication=False)
    print(f"{_peak_mb() - start_mb:.0f} 0")


def _reset_peak() -> float:
    """Lets Linux count the peak anew from here, and gives it in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_mb()


def _peak_mb() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def memory(counts: list[int]) -> None:
    """Prints peak memory by number of signatures, each measured in a process of its own."""
    print(f"\n{'signatures':>11} {'qwen_jax MB':>12} {'datasketch MB':>14}")
    for count in counts:
        shown = []
        for name in ("ours", "datasketch"):
            if name == "datasketch" and count > 100_000:
                shown.append("–")
                continue
            with tempfile.TemporaryDirectory() as folder:
                options = [f"--memory_of={name}", f"--documents={count}", f"--folder={folder}"]
                command = [sys.executable, __file__, *options]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            shown.append(done.stdout.split()[0])
        print(f"{count:>11,} {shown[0]:>12} {shown[1]:>14}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--signatures", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--peers", default="datasketch", help="datasketch,rensa (datasketch)")
    parser.add_argument("--peer_python", default=sys.executable, help="Python of an environment with rensa")
    parser.add_argument("--memory_of", choices=("ours", "datasketch"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=path_argument, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_of == "ours":
        return memory_of_ours(arguments.documents, arguments.folder)
    if arguments.memory_of:
        return memory_of_datasketch(arguments.documents)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "scipy", "datasketch"))
    print(f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores")
    print(machine())
    peers = arguments.peers.split(",")
    if arguments.processes > 1:
        compare(arguments.documents // 5, 1, peers, arguments.peer_python)
    compare(arguments.documents, arguments.processes, peers, arguments.peer_python)
    memory(arguments.signatures)


if __name__ == "__main__":
    main()
