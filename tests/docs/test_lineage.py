"""Runs the commands of docs/how_to/lineage.md in a copy of the repository, with a toy, killed once."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.environment import one_device
from tests.pages import blocks, copy_repository, shell

# Calls what `python -m MODULE` and `python tools/NAME.py` would, without importing everything anew for each.
ONE_PROCESS = """
import importlib, sys
sys.path.insert(0, "tools")
import shown_commands
def call(*words):
    words = [str(word) for word in words]
    name, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0][6:-3], words[1:])
    print(">", name, flush=True)
    assert not importlib.import_module(name).main(arguments), name
shown_commands.call = call
import lineage
sys.exit(lineage.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    first, rehearsal, asked = [text for kind, text in blocks("lineage.md") if kind == "sh"]
    assert first == "make lineage\n"
    (tmp_path / "call.py").write_text(ONE_PROCESS)
    command, page = rehearsal.splitlines()
    flags = command.removeprefix("python tools/lineage.py ").split()
    begun = subprocess.Popen(
        [sys.executable, "call.py", *flags],
        cwd=tmp_path,
        env=one_device() | {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in begun.stdout:
        if line.startswith("== 8 of"):
            break
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    finished = (tmp_path / "runs/rehearsal/steps.jsonl").read_text()
    shown = shell(f"python call.py {' '.join(flags)}", tmp_path).stdout
    assert shown.count("done before: ") == len(finished.splitlines()) >= 12
    steps = (tmp_path / "runs/rehearsal/steps.jsonl").read_text()
    assert steps.startswith(finished)
    words = [tuple(json.loads(line)["words"]) for line in steps.splitlines()]
    assert len(words) == len(set(words)) and shown.count("holds  ") + shown.count("FAILS  ") == 12
    written = (tmp_path / "runs/rehearsal/report.html").read_text()
    assert "A rehearsal" in written and written.count('class="card"') == 11
    shell(page, tmp_path)
    assert (tmp_path / "runs/rehearsal/report.html").read_text() == written
    said = shell(asked, tmp_path).stdout
    assert re.match(r"user: Tell me about the owl\.\nassistant: ", said)
