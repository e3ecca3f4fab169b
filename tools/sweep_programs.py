"""Compiles variants of a run's train step for an absent TPU pod, and reports the fastest one that fits.

    python tools/sweep_programs.py --gin_file=gin/runs/pretrain_7b.gin \\
        --gin_file=gin/hardware/v5p_256.gin --output=runs/sweep_7b_v5p --accumulation=1,2 --blocks=512,1024x2048

Every variant is compiled by tools/compile_for_tpu.py in a process of its own, one after the other, each one to two
minutes and 3 GB. Killed at any moment, the same command goes on: results are lines of results.jsonl in --output, and
are used again only for the same gin files, flags and sources of the step. The table is also written, as table.md.
Times are estimates; the help of tools/compile_for_tpu.py lists their assumptions.

Exit code 1: none fits.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.configuration import files_read
from qwen_jax.hardware import GIB
from qwen_jax.models.config import REMAT_POLICIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TABLE = "results.jsonl", "table.md"
# Sources of the step: a change of them makes old results useless.
SOURCES = ("qwen_jax/models", "qwen_jax/programs", "qwen_jax/training", "qwen_jax/sharding.py")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One program: a name for people, and the gin bindings (NAME=VALUE) that make it."""

    name: str
    bindings: tuple[str, ...]


def remat_choices(names: str | None) -> list[Variant]:
    """Remat policies by name, separated by commas; None: all.

    Raises:
      ValueError: no such policy.
    """
    chosen = names.split(",") if names else list(REMAT_POLICIES)
    if unknown := [name for name in chosen if name not in REMAT_POLICIES]:
        raise ValueError(f"--remat={names}: no policy {unknown[0]!r}; there are {', '.join(REMAT_POLICIES)}")
    return [Variant(f"remat={name}", (f"ModelConfig.remat={name}",)) for name in chosen]


def accumulation_choices(numbers: str | None) -> list[Variant]:
    """Numbers of parts of a batch, separated by commas; None: as configured.

    Raises:
      ValueError: no positive number.
    """
    if not numbers:
        return [Variant("", ())]
    if wrong := [n for n in numbers.split(",") if not n.isdecimal() or int(n) < 1]:
        raise ValueError(f"--accumulation={numbers}: expected positive numbers separated by commas, found {wrong[0]!r}")
    return [Variant(f"accumulation={n}", (f"ACCUMULATION_STEPS={n}",)) for n in numbers.split(",")]


def block_choices(sizes: str | None) -> list[Variant]:
    """Sizes of attention's blocks, each QUERY, QUERYxKEY or QUERYxKEYxSTEP, separated by commas; None: as configured.

    Raises:
      ValueError: another form.
    """
    if not sizes:
        return [Variant("", ())]
    found = []
    for size in sizes.split(","):
        numbers = size.split("x")
        if not 1 <= len(numbers) <= 3 or not all(n.isdecimal() and int(n) % 128 == 0 and int(n) for n in numbers):
            raise ValueError(f"--blocks={sizes}: expected QUERYxKEYxSTEP in multiples of 128, found {size!r}")
        query, key = numbers[0], numbers[min(1, len(numbers) - 1)]
        fields = {"query": query, "key": key, "key_step": numbers[-1] if len(numbers) == 3 else key}
        bindings = ["ModelConfig.attention_blocks=@AttentionBlocks()"]
        for field, number in fields.items():
            bindings += [f"AttentionBlocks.{field}={number}", f"AttentionBlocks.backward_{field}={number}"]
        found.append(Variant(f"blocks={size}", tuple(bindings)))
    return found


def other_choices(vary: str) -> list[Variant]:
    """NAME=VALUE|VALUE of any macro or parameter."""
    name, equals, values = vary.partition("=")
    if not equals:
        raise ValueError(f"--vary={vary}: expected NAME=VALUE|VALUE")
    return [Variant(f"{name.split('.')[-1]}={value}", (f"{name}={value}",)) for value in values.split("|")]


