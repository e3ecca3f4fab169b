"""Programs that do harm, in a harmless form: each is contained, and leaves nothing behind."""

import collections
import io
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from qwen_jax import sandbox as sandboxes
from qwen_jax.sandbox import run
from qwen_jax.sandbox.inner import remote

pytestmark = pytest.mark.usefixtures("nothing_left")


def run_with(sandbox, code: str, *, output_bytes: int = 1 << 18, **limits):
    step = sandboxes.Step("run", file="main.py", **limits)
    return sandbox.run(sandboxes.Plan({"main.py": code}, [step], disk_mb=16), output_bytes=output_bytes)


def test_processes_are_limited_in_number(sandbox):
    code = (
        "import os, time\nstarted = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(600)\n"
        "        started += 1\nexcept OSError: print(started)"
    )
    result = run_with(sandbox, code, processes=12)
    assert result.exit_code == 0 and 5 < int(result.stdout) < 12


def test_processes_of_other_runs_do_not_count(sandbox):
    code = "import os, time\nfor _ in range(6):\n    if os.fork() == 0: time.sleep(600)\nprint('all')\n"
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(run_with(sandbox, code, processes=12).stdout)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["all\n"] * 4


def test_memory_of_one_process_is_limited(sandbox):
    result = run_with(sandbox, "x = bytearray(300 << 20)", memory_mb=128, limit_addresses=True)
    assert result.exit_code == 1 and result.stderr.endswith("MemoryError\n")


def test_memory_of_all_processes_together_is_limited(sandbox):
    code = (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        x = b'x' * (50 << 20)\n"
        "        time.sleep(600)\ntime.sleep(600)"
    )
    result = run_with(sandbox, code, memory_mb=128, limit_addresses=True, timeout_s=60)
    assert result.stopped == "memory" and result.exit_code is None


def test_files_are_limited_in_size_and_go_with_the_run(sandbox):
    code = (
        "import os\ntry: open('a', 'wb').write(bytes(17 << 20))\nexcept OSError as e: print(e.strerror)\n"
        "os.remove('a')\ntry:\n    for i in range(4): open(f'/tmp/{i}', 'wb').write(bytes(8 << 20))\n"
        "except OSError as e: print(e.strerror)"
    )
    one, all_together = run_with(sandbox, code).stdout.splitlines()
    assert one in ("File too large", "No space left on device") and all_together == "No space left on device"


def test_endless_output_is_stopped_and_cut(sandbox):
    result = run_with(sandbox, "while True: print('x' * 1000)", output_bytes=2000, timeout_s=60)
    assert result.stopped == "output" and result.stdout_cut and len(result.stdout) == 2000


@pytest.mark.parametrize(
    "code",
    [
        "import time\ntime.sleep(600)",
        "while True: pass",
        "input_ = open('/dev/zero', 'rb')\nwhile True: input_.read(9)",
    ],
    ids=["sleep", "loop", "read"],
)
def test_what_does_not_end_is_stopped(sandbox, code):
    result = run_with(sandbox, code, timeout_s=0.3)
    assert (result.stopped, result.exit_code) == ("timeout", None)


def test_a_signal_does_not_keep_a_program_alive(sandbox):
    code = (
        "import signal\nfor number in range(1, 32):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass"
    )
    assert run_with(sandbox, code, timeout_s=0.3).stopped == "timeout"


def test_a_program_can_kill_nothing_but_itself(sandbox):
    bystander = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    code = (
        "import os, signal\nfor target in (os.getppid(), -1, *range(3, 500)):\n"
        "    try: os.kill(target, signal.SIGKILL)\n    except ProcessLookupError: pass\nprint('alive')"
    )
    result = run_with(sandbox, code)
    assert (result.stdout, result.exit_code, result.stopped) == ("alive\n", 0, None)
    assert bystander.communicate(b"alive")[0] == b"alive"


def test_it_sees_no_process_but_its_own(sandbox):
    assert run("import os\nprint(os.listdir('/proc'), os.getpid() < 9)").stdout == "[] True\n"
    if not isinstance(sandboxes.toolchain("javascript"), str):
        code = "console.log(require('fs').readdirSync('/proc').filter(n => /^[0-9]+$/.test(n)).length < 4)"
        assert run(code, language="javascript").stdout == "true\n"


