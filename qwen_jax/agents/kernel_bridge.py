"""Runs in the sandbox: a Jupyter kernel, and a bridge between its sockets and the pipes to the host.

`interpreter.py` sends this file's text there. There are two processes: the bridge, which the sandbox started, and the
kernel, which the bridge forked off itself and which executes the snippets. They speak the Jupyter protocol over sockets
in the private folder; bridge and host exchange JSON lines over standard input and output, which the kernel does not
hold.
"""

import builtins
import codecs
import fcntl
import json
import os
import re
import secrets
import select
import signal
import struct
import sys
import termios
import threading
import time
import traceback
from typing import Any

import zmq
from ipykernel.iostream import IOPubThread, OutStream
from ipykernel.kernelapp import IPKernelApp
from jupyter_client.connect import write_connection_file
from jupyter_client.session import Session

FOLDER = "/box/tmp/kernel"
CONNECTION: dict[str, Any] = {"transport": "ipc", "ip": f"{FOLDER}/socket", "signature_scheme": "hmac-sha256"}
PORTS: dict[str, Any] = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}
_CHUNK = 1 << 16
# An interrupt is repeated so often, as the kernel takes none before it has begun; so is the first request.
_AGAIN_S = 0.3
# At most so long the end of a snippet, and each result before it, waits for what child processes have written.
_SETTLE_S, _FLUSH_S = 1.0, 0.1
_FLOOD = 64  # a snippet that prints this many times what is kept is interrupted
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


class Stream(OutStream):
    """Standard output or error of the kernel; what child processes write to its descriptor becomes part of it.

    ipykernel's own reader cuts characters of several bytes in two, and gives no way to wait for it.
    """

    busy = False
    _fid: Any  # the end of the pipe to read from, or None

    def _watch_pipe_fd(self):
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        poll = select.poll()
        poll.register(self._fid, select.POLLIN)
        while poll.poll():
            self.busy = True  # before the pipe is emptied, so that `settle` never misses it
            data = os.read(self._fid, _CHUNK)
            if data and self._should_watch:
                self.write(decode(data))
            self.busy = False
            if not data or not self._should_watch:  # the stream was closed
                return

    def settle(self, seconds: float) -> None:
        """Waits until nothing is on its way from the descriptor to the buffer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            (waiting,) = struct.unpack("i", fcntl.ioctl(self._fid, termios.FIONREAD, bytes(4)))
            if waiting == 0 and not self.busy:
                return
            time.sleep(0.001)

    def flush(self):
        self.settle(_FLUSH_S)  # what follows, such as a result, comes after it
        super().flush()


class Kernel(IPKernelApp):
    """ipykernel's application with an output channel that drops no message."""

    def init_iopub(self, context):
        context.sndhwm = 0
        # Forks send their output over TCP, and where there is no network libzmq aborts: see `plain_streams` instead.
        setattr(IOPubThread, "_setup_pipe_in", lambda thread: setattr(thread, "_pipe_flag", False))  # noqa: B010
        super().init_iopub(context)


def become_kernel(connection_file: str, ready: int) -> None:
    """Turns this process, a child of the bridge, into the kernel; writes one byte to `ready` once it listens."""
    os.setpgid(0, 0)  # an interrupt reaches what a snippet has started, too
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # they were the pipes to the host
        os.dup2(null, descriptor)
    app: Any = Kernel.instance(
        connection_file=connection_file, outstream_class="__main__.Stream", parent_handle=0, log_level=50
    )
    app.config.HistoryManager.enabled = False  # no file; the history in memory is kept
    app.config.InteractiveShell.colors = "nocolor"
    app.initialize([])
    streams: Any = sys.stdout, sys.stderr
    os.dup2(null, streams[1]._original_stdstream_copy)  # it was the pipe on which a failed start is told
    os.close(null)
    _prepare(app, streams)
    os.write(ready, b"1")
    os.close(ready)
    app.start()


