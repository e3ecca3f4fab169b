"""Runs the commands and the program of docs/how_to/generate.md, in order, on a random model in place of the demo's."""

from tests.fakes import random_run
from tests.pages import ROOT, blocks, shell


def test_commands_of_the_page(tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    random_run(tmp_path / "runs" / "demo", hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=256)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import "}\n{"prompt": "x = "}\n')
    shown = []
    for kind, text in blocks("generate.md"):
        if kind in ("sh", "python"):
            command = text if kind == "sh" else f"python - <<'END'\n{text}END\n"
            done = shell(command, tmp_path, ROOT)
            shown.append(done.stdout)
    assert len(shown) == 4 and all(shown[index] for index in (0, 2, 3))
    assert shown[3].splitlines()[-1].startswith("[-")
    assert (tmp_path / "out.jsonl").read_text().count("finish_reason") == 2
