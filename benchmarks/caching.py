"""Tokens per second of `tools/cache_task.py`, against datatrove's tokenizer and `tokenizers` alone, on the same text.

    python -m venv ENV && ENV/bin/pip install "datatrove[io]==0.10.1" tokenizers orjson
    python benchmarks/caching.py --peer_python=ENV/bin/python
    python benchmarks/caching.py --peer_python=ENV/bin/python --megabytes=200 --processes=1,2,4 --rounds=5

The text is Python sources of this environment, as JSON lines in eight files; the vocabulary is the released one. Every
side is a command that starts, reads, tokenizes, writes and ends, and is measured as such:

    qwen_jax     SeqIO's cache, then examples of 2,048 tokens packed in hashed order
    datatrove    its DocumentTokenizer: ids and index, documents shuffled within a file; no merging, no packing
    tokenizers   Hugging Face's library alone: encode_batch_fast, nothing is written

The threads of `tokenizers` are off, so that a process is one thread of work on all sides. Sides take turns; medians are
printed. The ids of each document are compared.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 0)]

from workers import machine  # noqa: E402

from qwen_jax.command_line import path_argument, run  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FILES = 8
_PR_SET_CHILD_SUBREAPER = 36  # of Linux

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    corpus, vocabulary, output, processes = sys.argv[1:]
    writer = DocumentTokenizer(output + "/ids", vocabulary, eos_token="<|endoftext|>", seed=0)
    pipeline = [JsonlReader(corpus), writer]
    LocalPipelineExecutor(pipeline, tasks=8, workers=int(processes), logging_dir=output + "/logs").run()
"""

TOKENIZERS = """
import json, multiprocessing, sys
from pathlib import Path
from tokenizers import Tokenizer

def encode(work):
    vocabulary, file = work
    tokenizer, texts = Tokenizer.from_file(vocabulary), [json.loads(line)["text"] for line in open(file)]
    return sum(len(one) + 1 for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False))

if __name__ == "__main__":
    corpus, vocabulary, output, processes = sys.argv[1:]
    work = [(vocabulary, str(file)) for file in sorted(Path(corpus).glob("*.jsonl"))]
    with multiprocessing.get_context("forkserver").Pool(int(processes)) as pool:
        print(sum(pool.imap_unordered(encode, work)))
"""


def write_corpus(folder: Path, size: int) -> str:
    """Writes about `size` bytes of Python sources; returns their description."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(sys.prefix)]
    roots += [Path(path) for path in sys.path if path.endswith("site-packages")]
    sources = sorted({path for root in roots for path in root.rglob("*.py")}, key=lambda path: path.as_posix())
    rows, written, digest = [[] for _ in range(FILES)], 0, hashlib.sha256()
    for number, path in enumerate(sources):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if not text or written + len(text) > size:
            continue
        written += len(text)
        digest.update(text.encode())
        rows[number % FILES].append(json.dumps({"text": text, "id": str(number)}, ensure_ascii=False) + "\n")
    for number, lines in enumerate(rows):
        (folder / f"part-{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    documents = sum(map(len, rows))
    return f"{documents:,} Python sources, {written / 1e6:.1f}M characters, SHA-256 {digest.hexdigest()[:16]}"


def timed(command: list[str], log: Path, **environment: str) -> tuple[float, float, str]:
    """(seconds, CPU seconds of all its processes, standard output) of a command; its log goes to a file."""
    # The processes that it leaves behind become children of this one, so that they are counted when they end.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as errors:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    seconds = time.perf_counter() - began
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with code {done.returncode}: {log.read_text()[-2000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


class Benchmark:
    """One corpus, and the sides that are measured on it."""

    def __init__(self, folder: Path, peer_python: str):
        """`folder` has the corpus in `corpus`; outputs go there, too."""
        self.folder, self.peer_python, self.number = folder, peer_python, 0
        self.vocabulary = folder / "tokenizer.json"

    def ours(self, processes: int) -> tuple[float, float, Path]:
        """Seconds, CPU seconds and the folder of the output."""
        output = self._output()
        command = [sys.executable, "tools/cache_task.py", "local_files", f"--cache_dir={output}", "--splits=train"]
        command += ["--sequence_length=2048", f"--num_workers={processes}", "--gin.local_files.validation_share=0.0"]
        command += [f"--gin.local_files.pattern={self.folder / 'corpus'}"]
        seconds, cpu, _ = timed(command, self.folder / "log")
        return seconds, cpu, output

    def peer(self, program: str, processes: int) -> tuple[float, float, Path]:
        """The same of a program that runs in the environment of the peers."""
        output = self._output()
        output.mkdir()
        script = self.folder / "peer.py"
        script.write_text(program)
        command = [self.peer_python, str(script), *map(str, (self.folder / "corpus", self.vocabulary, output))]
        found = timed([*command, str(processes)], self.folder / "log", TOKENIZERS_PARALLELISM="false")
        return *found[:2], output

    def _output(self) -> Path:
        self.number += 1
        return self.folder / f"output{self.number}"


def our_documents(output: Path) -> list[bytes]:
    """Hashes of the documents of a cache, sorted; `<|endoftext|>` left out."""
    from qwen_jax.data.example_files import decode_example, read_records

    def arrays():
        for path in sorted((output / "local_files").glob("train.tfrecord-*")):
            with path.open("rb") as file:
                yield from (decode_example(record)["targets"] for record in read_records(file))

    return _hashes(arrays())


def their_documents(output: Path, eos: int) -> list[bytes]:
    """The same of datatrove's output."""
    import numpy as np

    def arrays():
        for path in sorted((output / "ids").glob("*.ds")):
            ids, ends = np.fromfile(path, "<u4"), np.fromfile(f"{path}.index", "<u8").astype(int)
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                if ids[end - 1] != eos:
                    raise ValueError(f"{path}: a document does not end with {eos}")
                yield ids[start : end - 1]

    return _hashes(arrays())


