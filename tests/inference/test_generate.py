"""The command that continues prompts: streamed text, files of prompts, one line for what cannot be."""

import json
import subprocess

import pytest

from qwen_jax.conversion import convert, load_tokenizer
from qwen_jax.generate import generate, main, read_prompts
from tests.fakes import random_run
from tests.warm_python import python


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A random model over a vocabulary of single bytes; large weights, so that greedy choices are not all alike."""
    sizes = dict(hidden_size=64, num_layers=3, num_heads=4, ffn_size=96, context_length=256)
    return random_run(tmp_path_factory.mktemp("generate"), **sizes)


def test_the_command_streams_the_same_text_from_any_format(run_folder, plain_environment):
    converted = convert("orbax", run_folder, "qwen2", run_folder.parent / "qwen2", progress=False)
    outputs = []
    for folder in (run_folder, converted):
        command = [python(), "-m", "qwen_jax.generate", "--checkpoint", folder, "--prompt", "hello"]
        command += ["--max_new_tokens", "24"]
        outputs.append(subprocess.run(command, capture_output=True, env=plain_environment, check=True).stdout)
    expected = "".join(generate(checkpoint=run_folder, prompt="hello", max_new_tokens=24)) + "\n"
    assert outputs[0] == outputs[1] == expected.encode()


def test_a_file_of_prompts(run_folder, tmp_path, capsys):
    prompts = ["hello", "héllo <|im_end|>", "x" * 50]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    main(["--checkpoint", str(run_folder), "--prompts", str(file), "--max_new_tokens", "12", "--slots", "2"])
    lines = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda line: line["index"])
    assert [line["text"] for line in lines] == [
        "".join(generate(checkpoint=run_folder, prompt=text, max_new_tokens=12)) for text in prompts
    ]
    assert all(line["log_prob"] < 0 for line in lines)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "tensor=4,fsdp=-1", "data=8,fsdp=1"])
def test_all_devices_write_what_one_does(run_folder, mesh, capsys):
    main(["--checkpoint", str(run_folder), "--prompt", "hello", "--max_new_tokens", "24", "--mesh", mesh])
    expected = "".join(generate(checkpoint=run_folder, prompt="hello", max_new_tokens=24))
    assert capsys.readouterr().out == expected + "\n"


def test_a_mesh_that_cannot_be_is_named(run_folder, capsys):
    flags = ["--checkpoint", str(run_folder), "--prompt", "hello"]
    with pytest.raises(ValueError, match=r"mesh data=3, fsdp=-1, .* does not divide 8"):
        main([*flags, "--mesh", "data=3"])
    with pytest.raises(ValueError, match="tensor"):
        main([*flags, "--mesh", "tensor=8"])  # the model has 4 heads
    with pytest.raises(SystemExit):
        main([*flags, "--mesh", "rows=2"])
    assert "'rows=2': expected data=N or fsdp=N" in capsys.readouterr().err


def test_a_line_without_a_prompt_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match='prompts.jsonl:2: expected an object with a text "prompt"'):
        read_prompts(file)


def test_a_control_token_in_the_prompt_stays_text(run_folder):
    assert max(load_tokenizer(run_folder).encode("<|im_end|><|endoftext|>")) < 256


def test_a_stop_string_ends_it(run_folder):
    whole = "".join(generate(checkpoint=run_folder, prompt="hello", max_new_tokens=24))
    stop = whole[10:13]
    cut = "".join(generate(checkpoint=run_folder, prompt="hello", max_new_tokens=24, stop=[stop]))
    assert cut == whole[: whole.index(stop)]


def test_a_schema_rules_what_is_written(run_folder, tmp_path):
    pytest.importorskip("llguidance", reason="the extra serve brings it")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}')
    found = json.loads("".join(generate(checkpoint=run_folder, prompt="hello", json_schema=schema)))
    assert len(found) == 2 and set(found) <= {"a", "b"}
    schema.write_text("[]")
    with pytest.raises(ValueError, match="schema.json: expected a JSON schema"):
        generate(checkpoint=run_folder, prompt="hello", json_schema=schema)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "a" * 300}, "context_length of 256"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p must be .* temperature 0 takes the most probable token, whatever top_p"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p must be .* for the most probable token alone, set temperature to"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"stop": [""]}, "stop_strings"),
        ({"seed": -1}, "seed"),
        ({"checkpoint": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run_folder, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        "".join(generate(**{"checkpoint": run_folder, "prompt": "x", **changes}))


def test_the_command_ends_with_one_line_and_status_2(run_folder, plain_environment):
    command = [python(), "-m", "qwen_jax.generate", "--checkpoint", run_folder, "--prompt", "a" * 300]
    done = subprocess.run(command, capture_output=True, text=True, env=plain_environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: prompt of 300 tokens + 128 new ones") and done.stderr.count("\n") == 1
