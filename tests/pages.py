"""Pages of docs/ whose commands are run as a reader would: in order, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests import warm_python
from tests.environment import one_device

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str) -> list[tuple[str, str]]:
    """(what stands after the three ticks, such as "sh", and text) of the code blocks of a page of docs/, in order.

    Of pages of one name, that in docs/how_to, which has commands.
    """
    (file,) = [*(ROOT / "docs/how_to").glob(page)] or (ROOT / "docs").rglob(page)
    text = file.read_text(encoding="utf-8")
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def copy_repository(folder: Path) -> Path:
    """Puts what a reader's commands use into `folder`, and returns it."""
    for name in ("qwen_jax", "tasks", "tools", "gin", "docs"):
        # With what Python has compiled, but for files that another worker is writing.
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc.*"))
    return folder


def shell(text: str, folder: Path, repository: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs a block of shell commands, which must succeed, in `folder`, with the modules of `repository` (or of it)."""
    # A folder after the first of PYTHONPATH may hold a package that the environment lacks.
    paths = [str(repository or folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)[1:]]
    ours = one_device() | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([warm_python.folder(), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=ours | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done