def test_nothing_outside_can_be_written(sandbox):
    places = ["/", "/usr", "/etc", "/bin", "/dev", "/var", "/proc", "/sys", str(Path.home()), sys.base_prefix]
    code = (
        f"for place in {places!r}:\n    try: open(place + '/new', 'w')\n    except OSError as e: print('refused')\n"
        "    else: print(place)\nopen('inside', 'w'); open('/tmp/inside', 'w')"
    )
    assert run(code).stdout == "refused\n" * len(places)
    assert not (Path.home() / "new").exists()


def test_the_home_folder_and_other_files_of_the_host_are_not_there(sandbox, tmp_path):
    (tmp_path / "secret").write_text("secret")
    places = [
        str(tmp_path),
        str(Path(__file__).parent),
        "/etc/shadow",
        "/etc/hostname",
        "/var/log",
        "/run",
        "/sys/kernel",
    ]
    code = f"import os\nprint([place for place in {places!r} if os.path.exists(place)])"
    assert run(code).stdout == "[]\n"
    home = Path.home()
    shown = run(
        f"import os\nprint(*(os.listdir({str(home)!r}) if os.path.exists({str(home)!r}) else []))"
    ).stdout.split()
    on_the_way = {
        Path(path).relative_to(home).parts[0] for path in (sys.base_prefix,) if Path(path).is_relative_to(home)
    }
    toolchains = [sandboxes.toolchain(language) for language in sandboxes.LANGUAGES]
    folders = [Path(one.folder) for one in toolchains if not isinstance(one, str) and one.folder]
    on_the_way |= {folder.relative_to(home).parts[0] for folder in folders if folder.is_relative_to(home)}
    assert set(shown) <= on_the_way


def test_the_environment_is_cleared(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "secret")
    assert run("import os\nprint(sorted(os.environ))").stdout == "['HOME', 'LANG', 'PATH', 'TMPDIR']\n"


def test_open_files_of_the_host_are_not_inherited(sandbox, tmp_path):
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        code = (
            "import os\nfound = []\nfor d in range(256):\n    try: os.fstat(d)\n    except OSError: continue\n"
            "    found.append(d)\nprint(found)"
        )
        assert run(code).stdout == "[0, 1, 2]\n"


def test_there_is_no_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0qwen_jax-test")
        local.listen()
        code = (
            f"import socket\nfor family, address in ((socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]})),"
            " (socket.AF_INET, ('1.1.1.1', 53)), (socket.AF_UNIX, '\\0qwen_jax-test')):\n"
            "    try: socket.socket(family).connect(address)\n    except OSError: print('refused')\n"
            "for family in (socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_PACKET, 38):\n"
            "    try: socket.socket(family, socket.SOCK_RAW)\n    except OSError: print('refused')\n"
            "a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))"
        )
        assert run(code).stdout == "refused\n" * 7 + "b'x'\n"


def test_there_are_no_rights_to_gain(sandbox):
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "calls = [lambda: libc.unshare(0x10000000), lambda: libc.unshare(0x20000),"
        " lambda: libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), lambda: libc.ptrace(16, 1, 0, 0),"
        " lambda: libc.syscall(319, b'x', 0), lambda: libc.syscall(425, 1, 0), lambda: libc.sethostname(b'x', 1),"
        " lambda: libc.setuid(0)]\nprint([call() for call in calls])\n"
        "print(os.getuid(), os.getgroups(), os.path.exists('/usr/bin/su') and os.access('/etc/shadow', os.R_OK))"
    )
    first, second = run(code).stdout.splitlines()
    assert first == str([-1] * 8)
    assert second in ("1000 [] False", "1000 [65534] False")


def test_daemons_and_threads_end_with_the_program(sandbox):
    code = (
        "import os, sys, threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)\n"
        "print('done')"
    )
    result = run_with(sandbox, code, timeout_s=60)
    assert (result.stdout, result.exit_code, result.stopped) == ("done\n", 0, None)


