"""Runs the commands and the program of docs/generate.md, in order, on a random model in place of the demo's."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.fakes import random_run

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_commands_of_the_page(tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    random_run(tmp_path / "runs" / "demo", hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, max_length=256)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import "}\n{"prompt": "x = "}\n')
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    shown = []
    for language, text in BLOCK.findall((ROOT / "docs" / "generate.md").read_text(encoding="utf-8")):
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
        shown.append(result.stdout.decode())
    assert len(shown) == 4 and all(shown[index] for index in (0, 2, 3))
    assert (tmp_path / "out.jsonl").read_text().count("finish_reason") == 2
