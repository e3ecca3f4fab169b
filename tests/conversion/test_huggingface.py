"""config.json and safetensors: what is read, what is refused, and that errors name what is wrong."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax.conversion import convert, load_pretrained
from qwen_jax.conversion.huggingface import SafetensorsFolder, external_config, parse_size, read_config
from qwen_jax.conversion.mapping import FORMATS
from qwen_jax.models.config import ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen1_tiny"
RELEASED_7B = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "layer_norm_epsilon": 1e-6,
    "initializer_range": 0.02,
    "no_bias": True,
    "scale_attn_weights": True,
    "emb_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
}
EARLY_7B = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "padded_vocab_size": 151936,
    "vocab_size": 151851,
    "n_embd": 4096,
    "n_layer": 32,
    "n_head": 32,
    "n_inner": None,
    "ffn_hidden_size": 22016,
    "kv_channels": 128,
    "seq_length": 2048,
    "rotary_emb_base": 10000,
    "layer_norm_epsilon": 1e-5,
    "no_bias": True,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "pos_emb": "rotary",
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 600,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 64,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


def write(folder: Path, content: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_reads_the_released_7b_configuration_and_writes_it_again(tmp_path):
    config = read_config(write(tmp_path, RELEASED_7B), FORMATS["qwen"])
    assert config == ModelConfig(
        vocab_size=151936,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        ffn_size=11008,
        context_length=8192,
        use_dynamic_ntk=True,
        use_logn=True,
    )
    again = external_config(FORMATS["qwen"], config, "bfloat16", 151643)
    assert {name: again[name] for name in RELEASED_7B} == RELEASED_7B
    assert "auto_map" not in again


@pytest.mark.parametrize(
    "sizes, limit",
    [
        ((2048, 24, 8192, True), 8192),
        ((4096, 32, 8192, True), 32768),
        ((5120, 40, 2048, True), 8192),
        ((8192, 80, 32768, False), 32768),
        ((64, 2, 128, True), 1024),
        ((64, 2, 128, False), 128),
    ],
)
def test_the_position_limit_is_that_of_the_released_models_or_of_generation_here(sizes, limit):
    width, layers, length, ntk = sizes
    config = ModelConfig(
        vocab_size=64,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        head_dim=64,
        ffn_size=64,
        context_length=length,
        use_dynamic_ntk=ntk,
    )
    assert external_config(FORMATS["qwen"], config, "float32", None)["max_position_embeddings"] == limit
    assert external_config(FORMATS["qwen2"], config, "float32", None)["max_position_embeddings"] == length
    assert external_config(FORMATS["qwen"], config, "float32", None, 77)["max_position_embeddings"] == 77


def test_the_position_limit_of_a_qwen_folder_is_kept(tmp_path):
    there = json.loads((GOLDEN / "config.json").read_text())["max_position_embeddings"]
    folder = convert("qwen", GOLDEN, "qwen", tmp_path / "out", progress=False)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == there == 256


def test_reads_the_field_names_of_the_first_release(tmp_path):
    config = read_config(write(tmp_path, EARLY_7B), FORMATS["qwen"])
    assert config == ModelConfig(
        vocab_size=151936,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        ffn_size=11008,
        context_length=2048,
        norm_epsilon=1e-5,
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_reads_the_rotary_base_of_transformers_4_and_5(tmp_path, rope):
    config = read_config(write(tmp_path, QWEN2 | rope), FORMATS["qwen2"])
    assert (config.rope_theta, config.num_kv_heads, config.head_dim, config.tie_embeddings) == (1e6, 2, 16, True)


@pytest.mark.parametrize(
    "base, change, words",
    [
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window is True"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (QWEN2, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope type 'dynamic'"),
        (QWEN2, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (QWEN2, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (QWEN2, {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        (QWEN2, {"architectures": ["QWenLMHeadModel"]}, "format qwen"),
        (QWEN2, {"hidden_size": None}, "no hidden_size"),
        (QWEN2, {"hidden_size": "64"}, "hidden_size is '64', expected an integer"),
        (QWEN2, {"num_attention_heads": 0}, "num_heads must be a positive integer, found 0"),
        (QWEN2, {"num_key_value_heads": 0}, "num_kv_heads must be a positive integer, found 0"),
        (QWEN2, {"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        (RELEASED_7B, {"rotary_emb_base": 0}, "rope_theta must be a positive number, found 0.0"),
        (RELEASED_7B, {"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        (RELEASED_7B, {"no_bias": False}, "no_bias is False"),
        (RELEASED_7B, {"intermediate_size": 22017}, "multiple of 2"),
    ],
)
def test_refuses_by_name_what_the_model_does_not_compute(tmp_path, base, change, words):
    table = FORMATS["qwen2" if base is QWEN2 else "qwen"]
    with pytest.raises(ValueError, match=words) as caught:
        read_config(write(tmp_path, base | change), table)
    assert "config.json" in str(caught.value)


def test_sizes():
    assert [parse_size(size) for size in ("5GB", "1.5kb", "1GiB", 77)] == [5 * 10**9, 1500, 2**30, 77]
    for wrong in ("five", "5XB", "0", "-1GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(wrong)


@pytest.fixture
def broken(tmp_path):
    """The golden model in three files, to be damaged, and a function that expects the damage to be named."""
    folder = convert("qwen", GOLDEN, "qwen", tmp_path / "sharded", max_shard_size="160KB", progress=False)

    def expect(*words, error=ValueError):
        with pytest.raises(error) as caught:
            convert("qwen", folder, "qwen2", tmp_path / "out" / "converted", progress=False)
        for word in words:
            assert word in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded"]

    return folder, expect


def edit(folder: Path, name: str, change):
    """Applies `change` to the tensors of the file that holds `name`, and to the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"][name]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != file} | dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_names_missing_unexpected_and_misshapen_tensors_together(broken):
    folder, expect = broken
    edit(folder, "transformer.h.1.ln_2.weight", lambda tensors: tensors.pop("transformer.h.1.ln_2.weight"))
    edit(folder, "transformer.ln_f.weight", lambda tensors: tensors.update(stray=np.zeros(2, np.float32)))
    edit(
        folder,
        "transformer.h.0.mlp.w1.weight",
        lambda tensors: tensors.update({"transformer.h.0.mlp.w1.weight": np.zeros((3, 64), np.float32)}),
    )
    expect(
        "1 missing: transformer.h.1.ln_2.weight",
        "1 unexpected: stray",
        "transformer.h.0.mlp.w1.weight is [3, 64], expected [172, 64]",
    )


