"""A Python program in this process, which was forked off an interpreter that is already started.

It runs as `python FILE` would run it: `__main__`, `sys.argv`, tracebacks with the program's lines, `exit`, functions
registered with atexit, threads that are waited for, and the exit codes.
"""

import atexit
import builtins
import linecache
import os
import sys
import types


def run(file: str, python_path: list[str]) -> None:
    """Runs `file` of the working folder to its end, and never returns."""
    os._exit(_finish(_execute(file, python_path)))


def prepare(python_path: list[str]) -> None:
    """Makes this interpreter look newly started in its working folder."""
    forget()
    sys.path[:0] = [os.getcwd()]
    sys.path += python_path
    linecache.clearcache()


def forget() -> None:
    """Takes the sandbox's own modules out of the program's reach by name."""
    package = __name__.rpartition(".")[0]
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]


def main_module(name: str, file: str) -> types.ModuleType:
    """An empty module for the text of `file`, registered as `name`."""
    module = types.ModuleType(name)
    module.__file__ = file
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module


def _execute(file: str, python_path: list[str]) -> int:
    prepare(python_path)
    sys.argv[:] = [file]
    path = os.path.join(os.getcwd(), file)
    module = main_module("__main__", path)
    try:
        with open(path, "rb") as opened:
            text = opened.read()
        exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as error:
        return exit_code(error)
    except BaseException as error:
        show(error)
        return 1
    return 0


def show(error: BaseException) -> None:
    """Reports an error as the interpreter does, without the frame that called the program."""
    try:
        if error.__traceback__ is not None:
            error.__traceback__ = error.__traceback__.tb_next
        sys.excepthook(type(error), error, error.__traceback__)
    except BaseException:
        os.write(2, f"{type(error).__name__}\n".encode())


def exit_code(error: SystemExit) -> int:
    """The process's exit code for `sys.exit(…)`; text goes to standard error."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    try:
        print(error.code, file=sys.stderr)
    except BaseException:
        return 1
    return 1


def _finish(code: int) -> int:
    """What the interpreter does at its end, in its order."""
    threads = sys.modules.get("threading")
    for task in (getattr(threads, "_shutdown", None), atexit._run_exitfuncs):
        try:
            if task is not None:
                task()
        except BaseException:
            code = code or 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            code = code or 120
    return code
