"""Runs the commands of docs/how_to/add_a_benchmark.md, in order, in a copy of the repository."""

import re
import shutil

from tests.pages import ROOT, blocks, copy_repository, shell

TESTS = ("pyproject.toml", "tests/conftest.py", "tests/environment.py", "tests/evaluation/test_benchmarks.py")


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    shutil.copytree(ROOT / "tests/evaluation/published", tmp_path / "tests/evaluation/published")
    for file in TESTS:
        shutil.copy(ROOT / file, tmp_path / file)
    shown = []
    for kind, text in blocks("add_a_benchmark.md"):
        if kind == "python":
            path = re.match(r"# ((?:tasks|tests)/[\w/]+\.py)\n", text)[1]
            (tmp_path / path).write_text(text, encoding="utf-8")
        elif kind == "sh":
            shown.append(shell(text, tmp_path).stdout)
    _, benchmark, tested = shown
    for line in (
        "examples:   2",
        "left out:   1: no proverb: the first is data/proverbs/test.jsonl:3",
        "subjects:   animals 2",
        "⟦Proverb: A stitch in time saves ____.",
        "→ ⟦ C⟧",
    ):
        assert line in benchmark.splitlines()
    assert "[100%]" in tested and "F" not in tested.split("[100%]")[0]
