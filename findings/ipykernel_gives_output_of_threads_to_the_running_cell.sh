#!/usr/bin/env bash
# A thread that a notebook cell has started prints into whichever cell runs later; a task of asyncio prints into its own.
#
# One expects: what belongs to a cell is known by the parent of its messages, as the Jupyter protocol says, for threads as for tasks.
# What happens: ipykernel 7 keeps the parent in a ContextVar. A task inherits it; a new thread begins with an empty context, and then
#   the parent is that of the last cell that was begun, by whomever.
# Who suffers: programs that read a cell's output by its messages, such as code interpreters and graders of notebooks: output of an
#   earlier cell becomes part of a later answer.
# qwen_jax: threads of its kernel take the parent of the snippet that starts them (qwen_jax/agents/kernel_bridge.py), and what comes
#   after a snippet's end is told apart from it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'ipykernel==7.4.0' 'jupyter_client==8.10.0'
"$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import importlib.metadata

from jupyter_client.manager import KernelManager

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("ipykernel", "jupyter_client")))
CELLS = {
    "first": """
import asyncio, threading
go, said = threading.Event(), threading.Event()
def thread():
    go.wait(); print("thread", flush=True); said.set()
async def task():
    while not go.is_set(): await asyncio.sleep(0.01)
    print("task", flush=True)
threading.Thread(target=thread).start()
running = asyncio.ensure_future(task())
""",
    "second": "go.set()\nsaid.wait()\nawait running",
}
manager = KernelManager()
manager.start_kernel(stdout=-3, stderr=-3)
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=120)
cells, owner = {}, {}
try:
    for name, code in CELLS.items():
        cells[client.execute(code)] = name
        while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") not in cells:
            pass
    while len(owner) < 2:
        message = client.get_iopub_msg(timeout=60)
        if message["msg_type"] == "stream":
            for word in message["content"]["text"].split():
                owner[word] = cells.get(message["parent_header"].get("msg_id"))
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
print(f"both started by the first cell, print during the second: task -> {owner['task']}, thread -> {owner['thread']}")
assert owner == {"task": "first", "thread": "second"}, "threads print elsewhere now"
print("as described: the thread printed into the running cell")
PYTHON
