"""Runs the commands of docs/gpu_clusters.md that need no GPU, in order, in a copy of the repository (30 s alone)."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from qwen_jax.training.checkpoints import saved_steps
from qwen_jax.training.loop_config import LoopConfig
from qwen_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu_clusters.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_commands_of_the_page(tmp_path):
    for name in ("qwen_jax", "tasks", "tools", "gin", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shown = []
    for text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text.replace("12345", port)], cwd=tmp_path, env=environment,
            capture_output=True, text=True,
        )
        assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
        shown.append(result.stdout + result.stderr)
    job, table, resumed, rewound = shown
    assert "2 device(s)" in job and "2 process(es)" in job and "1 device(s)" in resumed
    for row in table.splitlines():
        assert row in PAGE.read_text(encoding="utf-8"), "the table is what the command prints"
    assert "resuming runs/job after step 12" in resumed and "step 14" in resumed
    # Steps of 8 examples: after step 8 the run would go on with example 64.
    assert "passes over examples 64 to 79" in rewound and "resuming runs/job after step 8, example 64" in rewound
    run = tmp_path / "runs" / "job"
    assert saved_steps(run / "rewound_1") == [12, 14] and max(saved_steps(run)) == 14
    assert json.loads((run / "rewinds.json").read_text())[0]["skipped"] == [64, 80]
    assert {row["step"] for row in read_metrics(run) if "loss" in row} == set(range(1, 15))


def test_every_flag_and_macro_that_the_page_names_exists():
    page = PAGE.read_text(encoding="utf-8")
    recipe = (ROOT / "gin" / "runs" / "pretrain.gin").read_text(encoding="utf-8")
    macros = set(re.findall(r"--gin\.([A-Z_]+)=", page))
    assert {"SKIP_SPIKES", "KEEP_EVERY", "COMPILATION_CACHE"} <= macros
    assert all(re.search(rf"^{name} = ", recipe, re.MULTILINE) for name in macros)
    assert set(re.findall(r"LoopConfig\.(\w+)", page)) <= set(LoopConfig.__dataclass_fields__)