def _prepare(app: Any, streams: tuple[Stream, Stream]) -> None:
    """Closes the gaps between a kernel for a person and one for a model: input, exits, threads, forks."""
    shell, process = app.shell, os.getpid()

    def end_of_snippet():
        if os.getpid() != process:  # a fork that came to the end of the snippet, as of a script
            sys.stdout.flush()
            os._exit(0)
        for stream in streams:
            stream.settle(_SETTLE_S)

    def interrupt(_, frame):
        # In the kernel's own code it could end the kernel, or lose the reply: it is sent again.
        while frame is not None:
            if frame.f_globals is shell.user_global_ns or frame.f_code.co_name == "flush_figures":
                raise KeyboardInterrupt
            frame = frame.f_back

    def refuse(prompt="", *_, **__):
        raise EOFError("input() cannot be used here: nobody answers. Write the value into the code instead")

    def plain_streams():
        # The thread that sends what is printed does not exist in a fork; the descriptors are watched by the parent.
        for name, stream, descriptor in zip(("stdout", "stderr"), streams, (1, 2), strict=True):
            if getattr(sys, name) is stream:
                plain = open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
                setattr(sys, name, plain)

    threads: Any = threading.Thread
    start = threads.start

    def start_in_snippet(thread, *args):
        parent, run = shell.get_parent(), thread.run

        def run_in_snippet():
            shell.set_thread_parent(parent)  # else it prints into whichever snippet runs at that time
            run()

        thread.run = run_in_snippet
        start(thread, *args)

    threads.start = start_in_snippet
    os.register_at_fork(after_in_child=plain_streams)
    shell.events.register("post_execute", end_of_snippet)
    app.kernel.raw_input = app.kernel.getpass = refuse
    app.kernel.pre_handler_hook = lambda: signal.signal(signal.SIGINT, interrupt)
    app.kernel.post_handler_hook = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    shell.system = shell.system_raw  # `!command`; IPython's other way needs a terminal
    # IPython's own end the kernel.
    shell.user_ns.update({name: getattr(builtins, name) for name in ("exit", "quit")})


class Snippet:
    """What the bridge knows of the snippet that runs."""

    def __init__(self, message_id: str, limits: dict):
        self.message_id = message_id
        self.limits = limits
        self.reply: dict | None = None
        self.idle = False
        self.interrupted_at: float | None = None
        self.error: dict | None = None
        self.text = self.text_cut = self.images = self.images_cut = self.image_size = 0
        self.flooded = False


