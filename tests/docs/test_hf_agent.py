"""Runs the commands of docs/how_to/hf_agent.md, in order; they download the wheel."""

import pytest

from qwen_jax.sandbox import SandboxUnavailableError, run
from tests.fakes import random_run
from tests.pages import ROOT, blocks, shell


@pytest.mark.slow
def test_commands_of_the_page(tmp_path):
    try:
        run("")
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    sizes = dict(hidden_size=16, num_layers=1, num_heads=1, ffn_size=16, context_length=4096)
    random_run(tmp_path, **sizes).rename(tmp_path / "chat")
    (tmp_path / "runs").symlink_to(tmp_path)
    page = blocks("hf_agent.md")
    first, second = [shell(text, tmp_path, ROOT).stdout for kind, text in page if kind == "sh"]
    (expected,) = [text for kind, text in page if kind == ""]
    assert second == expected and first.endswith(expected.replace("again", "hf_agent"))
