"""Runs the commands of docs/how_to/gpu_clusters.md that need no GPU, in order, in a copy of the repository."""

import json
import re
import socket

from qwen_jax.checkpoints.run_folder import saved_steps
from qwen_jax.training.metrics import read_metrics
from qwen_jax.training.trainer_config import TrainerConfig
from tests.pages import ROOT, blocks, copy_repository, shell

PAGE = ROOT / "docs" / "how_to" / "gpu_clusters.md"


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shown = []
    for kind, text in blocks(PAGE.name):
        if kind == "sh":
            command = text.replace("12345", port)
            done = shell(command, tmp_path)
            shown.append(done.stdout + done.stderr)
    job, table, resumed, rewound = shown
    assert "2 device(s)" in job and "2 process(es)" in job and "1 device(s)" in resumed
    for row in table.splitlines():
        assert row in PAGE.read_text(encoding="utf-8"), "the table is what the command prints"
    assert "resuming runs/job after step 12" in resumed and "step 14" in resumed
    # Steps of 8 examples: after step 8 the run would go on with example 64.
    assert "passes over examples 64 to 79" in rewound and "resuming runs/job after step 8, at example 64 of" in rewound
    run = tmp_path / "runs" / "job"
    assert saved_steps(run / "rewound_1") == [12, 14] and max(saved_steps(run)) == 14
    assert json.loads((run / "rewinds.json").read_text())[0]["skipped"] == [64, 80]
    assert {row["step"] for row in read_metrics(run) if "loss" in row} == set(range(1, 15))


def test_every_flag_and_macro_that_the_page_names_exists():
    page = PAGE.read_text(encoding="utf-8")
    recipe = (ROOT / "gin" / "runs" / "train.gin").read_text(encoding="utf-8")
    macros = set(re.findall(r"--gin\.([A-Z_]+)=", page))
    assert {"SKIP_SPIKES", "KEEP_EVERY", "COMPILATION_CACHE"} <= macros
    assert all(re.search(rf"^{name} = ", recipe, re.MULTILINE) for name in macros)
    assert set(re.findall(r"TrainerConfig\.(\w+)", page)) <= set(TrainerConfig.__dataclass_fields__)
