"""The code interpreter against the real ipykernel: what a user of it sees, in the order of a conversation."""

import io
import threading

import pytest
from PIL import Image

from qwen_jax.agents import interpreter as interpreter_module
from qwen_jax.agents.interpreter import Interpreter, Limits
from qwen_jax.sandbox import SandboxUnavailableError

FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 4, 9])\n"


def kinds(execution):
    return [output.kind for output in execution.outputs]


def test_state_stays_from_snippet_to_snippet(interpreter):
    assert interpreter.execute("import math\ndef area(r):\n    return math.pi * r**2").outputs == ()
    assert interpreter.execute("round(area(2), 3)").text == "12.566\n"
    assert interpreter.execute("await __import__('asyncio').sleep(0, 'top level')").text == "'top level'\n"


def test_an_earlier_semicolon_hides_no_result(interpreter):
    assert interpreter.execute("a = 1;").ok
    assert interpreter.execute("41 + 1").text == "42\n"
    assert interpreter.execute("41 + 1;").text == ""


def test_text_results_and_images_come_in_order(interpreter):
    code = (
        "from IPython.display import display\nprint('one')\ndisplay(2)\nprint('three')\n"
        f"{FIGURE}plt.show()\nprint('four')\n5"
    )
    done = interpreter.execute(code)
    assert kinds(done) == ["stdout", "display", "stdout", "image", "stdout", "result"], done
    assert done.text == "one\n2\nthree\nfour\n5\n"
    assert Image.open(io.BytesIO(done.images[0])).format == "PNG"


def test_figures_come_after_the_result_and_from_snippets_that_fail(interpreter):
    done = interpreter.execute(f"{FIGURE}6 * 7")
    assert kinds(done) == ["result", "image"] and done.ok
    done = interpreter.execute(f"{FIGURE}1 / 0")
    assert kinds(done) == ["error", "image"] and done.status == "error"
    assert interpreter.execute("plt.get_fignums()").text == "[]\n"


def test_errors_are_text_without_the_colors_of_a_terminal(interpreter):
    done = interpreter.execute("def half(n):\n    return n / zero\nhalf(1)")
    assert (done.status, done.error) == ("error", "NameError: name 'zero' is not defined")
    assert "return n / zero" in done.outputs[0].text and "\x1b" not in done.outputs[0].text
    assert not done.state_lost and interpreter.execute("half").ok
    done = interpreter.execute("print('\\x1b[31mred\\x1b[0m')\n%config InteractiveShell.colors = 'linux'\n1 / 0")
    assert done.text == "red\n" and "\x1b" not in done.outputs[-1].text
    assert interpreter.execute("for").error.startswith("SyntaxError: ")


def test_nobody_answers_input(interpreter):
    done = interpreter.execute("input('name? ')")
    assert done.error.startswith("EOFError: input() cannot be used here")
    assert interpreter.execute("import getpass\ngetpass.getpass()").error.startswith("EOFError")
    assert interpreter.execute("import sys\nsys.stdin.read()").text == "''\n"


@pytest.mark.parametrize("code", ["raise SystemExit", "import sys\nsys.exit(3)", "exit()", "quit"])
def test_an_exit_ends_the_snippet_only(interpreter, code):
    interpreter.execute("kept = 'kept'")
    assert interpreter.execute(code).state_lost is False
    assert interpreter.execute("kept").text == "'kept'\n"


def test_what_child_processes_write_is_part_of_the_snippet(interpreter):
    done = interpreter.execute("import os\nos.system('echo out; echo error >&2') == 0")
    assert sorted(kinds(done)) == ["result", "stderr", "stdout"]
    assert {output.kind: output.text for output in done.outputs} == {
        "stdout": "out\n",
        "stderr": "error\n",
        "result": "True",
    }
    characters = interpreter.execute("import sys\nos.system('printf 中文%.0s ' + ' '.join(map(str, range(900)))) == 0")
    assert characters.text.startswith("中文" * 900)
    forked = (
        "process = os.fork()\nsys.stdout.write('parent\\n' if process else 'child\\n');\n"
        "if process: os.waitpid(process, 0)"
    )
    assert sorted(interpreter.execute(forked).text.split()) == ["child", "parent"]


def test_magic_commands_work(interpreter):
    assert interpreter.execute("!echo 'from 中文'; false\n_exit_code").text == "from 中文\n1\n"
    assert interpreter.execute("lines = !echo 7\nlines").text == "['7']\n"
    assert interpreter.execute("%timeit -n1 -r1 1").ok


def test_a_closed_stream_costs_only_what_is_printed_there(interpreter):
    with Interpreter(Limits(timeout_s=60)) as other:
        assert other.execute("import sys\nsys.stderr.close()\nprint('out')").text == "out\n"
        assert other.execute("6 * 7").text == "42\n"


