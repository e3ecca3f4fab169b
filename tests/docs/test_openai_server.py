"""Runs the commands and the program of docs/how_to/openai_server.md on a random model in place of the demo's."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import one_device
from tests.fakes import random_run
from tests.pages import ROOT, blocks, shell

ADDRESS = "http://127.0.0.1:8000"


def start(command, folder):
    """(process, URL) of a server that answers."""
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", "-c", f"exec env {command.strip()}"],
        cwd=folder,
        env=one_device() | paths,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if found := re.match(r"ready at (\S+) ", line):
            return process, found[1]
    raise AssertionError(f"the server ended with {process.wait()}")


def test_commands_of_the_page(tmp_path):
    pytest.importorskip("openai", reason="openai is not installed")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=2048)
    random_run(tmp_path / "runs" / "demo", **sizes)
    starting, *asking = [text for kind, text in blocks("openai_server.md") if kind == "sh"]
    *asking, opening = asking
    process, url = start(starting.replace("--port 8000", "--port 0"), tmp_path)
    try:
        shown = [shell(text.replace(ADDRESS, url), tmp_path, ROOT).stdout for text in asking]
        program = "\n".join(text for kind, text in blocks("openai_server.md") if kind == "python")
        # A random model never ends its reply.
        program = program.replace(ADDRESS, url).replace("seed=1)", "seed=1, max_tokens=500)")
        program = program.replace("as stream:", "as stream, contextlib.suppress(openai.LengthFinishReasonError):")
        shell(f"python - <<'END'\nimport contextlib\n{program}END\n", tmp_path, ROOT)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
    assert json.loads(shown[0])["choices"][0]["message"]["role"] == "assistant"
    assert json.loads(shown[1])["object"] == "text_completion"
    assert '{"status":"ok"}' in shown[2] and "qwen_jax_rows 16.0" in shown[2]
    assert opening.startswith("QWEN_JAX_API_KEY=secret python -m qwen_jax.serve ")
