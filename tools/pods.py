"""What the whole family of Qwen-7B and Qwen-14B would take on TPUs and GPUs: chip-hours and cost of each stage.

    make pods
    python tools/pods.py --stages sft,math_sft --sizes 7b --chips v5p --output runs/pods

Each stage's program is compiled by tools/compile_for_tpu.py or compile_for_gpu.py for devices that are not here, as its
recipe in gin/runs has it, and its memory and estimated time of a step are kept in docs/results/pods.json: a program
that stands there is not compiled again (`--again sft_7b/v5p_64` does so). One takes one to six minutes of processor
time and 3 GB, and needs libtpu (`pip install -c requirements.txt "jax[tpu]"`) or, for GPUs, JAX's plugin for CUDA
(docs/how_to/gpu_clusters.md). Killed at any moment, the same call goes on; one that cannot be compiled does not keep
the others from it. --table only writes the table, of what is there. --output gets pods.md.

Chip-hours are updates times the time of one, on all chips; cost is that times a price of one chip's hour, for which
--price takes yours: the default is an assumption. Evaluation, checkpoints, restarts and idle time come on top. PMP and
reward model: the report gives no number of comparisons, so their updates are ours. Times on GPUs are bounds, which no
GPU reaches: at nine tenths of the sheet's operations per second.

Exit code 1: a program does not fit; 2: one was not compiled.
"""

import argparse
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from shown_commands import ROOT, show, title

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.hardware import GIB

