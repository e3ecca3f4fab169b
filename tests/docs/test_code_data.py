"""Runs the commands of docs/how_to/code_data.md, in order, in a copy of the repository."""

import json

from tests.pages import blocks, copy_repository, shell


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    shown = [shell(text, tmp_path).stdout for kind, text in blocks("code_data.md") if kind == "sh"]
    _, made, code, arithmetic, instructions = shown
    manifest = json.loads((tmp_path / "corpus" / "code" / "manifest.json").read_text())
    reasons = manifest["left_out"]
    assert manifest["files"] == manifest["documents"] + sum(reasons.values()) and manifest["documents"] == 2
    assert reasons["duplicate"] == reasons["near-duplicate"] == reasons["vendored"] == 1
    assert reasons["license unknown"] == 2 and "license unknown" in made
    assert '{"repository": "abacus", "path": "' in made
    assert '⟦"""Memory of the host, where it is the memory' in code and "tokens with loss:       100.0%" in code
    assert '"kind": ' in arithmetic
    assert "=⟪<|im_end|>⟫" in instructions and "⟪<|im_start|>⟫assistant\n⟦" in instructions
