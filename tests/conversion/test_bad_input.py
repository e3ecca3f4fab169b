"""Damaged downloads through the program itself: one line on standard error, exit status 2, nothing left behind."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax.conversion import convert
from tests.warm_python import python

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "qwen1_tiny"
INDEX = "model.safetensors.index.json"


def with_header(file: Path, change) -> None:
    """Rewrites the header of a safetensors file, and leaves its data."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def as_one_byte(dtype: str):
    """A change of a header: one vector becomes four times as many numbers of one byte."""

    def change(header):
        entry = header["transformer.h.0.ln_1.weight"]
        entry |= {"dtype": dtype, "shape": [4 * entry["shape"][0]]}

    return change


def half_downloaded(folder, files):
    files[1].write_bytes(files[1].read_bytes()[: files[1].stat().st_size // 2])
    return f"{files[1].name} is damaged or was not downloaded whole"


def shard_missing(folder, files):
    files[1].unlink()
    return f"names 1 of {len(files)} files that are not in the folder: {files[1].name}"


def index_is_no_json(folder, files):
    (folder / INDEX).write_text((folder / INDEX).read_text()[:200])
    return f"{INDEX} is not valid JSON"


def config_of_another_model(folder, files):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"vocab_size": 80}))
    return "transformer.wte.weight is [64, 64], expected [80, 64]"


def tensor_missing(folder, files):
    index = json.loads((folder / INDEX).read_text())
    name = "transformer.h.1.mlp.w2.weight"
    file = folder / index["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    (folder / INDEX).write_text(json.dumps(index))
    return f"1 missing: {name}"


def quantized(folder, files):
    file = next(f for f in files if "transformer.h.0.ln_1.weight" in load_file(f))
    with_header(file, as_one_byte("I8"))
    return "transformer.h.0.ln_1.weight is I8"


def eight_bit_float(folder, files):
    file = next(f for f in files if "transformer.h.0.ln_1.weight" in load_file(f))
    with_header(file, as_one_byte("F8_E4M3"))
    return "transformer.h.0.ln_1.weight is F8_E4M3"


def unknown_dtype(folder, files):
    with_header(files[0], lambda header: header["transformer.h.0.ln_1.weight"].update(dtype="F9"))
    return f"{files[0].name} is damaged"


DAMAGES = (
    half_downloaded,
    shard_missing,
    index_is_no_json,
    config_of_another_model,
    tensor_missing,
    quantized,
    eight_bit_float,
    unknown_dtype,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_one_line_and_leaves_nothing(tmp_path, damage, monkeypatch, capsys):
    folder = convert("qwen", GOLDEN, "qwen", tmp_path / "sharded", max_shard_size="160KB", progress=False)
    words = damage(folder, sorted(folder.glob("*.safetensors")))
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import convert_checkpoint

    from qwen_jax import command_line

    # Handlers that it sets would outlive the test, with a standard error that is closed by then.
    monkeypatch.setattr(command_line.logging, "basicConfig", lambda **options: None)
    arguments = ["--from", f"qwen:{folder}", "--to", f"qwen2:{tmp_path / 'deep' / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: convert_checkpoint.main(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert os.listdir(tmp_path) == ["sharded"]


def run(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [python(), ROOT / "tools" / "convert_checkpoint.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_program_verifies_checks_and_says_so(tmp_path):
    done = run("--from", f"qwen:{GOLDEN}", "--to", f"orbax:{tmp_path / 'out'}", "--verify", "--check")
    assert done.returncode == 0, done.stderr
    assert "verified: 15 tensors read back" in done.stderr
    assert "check: logits differ by 0 at most" in done.stdout


def test_a_difference_is_exit_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import convert_checkpoint

    from qwen_jax.conversion import converter

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = np.zeros(64, np.float32)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(converter, "flush", damage)
    arguments = ["--from", f"qwen:{GOLDEN}", "--to", f"qwen2:{tmp_path / 'out'}", "--verify"]
    assert convert_checkpoint.main(arguments) == 1
    error = capsys.readouterr().err
    assert "error: 1 of 27 tensors read back differ from what was written: model.norm.weight." in error
    assert os.listdir(tmp_path) == []
