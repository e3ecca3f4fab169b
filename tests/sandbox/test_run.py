"""What a program gets and what comes back from it."""

import concurrent.futures
import os
import subprocess
import sys
import time

import pytest

from qwen_jax import sandbox as sandboxes
from qwen_jax.sandbox import run

HELLO = {
    "python": "print(input()[::-1])",
    "javascript": "console.log(require('fs').readFileSync(0, 'utf8').trim().split('').reverse().join(''))",
    "java": "public class Main { public static void main(String[] a) {"
    " System.out.println(new StringBuilder(new java.util.Scanner(System.in).next()).reverse()); } }",
    "go": 'package main\nimport "fmt"\nfunc main() { var s string; fmt.Scan(&s); '
    "for i := len(s) - 1; i >= 0; i-- { fmt.Print(s[i:i+1]) }; fmt.Println() }",
    "cpp": "#include <algorithm>\n#include <iostream>\nint main() { std::string s; std::cin >> s;"
    "std::reverse(s.begin(), s.end()); std::cout << s << std::endl; }",
    "rust": "fn main() { let mut s = String::new(); std::io::stdin().read_line(&mut s).unwrap();"
    'println!("{}", s.trim().chars().rev().collect::<String>()); }',
}


@pytest.mark.parametrize("language", sandboxes.LANGUAGES)
def test_each_installed_language_reads_its_input_and_writes_its_output(sandbox, language):
    missing = sandboxes.toolchain(language)
    if isinstance(missing, str):
        pytest.skip(missing)
    result = run(HELLO[language], language=language, stdin="stressed\n", timeout_s=60)
    assert (result.stdout, result.exit_code, result.stopped, result.step) == ("desserts\n", 0, None, "run"), result


def test_a_program_runs_as_python_runs_a_file(sandbox):
    """Compared with the interpreter itself: output, errors and exit code."""
    programs = (
        "import sys\nprint(__name__, len(sys.argv), __file__.endswith('main.py'))",
        "import sys\nprint('out')\nsys.stderr.write('err\\n')\nsys.exit(7)",
        "import sys\nsys.exit('a text')",
        "exit()",
        "import atexit\natexit.register(print, 'at exit')\nprint('first')",
        "import threading, time\nt = threading.Timer(0.05, print, ['thread'])\nt.start()\nprint('main')",
        "import sys\nsys.excepthook = lambda *_: print('hook')\n1/0",
        "print('é', '\\udc80'.encode('utf-8', 'surrogatepass'))",
        "import inspect\ndef f(): pass\nprint(inspect.getsource(f))",
        "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__module__)",
        "def f(n): return f(n + 1)\ntry: f(0)\nexcept RecursionError: print('deep')",
        "import subprocess, sys\nprint(subprocess.run([sys.executable, '-I', '-c', 'print(6 * 7)'],"
        " capture_output=True, text=True).stdout)",
        "import multiprocessing\nif __name__ == '__main__':\n"
        "    with multiprocessing.get_context('fork').Pool(2) as pool: print(pool.map(abs, [-1, -2]))",
    )
    for program in programs:
        ours = run(program)
        theirs = run(
            "import subprocess, sys\nopen('main2.py', 'w').write(sys.stdin.read())\n"
            "done = subprocess.run([sys.executable, '-I', 'main2.py'])\nsys.exit(done.returncode)",
            stdin=program.replace("main.py", "main2.py"),
        )
        assert (ours.stdout, ours.exit_code, ours.stderr) == (theirs.stdout, theirs.exit_code, theirs.stderr), program


def test_a_traceback_shows_the_program_and_not_the_sandbox(sandbox):
    result = run("def f():\n    return 1 / 0\n\nf()\n")
    assert result.exit_code == 1
    assert "return 1 / 0" in result.stderr and "ZeroDivisionError" in result.stderr
    assert result.stderr.count("File ") == 2 and "inner" not in result.stderr


def test_a_program_that_cannot_be_compiled_says_so(sandbox):
    assert "SyntaxError" in run("def f(:\n").stderr
    for text in ("\x00", "# \ud800\n\udcff"):
        assert run(text).exit_code == 1
    if not isinstance(sandboxes.toolchain("cpp"), str):
        result = run("int main() { return x; }", language="cpp", timeout_s=60)
        assert (result.step, result.ok) == ("compile", False) and "'x'" in result.stderr.replace("‘", "'").replace(
            "’", "'"
        )


def test_output_is_cut_at_the_limit_and_the_cut_is_said(sandbox):
    plan = sandboxes.Plan({"main.py": "print('é' * 5000)"}, [sandboxes.Step("run", file="main.py")])
    result = sandbox.run(plan, output_bytes=1001)
    assert result.stdout_cut and not result.stderr_cut and result.exit_code == 0
    assert result.stdout == "é" * 500 + "\N{REPLACEMENT CHARACTER}"


def test_a_large_input_is_read_and_may_be_left_unread(sandbox):
    text = "line\n" * 200_000
    assert run("import sys; print(len(sys.stdin.read()))", stdin=text).stdout == "1000000\n"
    assert run("print('no')", stdin=text).stdout == "no\n"


def test_many_threads_run_programs_at_once_and_get_their_own_results(sandbox):
    def one(number: int) -> str:
        return run(
            f"import os\nopen('f', 'x').write('{number}')\nprint(open('f').read(), sorted(os.listdir('.')))"
        ).stdout

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(24))) == [f"{i} ['f', 'main.py']\n" for i in range(24)]