def test_names_a_bounded_number_of_tensors(broken):
    folder, expect = broken
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 9}))
    expect("56 missing: transformer.h.2.ln_1.weight", "and 51 more")


def test_names_a_dtype_that_is_not_understood(broken):
    folder, expect = broken
    edit(
        folder,
        "transformer.ln_f.weight",
        lambda tensors: tensors.update({"transformer.ln_f.weight": np.zeros(64, np.float64)}),
    )
    expect("transformer.ln_f.weight is F64")


def test_names_a_truncated_file(broken):
    folder, expect = broken
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1000])
    expect(file.name, "download it again")
    file.write_bytes(b"")
    expect(file.name, "download it again")


def test_names_a_shard_that_was_not_downloaded(broken):
    folder, expect = broken
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    expect(file.name, "index.json", error=FileNotFoundError)


def test_names_a_tensor_that_is_not_in_its_file(broken):
    folder, expect = broken
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    shutil.copyfile(first, second)
    expect("not in their file", second.name)


def test_says_that_only_safetensors_are_read(broken):
    folder, expect = broken
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    expect("pytorch_model.bin", "safetensors", error=FileNotFoundError)


def test_buffers_of_old_checkpoints_are_skipped(broken):
    folder, _ = broken
    _, before = load_pretrained(folder)
    buffer = {"transformer.rotary_emb.inv_freq": np.zeros(16, np.float32)}
    edit(folder, "transformer.ln_f.weight", lambda tensors: tensors.update(buffer))
    _, after = load_pretrained(folder)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_a_tied_model_may_hold_its_output_only_as_a_copy(tmp_path, config, random_params):
    folder = tmp_path / "tied"
    tensors = load_file(convert("qwen", GOLDEN, "qwen2", tmp_path / "untied", progress=False) / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    content = json.loads((tmp_path / "untied" / "config.json").read_text()) | {"tie_word_embeddings": True}
    write(folder, content)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, params = load_pretrained(folder)
    assert model.config.tie_embeddings and "output" not in params
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_pretrained(folder)


def test_reads_float16_exactly(tmp_path):
    tensors = {name: array.astype(np.float16) for name, array in load_file(GOLDEN / "model.safetensors").items()}
    write(tmp_path / "half", json.loads((GOLDEN / "config.json").read_text()))
    save_file(tensors, tmp_path / "half" / "model.safetensors")
    assert SafetensorsFolder(tmp_path / "half", FORMATS["qwen"]).dtype == "float32"
    written = load_file(convert("qwen", tmp_path / "half", "qwen", tmp_path / "out") / "model.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array.astype(np.float32))


def test_shards_are_as_small_as_asked_and_the_index_is_whole(tmp_path):
    folder = convert("qwen", GOLDEN, "qwen2", tmp_path / "out", "bfloat16", max_shard_size="50KB", progress=False)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        tensors = load_file(file)  # the library reads what was written by hand
        size = sum(array.nbytes for array in tensors.values())
        assert size <= 50_000
        assert all(array.dtype == ml_dtypes.bfloat16 for array in tensors.values())
        assert all(index["weight_map"][name] == file.name for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == total
