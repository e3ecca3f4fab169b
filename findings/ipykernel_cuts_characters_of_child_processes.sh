#!/usr/bin/env bash
# What child processes of a Jupyter kernel write loses characters of several bytes: every 1,000 bytes one becomes U+FFFD.
#
# One expects: `os.system("cat chinese.txt")` in a cell shows the file, as print of its content does.
# What happens: ipykernel reads the descriptor in pieces of 1,000 bytes and decodes each piece by itself with errors="replace".
#   A character that lies across the end of a piece becomes two or three replacement characters.
# Who suffers: who reads what tools, compilers or shell commands write in Chinese, Japanese, Korean or emoji; code interpreters
#   that give such output to a model.
# qwen_jax: the kernel of its interpreter has a reader of its own, with an incremental decoder (qwen_jax/agents/kernel_bridge.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'ipykernel==7.4.0' 'jupyter_client==8.10.0'
"$work/venv/bin/python" - <<'PYTHON' 2>/dev/null
import importlib.metadata, time

from jupyter_client.manager import KernelManager

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("ipykernel", "jupyter_client")))
COUNT = 4000  # characters of 3 bytes


def shown(client, code):
    """Standard output of a cell, also what comes after its end."""
    client.execute(code)
    text, end = "", time.monotonic() + 60
    while text.count("\n") < 1 and time.monotonic() < end:
        message = client.get_iopub_msg(timeout=60)
        if message["msg_type"] == "stream":
            text += message["content"]["text"]
    return text.rstrip("\n")


manager = KernelManager()
manager.start_kernel(stdout=-3, stderr=-3)
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=120)
try:
    printed = shown(client, f"print('中' * {COUNT})")
    written = shown(client, f"import os, sys\nos.system(f\"{{sys.executable}} -X utf8 -c 'print(chr(0x4e2d) * {COUNT})'\");")
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
broken = COUNT - written.count("中")
print(f"{COUNT} characters: printed {printed.count('中')}, by a child process {written.count('中')}, {written.count(chr(0xFFFD))} replacements")
assert printed == "中" * COUNT, "print differs now"
assert broken >= 4 and chr(0xFFFD) in written, "child processes keep their characters now"
print("as described: characters at the ends of pieces are lost")
PYTHON