def test_a_run_sees_nothing_of_an_earlier_one(sandbox):
    first = (
        "import math, random, sys, os, builtins\nmath.pi = 3\nsys.earlier = 1\nos.environ['EARLIER'] = '1'\n"
        "builtins.earlier = 1\nopen('/tmp/earlier', 'w').write('x')\nprint(random.random())"
    )
    second = (
        "import math, random, sys, os, builtins\nprint(math.pi == 3, hasattr(sys, 'earlier'), 'EARLIER' in os.environ,"
        "hasattr(builtins, 'earlier'), os.path.exists('/tmp/earlier'))\nprint(random.random())"
    )
    number = run(first).stdout
    seen, other = run(second).stdout.splitlines()
    assert seen == "False False False False False"
    assert other + "\n" != number


def test_a_long_living_process_is_talked_to_and_ends_when_it_is_closed(sandbox, nothing_left):
    plan = sandboxes.Plan(
        {"main.py": "import sys\nfor line in sys.stdin: print(eval(line), flush=True)"},
        [sandboxes.Step("run", file="main.py", timeout_s=3600)],
    )
    with sandbox.start(plan, stdin=None) as process:
        for number in range(3):
            os.write(process.stdin, f"{number} * 10\n".encode())
            assert os.read(process.stdout, 100) == f"{number * 10}\n".encode()
        process.kill("finished with")
        assert process.wait().stopped == "finished with"


def test_a_host_that_was_suspended_gets_its_result(sandbox, monkeypatch):
    """Its clock leaps, far over the limit of the run and what is added to it."""
    real, asked = time.monotonic, []

    def leaping() -> float:
        asked.append(None)
        return real() + (0 if len(asked) == 1 else 10_000)

    monkeypatch.setattr(time, "monotonic", leaping)
    assert run("print(1, flush=True)\nwhile True: pass", timeout_s=60).stopped == "timeout"


def test_a_supervisor_that_was_killed_is_named_and_replaced(sandbox):
    made = sandboxes.Sandbox()
    step = sandboxes.Step("run", file="main.py", timeout_s=3600)
    endless = sandboxes.Plan({"main.py": "print('on', flush=True)\nwhile True: pass"}, [step])
    with made.start(endless) as process:
        assert os.read(process.stdout, 100) == b"on\n"
        made._supervisor.kill()
        with pytest.raises(sandboxes.SandboxUnavailableError, match="killed during the run; run it again"):
            process.wait()
    assert made.run(sandboxes.Plan({"main.py": "print(1)"}, [step])).stdout == "1\n"
    made.close()


def test_further_folders_are_seen_under_their_names_and_cannot_be_written(sandbox, tmp_path):
    tmp_path.chmod(0o755)  # an administrator's programs run as nobody
    made = sandboxes.Sandbox([tmp_path])
    try:
        code = f"import numbers_\nprint(numbers_.SEVEN)\nopen({str(tmp_path / 'new')!r}, 'w')"
        (tmp_path / "numbers_.py").write_text("SEVEN = 7\n")
        step = sandboxes.Step("run", file="main.py", python_path=[str(tmp_path)])
        result = made.run(sandboxes.Plan({"main.py": code}, [step]))
        assert result.stdout == "7\n" and "Read-only file system" in result.stderr
    finally:
        made.close()
    with pytest.raises(ValueError, match="nowhere: expected the absolute path"):
        sandboxes.Sandbox(["/nowhere"])


def test_what_is_wrong_is_said_before_anything_runs():
    with pytest.raises(ValueError, match="'cobol': expected one of python, javascript"):
        run("", language="cobol")
    with pytest.raises(ValueError, match="timeout_s 0, memory_mb 1024: limits are positive"):
        run("", timeout_s=0)
    with pytest.raises(ValueError, match="allow_missing: network: only seccomp may be missing"):
        sandboxes.Sandbox(allow_missing=["network"])


def test_a_missing_toolchain_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    sandboxes.toolchain.cache_clear()
    try:
        with pytest.raises(LookupError, match="go: go is not installed"):
            run("", language="go")
    finally:
        sandboxes.toolchain.cache_clear()


def test_the_filter_of_system_calls_may_be_missing_only_if_that_is_allowed(sandbox, monkeypatch, caplog):
    launch = sandboxes.Sandbox._launch
    monkeypatch.setattr(
        sandboxes.Sandbox,
        "_launch",
        lambda self, with_filter: "no filter of system calls for vax" if with_filter else launch(self, with_filter),
    )
    plan = sandboxes.Plan({"main.py": "print(1)"}, [sandboxes.Step("run", file="main.py")])
    with pytest.raises(sandboxes.SandboxUnavailableError, match="no filter of system calls for vax"):
        sandboxes.Sandbox().run(plan)
    made = sandboxes.Sandbox(allow_missing=["seccomp"])
    assert made.run(plan).stdout == "1\n"
    assert "WITHOUT a filter of system calls" in caplog.text
    made.close()


def test_a_user_who_may_make_no_namespaces_is_told_so(sandbox, root):
    """The kernel refuses: within a user namespace whose limit of further ones is 0."""
    program = (
        "from qwen_jax import sandbox as s\ntry: s.run('print(1)')\nexcept s.SandboxUnavailableError as e: print(e)\n"
    )
    limit = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", limit, "sh", sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if "unshare:" in done.stderr or "cannot create" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.stdout.startswith("this system cannot isolate programs: ") and done.stdout.count("\n") == 1, done.stderr


def test_a_system_without_namespaces_is_refused_with_the_mend(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(sandboxes.SandboxUnavailableError, match="darwin has no namespaces.*max_user_namespaces"):
        sandboxes.Sandbox().run(sandboxes.Plan({"main.py": ""}, [sandboxes.Step("run", file="main.py")]))
