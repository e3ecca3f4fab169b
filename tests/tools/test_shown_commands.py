"""tools/shown_commands.py: a step is finished once, its time is kept, and it ends with the tool that runs it."""

import json
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
