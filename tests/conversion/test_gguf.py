"""GGUF: llama.cpp loads what is written and chooses the same tokens; round trips are exact; damage is named."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from qwen_jax.checkpoints.arrays import load_params, save_params
from qwen_jax.conversion import convert, detect_format, load_pretrained, load_tokenizer
from qwen_jax.conversion.check import compare_logits

pytest.importorskip("gguf", reason="gguf is not installed")


def flat(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("grouped, tied", [(3, False), (1, True)])
def test_round_trips_are_exact(tmp_path, config, random_params, tokenizer_file, grouped, tied):
    config = dataclasses.replace(
        config,
        num_kv_heads=grouped,
        tie_embeddings=tied,
        rope_theta=1e6,
        use_dynamic_ntk=False,
        use_logn=False,
        dtype="float32",
    )
    save_params(tmp_path / "run", config, random_params(config), tokenizer_file)
    file = convert("orbax", tmp_path / "run", "gguf", tmp_path / "model.gguf", progress=False, verify=True)
    assert file.is_file() and detect_format(file) == "gguf"
    model, params = load_pretrained(file)
    assert model.config == config
    expected = flat(load_params(tmp_path / "run")[1])
    for path, array in flat(params).items():
        np.testing.assert_array_equal(array, expected.pop(path), err_msg=path)
    assert not expected
    back = convert("gguf", file, "qwen2", tmp_path / "back", progress=False)
    assert (back / "qwen.tiktoken").read_bytes() == tokenizer_file.read_bytes()
    assert compare_logits(tmp_path / "run", back).largest == 0


def test_bfloat16_matrices_lose_nothing_and_vectors_stay_float32(tmp_path, config, random_params, tokenizer_file):
    import gguf

    narrow = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), random_params(config))
    save_params(tmp_path / "run", config, narrow, tokenizer_file)
    file = convert("orbax", tmp_path / "run", "gguf", tmp_path / "model.gguf", "bfloat16", progress=False)
    kinds = {(len(tensor.shape), tensor.tensor_type.name) for tensor in gguf.GGUFReader(file).tensors}
    assert kinds == {(1, "F32"), (2, "BF16")}
    for path, array in flat(load_pretrained(file)[1]).items():
        np.testing.assert_array_equal(array, flat(narrow)[path], err_msg=path)


def llama(file: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    # Its cache of keys and values is float16 by default.
    exact = dict(type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    return llama_cpp.Llama(str(file), n_ctx=0, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **exact)


@pytest.mark.parametrize("dtype, grouped", [("float32", 3), ("bfloat16", 1)])
def test_llama_cpp_chooses_the_same_tokens(tmp_path, config, random_params, tokenizer_file, dtype, grouped):
    config = dataclasses.replace(config, num_kv_heads=grouped, context_length=64, use_dynamic_ntk=False, use_logn=False)
    params = jax.tree.map(lambda a: 2 * a.astype(dtype).astype(np.float32), random_params(config))
    save_params(tmp_path / "run", config, params, tokenizer_file)
    file = convert("orbax", tmp_path / "run", "gguf", tmp_path / "model.gguf", dtype, progress=False)
    theirs, ours = llama(file), load_tokenizer(tmp_path / "run")
    assert theirs.n_vocab() == 600 and theirs.n_ctx() >= 64
    for text in ("the quick brown fox, 你好 2023's été\n", "  123 and  über"):
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == ours.encode(text)
    chat = "<|im_start|>user\nthe dog<|im_end|>\n"
    assert theirs.tokenize(chat.encode(), add_bos=True, special=True) == ours.encode_with_control_tokens(chat)
    assert theirs.detokenize(ours.encode("世界 the")) == "世界 the".encode()

    tokens = ours.encode("the quick brown fox jumps over")
    expected = list(tokens)
    model, params = load_pretrained(tmp_path / "run")
    forward = jax.jit(model.apply)
    for _ in range(24):
        padded = jnp.asarray([expected + [0] * (64 - len(expected))])
        expected.append(int(forward({"params": params}, padded)[0, len(expected) - 1].argmax()))
    theirs.eval(tokens)
    found = list(tokens)
    for _ in range(24):
        found.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
        theirs.eval(found[-1:])
    if dtype == "float32":
        assert found == expected
    logits = np.asarray(forward({"params": params}, jnp.asarray([found])))[0]
    difference = np.abs(theirs.scores[: len(found)] - logits).max() / np.abs(logits).max()
    # With bfloat16 weights, llama.cpp rounds the other factor of each product to bfloat16 too.
    assert difference < (0.2 if dtype == "bfloat16" else 1e-4)


def test_a_file_needs_a_tokenizer_and_is_never_overwritten(tmp_path, config, random_params, tokenizer_file, caplog):
    save_params(tmp_path / "run", config, random_params(config), None)
    with pytest.raises(ValueError, match="a GGUF file holds the tokenizer"):
        convert("orbax", tmp_path / "run", "gguf", tmp_path / "model.gguf", progress=False)
    assert os.listdir(tmp_path) == ["run"]
    file = convert("orbax", tmp_path / "run", "gguf", tmp_path / "model.gguf", tokenizer=tokenizer_file, progress=False)
    assert "format gguf has no dynamic NTK and no LogN attention" in caplog.text
    with pytest.raises(ValueError, match="choose another target"):
        convert("orbax", tmp_path / "run", "gguf", file, tokenizer=tokenizer_file, progress=False)


def test_one_of_several_parts_says_how_to_join_them(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2", split_max_tensors=1)
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 2
    for number, part in enumerate(parts, start=1):
        for load in (load_pretrained, load_tokenizer):
            with pytest.raises(
                ValueError, match=rf"{part.name} is part {number} of 2 of a model: join the parts first"
            ):
                load(part)


def test_damaged_and_quantized_files_are_named(tmp_path, run_folder):
    import gguf

    file = convert("orbax", run_folder, "gguf", tmp_path / "model.gguf", progress=False)
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="short.gguf is damaged or was not downloaded whole"):
        load_pretrained(short)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="other.gguf is a model of architecture 'llama'"):
        load_pretrained(tmp_path / "other.gguf")