RECORDS = ROOT / "docs" / "results" / "pods.json"
CHIPS = {"v5p": "TPU v5p", "v5e": "TPU v5e", "h200": "NVIDIA H200"}
PRICES = {"v5p": 4.20, "v5e": 1.20, "h200": 3.80}
SIZES = ("7b", "14b")
_START = "INITIAL_CHECKPOINT=none"
# What PPO needs besides, as docs/results/tpu_estimates.md has it.
_PPO = (_START, "REWARD_CHECKPOINT=none", "MIXTURE_OR_TASK=none", "PRETRAINING=none", "PRETRAINING_COEFFICIENT=1")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the report.

    Attributes:
      title: as in the table.
      updates: how many by its recipe, by size; of a rollout, tokens that are generated one after the other.
      hardware: file of gin/hardware by chip, without `.gin`.
      program: of tools/compile_for_tpu.py and compile_for_gpu.py.
      recipe: of gin/runs, without size; empty: the name of the stage.
      bindings: that the recipe leaves open, or that make it fit.
      by_chip: more of them, where the batch has fewer rows than there are chips, or memory is short.
      like: stage whose program this is, too: it differs in rates and data alone.
      note: of the table.
    """

    title: str
    updates: dict[str, int]
    hardware: dict[str, str]
    program: str = "train"
    recipe: str = ""
    bindings: tuple[str, ...] = (_START,)
    by_chip: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    like: str = ""
    note: str = ""


def _both(updates: int) -> dict[str, int]:
    return dict.fromkeys(SIZES, updates)


_POD = {"v5p": "v5p_256", "v5e": "v5e_256", "h200": "h200_256"}
_SLICE = {"v5p": "v5p_64", "v5e": "v5e_64", "h200": "h200_8"}
_HOST = {"v5p": "v5p_4", "v5e": "v5e_16", "h200": "h200_8"}
# Of PPO, whose four models are in memory: a pod of v5e, with a row for each pair of chips and nothing kept of it.
_FOUR_MODELS = {**_SLICE, "v5e": "v5e_256"}
_IN_PAIRS = {"v5e": ("MeshConfig.tensor=2", "ModelConfig.remat='full'")}
# A rollout of 512 responses, 64 at a time, each of up to 1,024 tokens; 100 rollouts.
_GENERATED = 100 * (512 // 64) * 1024
STAGES = {
    "pretrain": Stage("Qwen: pretraining", {"7b": 572_205, "14b": 715_256}, _POD, bindings=()),
    "sft": Stage("Qwen-Chat: SFT", _both(4_000), _SLICE),
    "pmp": Stage(
        "Qwen-PMP",
        _both(15_625),
        _HOST,
        by_chip={"v5e": ("MeshConfig.tensor=4",), "h200": ("MeshConfig.tensor=2",)},
        note="1M comparisons, ours",
    ),
    "reward": Stage("Qwen-RM", _both(1_563), _HOST, like="pmp", note="100k comparisons, ours"),
    "ppo": Stage("Qwen-Chat-RLHF: updates", _both(1_600), _FOUR_MODELS, "ppo_update", "ppo", _PPO, _IN_PAIRS),
    "rollout": Stage(
        "Qwen-Chat-RLHF: rollouts", _both(_GENERATED), _FOUR_MODELS, "ppo_rollout", "ppo", _PPO, _IN_PAIRS
    ),
    "code": Stage("Code-Qwen", _both(21_458), {**_POD, "v5p": "v5p_64"}),
    # 32 rows of 8,192 tokens.
    "code_sft": Stage(
        "Code-Qwen-Chat",
        _both(4_000),
        _SLICE,
        by_chip={"v5p": ("MeshConfig.tensor=2",), "v5e": ("MeshConfig.tensor=2",)},
        note="one stage",
    ),
    "math_sft": Stage("Math-Qwen-Chat", _both(50_000), _SLICE),
    "vl_stage1": Stage("Qwen-VL, stage 1", {"7b": 50_000}, _POD, bindings=(_START, "MeshConfig.data=2")),
    "vl_stage2": Stage(
        "Qwen-VL, stage 2",
        {"7b": 19_000},
        _POD,
        bindings=(_START, "MeshConfig.data=2", "TOKENS_PER_DEVICE=4096"),
    ),
    "vl_stage3": Stage("Qwen-VL-Chat, stage 3", {"7b": 8_000}, _SLICE),
}


def name_of(stage: str, size: str, chip: str) -> str:
    """Name of a program in the records."""
    return f"{STAGES[stage].like or stage}_{size}/{STAGES[stage].hardware[chip]}"


def command(stage: str, size: str, chip: str) -> list[str]:
    """Arguments, after `python`, that compile a program."""
    one = STAGES[STAGES[stage].like or stage]
    recipe = one.recipe or STAGES[stage].like or stage
    tool = f"tools/compile_for_{'gpu' if chip == 'h200' else 'tpu'}.py"
    found = [tool, f"--program={one.program}", f"--gin_file=gin/runs/{recipe}_{size}.gin"]
    return [
        *found,
        f"--gin_file=gin/hardware/{one.hardware[chip]}.gin",
        *(f"--gin.{binding}" for binding in (*one.bindings, *one.by_chip.get(chip, ()))),
    ]


def chips_of(hardware: str) -> int:
    """Chips of a hardware file, by its name: `v5p_256`, `h200_8`, or `v5e_2x256` of two slices."""
    number = 1
    for factor in hardware.split("_")[1].split("x"):
        number *= int(factor)
    return number


def record(report: dict) -> dict:
    """What is kept of a report of tools/compile_for_tpu.py or compile_for_gpu.py."""
    kept = {"fits": report["fits"], "limit_gib": round(report["memory_limit_bytes"] / GIB, 2)}
    if "memory_need_bytes" in report:
        kept["memory_gib"] = round(report["memory_need_bytes"] / GIB, 1)
    if not report["fits"]:
        return kept | ({"message": report["message"]} if "message" in report else {})
    return kept | {"seconds": [float(f"{report['seconds'][bound]:.3g}") for bound in ("low", "high")]}


def compile_one(stage: str, size: str, chip: str) -> dict:
    """The record of a program that is compiled now.

    Raises:
      subprocess.CalledProcessError: the compiler or the arguments fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        done = subprocess.run(show([*command(stage, size, chip), "--json", path]), cwd=ROOT)
        if not path.exists():
            raise subprocess.CalledProcessError(done.returncode, done.args)
        return record(json.loads(path.read_text()))


def hours(stage: str, size: str, chip: str, records: dict[str, dict]) -> tuple[float, float] | None:
    """Chip-hours of a stage, low and high; None: its program is not known or does not fit."""
    found = records.get(name_of(stage, size, chip), {})
    if not found.get("fits"):
        return None
    chips, updates = chips_of(STAGES[stage].hardware[chip]), STAGES[stage].updates[size]
    low, high = (updates * seconds * chips / 3600 for seconds in found["seconds"])
    return low, high


def _shown(low: float, high: float, form: str = ",.0f") -> str:
    first, second = format(low, form), format(high, form)
    return first if first == second else f"{first}–{second}"