def all_variants(axes: Sequence[Sequence[Variant]]) -> list[Variant]:
    """Every combination of one choice of each axis."""
    return [
        Variant(
            " ".join(choice.name for choice in choices if choice.name),
            tuple(itertools.chain.from_iterable(choice.bindings for choice in choices)),
        )
        for choices in itertools.product(*axes)
    ]


def fingerprint(arguments: Sequence[str], files: Sequence[str]) -> str:
    """Fingerprint of everything that a result depends on, except the variant."""
    digest = hashlib.sha256("\0".join(arguments).encode())
    paths = files_read(files)
    for source in SOURCES:
        paths += sorted((ROOT / source).glob("*.py")) if (ROOT / source).is_dir() else [ROOT / source]
    for path in paths:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


class Results:
    """Results in a file that a kill does not damage: one line of JSON each, in the order of arrival."""

    def __init__(self, file: Path, of: str):
        """Reads earlier results.

        Args:
          of: fingerprint of the results to use; other lines stay in the file.
        """
        self._file, self._of = file, of
        self.by_name: dict[str, dict] = {}
        self.others = 0
        if not file.exists():
            return
        text = file.read_text()
        if text and not text.endswith("\n"):  # killed while it wrote
            file.write_text(text := text[: text.rfind("\n") + 1])
        for row in map(json.loads, text.splitlines()):
            if row["of"] == of:
                self.by_name[row["variant"]] = row
            else:
                self.others += 1

    def add(self, variant: Variant, result: dict) -> None:
        """Keeps a result."""
        row = {"variant": variant.name, "of": self._of, "bindings": list(variant.bindings), **result}
        with open(self._file, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.by_name[variant.name] = row


def compile_variant(arguments: Sequence[str], variant: Variant, timeout: float) -> dict:
    """Compiles one variant in a process of its own.

    Returns:
      its report, or {"error": …} if the compiler gave up; with "transient" if trying again may help.

    Raises:
      ValueError: the arguments are wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, bindings = Path(folder) / "report.json", [f"--gin.{binding}" for binding in variant.bindings]
        command = [sys.executable, str(ROOT / "tools" / "compile_for_tpu.py"), *arguments, *bindings, "--json", report]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"not compiled after {timeout:.0f} s", "transient": True}
        if report.exists():
            return json.loads(report.read_text())
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    message = errors[-1].removeprefix("error: ") if errors else " ".join(done.stderr.splitlines()[-3:])
    if done.returncode < 0:
        return {"error": f"the compiler died of signal {-done.returncode}", "transient": True}
    if "the compiler gave up" in message:
        return {"error": message}
    raise ValueError(f"{variant.name}: {message}")


def sweep(variants: Sequence[Variant], compile_one: Callable[[Variant], dict], results: Results) -> None:
    """Compiles the variants without a result, and prints the progress."""
    seconds: list[float] = []
    for number, variant in enumerate(variants, 1):
        known, began = variant.name in results.by_name, time.monotonic()
        result = results.by_name[variant.name] if known else compile_one(variant)
        left = ""
        if not known:
            seconds.append(time.monotonic() - began)
            waiting = sum(other.name not in results.by_name for other in variants[number:])
            minutes = waiting * sum(seconds) / len(seconds) / 60
            left = f" ({seconds[-1]:.0f} s; {waiting} to go, about {minutes:.0f} minutes)" if waiting else ""
            if not result.pop("transient", False):
                results.add(variant, result)
        print(f"{number} of {len(variants)}: {variant.name}: {verdict(result)}{left}", flush=True)


def verdict(result: dict) -> str:
    """A result in a few words."""
    if "error" in result:
        return result["error"]
    if "memory_need_bytes" not in result:
        return f"does not fit: {result['message']}"
    need = f"{result['memory_need_bytes'] / GIB:.2f} of {result['memory_limit_bytes'] / GIB:.2f} GiB"
    if not result["fits"]:
        return f"does not fit, {need}"
    return f"{result['seconds']['low']:.4g} to {result['seconds']['high']:.4g} s, {need}"


def ranked(rows: Sequence[dict]) -> list[dict]:
    """Results that fit, the fastest first, by the mean of both bounds."""
    fitting = [row for row in rows if row.get("fits")]
    return sorted(fitting, key=lambda row: row["seconds"]["low"] + row["seconds"]["high"])


def table(variants: Sequence[Variant], results: Results) -> str:
    """All results in Markdown: the fitting ones by time, then the others."""
    rows = [results.by_name[variant.name] for variant in variants if variant.name in results.by_name]
    lines = [
        "| variant | step, s | tokens/s per chip | MFU % | memory, GiB | executed / model FLOPs | wire / least |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ranked(rows):
        seconds, speed, mfu = row["seconds"], row["tokens_per_second_per_chip"], row["mfu"]
        wire = f"{row['wire_bytes'] / row['least_wire_bytes']:.2f}" if row["least_wire_bytes"] else "–"
        lines.append(
            f"| {row['variant']} | {seconds['low']:.4g}–{seconds['high']:.4g} | {speed['low']:,.0f}–"
            f"{speed['high']:,.0f} | {100 * mfu['low']:.0f}–{100 * mfu['high']:.0f} | "
            f"{row['memory_need_bytes'] / GIB:.2f} | {row['executed_flops'] / row['model_flops']:.2f} | {wire} |"
        )
    lines += [f"| {row['variant']} | {verdict(row)} | | | | | |" for row in rows if not row.get("fits")]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--gin_file=FILE and --gin.NAME=VALUE, in one word each, as for tools/compile_for_tpu.py",
    )
    parser.add_argument("--output", type=path_argument, required=True, help="folder of the results")
    parser.add_argument(
        "--remat", help="remat policies, separated by commas; default all: " + ", ".join(REMAT_POLICIES)
    )
    parser.add_argument("--accumulation", help="ACCUMULATION_STEPS, separated by commas")
    parser.add_argument(
        "--blocks", help="blocks of TPU attention: QUERY, QUERYxKEY or QUERYxKEYxSTEP, separated by commas"
    )
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=VALUE|VALUE", help="any other setting")
    parser.add_argument(
        "--timeout", type=float, default=1800, help="largest time of one variant, in seconds (default 1800)"
    )
    arguments, passed = parser.parse_known_args(argv)
    if wrong := [a for a in passed if not a.startswith(("--gin_file=", "--gin."))]:
        parser.error(f"unknown argument {wrong[0]}; write --gin_file=FILE and --gin.NAME=VALUE in one word")
    if arguments.timeout <= 0:
        raise ValueError(f"--timeout={arguments.timeout:g}: expected a positive number of seconds")
    variants = all_variants(
        [
            remat_choices(arguments.remat),
            accumulation_choices(arguments.accumulation),
            block_choices(arguments.blocks),
            *map(other_choices, arguments.vary),
        ]
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    gin_files = [a.removeprefix("--gin_file=") for a in passed if a.startswith("--gin_file=")]
    results = Results(arguments.output / RESULTS, fingerprint(passed, gin_files))
    if results.others:
        print(f"{results.others} result(s) of other files, flags or sources in {arguments.output} are left alone")
    sweep(variants, lambda variant: compile_variant(passed, variant, arguments.timeout), results)
    text = table(variants, results)
    files.write_text(arguments.output / TABLE, text + "\n")
    print(f"\n{text}\n")
    best = ranked([results.by_name[v.name] for v in variants if v.name in results.by_name])
    if not best:
        print(f"none of {len(variants)} fits")
        return 1
    print(f"fastest that fits: {best[0]['variant']}, {verdict(best[0])}")
    print("use it with " + " ".join(f"--gin.{binding}" for binding in best[0]["bindings"]))
    return 0


if __name__ == "__main__":
    run(main)