EARLY_ENDS = {
    "sys_exit": "import sys\nsys.exit(0)",
    "os_exit": "import os\nos._exit(0)",
    "exit_in_call": "import os\ndef f(x): os._exit(0)",
    "system_exit_in_call": "def f(x): raise SystemExit(0)",
    "kill_in_call": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
    "kill_of_the_test": "import os, signal\ndef f(x): os.kill(os.getppid(), signal.SIGTERM)",
    "equal_to_all": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "equal_number": "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(5)",
    "equal_text": "class A(str):\n    __eq__ = lambda *_: True\n    __str__ = lambda _: A('2')\ndef f(x): return A()",
    "builtins": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\n"
    "builtins.compile = lambda *a, **k: ''\nbuiltins.exec = print\ndef f(x): return 0",
    "forged_class": "import os\nclass A:\n    def __reduce__(self): return os._exit, (0,)\ndef f(x): return A()",
    "no_answer": "import os\nfor d in range(3, 99):\n    try: os.close(d)\n    except OSError: pass\n"
    "def f(x): return 2",
    "printed": "print('passed', 0)\ndef f(x): return 0",
    "at_exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): 1/0",
    "no_definition": "g = 1",
    "end_of_iteration": "def f(x): raise StopIteration",
    "limits_of_the_test": "import os, resource\ndef f(x):\n    resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))\n"
    "    return 0",
}


@pytest.mark.parametrize("solution", EARLY_ENDS.values(), ids=EARLY_ENDS.keys())
def test_no_solution_decides_its_own_verdict(sandbox, solution):
    test = "assert all(map(f, [1])) and f(1) == 2\nassert f(2) == 3"
    result = sandboxes.check(solution, test, names=["f"], timeout_s=20)
    assert result.exit_code != 0 and not result.ok
    assert sandboxes.check("def f(x): return x + 1", "assert f(1) == 2", names=["f"]).ok


def test_the_solution_cannot_read_its_test(sandbox):
    solution = (
        "import gc, inspect, os, sys\ndef f(x):\n"
        "    texts = [str(o) for o in gc.get_objects() if isinstance(o, dict)]\n"
        "    frames, frame = [], sys._getframe()\n"
        "    while frame: frames.append(str(frame.f_locals) + str(frame.f_globals)); frame = frame.f_back\n"
        "    files = [open(n).read() for n in os.listdir('.')]\n"
        "    return any('forty' + 'two' in text for text in texts + frames + files)"
    )
    result = sandboxes.check(solution, "hidden = 'fortytwo'\nprint(f(1))", names=["f"])
    assert result.ok and result.stdout == "False\n", result.stderr


def test_plain_values_arrive_as_they_are_and_others_stay_with_the_solution(sandbox):
    solution = (
        "import collections, datetime, decimal, enum, fractions\nPoint = collections.namedtuple('Point', 'x y')\n"
        "class Color(enum.IntEnum): RED = 2\nclass Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "    def swapped(self): return Pair(self.b, self.a)\n"
        "def make(kind):\n    return {'named': Point(1, 2), 'color': Color.RED, 'counter': collections.Counter('aab'),"
        " 'half': fractions.Fraction(1, 2), 'tenth': decimal.Decimal('0.1'), 'day': datetime.date(2023, 9, 28),"
        " 'nested': {(1, 2): [{3}, None, 1j, b'x', 1.5, True]}, 'keys': {'k': 1}.keys()}[kind]\n"
        "def count():\n    yield from range(3)\ndef endless():\n    n = 0\n    while True:\n        n += 1; yield n\n"
        "def total(pairs): return sum(p.a for p in pairs)\ndef fail(): raise KeyError('no')\n"
        "def fail_oddly(): raise type('Odd', (Exception,), {})('text')\nLIMIT = 7"
    )
    test = (
        "import collections, datetime, decimal, fractions, itertools\n"
        "assert make('named') == (1, 2) and make('color') == 2 and make('counter') == {'a': 2, 'b': 1}\n"
        "assert make('half') == fractions.Fraction(1, 2) and make('tenth') == decimal.Decimal('0.1')\n"
        "assert make('day') == datetime.date(2023, 9, 28) and list(make('keys')) == ['k'] and LIMIT == 7\n"
        "assert make('nested') == {(1, 2): [{3}, None, 1j, b'x', 1.5, True]}\n"
        "assert list(count()) == [0, 1, 2] and list(itertools.islice(endless(), 3)) == [1, 2, 3]\n"
        "pair = Pair(1, b=4)\nassert total([pair, pair.swapped()]) == 5 and pair.b == 4 and pair != Pair(1, 4)\n"
        "try: fail()\nexcept KeyError as error: assert 'no' in str(error)\n"
        "try: fail_oddly()\nexcept Exception as error: assert 'Odd: text' in str(error)\n"
        "try: total(lambda: 0)\nexcept Exception as error: assert 'cannot go to another process' in str(error)\n"
        "print('end')"
    )
    result = sandboxes.check(solution, test)
    assert (result.stdout, result.ok) == ("end\n", True), result.stderr


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
    | st.fractions()
    | st.dates(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.frozensets(st.integers())
        | st.sets(st.text())
        | st.lists(inner).map(collections.deque)
    ),
    max_leaves=12,
)


