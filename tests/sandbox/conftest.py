"""The sandbox of the tests, and what there is of processes before and after a run."""

import os

import pytest

from qwen_jax import sandbox as sandboxes


@pytest.fixture(scope="session")
def sandbox():
    """A sandbox for all installed languages; skips where this system cannot isolate programs."""
    made = sandboxes.default_sandbox()
    try:
        made.run(sandboxes.Plan({"main.py": ""}, [sandboxes.Step("run", file="main.py")]))
    except sandboxes.SandboxUnavailableError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def descendants() -> set[int]:
    """Processes that this one started, and those that they started."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


@pytest.fixture
def nothing_left(sandbox):
    """After the test there are no more processes than before, and nothing is mounted or left in the host's folders."""
    before = descendants()
    yield
    assert descendants() <= before
    with open("/proc/self/mountinfo") as file:
        assert " /box " not in file.read()
    assert not os.path.exists("/box")
