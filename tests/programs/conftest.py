"""The team's own yardstick for compiled programs, where it lies beside the repository."""

import importlib.util
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def yardstick(root):
    """The module `tpu_report`, which others of the team use to measure peers."""
    shared = Path(os.environ.get("QWEN_JAX_SHARED", root.parent / "shared"))
    path = shared / "bench" / "tpu_report.py"
    if not path.is_file():
        pytest.skip("the yardstick ../shared/bench/tpu_report.py is not here")
    spec = importlib.util.spec_from_file_location("tpu_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
