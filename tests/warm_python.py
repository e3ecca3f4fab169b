"""`python` for the commands of a page, without the seconds that each spends on importing JAX and TensorFlow.

A process that has imported other people's packages, and nothing of this project, waits for commands and forks for each.
The fork gets the arguments, environment, folder and open files of the caller and runs the module or script as its main
program. What a command imports of the project it imports itself, from the folder that it is run in.

`folder` has a program `python` that asks for such a fork; put it at the front of PATH, or call it in the place of
`sys.executable`. It passes SIGTERM and SIGINT on, ends as the fork does, by the same signal where it was one, and takes
the fork with it when it is killed. With options of the interpreter it starts the interpreter itself. Tests of what a
command imports, and of SIGSTOP, start real processes.
"""

import array
import contextlib
import functools
import gc
import json
import os
import signal
import socket
import sys
import threading

SOCKET = "WARM_PYTHON_SOCKET"


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """A request and the three files that came with it."""
    data, ancillary, *_ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(3 * 4))
    files = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(content[: len(content) // 4 * 4])
    size = int.from_bytes(data[:4], "big")
    data = data[4:]
    while len(data) < size:
        data += connection.recv(1 << 16)
    return json.loads(data), list(files)


def ask(arguments: list[str]) -> int:
    """Exit code of `python ARGUMENTS` in a fork; its output goes to this process's files."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[SOCKET])
    environment = {name: value for name, value in os.environ.items() if name != SOCKET}
    request = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": environment}).encode()
    files = array.array("i", [0, 1, 2])
    connection.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    connection.sendall(request)
    process = int.from_bytes(connection.recv(8), "big")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(process, number))
    answer = connection.recv(8)
    code = int.from_bytes(answer, "big", signed=True) if answer else 70
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(path: str) -> dict:
    """Waits for requests; returns, in a fork, the one that it has to run. Ends when its standard input does."""
    import selectors

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    print("ready", flush=True)
    waiting = selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for key, _ in waiting.select():
            if key.fileobj == 0:
                os._exit(0)
            if key.fileobj is listening:
                connection, _ = listening.accept()
                request, files = receive(connection)
                process = os.fork()
                if not process:
                    for number, file in enumerate(files):
                        os.dup2(file, number)
                    waiting.close()
                    for one in (listening, connection, *(other for _, other in running.values())):
                        one.close()
                    for file in (*files, *running):
                        os.close(file)
                    return request
                for file in files:
                    os.close(file)
                connection.sendall(process.to_bytes(8, "big"))
                watched = os.pidfd_open(process)
                running[watched] = process, connection
                waiting.register(watched, selectors.EVENT_READ)
                waiting.register(connection, selectors.EVENT_READ)
            elif isinstance(key.fileobj, socket.socket):
                # The caller was killed.
                waiting.unregister(key.fileobj)
                for process, connection in running.values():
                    if connection is key.fileobj:
                        os.kill(process, signal.SIGKILL)
            elif key.fileobj in running:
                process, connection = running.pop(key.fileobj)
                waiting.unregister(key.fileobj)
                os.close(key.fileobj)
                with contextlib.suppress(KeyError):
                    waiting.unregister(connection)
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    connection.sendall(code.to_bytes(8, "big", signed=True))
                connection.close()


def run_as_main(request: dict) -> None:
    """Runs `-m MODULE …`, `-c PROGRAM …` or `SCRIPT …` as the interpreter would."""
    import runpy
    import types

    import jax

    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for name, value in request["environment"].items():
        # JAX has read these when it was imported.
        if name.startswith("JAX_") and (option := name.lower()) in jax.config.values:
            kind = type(jax.config.values[option])
            jax.config.update(option, kind(value) if kind in (int, float) else value)
    paths = [os.path.abspath(one) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    arguments = request["arguments"]
    if arguments[0] == "-m":
        sys.path[:0] = [os.getcwd(), *paths]
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path[:0] = ["", *paths]
        sys.argv = ["-c", *arguments[2:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    else:
        sys.path[:0] = [os.path.dirname(os.path.abspath(arguments[0])), *paths]
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def leave(request: dict) -> None:
    """Runs the request and ends the process as the interpreter does, but does not take the packages apart."""
    import atexit
    import traceback

    code: object = 0
    try:
        run_as_main(request)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit((code or 0) & 255)


def import_packages(root: str) -> None:
    """What commands import of others. `quick_seqio.py` of this project is run by its path; it needs no other file."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("import_packages", f"{root}/qwen_jax/data/quick_seqio.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for name in ("jax", "flax.linen", "optax", "orbax.checkpoint.experimental.v1", "gin", "grain", "apache_beam"):
        importlib.import_module(name)


@functools.cache
def folder() -> str:
    """A folder with the program `python`, which works as long as this process lives."""
    import atexit
    import shutil
    import subprocess
    import tempfile
    from pathlib import Path

    from tests.environment import one_device

    made = Path(tempfile.mkdtemp(prefix="warm-python-"))
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, __file__, "serve", str(root), str(made / "socket")]
    # It ends with its standard input, which is open as long as this process is.
    pipe = subprocess.PIPE
    with open(made / "errors", "w") as errors:
        server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=one_device())

    def end():
        server.communicate()
        shutil.rmtree(made, ignore_errors=True)

    atexit.register(end)
    assert server.stdout is not None and server.stdout.readline() == "ready\n", (made / "errors").read_text()
    program = made / "python"
    program.write_text(
        '#!/bin/sh\ncase "$1" in -m|-c|[!-]*) ;; *) exec "$REAL" "$@" ;; esac\n'.replace("$REAL", sys.executable)
        + f'{SOCKET}="{made}/socket" exec "{sys.executable}" -I -S "{__file__}" ask "$@"\n'
    )
    program.chmod(0o755)
    return str(made)


def python() -> str:
    """The program `python` of `folder`, to call in the place of `sys.executable`."""
    return f"{folder()}/python"


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        sys.exit(ask(sys.argv[2:]))
    # As in tests/environment.py, which cannot be imported from here.
    gc.set_threshold(20_000, 20, 50)
    import_packages(sys.argv[2])
    gc.freeze()
    leave(serve(sys.argv[3]))
