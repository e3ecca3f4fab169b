"""Questions of MMLU per second by log-likelihood, against lm-evaluation-harness's HFLM on the same weights, in one run.

    python benchmarks/mmlu.py --data_dir ../shared/data --peer_python ../lm_eval/bin/python        # four subjects
    python benchmarks/mmlu.py --data_dir ../shared/data --peer_python ../lm_eval/bin/python --all  # about two hours
    python benchmarks/mmlu.py --data_dir ../shared/data --peer_python ../lm_eval/bin/python --all --peer_every 10

A model of 34M parameters (that of benchmarks/train_step.py) with random weights, float32, and a vocabulary of 8,192
tokens learnt from the publisher's validation questions. Prompts have five shots, as our benchmark `mmlu` makes them.
The context is 4,096 tokens, for with this vocabulary 460 prompts are longer than the 2,048 of the report.

Each side is a process of its own on the same cores; they take turns, one subject a turn, so that other work on the
machine slows both. Both get the same 4 requests a question, as text, through the harness's interface
`loglikelihood`, and encode them themselves; ours compiles its programs meanwhile. With --peer_every N the peer answers
every N-th question of each subject, and its time for the subject is taken as N times as long. The peer's
environment: `pip install torch==2.13.0 transformers==5.23.0 lm-eval==0.4.13 accelerate`. CPU seconds, summed over the
threads of a process, suffer less from other work on the machine.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

SUBJECTS = "abstract_algebra,anatomy,computer_security,high_school_geography"
VOCABULARY = 8192
CONTEXT_LENGTH = 4096
LETTERS = "ABCD"

PEER = """
import sys
from lm_eval.models.huggingface import HFLM
def model(folder, batch):
    return HFLM(folder, device="cpu", dtype="float32", batch_size=batch)
"""
OURS = """
import sys
from qwen_jax.generate import load_engine
from qwen_jax.evaluation.harness import HarnessModel
def model(folder, batch):
    return HarnessModel(load_engine(folder))
"""
# Both sides: a line of input is a subject's requests; answered with seconds and log-likelihoods.
SIDE = """
import json, sys, time
from lm_eval.api.instance import Instance
lm = model(sys.argv[1], int(sys.argv[2]))
print("READY", flush=True)
for line in sys.stdin:
    rows = json.loads(line)
    requests = [Instance("loglikelihood", {}, tuple(row), index) for index, row in enumerate(rows)]
    wall, cpu = time.perf_counter(), time.process_time()
    found = lm.loglikelihood(requests, disable_tqdm=True)
    seconds = [time.perf_counter() - wall, time.process_time() - cpu]
    print("RESULT" + json.dumps([seconds, [total for total, _ in found]]), flush=True)
