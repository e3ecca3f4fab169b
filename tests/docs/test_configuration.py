"""Runs the commands of docs/reference/configuration.md, in order, beside the repository and not in it."""

from tests.pages import ROOT, blocks, shell


def test_a_size_of_ones_own_is_one_file(tmp_path):
    page = blocks("configuration.md")
    shown = [shell(text, tmp_path, ROOT).stdout for kind, text in page if kind == "sh"]
    assert ("", shown[-1]) in page, f"the page does not show {shown[-1]!r}"
