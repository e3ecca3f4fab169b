"""tools/shown_commands.py: a step is finished once, its time is kept, and it ends with the tool that runs it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.pages import ROOT


@pytest.fixture
def shown_commands(tool):
    return tool("shown_commands")


def test_a_step_whose_whole_output_exists_is_finished(shown_commands, tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(shown_commands, "call", lambda *words: called.append(words))
    (tmp_path / "made").mkdir()
    steps = [
        shown_commands.Step("first", ("a", "--flag"), tmp_path / "made"),
        shown_commands.Step("second", ("b",), tmp_path / "missing"),
        shown_commands.Step("", ("c",)),
    ]
    shown_commands.go(tmp_path, steps)
    assert called == [("b",), ("c",)] and list(shown_commands.finished(tmp_path)) == [step.words for step in steps]
    assert "== 1 of 2. first" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / shown_commands.DONE).read_text().splitlines()]
    assert all(row["seconds"] >= 0 for row in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_killed_tool_leaves_no_step_behind(tmp_path):
    (tmp_path / "step.py").write_text("import sys\nprint('running', flush=True)\nsys.stdin.read()\n")
    code = f"import shown_commands; shown_commands.call({str(tmp_path / 'step.py')!r})"
    pipe = subprocess.PIPE
    tool = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tools", stdin=pipe, stdout=pipe, text=True)
    assert tool.stdout.readline().startswith("$ python ") and tool.stdout.readline() == "running\n"
    tool.kill()
    # The standard output ends when the last process that holds it does; the standard input of the step stays open.
    assert tool.stdout.read() == ""
    tool.wait()


def test_ctrl_c_waits_for_a_step_that_saves(tmp_path):
    """A terminal sends it to both."""
    (tmp_path / "step.py").write_text("""
import pathlib, signal, time
try:
    print("running", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(2)
    pathlib.Path(__file__).with_name("saved").touch()
""")
    code = f"import shown_commands as s; s.run(lambda: s.call({str(tmp_path / 'step.py')!r}))"
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    tool = subprocess.Popen(command, cwd=ROOT / "tools", stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert tool.stdout.readline().startswith("$ python ") and tool.stdout.readline() == "running\n"
    os.killpg(tool.pid, signal.SIGINT)
    assert tool.communicate() == ("", "interrupted\n") and tool.returncode == 130
    assert (tmp_path / "saved").exists()


def test_a_folder_with_steps_of_another_call_is_refused(shown_commands, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(shown_commands, "call", lambda *words: called.append(words))

    def steps(seed, count=3):
        trained = [shown_commands.Step("", ("train", f"--seed={seed}", f"{number}")) for number in range(count)]
        return [*trained, shown_commands.Step("", ("measure",))]

    shown_commands.go(tmp_path, steps(0))
    # Else the models would be made anew, or taken for trained, and the figures would be those of the others.
    with pytest.raises(ValueError, match="finished steps of another call, such as `python train --seed=0 0`"):
        shown_commands.go(tmp_path, steps(1))
    assert len(called) == 4
    shown_commands.go(tmp_path, steps(0, count=5))  # more of the same
    assert called[4:] == [("train", "--seed=0", "3"), ("train", "--seed=0", "4")]
    shown_commands.go(tmp_path, steps(0))  # less of it: nothing is left to run
    done = tmp_path / shown_commands.DONE
    done.write_text("".join(line for line in done.read_text().splitlines(keepends=True) if "measure" not in line))
    shown_commands.go(tmp_path, steps(0, count=5))  # a line that a person removed
    assert called[6:] == [("measure",)]


def test_a_relative_output_is_one_folder_for_the_tool_and_its_steps_wherever_it_is_started(tmp_path):
    """Steps run in the repository; the tool keeps its account and looks for results where they wrote."""
    (tmp_path / "elsewhere").mkdir()
    program = """
import sys
sys.path.insert(0, sys.argv[1])
import shown_commands
from shown_commands import Step, tell

def steps(given):
    return [Step("made", ("-c", f"from pathlib import Path; Path({str(given.output / 'made')!r}).touch()"))]

sys.exit(tell(["--output=out"], "", "runs/x", steps, lambda given, seconds: (given.output / "made").exists()))
"""
    command = [sys.executable, "-c", program, str(ROOT / "tools")]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "done before" in done.stdout
    assert {path.name for path in (tmp_path / "elsewhere/out").iterdir()} == {".lock", "made", "steps.jsonl"}
    assert not (ROOT / "out").exists()


@pytest.mark.parametrize("wrong", ["0", "-1"])
def test_too_few_seeds_are_refused_before_anything_is_made(tool, tmp_path, wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        tool("specialists").main([f"--output={tmp_path / 'out'}", f"--seeds={wrong}"])
    assert ended.value.code == 2 and f"must be at least 1, found {wrong}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