"""


def write_vocabulary(data_dir: Path, folder: Path) -> Path:
    """A .tiktoken file learnt from the validation questions."""
    lines = []
    for file in sorted((data_dir / "mmlu" / "val").glob("*.csv")):
        with open(file, newline="", encoding="utf-8-sig") as rows:
            for row in csv.reader(rows):
                choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True))
                lines.append(f"Question: {row[0]}\n{choices}\nAnswer: {row[5]}\n\n")
    (folder / "val.txt").write_text("".join(lines))
    path = folder / "mmlu.tiktoken"
    command = [sys.executable, ROOT / "tools/build_tokenizer.py", f"--size={VOCABULARY}", f"--output={path}"]
    subprocess.run([*command, "--input", folder / "val.txt"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return path


def read_requests(data_dir: Path, subjects: Sequence[str] | None) -> dict[str, list[tuple[str, str]]]:
    """(context, continuation) pairs of each subject, four a question."""
    from qwen_jax.evaluation.benchmark import Example
    from tasks.benchmarks.mmlu import read

    found = {}
    for one in read(data_dir / "mmlu"):
        if isinstance(one, Example) and (subjects is None or one.subject in subjects):
            found.setdefault(one.subject, []).extend((one.prompt, choice) for choice in one.choices)
    return found


class Side:
    """A process that answers requests, with the seconds that it took so far.

    Attributes:
      every: it answers every so many-th question of a subject; its seconds are multiplied accordingly.
      totals: log-likelihood of each request that it answered, in their order.
    """

    def __init__(self, python: str, program: str, folder: Path, batch: int, every: int = 1):
        command = [python, "-c", program + SIDE, folder, str(batch)]
        self._process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._until("READY")
        self.every = every
        self.wall = self.cpu = 0.0
        self.totals: list[float] = []

    def _until(self, mark: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(mark):
                return line.removeprefix(mark)
        raise RuntimeError(f"{self._process.args[0]} ended with exit code {self._process.wait()}")

    def answer(self, requests: Sequence[tuple[str, str]]) -> None:
        """Asks for the log-likelihoods of one subject's requests, four a question, and waits for them."""
        assert self._process.stdin is not None
        chosen = self.chosen(requests)
        self._process.stdin.write(json.dumps(chosen) + "\n")
        self._process.stdin.flush()
        (wall, cpu), totals = json.loads(self._until("RESULT"))
        share = len(requests) / len(chosen)
        self.wall, self.cpu = self.wall + wall * share, self.cpu + cpu * share
        self.totals += totals

    def chosen(self, of_subject: Sequence) -> list:
        """Those of a subject's values, four a question, that belong to the questions that it answers."""
        return [value for place, value in enumerate(of_subject) if place // 4 % self.every == 0]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def answers(totals: Sequence[float]) -> list[int]:
    """The most likely of the four choices of each question."""
    rows = [totals[start : start + 4] for start in range(0, len(totals), 4)]
    return [max(range(4), key=row.__getitem__) for row in rows]


def main(argv: list[str] | None = None) -> None:
    """Writes the model and the prompts, runs both sides, prints a table."""
    from random_weights import write_model

    from qwen_jax.command_line import path_argument
    from qwen_jax.models.config import ModelConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=path_argument, required=True, help="has the folder mmlu of the publisher")
    parser.add_argument("--peer_python", default=sys.executable, help="Python of an environment with lm-eval and torch")
    parser.add_argument("--subjects", default=SUBJECTS, help="joined by commas (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="all 57 subjects, 14,042 questions")
    parser.add_argument("--batches", nargs="+", type=int, default=[8], help="batch sizes of HFLM; the best one counts")
    parser.add_argument("--peer_every", type=int, default=1, help="the peer answers every so many-th question")
    parser.add_argument("--tiny", action="store_true", help="a model that only shows that it runs")
    arguments = parser.parse_args(argv)
    shape = dict(hidden_size=512, num_layers=8, num_heads=8, head_dim=64, ffn_size=1408)
    if arguments.tiny:
        shape = dict(hidden_size=32, num_layers=1, num_heads=2, head_dim=16, ffn_size=48)
    config = ModelConfig(vocab_size=VOCABULARY, context_length=CONTEXT_LENGTH, **shape)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        vocabulary = write_vocabulary(arguments.data_dir.absolute(), place)
        folder = write_model(config, place, spread=0.5, tokenizer=vocabulary)
        subjects = read_requests(
            arguments.data_dir.absolute(), None if arguments.all else arguments.subjects.split(",")
        )
        sides = {"qwen_jax": Side(sys.executable, OURS, folder, 0)}
        for size in arguments.batches:
            sides[f"HFLM, batches of {size}"] = Side(arguments.peer_python, PEER, folder, size, arguments.peer_every)
        answer_in_turns(subjects, sides)
        show(sides, subjects)


def answer_in_turns(subjects: dict[str, list[tuple[str, str]]], sides: dict[str, Side]) -> None:
    """Has every side answer each subject before the next one; prints a line a subject."""
    for index, (subject, requests) in enumerate(subjects.items(), 1):
        before = {name: side.wall for name, side in sides.items()}
        for side in sides.values():
            side.answer(requests)
        spent = ", ".join(f"{name} {side.wall - before[name]:.1f} s" for name, side in sides.items())
        load = os.getloadavg()[0]
        print(
            f"{index} of {len(subjects)} {subject}: {len(requests) // 4} questions, {spent}; load {load:.1f}",
            flush=True,
        )
    for side in sides.values():
        side.close()


def show(sides: dict[str, Side], subjects: dict[str, list[tuple[str, str]]]) -> None:
    """Prints the table of all questions, the ratio to the best peer, and the share of equal answers."""
    count = sum(map(len, subjects.values())) // 4
    print(f"{count:,} questions, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    print(f"{'':20} {'answered':>9} {'wall s':>9} {'CPU s':>9} {'questions/s':>12} {'per 2 CPU s':>12}")
    for name, side in sides.items():
        rates = f"{count / side.wall:>12.2f} {2 * count / side.cpu:>12.2f}"
        print(f"{name:20} {len(side.totals) // 4:>9,} {side.wall:>9.1f} {side.cpu:>9.1f} {rates}")
    ours = sides["qwen_jax"]
    peer = min((side for side in sides.values() if side is not ours), key=lambda side: side.wall)
    totals = iter(ours.totals)
    common = [total for rows in subjects.values() for total in peer.chosen([next(totals) for _ in rows])]
    same = sum(one == other for one, other in zip(answers(common), answers(peer.totals), strict=True))
    difference = max(abs(one - other) for one, other in zip(common, peer.totals, strict=True))
    print(f"ratio {peer.wall / ours.wall:.2f} by wall, {peer.cpu / ours.cpu:.2f} by CPU seconds")
    print(f"equal answers {same:,} of {len(common) // 4:,}; largest difference of log-likelihoods {difference:.1e}")


if __name__ == "__main__":
    main()
