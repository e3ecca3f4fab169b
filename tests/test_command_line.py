"""The parts that all commands share: which errors are one line."""

import subprocess
import sys

import pytest

from qwen_jax import command_line
from qwen_jax.sandbox import SandboxUnavailableError


def test_a_system_that_cannot_isolate_programs_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(command_line.logging, "basicConfig", lambda **options: None)

    def main():
        raise SandboxUnavailableError("this system cannot isolate programs: allow user namespaces")

    with pytest.raises(SystemExit) as ended:
        command_line.run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: this system cannot isolate programs: allow user namespaces\n"


def test_ctrl_c_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(command_line.logging, "basicConfig", lambda **options: None)
    for words, said in (((), "interrupted\n"), (("all is saved",), "interrupted: all is saved\n")):

        def main(words=words):
            raise KeyboardInterrupt(*words)

        with pytest.raises(SystemExit) as ended:
            command_line.run(main)
        assert ended.value.code == 130 and capsys.readouterr().err == said
    monkeypatch.setenv("QWEN_JAX_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        command_line.run(main)


def test_a_command_ends_without_looking_for_garbage(root, plain_environment):
    program = (
        "import atexit, gc, qwen_jax.command_line\n"
        "atexit.register(lambda: print(len(gc.get_objects()), gc.get_freeze_count() > 1000))\n"
        "qwen_jax.command_line.run(lambda: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=plain_environment, capture_output=True, text=True, check=True
    )
    left, frozen = done.stdout.split()
    assert int(left) < 1000 and frozen == "True"


def test_a_command_that_runs_no_programs_does_not_load_the_sandbox(root, plain_environment):
    loaded = "import sys, qwen_jax.command_line; print('qwen_jax.sandbox' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", loaded], cwd=root, env=plain_environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
