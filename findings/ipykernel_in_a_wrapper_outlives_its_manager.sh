#!/usr/bin/env bash
# A Jupyter kernel that is started through a wrapper which stays (unshare --fork, a shell, a sandbox program) lives for ever
# after its manager was killed. Started directly, it ends within a second or two.
#
# One expects: ipykernel watches its parent and exits when that dies, as it does under plain jupyter_client.
# What happens: jupyter_client puts its own process id into JPY_PARENT_PID. ipykernel compares it with getppid(), finds the
#   wrapper instead, and then waits only for its parent to become process 1, which never happens while the wrapper lives, and
#   never in a pid namespace, where the kernel itself is process 1 and its parent is 0.
#   (`env`, `prlimit`, `nice` replace themselves by the kernel and do no harm.)
# Who suffers: code interpreters that put their kernels into namespaces; a server killed with -9 leaves every kernel, with
#   its memory and whatever loop the model wrote, running.
# qwen_jax: its interpreter (qwen_jax/agents/interpreter.py) does not rely on it: the sandbox ends with the process that
#   started it by its own means, and a test kills that process with -9.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'ipykernel==7.4.0' 'jupyter_client==8.10.0'
cat > "$work/manager.py" <<'PYTHON'
import json, sys, time
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

command = [*json.loads(sys.argv[1]), sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
KernelManager.kernel_spec = property(lambda self: KernelSpec(argv=command, display_name="", language="python"))
manager = KernelManager()
manager.start_kernel(stdout=-3, stderr=-3)
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=120)
print(manager.provisioner.pid, flush=True)
time.sleep(1000)
PYTHON
"$work/venv/bin/python" - "$work/manager.py" <<'PYTHON'
import importlib.metadata, json, os, signal, subprocess, sys, time

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("ipykernel", "jupyter_client")))
WAIT_S = 10


def outlives(wrapper):
    """Whether what the manager started is still there 10 s after the manager was killed."""
    arguments = [sys.executable, sys.argv[1], json.dumps(wrapper)]
    manager = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    started = int(manager.stdout.readline())
    manager.kill()
    manager.wait()
    end = time.monotonic() + WAIT_S
    while (there := os.path.exists(f"/proc/{started}") and " Z " not in open(f"/proc/{started}/stat").read()) and time.monotonic() < end:
        time.sleep(0.2)
    if there:  # the kernel and its wrapper are one process group
        os.killpg(os.getpgid(started), signal.SIGKILL)
    return there


direct, replaced, shell = outlives([]), outlives(["env"]), outlives(["sh", "-c", '"$@"; exit $?', "sh"])
print(f"{WAIT_S} s after kill -9 of the manager, still alive: direct {direct}, through env {replaced}, through sh {shell}")
assert not direct and not replaced and shell, "kernels end otherwise now"
print("as described: the wrapped kernel outlives its manager")
PYTHON
