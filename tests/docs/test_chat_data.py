"""Runs the commands of docs/how_to/chat_data.md, in order, in a copy of the repository."""

import re

from tests.pages import blocks, copy_repository, shell


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    shown = [shell(text, tmp_path).stdout for kind, text in blocks("chat_data.md") if kind == "sh"]
    _, released, report, cached, packed = shown
    assert "assistant\n⟦1, 2, 3.⟪<|im_end|>⟫\n⟪<|im_start|>⟫⟧user\nAnd back?⟦⟪<|im_end|>⟫\n" in released
    assert "What does <|im_end|> do?" in released and 'Observation:⟧ {"degrees": 21}' in released
    assert re.search(r"left out: +1: empty turn of the assistant", released)
    assert "<|im_start|>⟫assistant\n⟦1, 2, 3.⟪<|im_end|>⟫⟧\n" in report
    assert "truncated 1 document, " in cached and "left out 1 document, 0 tokens: empty turn" in cached
    assert "--- segment 2: " in packed and "--- filling: " in packed
