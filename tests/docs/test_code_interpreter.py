"""Runs the examples of docs/how_to/code_interpreter.md and compares what they print with the page."""

import contextlib
import io

import pytest

from qwen_jax.sandbox import SandboxUnavailableError, run
from tests.pages import blocks


def test_the_examples_print_what_the_page_says(tmp_path, monkeypatch):
    try:
        run("")
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    page = blocks("code_interpreter.md")
    examples = [(text, page[i + 1][1]) for i, (kind, text) in enumerate(page) if kind == "python"]
    assert len(examples) == 2
    for text, expected in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "code_interpreter.md", "exec"), {"__name__": "example"})
        assert printed.getvalue() == expected
