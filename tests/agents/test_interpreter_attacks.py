"""Snippets that do harm, in a harmless form: each is contained, and the next snippet works."""

import os
import select
import signal
import socket
import subprocess
import sys

import pytest

from qwen_jax.agents.interpreter import Interpreter, Limits
from tests.sandbox.conftest import descendants


@pytest.fixture(scope="module")
def victim(interpreter):
    """A kernel that the tests of this module may destroy; `interpreter` has seen that there can be one."""
    with Interpreter(Limits(timeout_s=60, grace_s=1, disk_mb=16, processes=40, text=2000)) as made:
        yield made


@pytest.fixture(autouse=True)
def works_afterwards(victim):
    yield
    assert victim.execute("6 * 7").text == "42\n"


def until_lost(interpreter, code):
    """What a snippet does that loses its kernel; on a busy machine it may be interrupted before it has begun."""
    while not (done := interpreter.execute(code, timeout_s=0.3)).state_lost:
        pass
    return done


def test_there_is_no_network_and_no_file_of_the_host(victim, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            f"import os, socket\nfor address in (('127.0.0.1', {server.getsockname()[1]}), ('1.1.1.1', 53)):\n"
            "    try: socket.create_connection(address)\n    except OSError: print('refused')\n"
            f"print(os.path.exists({str(tmp_path)!r}), os.listdir('/proc'), os.getuid())\n"
            "print(sorted(name for name in os.environ if 'KEY' in name or 'SECRET' in name))\n"
            "for place in ('/usr/new', np.__file__):\n    try: open(place, 'w')\n    except OSError: print('refused')"
        )
        assert victim.execute("import numpy as np").ok
        done = victim.execute(code)
    assert done.text == "refused\nrefused\nFalse [] 1000\n[]\nrefused\nrefused\n"


def test_a_fork_bomb_meets_the_limit(victim):
    code = (
        "import os, time\nstarted = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(600)\n"
        "        started += 1\nexcept OSError: print(started)"
    )
    done = victim.execute(code)
    assert done.ok and 10 < int(done.text) < 40
    victim.restart()


def test_too_much_memory_is_an_error_and_the_state_stays(victim):
    victim.execute("kept = 1")
    done = victim.execute("flood = bytearray(3 << 30)")
    assert done.error.startswith("MemoryError") and not done.state_lost
    assert victim.execute("kept").text == "1\n"


def test_memory_of_many_processes_ends_the_kernel(victim):
    code = (
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        x = b'x' * (80 << 20)\n"
        "        time.sleep(600)\ntime.sleep(600)"
    )
    with Interpreter(Limits(timeout_s=60, memory_mb=400)) as small:
        done = small.execute(code)
    assert (done.status, done.state_lost) == ("memory", True)


def test_files_are_limited(victim):
    done = victim.execute("open('large', 'wb').write(bytes(17 << 20))")
    assert done.error.startswith("OSError")
    victim.execute("import os\nos.remove('large')")


def test_endless_output_is_interrupted(victim):
    done = victim.execute("kept = 2\nwhile True: print('x' * 1000)")
    assert (done.status, len(done.text), done.state_lost) == ("output", 2000, False) and done.cut
    assert victim.execute("kept").text == "2\n"


def test_what_resists_the_interrupt_loses_its_kernel(victim):
    code = "import time\nwhile True:\n    try: time.sleep(600)\n    except KeyboardInterrupt: print('no')"
    done = until_lost(victim, code)
    assert done.status == "timeout" and set(done.text.split()) == {"no"}


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes\nctypes.string_at(0)",
        "import os, signal\nos.kill(-1, signal.SIGKILL)",  # the bridge, too
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    ],
    ids=["exit", "kill", "fault", "kill_all", "kill_bridge"],
)
def test_a_kernel_that_kills_itself_is_replaced(victim, code):
    done = victim.execute(f"print('said', flush=True)\n{code}")
    assert (done.status, done.state_lost, done.error) == ("died", True, None)


def test_a_stopped_bridge_is_replaced(victim):
    assert until_lost(victim, "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)").status == "timeout"


def test_the_kernel_does_not_hold_the_channel_to_the_host(victim):
    code = (
        'import os\nline = b\'{"kind": "stdout", "text": "forged"}\\n{"done": "ok"}\\n\'\n'
        "for descriptor in range(256):\n    try:\n        os.set_blocking(descriptor, False)\n"
        "        os.write(descriptor, line)\n    except OSError: pass"
    )
    done = victim.execute(code, timeout_s=1)
    assert all(output.text != "forged" for output in done.outputs)
    victim.restart()


def test_forged_messages_of_the_kernel_do_not_break_the_host(victim):
    """The snippet holds the kernel's own sockets and its key: what it says there it says for itself."""
    code = (
        "import zmq\nfrom ipykernel.kernelapp import IPKernelApp\napp = IPKernelApp.instance()\n"
        "send = app.iopub_thread.send_multipart\nsend([b'no', b'message'])\n"
        "session, parent = app.session, app.kernel.get_parent('shell')\n"
        "def say(kind, content): session.send(app.iopub_socket, kind, content, parent=parent)\n"
        "say('stream', {'name': 'stdout', 'text': 7}); say('stream', {'text': 'forged'})\n"
        "say('error', {'traceback': 5})\n"
        "say('display_data', {'data': {'image/png': '%%%'}}); say('display_data', []); say('status', {})"
    )
    done = victim.execute(code)
    assert done.status in ("ok", "died")
    victim.restart()


def test_every_process_ends_with_the_host(victim, root):
    """The host is killed with signal 9: no process of the kernel outlives it."""
    program = (
        "import sys\nfrom qwen_jax.agents.interpreter import Interpreter\n"
        "from tests.sandbox.conftest import descendants\n"
        'kernel = Interpreter()\nkernel.execute(\'import subprocess\\nsubprocess.Popen(["sleep", "600"])\')\n'
        "print(*descendants(), flush=True)\nsys.stdin.read()"
    )
    host = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert host.stdin and host.stdout
    started = [os.pidfd_open(int(word)) for word in host.stdout.readline().split()]
    assert len(started) >= 5
    host.send_signal(signal.SIGKILL)
    host.wait()
    for descriptor in started:
        assert select.select([descriptor], [], [], 60)[0]
        os.close(descriptor)
    host.stdin.close()
    host.stdout.close()


def test_a_closed_interpreter_leaves_no_process(victim):
    before = descendants()
    with Interpreter() as other:
        assert other.execute("import subprocess\nsubprocess.Popen(['sleep', '600']).pid > 0").ok
        assert descendants() > before
    assert descendants() <= before