class Bridge:
    """The client of the kernel, and the other end of the host's pipes."""

    def __init__(self, kernel: int, key: bytes):
        context = zmq.Context()
        self.kernel = kernel
        self.session = Session(key=key)
        self.shell, self.iopub = context.socket(zmq.DEALER), context.socket(zmq.SUB)
        self.iopub.rcvhwm = 0
        self.iopub.subscribe(b"")
        for socket, name in ((self.shell, "shell_port"), (self.iopub, "iopub_port")):
            socket.linger = 0
            socket.connect(f"ipc://{CONNECTION['ip']}-{PORTS[name]}")
        self.ended = os.pidfd_open(kernel)
        self.snippet: Snippet | None = None
        self.background = ""
        self.background_cut = 0
        self.subscribed = False
        self.received = b""

    def serve(self) -> None:
        """Passes messages on until the kernel or the host ends."""
        poller = zmq.Poller()
        for source in (self.shell, self.iopub, self.ended, 0):
            poller.register(source, zmq.POLLIN)
        while True:
            snippet = self.snippet
            interrupted = snippet is not None and snippet.interrupted_at is not None
            waits = interrupted or not self.subscribed
            ready = {source for source, _ in poller.poll(int(1000 * _AGAIN_S) if waits else None)}
            if not self.subscribed and not ready:
                # ipykernel says when it has the subscription, unless it sends something at that moment: its stream
                # then misses the event. Whatever it does for this request is told to subscribers.
                self.session.send(self.shell, "kernel_info_request")
            if interrupted and time.monotonic() - snippet.interrupted_at > _AGAIN_S:
                self.interrupt(snippet)
            if 0 in ready and not self.read_commands():
                return
            if self.shell in ready:
                self.receive(self.shell)
            if self.iopub in ready:
                self.receive(self.iopub)
            if self.snippet is not None and self.snippet.idle and self.snippet.reply is not None:
                self.finish(self.snippet, self.snippet.reply)
            if self.ended in ready:
                while self.receive(self.iopub):  # what it said at the end
                    pass
                _, status = os.waitpid(self.kernel, 0)
                say({"died": os.waitstatus_to_exitcode(status)})
                return

    def read_commands(self) -> bool:
        data = os.read(0, _CHUNK)
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "code" in command:
                content = {
                    "code": command["code"],
                    "silent": False,
                    "store_history": True,  # else a `;` of an earlier snippet hides results
                    "user_expressions": {},
                    "allow_stdin": False,
                    "stop_on_error": False,
                }
                message = self.session.msg("execute_request", content)
                self.snippet = Snippet(message["header"]["msg_id"], command["limits"])
                self.session.send(self.shell, message)
            elif "interrupt" in command and self.snippet is not None:
                self.interrupt(self.snippet)
        return bool(data)

    def interrupt(self, snippet: Snippet) -> None:
        snippet.interrupted_at = time.monotonic()
        try:
            os.killpg(self.kernel, signal.SIGINT)
        except ProcessLookupError:
            pass  # its end is seen next

    def receive(self, socket: zmq.Socket) -> bool:
        """Takes one message from the kernel; False if there is none."""
        try:
            _, message = self.session.recv(socket, copy=True)
        except Exception:  # a snippet reached the kernel's socket and wrote what is no message
            return True
        if message is None:
            return False
        kind, content = str(message.get("msg_type")), message.get("content")
        if socket is self.iopub and not self.subscribed:
            self.subscribed = True
            say({"ready": True})
        if not isinstance(content, dict):
            return True
        parent = (message.get("parent_header") or {}).get("msg_id")
        snippet = self.snippet
        if snippet is None or parent != snippet.message_id:
            self.note(kind, content)
        elif socket is self.shell:
            snippet.reply = content
        elif kind == "status":
            snippet.idle |= content.get("execution_state") == "idle"
        elif not snippet.idle:
            self.show(snippet, kind, content)
        else:
            self.note(kind, content)
        return True

    def note(self, kind: str, content: dict) -> None:
        """Text that belongs to no snippet: a thread or a process of an earlier one wrote it."""
        if kind == "stream" and isinstance(content.get("text"), str):
            room = max(0, 10000 - len(self.background))
            self.background += content["text"][:room]
            self.background_cut += len(content["text"][room:])

    def show(self, snippet: Snippet, kind: str, content: dict) -> None:
        if kind == "stream":
            self.write(snippet, "stderr" if content.get("name") == "stderr" else "stdout", content.get("text"))
        elif kind == "error":
            trace = content.get("traceback")
            lines = [line for line in trace if isinstance(line, str)] if isinstance(trace, list) else []
            names = {field: str(content.get(field, ""))[:_CHUNK] for field in ("ename", "evalue")}
            snippet.error = {**names, "traceback": plain("\n".join(lines))[:_CHUNK]}
            say({"kind": "error", "text": snippet.error["traceback"]})
        elif kind in ("execute_result", "display_data", "update_display_data"):
            data = content.get("data")
            if not isinstance(data, dict):
                return
            pictures = [data[name] for name in ("image/png", "image/jpeg") if isinstance(data.get(name), str)]
            if pictures:
                self.picture(snippet, pictures[0].replace("\n", ""))
            elif isinstance(data.get("text/plain"), str):
                self.write(snippet, "result" if kind == "execute_result" else "display", data["text/plain"])

    def write(self, snippet: Snippet, kind: str, text: object) -> None:
        if not isinstance(text, str):
            return
        most = snippet.limits["text"]
        room = max(0, most - snippet.text)
        snippet.text += len(text)
        snippet.text_cut += len(text[room:])
        if text[:room]:
            say({"kind": kind, "text": plain(text[:room])})
        if snippet.text > _FLOOD * most and not snippet.flooded:
            snippet.flooded = True
            self.interrupt(snippet)

    def picture(self, snippet: Snippet, data: str) -> None:
        limits = snippet.limits
        if snippet.images >= limits["images"] or snippet.image_size + len(data) > limits["image_bytes"] * 4 // 3:
            snippet.images_cut += 1
            return
        snippet.images += 1
        snippet.image_size += len(data)
        say({"kind": "image", "data": data})

    def finish(self, snippet: Snippet, reply: dict) -> None:
        self.snippet = None
        status, error = str(reply.get("status")), snippet.error
        if status != "ok" and error is None:
            error = {field: str(reply.get(field, ""))[:_CHUNK] for field in ("ename", "evalue", "traceback")}
        done = {
            "done": status,
            "error": error,
            "flooded": snippet.flooded,
            "text_cut": snippet.text_cut,
            "images_cut": snippet.images_cut,
            "background": plain(self.background),
            "background_cut": self.background_cut,
        }
        self.background, self.background_cut = "", 0
        say(done)


def plain(text: str) -> str:
    """Text without the colors and movements of a terminal."""
    return _ANSI.sub("", text)


def say(content: dict) -> None:
    """One line to the host."""
    data = memoryview(json.dumps(content).encode() + b"\n")
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    os.environ.update(IPYTHONDIR=f"{FOLDER}/ipython", JUPYTER_RUNTIME_DIR=FOLDER)
    os.makedirs(FOLDER)
    key, connection_file = secrets.token_hex(32).encode(), f"{FOLDER}/connection.json"
    write_connection_file(connection_file, key=key, **PORTS, **CONNECTION)
    wait, ready = os.pipe()
    kernel = os.fork()
    if kernel == 0:
        try:
            os.close(wait)
            become_kernel(connection_file, ready)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(ready)
    if os.read(wait, 1):
        os.close(wait)
        Bridge(kernel, key).serve()


main()
