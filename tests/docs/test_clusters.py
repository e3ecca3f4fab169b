"""Runs the commands of docs/how_to/clusters.md, in order, in a copy of the repository."""

import pytest

from tests.pages import blocks, copy_repository, shell


@pytest.mark.slow
def test_commands_of_the_page(tmp_path):
    pytest.importorskip("distributed", reason="needs the extra `dask`")
    copy_repository(tmp_path)
    (text,) = [text for kind, text in blocks("clusters.md") if kind == "sh"]
    shell(text, tmp_path)
    assert (tmp_path / "distributed" / "manifest.json").is_file()
