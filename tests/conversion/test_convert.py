"""Whole conversions: exact round trips, transformers loads the result, and failures leave nothing behind."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from qwen_jax.checkpoints.arrays import StoredParams, load_params, save_params
from qwen_jax.conversion import convert, detect_format, load_pretrained
from qwen_jax.models.config import ModelConfig
from tests.fakes import outputs
from tests.warm_python import python

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "qwen1_tiny"
TOOL = ROOT / "tools" / "convert_checkpoint.py"
FORMATS = ("orbax", "qwen", "qwen2")


def parameters(folder) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in flatten_dict(load_pretrained(folder)[1], sep="/").items()}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype
        np.testing.assert_array_equal(found[path].view(np.uint8), array.view(np.uint8), err_msg=path)


def round_to(tree, dtype):
    return jax.tree.map(lambda array: array.astype(dtype).astype(np.float32), tree)


@pytest.mark.parametrize("first, second", itertools.product(FORMATS, FORMATS))
def test_round_trips_are_exact_in_float32(tmp_path, run_folder, config, first, second):
    """run -> first -> second -> run, with the tokenizer."""
    one = convert("orbax", run_folder, first, tmp_path / "one", progress=False)
    two = convert(first, one, second, tmp_path / "two", max_shard_size="40KB", progress=False)
    back = convert(second, two, "orbax", tmp_path / "back", progress=False)
    assert [detect_format(folder) for folder in (one, two, back)] == [first, second, "orbax"]
    expected = parameters(run_folder)
    for folder in (one, two, back):
        assert_same_bits(parameters(folder), expected)
    there, here = load_params(back)[0], config
    if "qwen2" in (first, second):
        here = dataclasses.replace(config, use_dynamic_ntk=False, use_logn=False)
    assert there == here
    assert (back / "tokenizer.tiktoken").read_bytes() == (run_folder / "tokenizer.tiktoken").read_bytes()


@pytest.mark.parametrize("first, second", itertools.product(("qwen", "qwen2"), FORMATS))
def test_bfloat16_is_kept_without_loss(tmp_path, config, random_params, first, second):
    params = round_to(random_params(config), ml_dtypes.bfloat16)
    save_params(tmp_path / "run", config, params, None)
    one = convert("orbax", tmp_path / "run", first, tmp_path / "one", "bfloat16", progress=False)
    dtype = "bfloat16" if second == "orbax" else None  # from another format, the dtype of the source is kept
    two = convert(first, one, second, tmp_path / "two", progress=False)
    back = convert(second, two, first, tmp_path / "back", dtype, progress=False)
    assert_same_bits(parameters(two), parameters(tmp_path / "run"))
    assert_same_bits(load_file(back / "model.safetensors"), load_file(one / "model.safetensors"))
    assert {array.dtype for array in load_file(back / "model.safetensors").values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_bfloat16_rounds_to_the_nearest(tmp_path, run_folder):
    folder = convert("orbax", run_folder, "qwen2", tmp_path / "out", "bfloat16", progress=False)
    found = load_file(folder / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(found, parameters(run_folder)["final_norm/scale"].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_a_run_folder_from_bfloat16_holds_it_and_is_read_as_float32(tmp_path, run_folder, layout):
    """Half of the bytes; whoever reads the parameters widens them, which is exact."""
    narrow = convert("orbax", run_folder, "qwen", tmp_path / "narrow", dtype="bfloat16", progress=False)
    options = {"layout": layout, "progress": False, "verify": True}
    run = convert("qwen", narrow, "orbax", tmp_path / "run_again", **options)
    wide = convert("qwen", narrow, "orbax", tmp_path / "wide", dtype="float32", **options)
    assert (StoredParams(run).dtype, StoredParams(wide).dtype) == ("bfloat16", "float32")
    assert_same_bits(parameters(run), parameters(wide))
    assert {array.dtype.name for array in parameters(run).values()} == {"float32"}
    back = convert("orbax", run, "qwen", tmp_path / "back", progress=False)
    before, after = (
        {file.name: file.read_bytes() for file in folder.glob("*.safetensors")} for folder in (narrow, back)
    )
    assert before == after and before
    if layout == "scanned":
        flat = flatten_dict(load_params(run)[1], sep="/")
        assert {array.dtype.name for array in flat.values()} == {"float32"}
        assert_same_bits(flat, parameters(wide))


def test_the_folder_of_one_step_is_read_too(run_folder):
    assert detect_format(run_folder / "checkpoints" / "0") == "orbax"
    assert_same_bits(parameters(run_folder / "checkpoints" / "0"), parameters(run_folder))


def test_load_pretrained_gives_the_model_in_the_dtype_asked_for(run_folder):
    tokens = jnp.arange(10)[None]
    model, params = load_pretrained(run_folder)
    assert all(array.dtype == jnp.float32 for array in jax.tree.leaves(params))
    full = outputs(model, params, tokens)
    model, params = load_pretrained(run_folder, dtype="bfloat16")
    assert all(array.dtype == jnp.float32 for array in jax.tree.leaves(params))
    half = outputs(model, params, tokens)
    assert full.dtype == half.dtype == jnp.float32
    assert 0 < jnp.abs(full - half).max() < 0.1 * jnp.abs(full).max()


def worst(found, expected) -> float:
    """Largest difference, relative to the scale (largest magnitude) of what is expected."""
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def test_transformers_loads_a_converted_run(tmp_path, run_folder):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = convert("orbax", run_folder, "qwen2", tmp_path / "out", max_shard_size="100KB", progress=False)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "Qwen2ForCausalLM"
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.generation_config.eos_token_id == [theirs.config.eos_token_id + 2, theirs.config.eos_token_id]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = np.asarray(tokenizer("the quick brown fox, 你好")["input_ids"])[None]
    model, params = load_pretrained(run_folder)
    ours = outputs(model, params, jnp.asarray(tokens))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert worst(ours, expected) < 1e-4


def test_qwen_folder_has_a_tokenizer_that_transformers_loads(tmp_path, run_folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = convert("orbax", run_folder, "qwen", tmp_path / "out", progress=False)
    auto = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert auto.convert_tokens_to_ids("<|im_end|>") == auto.convert_tokens_to_ids("<|endoftext|>") + 2
    assert json.loads((folder / "generation_config.json").read_text())["chat_format"] == "chatml"


@pytest.mark.parametrize("grouped, tied, head_dim", [(2, True, 16), (4, False, 16), (1, True, 24)])
def test_models_of_transformers_give_their_logits_here(tmp_path, grouped, tied, head_dim):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=grouped,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
            head_dim=head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            rms_norm_eps=1e-5,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms would otherwise be 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    assert model.config == ModelConfig(
        vocab_size=100,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=grouped,
        head_dim=head_dim,
        ffn_size=72,
        context_length=64,
        rope_theta=1e6,
        norm_epsilon=1e-5,
        tie_embeddings=tied,
        dtype="float32",
    )
    tokens = np.random.default_rng(0).integers(0, 100, (2, 40))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert worst(outputs(model, params, jnp.asarray(tokens)), expected) < 1e-4
    # And back: the same tensors, and a configuration that transformers reads the same way.
    again = convert("qwen2", tmp_path / "theirs", "qwen2", tmp_path / "again", progress=False)
    assert_same_bits(load_file(again / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors"))
    reloaded, info = transformers.AutoModelForCausalLM.from_pretrained(again, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        np.testing.assert_array_equal(reloaded(torch.tensor(tokens)).logits.numpy(), expected)


def test_warns_that_context_extension_is_lost(tmp_path, run_folder, caplog):
    convert("orbax", run_folder, "qwen2", tmp_path / "two", progress=False)
    assert "length limit of 32 tokens" in caplog.text
    caplog.clear()
    convert("orbax", run_folder, "qwen", tmp_path / "one", progress=False)
    assert not caplog.text


@pytest.mark.parametrize("target", ["qwen", "qwen2"])
def test_warns_that_window_attention_is_lost(tmp_path, config, random_params, caplog, target):
    windowed = dataclasses.replace(config, window_sizes=(8, 16, 0))
    save_params(tmp_path / "run", windowed, random_params(windowed), None)
    convert("orbax", tmp_path / "run", target, tmp_path / "out", progress=False)
    assert f"format {target} has no window attention" in caplog.text
    assert "window_sizes, from 8 tokens" in caplog.text and "length limit is 32 tokens" in caplog.text
    back = convert("orbax", tmp_path / "run", "orbax", tmp_path / "back", progress=False)
    assert load_params(back)[0].window_sizes == (8, 16, 0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(source_format="ggml"), "unknown format 'ggml'"),
        (dict(source_format="qwen2"), "is a folder of format orbax, not qwen2"),
        (dict(source="nowhere"), "nowhere is not a folder"),
        (dict(dtype="float16"), "float16"),
        (dict(target_format="orbax", dtype="float16"), "float16"),
        (dict(max_shard_size="lots"), "max_shard_size"),
        (dict(tokenizer="no.tiktoken"), "no.tiktoken"),
    ],
)
def test_errors_name_what_is_wrong_and_leave_nothing(tmp_path, run_folder, arguments, words):
    given = dict(source_format="orbax", source=run_folder, target_format="qwen", progress=False) | arguments
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        convert(target=tmp_path / "deep" / "er" / "out", **given)
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == ["run"]


def test_refuses_the_tokenizer_of_a_larger_model(tmp_path, tokenizer_file):
    with pytest.raises(ValueError, match="vocab_size is 64"):
        convert("qwen", GOLDEN, "qwen2", tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    assert os.listdir(tmp_path) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, run_folder):
    out = tmp_path / "out"
    out.mkdir()
    convert("orbax", run_folder, "qwen", out, progress=False)
    before = sorted(os.listdir(out))
    with pytest.raises(ValueError, match="not an empty folder"):
        convert("orbax", run_folder, "qwen", out, progress=False)
    assert sorted(os.listdir(out)) == before
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_a_checkpoint_with_damaged_data_is_named(tmp_path, run_folder):
    for file in (run_folder / "checkpoints" / "0").rglob("*"):
        if file.is_file() and "/d/" in file.as_posix():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match="checkpoints/0 cannot be read"):
        convert("orbax", run_folder, "qwen", tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["run"]


KILLED = """
import os, signal, sys
from qwen_jax.conversion import convert, pipelines
whole = pipelines.assemble
def assemble(tensor, parts, dtype):
    if tensor.name == "transformer.ln_f.weight":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(tensor, parts, dtype)
