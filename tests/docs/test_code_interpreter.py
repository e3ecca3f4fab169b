"""Runs the examples of docs/how_to/code_interpreter.md and compares what they print with the page."""

import contextlib
import io
import json
import shlex

import pytest

from qwen_jax.sandbox import SandboxUnavailableError, run
from tests.fakes import random_run
from tests.pages import blocks


def test_the_examples_print_what_the_page_says(tmp_path, monkeypatch):
    try:
        run("")
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    page = blocks("code_interpreter.md")
    examples = [(text, page[i + 1][1]) for i, (kind, text) in enumerate(page) if kind == "python"]
    assert len(examples) == 3
    for text, expected in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "code_interpreter.md", "exec"), {"__name__": "example"})
        assert printed.getvalue() == expected


def test_the_commands_of_the_page_score_a_checkpoint(tmp_path, monkeypatch, tool, capsys):
    (commands,) = [text for kind, text in blocks("code_interpreter.md") if kind == "sh"]
    sizes = dict(hidden_size=16, num_layers=1, num_heads=1, ffn_size=16, context_length=2048)
    random_run(tmp_path, **sizes).rename(tmp_path / "chat")
    (tmp_path / "runs").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        python, program, *arguments = shlex.split(line)
        assert python == "python"
        tool(program.removeprefix("tools/").removesuffix(".py")).main(arguments)
    printed = capsys.readouterr().out
    assert "| executable | 0.0 (of 1) | 0.0 (of 2) | – | – | 0.0 (of 1) |" in printed
    assert "| Qwen-7B-Chat in the report: executable | 82.4 | 64.4 | – | – | 67.2 |" in printed
    assert json.loads((tmp_path / "scores/scores.json").read_text())["correct"]["math"] == {"share": 0.0, "of": 1}
    assert len((tmp_path / "scores/solutions.jsonl").read_text().splitlines()) == 4
