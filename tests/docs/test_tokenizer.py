"""Runs the commands of docs/how_to/tokenizer.md that are marked `sh`, in a copy of the repository."""

import re

from tests.pages import blocks, copy_repository, shell


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    shown = [shell(text, tmp_path).stdout for kind, text in blocks("tokenizer.md") if kind == "sh"]
    small, more, compared = shown
    assert "2000 ids (1792 ranks)" in small and "small.tokenizer.json beside it gives the same ids" in small
    assert "99156 ranks of cl100k_base, all kept: True; 500 merges of our own" in more
    assert re.search(r"\| code \| [\d,]+ \| \d\.\d\d \(\d\.\d\d\) \| \d\.\d\d \(1\.00\) \| ", compared)
    assert (tmp_path / "runs" / "compression.png").stat().st_size > 5000