def test_late_output_of_a_thread_belongs_to_no_snippet(interpreter):
    code = (
        "import threading\ngo, gone = threading.Event(), threading.Event()\n"
        "def late():\n    print('soon')\n    go.wait()\n    print('late')\n    gone.set()\n"
        "thread = threading.Thread(target=late)\nthread.start()"
    )
    interpreter.execute(code)
    done = interpreter.execute("go.set()\ngone.wait()\nthread.join()\nprint('mine')")
    assert done.text == "mine\n"
    seen = done.background
    while "late" not in seen:  # it is sent apart from the snippet's own output
        seen += interpreter.execute("").background
    assert seen.replace("soon\n", "") == "late\n"


def test_a_snippet_that_takes_too_long_is_interrupted_and_the_state_stays(interpreter):
    interpreter.execute("x = 1")
    done = interpreter.execute("")
    while not done.text:  # on a busy machine the time may be over before it prints
        done = interpreter.execute("import time\nx = 2\nprint('begun')\ntime.sleep(600)", timeout_s=0.5)
    assert (done.status, done.text, done.state_lost) == ("timeout", "begun\n", False)
    assert done.error.startswith("KeyboardInterrupt")
    done = interpreter.execute("import os\nos.system('sleep 600')", timeout_s=0.5)
    assert not done.state_lost
    assert interpreter.execute("x").text == "2\n"


def test_another_thread_interrupts_a_snippet(interpreter):
    interpreter.interrupt()  # nothing runs
    results = []
    code = "print('begun', flush=True)\nx = 3\nwhile True: pass"
    thread = threading.Thread(target=lambda: results.append(interpreter.execute(code)))
    thread.start()
    while thread.is_alive():
        interpreter.interrupt()
        thread.join(0.001)  # many interrupts: none may meet the kernel itself
    assert results[0].status == "interrupted" and not results[0].state_lost
    assert interpreter.execute("1 + 1").text == "2\n"


def test_too_much_text_and_too_many_images_are_cut_and_said_so(interpreter):
    done = interpreter.execute("print('x' * 10_000)\nprint('中')")
    assert done.ok and done.text == "x" * 4000 and done.cut == "6,003 characters"
    done = interpreter.execute("for _ in range(5):\n    plt.plot([1])\n    plt.show()")
    assert len(done.images) == 3 and done.cut == "2 images"
    assert interpreter.execute("1").cut == ""


def test_a_long_snippet_arrives_whole(interpreter):
    code = "text = '" + "字" * 300_000 + "'\nlen(text)"
    assert interpreter.execute(code).text == "300000\n"


def test_numpy_and_files_in_the_private_folder(interpreter):
    done = interpreter.execute(
        "import numpy as np, os\nnp.save('a.npy', np.eye(2))\nprint(os.listdir(), np.load('a.npy').sum())"
    )
    assert done.text == "['a.npy'] 2.0\n"


def test_a_new_kernel_has_nothing_of_the_old_one(interpreter):
    with Interpreter(Limits()) as other:
        assert other.execute("import os\nos.listdir(), 'area' in globals()").text == "([], False)\n"
        other.execute("kept = 1\nopen('file', 'w').close()")
        other.restart()
        assert other.execute("os.listdir()").error == "NameError: name 'os' is not defined"
        assert other.execute("import os\nos.listdir(), 'kept' in globals()").text == "([], False)\n"


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_snippet_that_is_none_or_has_no_time_starts_no_kernel(timeout_s):
    interpreter = Interpreter()
    with pytest.raises(ValueError, match="give a positive number of seconds"):
        interpreter.execute("1", timeout_s=timeout_s)
    with pytest.raises(TypeError, match="NoneType: expected text"):
        interpreter.execute(None)


def test_limits_are_positive():
    with pytest.raises(ValueError, match="timeout_s is 0: limits are positive"):
        Limits(timeout_s=0)


def test_an_interrupt_at_any_moment_costs_no_state(interpreter):
    """Before the kernel has begun a snippet it ignores signals, so that they have to be sent again."""
    interpreter.execute("kept = 'kept'")
    for tenths in range(12):
        done = interpreter.execute("while True: pass", timeout_s=1e-4 + tenths * 1e-3)
        assert (done.status, done.state_lost) == ("timeout", False)
    assert interpreter.execute("kept").text == "'kept'\n"


def test_half_a_character_costs_no_state(interpreter):
    """JSON with an escape alone, as models write it."""
    interpreter.execute("kept = 'kept'")
    done = interpreter.execute("len('\ud83d')")
    assert not done.state_lost and done.text == "1\n"
    assert interpreter.execute("kept").text == "'kept'\n"
    assert interpreter.execute("print(chr(0xd83d))").state_lost is False


def test_a_kernel_that_does_not_greet_starts(monkeypatch):
    """ipykernel's greeting is lost where it comes to a subscriber while something else is sent."""
    bridge = interpreter_module._bridge()
    silent = bridge.replace("\nmain()\n", "\nsetattr(IOPubThread, '_send_welcome_message', print)\nmain()\n")
    assert silent != bridge
    monkeypatch.setattr(interpreter_module, "_bridge", lambda: silent)
    with Interpreter() as one:
        try:
            one.start()
        except SandboxUnavailableError as error:
            if "does not start" in str(error):
                raise
            pytest.skip(str(error))
        assert [one.execute(f"print({number})").text for number in range(3)] == ["0\n", "1\n", "2\n"]