pipelines.assemble = assemble
convert("qwen", sys.argv[1], "qwen", sys.argv[2], progress=False)
"""


def run(*arguments, interpreter=None) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [interpreter or python(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_killed_conversion_leaves_only_a_hidden_folder_that_the_next_one_removes(tmp_path):
    out = tmp_path / "out"
    assert run("-c", KILLED, GOLDEN, out).returncode == -signal.SIGKILL
    assert [name.startswith(".") for name in os.listdir(tmp_path)] == [True]
    convert("qwen", GOLDEN, "qwen", out, progress=False)
    assert os.listdir(tmp_path) == ["out"]


def test_two_conversions_to_one_target_do_not_mix(tmp_path, monkeypatch):
    from qwen_jax.conversion import converter

    def second(*arguments):
        with pytest.raises(ValueError, match="another conversion to .* is running"):
            convert("qwen", GOLDEN, "qwen2", tmp_path / "out", progress=False)
        return whole(*arguments)

    whole = converter._write_external
    monkeypatch.setattr(converter, "_write_external", second)
    convert("qwen", GOLDEN, "qwen", tmp_path / "out", progress=False)
    assert detect_format(tmp_path / "out") == "qwen" and os.listdir(tmp_path) == ["out"]


def test_the_program_converts_and_says_how_to_load(tmp_path, tokenizer_file, run_folder):
    done = run(TOOL, "--from", f"orbax:{run_folder}", "--to", f"qwen2:{tmp_path / 'out'}", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout and "AutoTokenizer.from_pretrained" in done.stdout
    assert "format qwen2 has no dynamic NTK" in done.stderr
    assert {"tokenizer.json", "tokenizer_config.json", "qwen.tiktoken", "generation_config.json"} <= set(
        os.listdir(tmp_path / "out")
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("qwen2", "is a folder of format qwen, not qwen2"),
        ("ggml", "FORMAT one of orbax, qwen, qwen2, qwen2_reward, gguf, peft"),
    ],
)
def test_the_program_reports_errors_in_one_line(tmp_path, name, words):
    done = run(TOOL, "--from", f"{name}:{GOLDEN}", "--to", f"orbax:{tmp_path / 'out'}")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr
    assert os.listdir(tmp_path) == []


def test_importing_the_room_loads_neither_tensorflow_nor_torch():
    unwanted = ("tensorflow", "seqio", "t5", "torch", "transformers")
    program = f"import sys, qwen_jax.conversion; print([m for m in {unwanted} if m in sys.modules])"
    done = run("-c", program, interpreter=sys.executable)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
