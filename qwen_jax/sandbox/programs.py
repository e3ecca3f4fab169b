"""Programs of one file: `run` them, or `check` a Python solution by a test."""

import atexit
import functools
from collections.abc import Sequence

from qwen_jax.sandbox import languages
from qwen_jax.sandbox.sandbox import Plan, Result, Sandbox, Step


@functools.cache
def default_sandbox() -> Sandbox:
    """The sandbox of this process: programs see the installed languages and nothing else."""
    made = Sandbox(languages.mounts())
    atexit.register(made.close)
    return made


def run(
    code: str,
    *,
    language: str = "python",
    stdin: str = "",
    timeout_s: float = 10.0,
    memory_mb: int = 1024,
    sandbox: Sandbox | None = None,
) -> Result:
    """Runs a program, isolated, and returns how it ended. Threads may call this at the same time.

    Args:
      code: text of one source file.
      language: one of `languages.LANGUAGES`. Compiled ones have a step for the compiler, with its own limits.
      stdin: all of standard input.
      timeout_s: seconds of wall time for the program.
      memory_mb: MiB for all its processes together.
      sandbox: where to run it; default: `default_sandbox()`.

    Raises:
      LookupError: the language's toolchain is not installed.
      SandboxUnavailableError: this system cannot isolate programs.
      ValueError: an unknown language or a limit that is not positive.
    """
    _check_limits(timeout_s, memory_mb)
    plan = languages.plan(code, language, timeout_s=timeout_s, memory_mb=memory_mb)
    return (sandbox or default_sandbox()).run(plan, stdin=stdin)


def check(
    solution: str,
    test: str,
    *,
    names: Sequence[str] = (),
    prelude: str = "",
    timeout_s: float = 10.0,
    memory_mb: int = 1024,
    sandbox: Sandbox | None = None,
) -> Result:
    """Runs a Python test against a solution that runs in another process; `Result.ok` only if the test came to its end.

    The test's process never executes the solution's code: it calls the solution's functions and gets plain values
    (`inner/remote.py`). So a solution that exits early, replaces built-in functions, or returns objects that equal
    everything does not pass. Arguments are copies: what the solution does to them, the test does not see.

    Args:
      solution: text of the module that is tested. Its `__name__` is not `__main__`.
      test: text of the program that tests it.
      names: the test gets these from the solution, even where the prelude or Python define them. What only the
        solution defines is found there, too, and so are modules of the standard library that it imports.
      prelude: trusted text that is executed before the test, such as imports.
      timeout_s: seconds of wall time for both.
      memory_mb: MiB for both together.
      sandbox: where to run it; default: `default_sandbox()`.

    Raises:
      SandboxUnavailableError: this system cannot isolate programs.
      ValueError: a limit that is not positive.
    """
    _check_limits(timeout_s, memory_mb)
    step = Step(
        "run",
        file="solution.py",
        check={"prelude": prelude, "names": list(names)},
        timeout_s=timeout_s,
        memory_mb=memory_mb,
        limit_addresses=True,
    )
    return (sandbox or default_sandbox()).run(Plan({"solution.py": solution}, [step], test=test))


def _check_limits(timeout_s: float, memory_mb: int) -> None:
    if not timeout_s > 0 or not memory_mb > 0:
        raise ValueError(f"timeout_s {timeout_s}, memory_mb {memory_mb}: limits are positive")