def _hashes(arrays: Iterator) -> list[bytes]:
    return sorted(hashlib.blake2b(array.astype("<i4").tobytes(), digest_size=16).digest() for array in arrays)


def main(argv: list[str] | None = None) -> None:
    """Writes the corpus, measures, prints a table with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", required=True, help="python of an environment with datatrove and tokenizers")
    parser.add_argument("--megabytes", type=int, default=100, help="of text (default: %(default)s)")
    parser.add_argument("--processes", default="1,2", help="numbers of processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=path_argument, help="where to work (default: a folder that goes again)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        _measure(arguments, Path(folder))


def _measure(arguments: argparse.Namespace, folder: Path) -> None:
    from qwen_jax.conversion.tokenizer import tokenizer_json
    from qwen_jax.data.packing import Manifest, packed_folder
    from qwen_jax.data.tokenizer import Tokenizer

    (folder / "corpus").mkdir()
    print(machine())
    print(write_corpus(folder / "corpus", arguments.megabytes * 1_000_000))
    tokenizer, benchmark = Tokenizer(), Benchmark(folder, arguments.peer_python)
    benchmark.vocabulary.write_text(json.dumps(tokenizer_json(tokenizer)))
    sides = [
        (name, processes)
        for processes in map(int, arguments.processes.split(","))
        for name in ("datatrove", "tokenizers", "qwen_jax")
    ]
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {side: [] for side in sides}
    tokens, checked = 0, {}
    for number in range(arguments.rounds):
        for name, processes in sides:
            if name == "qwen_jax":
                *found, output = benchmark.ours(processes)
                tokens = Manifest.load(packed_folder(output, "local_files", 2048, "train")).tokens
                checked.setdefault(name, our_documents(output))
            else:
                *found, output = benchmark.peer(DATATROVE if name == "datatrove" else TOKENIZERS, processes)
                if name == "datatrove":
                    checked.setdefault(name, their_documents(output, tokenizer.endoftext_id))
            measured[name, processes].append((found[0], found[1]))
            print(f"round {number + 1}: {name}, {processes}: {found[0]:.1f} s, {found[1]:.1f} CPU s", file=sys.stderr)
    same = "the same" if checked["qwen_jax"] == checked["datatrove"] else "DIFFERENT"
    print(f"{tokens:,} tokens with one <|endoftext|> a document; the ids of both sides are {same}; {machine()}")
    print(f"{'':12} {'processes':>9} {'seconds':>8} {'tokens/s':>10} {'ratio':>6} {'tokens/CPU s':>13} {'ratio':>6}")
    for name, processes in sides:
        wall, cpu = (statistics.median(column) for column in zip(*measured[name, processes], strict=True))
        base = [statistics.median(c) for c in zip(*measured["datatrove", processes], strict=True)]
        print(
            f"{name:12} {processes:>9} {wall:>8.1f} {tokens / wall:>10,.0f} {base[0] / wall:>6.2f} "
            f"{tokens / cpu:>13,.0f} {base[1] / cpu:>6.2f}"
        )


if __name__ == "__main__":
    run(main)
