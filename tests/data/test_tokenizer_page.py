"""Runs the commands of docs/tokenizer.md that are marked `sh`, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys


def test_commands_of_the_page(root, tmp_path, plain_environment):
    page = (root / "docs" / "tokenizer.md").read_text(encoding="utf-8")
    for name in ("qwen_jax", "tasks", "tools", "docs"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = plain_environment | {
        "PYTHONPATH": str(tmp_path), "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
    }
    shown = []
    for text in re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        shown.append(done.stdout)
    small, more, compared = shown
    assert "2000 ids (1792 ranks)" in small and "small.tokenizer.json beside it gives the same ids" in small
    assert "99156 ranks of cl100k_base, all kept: True; 500 merges of our own" in more
    assert re.search(r"\| code \| [\d,]+ \| \d\.\d\d \(\d\.\d\d\) \| \d\.\d\d \(1\.00\) \| ", compared)
    assert (tmp_path / "runs" / "compression.png").stat().st_size > 5000
