"""Peak memory and speed of conversions between all pairs of formats, at the shape of a released model.

    python benchmarks/conversion.py --folder=/scratch/convert                  # 7B: 15.4 GB of random bfloat16 values
    python benchmarks/conversion.py --folder=/scratch/convert --size=tiny      # the same in seconds
    python benchmarks/conversion.py --folder=/scratch/convert --step=qwen:orbax
    python benchmarks/conversion.py --folder=/scratch/convert --layers=8 --against=../before

Each conversion is a process of `tools/convert_checkpoint.py`, started with the source out of the kernel's cache, and
timed until its files are on disk. Its peak memory is what the kernel says of it at its end (`VmHWM`: resident pages,
with those of mapped files such as shared libraries, and without the kernel's cache of files, which it gives up when
memory is short). The peer is `cp -r` of the safetensors folder that is its source or target, just after it and timed
in the same way. Every conversion ends with a comparison of all tensors with what was made at first. Three checkpoints
are on disk at a time (46 GB for 7B): a source is removed once it has been read for the last time. `--against` names a
checkout of another commit, whose converter runs just before ours on the same source.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

from qwen_jax import files  # noqa: E402
from qwen_jax.command_line import path_argument, run  # noqa: E402
from qwen_jax.conversion import huggingface  # noqa: E402
from qwen_jax.conversion.checksums import Checksums, flush  # noqa: E402
from qwen_jax.conversion.load import open_weights  # noqa: E402
from qwen_jax.conversion.mapping import FORMATS, external_tensors, gather  # noqa: E402
from qwen_jax.models.config import ModelConfig  # noqa: E402

SIZES = {
    "tiny": ModelConfig(vocab_size=4096, hidden_size=256, num_layers=4, num_heads=2, ffn_size=704),
    "1_8b": ModelConfig(vocab_size=151936, hidden_size=2048, num_layers=24, num_heads=16, ffn_size=5504),
    "7b": ModelConfig(vocab_size=151936, hidden_size=4096, num_layers=32, num_heads=32, ffn_size=11008),
}
# In an order in which two checkpoints at a time are enough.
STEPS = ("make", "qwen:qwen2", "qwen2:qwen", "qwen2:orbax", "orbax:qwen2", "orbax:qwen", "qwen:orbax")
BLOCK = 2**24
# A process tells its own peak: what its parent can ask for afterwards includes the parent's pages of before the start.
PEAK_FILE = "peak.txt"
TELLING = """
import runpy, sys
from pathlib import Path
file, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    Path(file).write_text(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def make(folder: Path, config: ModelConfig) -> None:
    """Writes random bfloat16 weights as format qwen, and their hashes beside."""
    values = np.random.default_rng(0).standard_normal(BLOCK, np.float32).astype(ml_dtypes.bfloat16)
    offsets = np.random.default_rng(1)

    def produce(tensor):
        start = int(offsets.integers(BLOCK))
        return np.resize(np.roll(values, -start), int(np.prod(tensor.shape))).reshape(tensor.shape)

    (folder / "qwen").mkdir(parents=True)
    table = FORMATS["qwen"]
    content = huggingface.external_config(table, config, "bfloat16", None)
    files.write_json(folder / "qwen" / huggingface.CONFIG_FILE, content)
    tensors = external_tensors(table, config)
    huggingface.write_safetensors(
        folder / "qwen", tensors, map(produce, tensors), "bfloat16", 5 * 10**9, Checksums(False), True
    )
    files.write_json(folder / "hashes.json", hashes(folder / "qwen"))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a folder in any format, as format qwen has it in bfloat16."""
    weights = open_weights(folder)
    found = {}
    for tensor in external_tensors(FORMATS["qwen"], weights.config):
        array = np.ascontiguousarray(gather(weights, tensor))
        narrow = array.astype(ml_dtypes.bfloat16)
        if not np.array_equal(narrow.astype(array.dtype).reshape(-1).view(np.uint8), array.reshape(-1).view(np.uint8)):
            raise ValueError(f"{folder}: {tensor.name} is not bfloat16 any more")
        found[tensor.name] = hashlib.sha256(narrow.reshape(-1).view(np.uint8).data).hexdigest()
    return found


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a command took: seconds until its files were on disk, and seconds of processors."""

    seconds: float
    processor_seconds: float


def measured(command: list[str], source: Path, target: Path, root: Path = ROOT) -> Cost:
    """Runs a command that makes `target` of `source`, with a checkout as the current folder."""
    shutil.rmtree(target, ignore_errors=True)
    flush(source)
    began, used = time.perf_counter(), _children()
    subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=True)
    used = _children() - used
    flush(target)
    return Cost(time.perf_counter() - began, used)


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def convert(folder: Path, source: str, target: str, config: ModelConfig, against: Path | None) -> list[str]:
    """Converts, compares and copies; gives rows of the table."""
    arguments = ["--from", f"{source}:{folder / source}", "--to", f"{target}:{folder / target}"]
    if target != "orbax":
        arguments += ["--dtype", "bfloat16"]
    costs = []
    for root in filter(None, (against, ROOT)):
        command = [sys.executable, "-c", TELLING, str(folder / PEAK_FILE), "tools/convert_checkpoint.py", *arguments]
        cost = measured(command, folder / source, folder / target, root)
        peak = int((folder / PEAK_FILE).read_text()) * 1024 / 1e9
        name = f"{source} to {target}{'' if root == ROOT else ', before'}"
        costs.append((name, cost, peak, size_of(folder / target) / 1e9))
    if hashes(folder / target) != json.loads((folder / "hashes.json").read_text()):
        raise ValueError(f"{source} to {target} changed tensors")
    copied = folder / (target if source == "orbax" else source)
    peer = measured(["cp", "-r", str(copied), str(folder / "copy")], copied, folder / "copy")
    shutil.rmtree(folder / "copy")
    wide = max(int(np.prod(tensor.shape)) for tensor in external_tensors(FORMATS["qwen"], config))
    limit = (wide * 2 * 4 + 10**9) / 1e9
    size = weight_bytes(config) / 1e9
    return [
        *(
            f"| {name} | {cost.seconds:.1f} | {cost.processor_seconds:.1f} | {size / cost.seconds:.2f} | "
            f"{peer.seconds / cost.seconds:.2f} | {peak:.2f} | {limit:.2f} | {written:.1f} |"
            for name, cost, peak, written in costs
        ),
        f"| cp -r | {peer.seconds:.1f} | {peer.processor_seconds:.1f} | {size / peer.seconds:.2f} | 1 | | | "
        f"{size:.1f} |",
    ]


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the weights in bfloat16."""
    return 2 * sum(int(np.prod(tensor.shape)) for tensor in external_tensors(FORMATS["qwen"], config))


def main() -> None:
    """Runs the steps and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=path_argument, required=True, help="where the checkpoints are made")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="number of layers, to take less room and time than the whole model")
    parser.add_argument("--vocab_size", type=int, help="rows of the vocabulary, for the same")
    parser.add_argument("--step", choices=STEPS, help="one of them alone; default: all, one after the other")
    parser.add_argument("--against", type=path_argument, help="checkout of another commit, to convert in turn")
    arguments = parser.parse_args()
    folder, config = arguments.folder, dataclasses.replace(SIZES[arguments.size], use_dynamic_ntk=True, use_logn=True)
    smaller = {"num_layers": arguments.layers, "vocab_size": arguments.vocab_size}
    config = dataclasses.replace(config, **{name: size for name, size in smaller.items() if size})
    print(f"load average at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    print(
        "| | seconds | CPU seconds | GB/s of bfloat16 | of cp | peak GB | limit GB | GB written |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        sep="\n",
        flush=True,
    )
    for step in (arguments.step,) if arguments.step else STEPS:
        if step == "make":
            shutil.rmtree(folder, ignore_errors=True)
            make(folder, config)
        else:
            source, target = step.split(":")
            for other in set(FORMATS) | {"orbax"}:
                if other not in (source, target):
                    shutil.rmtree(folder / other, ignore_errors=True)
            print(*convert(folder, source, target, config, arguments.against), sep="\n", flush=True)
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    run(main)
