"""Runs the commands of docs/curate.md, in order, in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "curate.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_commands_of_the_page(tmp_path):
    for name in ("qwen_jax", "tasks", "tools", "gin"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("XLA_FLAGS", None)
    shown = []
    for text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
        shown.append(result.stdout)
    reasons, cached = shown[4], shown[5]
    for reason in ("exact: duplicate", "fuzzy: near_duplicate", "scores: max_offensive", "contamination: in_benchmark"):
        assert reason in reasons
    assert "local_files" in cached
    manifest = json.loads((tmp_path / "scored" / "manifest.json").read_text())
    counters = manifest["counters"]
    assert counters["written_documents"]["books"] > 2 * counters["kept_source"]["books"] > 0
    assert (tmp_path / "scored" / "report.html").stat().st_size > 10_000


def test_every_parameter_that_the_page_names_exists():
    from qwen_jax.curation.contamination import ContaminationConfig
    from qwen_jax.curation.dedup import FuzzyConfig
    from qwen_jax.curation.stages import CurationConfig

    page = PAGE.read_text(encoding="utf-8")
    for configurable, fields in (("make_config", CurationConfig), ("FuzzyConfig", FuzzyConfig)):
        names = re.findall(rf"\b{configurable}\.(\w+)", page)
        assert names and set(names) <= set(fields.__dataclass_fields__)
    assert {"words", "characters"} <= set(ContaminationConfig.__dataclass_fields__)
