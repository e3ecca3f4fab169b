"""Runs the commands of docs/how_to/sft.md, in order, with a smaller model and shorter runs than the recipes have."""

import importlib.util
import json
import re

from qwen_jax.checkpoints.run_folder import read_config
from qwen_jax.conversion import convert
from tests.fakes import random_run
from tests.pages import blocks, copy_repository, shell

SIZES = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "ffn_size": 48, "context_length": 256}


def shrink(file, **values):
    """Sets names in a gin file, each of which it must have."""
    text = file.read_text()
    for name, value in values.items():
        text, count = re.subn(rf"^((?:ModelConfig\.)?{name}) = .*$", rf"\1 = {value}", text, flags=re.MULTILINE)
        assert count == 1, name
    file.write_text(text)


def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    gin = tmp_path / "gin"
    shrink(gin / "models" / "tiny.gin", vocab_size=464, head_dim=16, **SIZES)
    shrink(gin / "runs" / "sft_tiny.gin", TRAIN_STEPS=3, WARMUP_STEPS=1, EVAL_EVERY=3, CHECKPOINT_EVERY=3, BATCH_SIZE=2)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    run = random_run(tmp_path / "runs" / "demo", **SIZES)
    (tmp_path / "runs" / "demo" / "bytes.tiktoken").rename(tmp_path / "runs" / "demo" / "vocabulary.tiktoken")
    convert("orbax", run, "qwen2", tmp_path / "runs" / "demo" / "qwen2", progress=False)
    shown = []
    for kind, text in blocks("sft.md"):
        if kind == "sh":
            done = shell(text.replace("--output runs/sft\n", "--output runs/sft --count 40\n"), tmp_path)
            shown.append(done.stdout)
        elif importlib.util.find_spec("peft") is not None:
            shell(f"python - <<'END'\n{text}END\n", tmp_path)
    assert [line.split(" | ")[0] for line in shown[3].splitlines()[2:5]] == ["| base", "| sft", "| lora"]
    assert "| 200 |" in shown[3] and len((tmp_path / "runs/sft/answers.jsonl").read_text().splitlines()) == 600
    assert "logits differ by 0 at most" in shown[4] and "logits differ by" in shown[5]
    held_out = {line for line in (tmp_path / "runs/sft/held_out.jsonl").read_text().splitlines()}
    assert len(held_out) == 200
    asked = [json.loads(line)["messages"][0] for line in held_out]
    train = (tmp_path / "runs/sft/train.jsonl").read_text()
    assert not any(json.dumps(question) in train for question in asked)
    lora = read_config(tmp_path / "runs/sft/lora").lora
    assert (lora.rank, lora.alpha, len(lora.targets)) == (16, 16.0, 7)
    assert read_config(tmp_path / "runs/sft/full").lora is None


def test_the_macros_of_the_page_are_those_of_the_file(root):
    page = (root / "docs/how_to/sft.md").read_text(encoding="utf-8")
    text = (root / "gin/runs/lora.gin").read_text()
    for name in re.findall(r"^LORA_\w+", text, re.MULTILINE):
        assert f"`{name}`" in page, name
    trained = re.search(r"^LORA_TRAINED = '(.*)'", text, re.MULTILINE)[1]
    assert trained in page.replace("\\|", "|")
