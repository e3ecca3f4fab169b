"""Runs the commands and the program of docs/how_to/chat_with_pictures.md, in order, on a random model."""

import json

import numpy as np
from PIL import Image

from tests.fakes import random_vision_run
from tests.pages import ROOT, blocks, shell


def test_commands_of_the_page(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "runs").mkdir()
    random_vision_run(tmp_path / "made", context_length=512).rename(tmp_path / "runs" / "vl")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)).save(tmp_path / "cat.png")
    Image.new("RGB", (40, 60), "green").save(tmp_path / "garden.jpg")
    shown = []
    for kind, text in blocks("chat_with_pictures.md"):
        if kind in ("sh", "python"):
            command = text if kind == "sh" else f"python - <<'END'\n{text}END\n"
            shown.append(shell(command, tmp_path, ROOT))
    assert len(shown) == 4
    assert "garden.jpg is shown with the next message" in shown[0].stderr and shown[0].stdout.count("\n") >= 2
    assert shown[1].stdout.strip() and shown[3].stdout.strip().split(" ")[-1].startswith("-")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(answer["index"] for answer in answers) == [0, 1]
