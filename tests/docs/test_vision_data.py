"""Runs the commands of docs/how_to/vision_data.md, in order, in a copy of the repository."""

import re

from tests.pages import blocks, copy_repository, shell


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    shown = [shell(text, tmp_path).stdout for kind, text in blocks("vision_data.md") if kind == "sh"]
    _, inspected, packed = shown
    (example,) = (text for kind, text in blocks("vision_data.md") if not kind)
    assert example.strip() in inspected
    picture = "⟪<img>⟫⟪<imgpad>×256⟫⟪</img>⟫"
    assert f"{picture}Generate the caption in Chinese:⟦ 蓝色的正方形" in inspected
    assert f"user\nPicture 1: {picture}\nPicture 2: {picture}\nWhich one is red? <img>⟦⟪<|im_end|>⟫" in inspected
    assert re.search(r"left out: +1: a picture that cannot be read", inspected)
    assert "left out 1 document, 0 tokens: a picture that cannot be read" in packed
    assert "--- segment 2: " in packed and "pictures:               3, 3.00 per example" in packed
