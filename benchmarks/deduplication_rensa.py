"""rensa's side of benchmarks/deduplication.py, in an environment of its own: texts to clusters, as users write it.

    python benchmarks/deduplication_rensa.py FOLDER --processes 2 --config '{"threshold": 0.8, …}'

Reads texts.jsonl, one JSON string a line, and writes rensa.json: the version, and for each way of checking the
candidates seconds, CPU seconds, and the number of the first text of the cluster of each. Shingles are sets of strings
that Python makes, sketches `RMinHash.from_token_sets` (both dealt to processes), candidates `RMinHashLSH.insert_many`
and `query_all`. They are taken as they come, checked by the sketches' estimate, or by the exact similarity of the sets
of the shingles' hashes.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from rensa import RMinHash, RMinHashLSH

CHECKS = ("none", "estimate", "exact")
SEED = 42
BATCH_CHARACTERS = 1 << 20
TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff_]+")
BATCHES_OF_QUERIES = 10_000


def shingle_set(text: str, size: int) -> set[str]:
    """Shingles as anyone would write it."""
    tokens = TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
    return {" ".join(tokens[start : start + size]) for start in range(max(1, len(tokens) - size + 1))}


def sketch(job: tuple[list[str], int, int, bool]) -> tuple[list[RMinHash], list[frozenset[int]]]:
    """Sketches of a batch, and the sets of its shingles' hashes where they are needed."""
    texts, shingle, num_hashes, exact = job
    sets = [shingle_set(text, shingle) for text in texts]
    hashes = [frozenset(one) for one in RMinHash.hash_token_sets(sets)] if exact else []
    return RMinHash.from_token_sets(sets, num_perm=num_hashes, seed=SEED), hashes


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Groups of texts of about a million characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def clusters(texts: list[str], mapped: Callable, config: dict, check: str) -> list[int]:
    """The number of the first text of the cluster of each."""
    num_hashes, threshold = config["bands"] * config["rows"], config["threshold"]
    sketches: list[RMinHash] = []
    sets: list[frozenset[int]] = []
    jobs = ((batch, config["shingle"], num_hashes, check == "exact") for batch in batches(texts))
    for made, hashes in mapped(sketch, jobs):
        sketches += made
        sets += hashes
    index = RMinHashLSH(threshold=threshold, num_perm=num_hashes, num_bands=config["bands"])
    index.insert_many(sketches)
    parent = list(range(len(texts)))

    def find(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    def alike(one: int, other: int) -> bool:
        if check == "estimate":
            return sketches[one].jaccard(sketches[other]) >= threshold
        if check == "exact":
            common = len(sets[one] & sets[other])
            return common >= threshold * (len(sets[one]) + len(sets[other]) - common)
        return True

    for start in range(0, len(sketches), BATCHES_OF_QUERIES):
        for place, candidates in enumerate(index.query_all(sketches[start : start + BATCHES_OF_QUERIES])):
            one = start + place
            for other in candidates:
                if other < one:
                    left, right = find(one), find(other)
                    if left != right and alike(one, other):
                        parent[max(left, right)] = min(left, right)
    return [find(number) for number in range(len(texts))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts_folder", help="with texts.jsonl; deduplication.py makes it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--config", type=json.loads, required=True, help="threshold, shingle, bands and rows as JSON")
    arguments = parser.parse_args()
    texts = [json.loads(line) for line in (Path(arguments.texts_folder) / "texts.jsonl").open(encoding="utf-8")]
    found = {"version": importlib.metadata.version("rensa"), "checks": {}}
    for check in CHECKS:
        pool = multiprocessing.get_context("fork").Pool(arguments.processes) if arguments.processes > 1 else None
        mapped = pool.imap if pool else map
        warm = (["warm up"], arguments.config["shingle"], 8, True)
        list(mapped(sketch, [warm] * arguments.processes))
        began, used = time.perf_counter(), sum(os.times()[:4])
        labels = clusters(texts, mapped, arguments.config, check)
        seconds = time.perf_counter() - began
        if pool:
            pool.close()
            pool.join()
        used = sum(os.times()[:4]) - used
        found["checks"][check] = {"seconds": seconds, "cpu": used, "clusters": labels}
    (Path(arguments.texts_folder) / "rensa.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
