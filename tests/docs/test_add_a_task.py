"""Runs the commands of docs/add_a_task.md, in order, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add_a_task.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_commands_of_the_page(tmp_path):
    for name in ("qwen_jax", "tasks", "tools", "gin"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("XLA_FLAGS", None)
    shown = []
    for language, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            path = re.match(r"# (tasks/\w+\.py)\n", text)[1]
            (tmp_path / path).write_text(text, encoding="utf-8")
            continue
        assert language == "sh"
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
        shown.append(result.stdout)
    inspected, packed = shown[1], shown[4]
    assert "⟦2 birds sat in a tree" in inspected and "⟪<|endoftext|>⟫⟧" in inspected
    assert "25.00% poems" in packed and "75.00% python_corpus" in packed
    assert (tmp_path / "runs" / "cache" / "poems" / "packed-256" / "train" / "manifest.json").exists()
    assert (tmp_path / "runs" / "poems").is_dir()
