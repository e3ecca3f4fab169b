"""Questions of MMLU per second by log-likelihood, against lm-evaluation-harness's HFLM on the same weights, in one run.

    python benchmarks/mmlu.py --data_dir ../shared/data --peer_python ../lm_eval/bin/python        # four subjects
    python benchmarks/mmlu.py --data_dir ../shared/data --peer_python ../lm_eval/bin/python --all  # an hour or two

A model of 34M parameters (that of benchmarks/train_step.py) with random weights, float32, and a vocabulary of 8,192
tokens learnt from the publisher's validation questions. Prompts have five shots, as our benchmark `mmlu` makes them.
The context is 4,096 tokens, for with this vocabulary 460 prompts are longer than the 2,048 of the report.

Each side is a process of its own on the same cores. Both get the same 4 requests a question, as text, through the
harness's interface `loglikelihood`, and encode them themselves; ours compiles its programs meanwhile. The peer's
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
from qwen_jax.evaluate import load_engine
from qwen_jax.evaluation.harness import HarnessModel
def model(folder, batch):
    return HarnessModel(load_engine(folder))
"""
# Both sides: reads the requests, answers them, and writes seconds and log-likelihoods.
SIDE = """
import json, sys, time
from lm_eval.api.instance import Instance
lm = model(sys.argv[1], int(sys.argv[3]))
rows = [json.loads(line) for line in open(sys.argv[2])]
requests = [Instance("loglikelihood", {}, tuple(row), index) for index, row in enumerate(rows)]
wall, cpu = time.perf_counter(), time.process_time()
found = lm.loglikelihood(requests)
seconds = [time.perf_counter() - wall, time.process_time() - cpu]
print("RESULT" + json.dumps([seconds, [total for total, _ in found]]))
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


def write_requests(data_dir: Path, subjects: Sequence[str] | None, path: Path) -> int:
    """Writes (context, continuation) pairs as JSON lines; returns the number of questions."""
    from qwen_jax.evaluation.benchmark import Example
    from tasks.benchmarks.mmlu import read

    found = [one for one in read(data_dir / "mmlu") if isinstance(one, Example)]
    examples = [one for one in found if subjects is None or one.subject in subjects]
    with open(path, "w") as file:
        file.writelines(json.dumps([one.prompt, choice]) + "\n" for one in examples for choice in one.choices)
    return len(examples)


def run_side(python: str, program: str, folder: Path, requests: Path, batch: int) -> tuple[list[float], list[float]]:
    """([wall seconds, CPU seconds], log-likelihoods)."""
    command = [python, "-c", program + SIDE, folder, requests, str(batch)]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.split("RESULT")[-1])


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
        subjects = None if arguments.all else arguments.subjects.split(",")
        count = write_requests(arguments.data_dir.absolute(), subjects, place / "requests.jsonl")
        print(f"{count:,} questions, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
        print(f"{'':20} {'wall s':>9} {'CPU s':>9} {'questions/s':>12} {'per 2 CPU s':>12} {'load':>6}")
        found = {}
        sides = [("qwen_jax", sys.executable, OURS, 0)]
        sides += [(f"HFLM, batches of {size}", arguments.peer_python, PEER, size) for size in arguments.batches]
        for name, python, program, batch in sides:
            seconds, totals = run_side(python, program, folder, place / "requests.jsonl", batch)
            found[name] = seconds, totals
            rates = f"{count / seconds[0]:>12.2f} {2 * count / seconds[1]:>12.2f}"
            print(f"{name:20} {seconds[0]:>9.1f} {seconds[1]:>9.1f} {rates} {os.getloadavg()[0]:>6.1f}", flush=True)
    (wall, cpu), ours = found.pop("qwen_jax")
    (peer_wall, peer_cpu), theirs = min(found.values(), key=lambda side: side[0][1])
    same = sum(one == other for one, other in zip(answers(ours), answers(theirs), strict=True))
    difference = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    print(f"ratio {peer_wall / wall:.2f} by wall, {peer_cpu / cpu:.2f} by CPU seconds")
    print(f"equal answers {same:,} of {count:,}; largest difference of log-likelihoods {difference:.1e}")


if __name__ == "__main__":
    main()
