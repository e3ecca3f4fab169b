"""Runs the cells of docs/how_to/from_python.md in order, and compares what they print with the page."""

import contextlib
import io

from tests.pages import blocks


def test_the_cells_print_what_the_page_says(tmp_path, monkeypatch, single_device):
    monkeypatch.chdir(tmp_path)
    page, cells = blocks("from_python.md"), {"__name__": "notebook"}
    compared = 0
    for place, (kind, text) in enumerate(page):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "from_python.md", "exec"), cells)
        if place + 1 < len(page) and page[place + 1][0] == "":
            assert printed.getvalue() == page[place + 1][1]
            compared += 1
    assert compared == 3
    assert cells["base"]["step"] == cells["tuned"]["step"] == 80
    assert cells["base"]["loss"] < 0.5 and cells["tuned"]["loss"] < 0.1
    assert (tmp_path / "runs/python/chat/metrics.jsonl").exists()
