"""Shows that a change of structure changes no number: trains the tiny model before and after, and compares.

    python tools/identical.py                  # the working tree against HEAD
    python tools/identical.py --base=HEAD~3    # against an earlier commit

The commit is checked out beside the working tree. Both train the same few steps from the same data and seed, through
the command line, in four ways: on one device, on 8 virtual CPU devices, in parts (gradient accumulation), and on rows
of whole documents (packed). Losses, gradient norms and held-out losses must be equal to the last bit, and so must the
parameters, compared as float32 safetensors. Results of a commit are kept in runs/identical, so that the next comparison
with it takes half as long. Takes about two minutes for each side.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "identical"
COMPARED = ("loss", "gradient_norm", "learning_rate", "eval/loss")
# Name of a way to train: (virtual devices, settings).
WAYS = {
    "one device": (1, {}),
    "8 devices": (8, {"MeshConfig.data": 2, "MeshConfig.fsdp": 2, "MeshConfig.tensor": 2}),
    "in parts": (1, {"ACCUMULATION_STEPS": 4}),
    "packed rows": (1, {"PACKING": "best_fit"}),
}
SETTINGS = {
    "ModelConfig.hidden_size": 256,
    "ModelConfig.num_layers": 2,
    "ModelConfig.num_heads": 2,
    "ModelConfig.head_dim": 128,
    "ModelConfig.ffn_size": 688,
    "SEQUENCE_LENGTH": 128,
    "BATCH_SIZE": 16,
    "TRAIN_STEPS": 6,
    "PEAK_LEARNING_RATE": 3e-3,
    "WARMUP_STEPS": 2,
    "EVAL_EVERY": 3,
    "EVAL_BATCHES": 2,
    "CHECKPOINT_EVERY": 6,
    "LOG_EVERY": 1,
    "ModelConfig.embedding_dropout": 0.1,
    "ModelConfig.attention_dropout": 0.1,
    "SEED": 1,
}


def _run(tree: Path, devices: int, *arguments) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: in {tree}: {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


def _corpus(folder: Path) -> tuple[Path, Path]:
    """Text and a vocabulary that do not depend on this machine: docs and sources of the commit compared with."""
    text, vocabulary = folder / "text", folder / "vocabulary.tiktoken"
    if not vocabulary.exists():
        text.mkdir(parents=True, exist_ok=True)
        for number in range(60):
            words = [hashlib.sha256(f"{number}/{i}".encode()).hexdigest()[: 2 + i % 5] for i in range(400)]
            (text / f"{number}.txt").write_text(" ".join(words) + "\n")
        _run(ROOT, 1, "tools/build_tokenizer.py", "--input", text, "--size=512", "--output", vocabulary)
    return text, vocabulary


def measure(tree: Path, folder: Path) -> dict[str, dict]:
    """Trains in every way with the code of `tree`.

    Returns:
      Way to {"rows": what metrics.jsonl says, as written; "parameters": SHA-256 of the exported weights}.
    """
    text, vocabulary = _corpus(WORK / "corpus")
    shutil.rmtree(folder, ignore_errors=True)
    files = ["gin/runs/pretrain_tiny.gin"]
    if not (tree / files[0]).exists():
        files = ["gin/models/tiny.gin", "gin/runs/pretrain.gin"]
    # Names that a commit of before had.
    old = (tree / "qwen_jax/training/loop_config.py").exists()
    found = {}
    for way, (devices, changes) in tqdm(WAYS.items(), desc=tree.name):
        output = folder / way.replace(" ", "_")
        settings = (
            SETTINGS
            | changes
            | {
                "OUTPUT_DIR": output,
                "CACHE_DIR": WORK / f"cache_{'old' if old else 'new'}",
                "VOCABULARY": vocabulary,
                "MIXTURE_OR_TASK": "local_files",
                "local_files.pattern": text,
                "local_files.validation_share": 0.1,
            }
        )
        if old and settings.get("PACKING") == "best_fit":
            settings["PACKING"] = "fit"
        _run(
            tree,
            devices,
            "-m",
            "qwen_jax.train",
            *(f"--gin_file={file}" for file in files),
            *(f"--gin.{name}={value}" for name, value in settings.items()),
        )
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        rows = [{name: row[name] for name in ("step", *COMPARED) if name in row} for row in rows]
        weights = folder / f"{output.name}_qwen2"
        _run(
            tree,
            1,
            "tools/convert_checkpoint.py",
            "--from",
            f"orbax:{output}",
            "--to",
            f"qwen2:{weights}",
            "--dtype=float32",
        )
        digest = hashlib.sha256()
        for file in sorted(weights.glob("*.safetensors")):
            digest.update(file.read_bytes())
        found[way] = {"rows": [row for row in rows if len(row) > 1], "parameters": digest.hexdigest()}
    return found


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HEAD", help="commit to compare the working tree with (default: %(default)s)")
    arguments = parser.parse_args(argv)

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=12", arguments.base)
    kept, tree = WORK / f"{commit}.json", WORK / commit
    if not kept.exists():
        if not tree.exists():
            git("worktree", "add", "--detach", str(tree), commit)
        try:
            before = measure(tree, WORK / "before")
        finally:
            git("worktree", "remove", "--force", str(tree))
        kept.write_text(json.dumps(before))
    before, after = json.loads(kept.read_text()), measure(ROOT, WORK / "after")
    differing = 0
    for way in WAYS:
        same = before[way] == after[way]
        differing += not same
        last = [row["loss"] for row in after[way]["rows"] if "loss" in row][-1]
        print(
            f"{way:12} {'identical' if same else 'DIFFERENT'}: {len(after[way]['rows'])} rows, last loss {last!r}, "
            f"parameters {after[way]['parameters'][:12]}"
        )
        for old, new in zip(before[way]["rows"], after[way]["rows"], strict=False):
            if old != new:
                print(f"    {commit}: {old}\n    {'here':12}: {new}")
                break
    sys.exit(f"{differing} of {len(WAYS)} ways differ from {commit}" if differing else 0)


if __name__ == "__main__":
    main()