@hypothesis.given(PLAIN)
def test_every_plain_value_is_equal_on_the_other_side(value):
    sent = remote._Handles().dump(("value", value))
    kind, received = remote._TestUnpickler(io.BytesIO(sent), None).load()
    assert kind == "value" and received == value and type(received) is type(value)


def test_a_check_has_limits_too(sandbox):
    assert sandboxes.check("def f(): \n    while True: pass", "f()", timeout_s=0.4).stopped == "timeout"
    assert sandboxes.check("while True: pass", "f()", timeout_s=0.4).stopped == "timeout"
    assert "MemoryError" in sandboxes.check("def f(): return bytes(300 << 20)", "f()", memory_mb=200).stderr


def test_all_runs_end_with_the_host(sandbox, root):
    """The host is killed with signal 9: no process of the sandbox outlives it."""
    program = (
        "import os, sys\nfrom qwen_jax import sandbox as s\n"
        "plan = s.Plan({'main.py': 'import time; print(1, flush=True); time.sleep(600)'},"
        " [s.Step('run', file='main.py', timeout_s=600)])\n"
        "process = s.default_sandbox().start(plan)\nos.read(process.stdout, 2)\n"
        "from tests.sandbox.conftest import descendants\nprint(*descendants(), flush=True)\nsys.stdin.read()"
    )
    host = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert host.stdin and host.stdout
    started = [os.pidfd_open(int(word)) for word in host.stdout.readline().split()]
    assert len(started) >= 4
    host.send_signal(signal.SIGKILL)
    host.wait()
    for descriptor in started:
        assert select.select([descriptor], [], [], 60)[0]
        os.close(descriptor)
    host.stdin.close()
    host.stdout.close()


def test_it_works_for_a_user_without_rights(sandbox, tmp_path):
    """The administrator's tests show nothing of what others may do."""
    python = next((path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(path)), None)
    if os.getuid() != 0 or python is None or shutil.which("setpriv") is None:
        pytest.skip("needs the administrator, setpriv, and a Python outside of home folders")
    folder = Path("/var/tmp") / tmp_path.name
    shutil.copytree(Path(sandboxes.__file__).parent, folder / "qwen_jax/sandbox")
    (folder / "qwen_jax/__init__.py").write_text("")
    program = (
        "import sys\nsys.path.insert(0, '.')\nfrom qwen_jax.sandbox import check, run\n"
        "print(run('import os; print(os.getuid(), os.listdir(\"/proc\"))').stdout, end='')\n"
        "print(check('def f(x): return x', 'assert f(1) == 1').ok)\n"
        "print(run('import os\\nfor _ in range(99): os.fork()', timeout_s=30).stderr.count('BlockingIOError') > 0)"
    )
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, "-B", "-c", program]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    finally:
        shutil.rmtree(folder)
    assert done.stdout.split("\n")[:3] == ["1000 []", "True", "True"], done.stderr