def table(
    stages: Sequence[str],
    sizes: Sequence[str],
    chips: Sequence[str],
    records: dict[str, dict],
    prices: dict[str, float],
) -> str:
    """Markdown: a table for each size and chip, with the sum of what is known."""
    parts = []
    for size in sizes:
        for chip in chips:
            lines = [
                f"### Qwen-{size.upper()} on {CHIPS[chip]}, ${prices[chip]:.2f} a chip-hour\n",
                "| stage | chips | updates | step, s | memory, GiB | chip-hours | cost, $ |",
                "|---|--:|--:|--:|--:|--:|--:|",
            ]
            total, missing = [0.0, 0.0], 0
            for stage in stages:
                one = STAGES[stage]
                if size not in one.updates:
                    continue
                found, spent = records.get(name_of(stage, size, chip)), hours(stage, size, chip, records)
                start = f"| {one.title}{f' ({one.note})' if one.note else ''} | {chips_of(one.hardware[chip])} | "
                start += f"{one.updates[size]:,} | "
                if found is None or spent is None:
                    missing += 1
                    why = "not compiled" if found is None else "does not fit"
                    lines.append(f"{start}{why} | {'' if found is None else found.get('memory_gib', '')} | – | – |")
                    continue
                total = [before + more for before, more in zip(total, spent, strict=True)]
                cost = _shown(*(prices[chip] * value for value in spent))
                seconds = _shown(*found["seconds"], ".3g")
                lines.append(f"{start}{seconds} | {found['memory_gib']:g} | {_shown(*spent)} | {cost} |")
            cost = _shown(*(prices[chip] * value for value in total))
            without = f" without {missing} of {len(lines) - 3} stages" if missing else ""
            lines.append(f"| **sum**{without} | | | | | **{_shown(*total)}** | **{cost}** |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _listed(known: Iterable[str]):
    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {wrong[0]!r}: choose of {', '.join(known)}")
        return names

    return read


def _prices(text: str) -> dict[str, float]:
    try:
        found = {name: float(value) for name, value in (one.split("=") for one in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not CHIP=DOLLARS,…") from error
    if wrong := [name for name, value in found.items() if name not in CHIPS or not 0 < value < 1e6]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}: expected a positive price of {' or '.join(CHIPS)}")
    return PRICES | found


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=_listed(list(STAGES)), default=list(STAGES), help="default: all")
    parser.add_argument("--sizes", type=_listed(SIZES), default=list(SIZES), help="default: 7b,14b")
    parser.add_argument("--chips", type=_listed(CHIPS), default=list(CHIPS), help="default: v5p,v5e,h200")
    parser.add_argument("--price", type=_prices, default=PRICES, metavar="CHIP=DOLLARS,…", help="of one chip's hour")
    parser.add_argument("--again", action="append", default=[], metavar="NAME", help="compile a recorded program anew")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument(
        "--records", type=path_argument, default=RECORDS, help="JSON of programs (default: %(default)s)"
    )
    parser.add_argument("--output", type=path_argument, default=Path("runs/pods"), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    records = files.read_json(arguments.records) if arguments.records.exists() else {}
    wanted = [
        (stage, size, chip)
        for stage in arguments.stages
        for size in arguments.sizes
        for chip in arguments.chips
        if size in STAGES[stage].updates
    ]
    if not wanted:
        raise ValueError(f"no stage of {', '.join(arguments.stages)} is one of {', '.join(arguments.sizes)}")
    if unknown := set(arguments.again) - {name_of(*one) for one in wanted}:
        raise ValueError(f"--again {sorted(unknown)[0]}: no such program; one is {name_of(*wanted[0])}")
    again, failed = set(arguments.again), []
    for number, one in enumerate(wanted, 1):
        name = name_of(*one)
        if arguments.table or (name in records and name not in again):
            continue
        title(f"{number} of {len(wanted)}. {STAGES[one[0]].title}, {one[1]}, {one[2]}")
        try:
            records[name] = compile_one(*one)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} (exit code {error.returncode})")
            continue
        again.discard(name)
        files.write_json(arguments.records, dict(sorted(records.items())))
    text = table(arguments.stages, arguments.sizes, arguments.chips, records, arguments.price)
    arguments.output.mkdir(parents=True, exist_ok=True)
    files.write_text(arguments.output / "pods.md", text)
    print(f"\n{text}\nwrote {arguments.output / 'pods.md'}")
    if failed:
        raise ValueError(f"not compiled, for the reasons above: {', '.join(failed)}")
    return 1 if any(not records.get(name_of(*one), {"fits": True})["fits"] for one in wanted) else 0


if __name__ == "__main__":
    run(main)
