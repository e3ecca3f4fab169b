"""Runs the commands of docs/how_to/add_a_task.md, in order, in a copy of the repository."""

import re

from tests.pages import blocks, copy_repository, shell


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    shown = []
    for kind, text in blocks("add_a_task.md"):
        if kind == "python":
            path = re.match(r"# (tasks/\w+\.py)\n", text)[1]
            (tmp_path / path).write_text(text, encoding="utf-8")
        elif kind == "sh":
            shown.append(shell(text, tmp_path).stdout)
    inspected, packed = shown[1], shown[4]
    assert "⟦2 birds sat in a tree" in inspected and "⟪<|endoftext|>⟫⟧" in inspected
    assert "25.00% poems" in packed and "75.00% python_corpus" in packed
    assert (tmp_path / "runs" / "cache" / "poems" / "packed-256" / "train" / "manifest.json").exists()
    assert (tmp_path / "runs" / "poems").is_dir()
