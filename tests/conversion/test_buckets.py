"""Conversion from and to buckets: streamed, whole or not at all, and errors in one line."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from qwen_jax import files
from qwen_jax.conversion import convert, detect_format, load_pretrained, load_tokenizer
from qwen_jax.conversion.initial_weights import InitialWeights
from qwen_jax.conversion.load import open_weights
from qwen_jax.files import ObjectChangedError
from qwen_jax.generate import generate
from tests.object_stores import stores  # noqa: F401
from tests.warm_python import python

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "qwen1_tiny"
TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture(params=["s3", "gs"])
def store(stores, request):  # noqa: F811
    return stores[request.param]


def parameters(folder) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in flatten_dict(load_pretrained(folder)[1], sep="/").items()}


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(files.as_path(folder))) for path in files.as_path(folder).rglob("*"))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_models_go_through_buckets_unchanged(store, run_folder, tmp_path, monkeypatch):
    """run -> qwen2 -> run -> qwen, the first three in the bucket, and what reads checkpoints reads them there."""
    url = store.folder()
    one = convert("orbax", run_folder, "qwen2", f"{url}/one", max_shard_size="100KB", progress=False, verify=True)
    two = convert("qwen2", one, "orbax", f"{url}/two", progress=False, verify=True)
    three = convert("orbax", two, "qwen", tmp_path / "three", progress=False)
    assert str(one) == f"{url}/one" and detect_format(one) == "qwen2" and detect_format(two) == "orbax"
    assert [name for name in names(url) if "converting" in name] == []
    expected = parameters(run_folder)
    for folder in (one, two, three):
        assert_same(parameters(folder), expected)
    local = convert("orbax", run_folder, "qwen2", tmp_path / "one", max_shard_size="100KB", progress=False)
    assert names(one) == names(local)
    for name in names(local):
        assert (one / name).read_bytes() == (local / name).read_bytes(), name
    assert load_tokenizer(one).mergeable_ranks == load_tokenizer(two).mergeable_ranks
    said = ["".join(generate(checkpoint=at, prompt="the dog", max_new_tokens=4)) for at in (run_folder, one, two)]
    assert len(set(said)) == 1
    abstract = load_pretrained(run_folder)[1]
    copied, whole = [], files.copy_file
    monkeypatch.setattr(files, "copy_file", lambda *paths: copied.append(str(paths[0])) or whole(*paths))
    for where in (f"{url}/one", f"{url}/two"):
        weights = InitialWeights(where)
        weights.check(abstract)
        found = flatten_dict(weights.load(abstract), sep="/")
        assert_same({path: np.asarray(array) for path, array in found.items()}, expected)
    # The parameters of the run folder, from `check` to `load`.
    assert len([name for name in copied if name.endswith("params/manifest.ocdbt")]) == 1


def test_a_checkpoint_that_is_not_what_was_written_is_refused(store, run_folder):
    url = convert("orbax", run_folder, "orbax", store.folder("run"), progress=False)
    damaged = url / "checkpoints" / "0" / "params" / "manifest.ocdbt"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoints/0 cannot be read: the checksum of params/manifest\.ocdbt"):
        load_pretrained(url)


def test_a_gguf_file_goes_through_a_bucket(store, run_folder):
    pytest.importorskip("gguf", reason="gguf is not installed")
    file = convert("orbax", run_folder, "gguf", store.folder("model.gguf"), progress=False, verify=True)
    assert detect_format(file) == "gguf"
    assert_same(parameters(file), parameters(run_folder))
    assert load_tokenizer(file).mergeable_ranks == load_tokenizer(run_folder).mergeable_ranks


KILLED = """
import os, signal, sys
from qwen_jax.conversion import convert, huggingface, targets
targets.LEASE = 0.3
whole = huggingface.write_file
def write_file(path, *rest):
    if path.name.startswith("model-00003"):
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, *rest)
huggingface.write_file = write_file
convert("qwen", sys.argv[1], "qwen", sys.argv[2], max_shard_size="20KB", progress=False)
"""


def run(*arguments) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [python(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_killed_conversion_leaves_no_model_and_the_next_one_removes_its_remains(store):
    url = store.folder("out")
    assert run("-c", KILLED, GOLDEN, url).returncode == -signal.SIGKILL
    assert "config.json" not in names(url) and any(name.endswith(".safetensors") for name in names(url))
    with pytest.raises(ValueError, match="holds no model"):
        load_pretrained(url)
    convert("qwen", GOLDEN, "qwen", url, progress=False)
    assert [name for name in names(url) if name.endswith(".safetensors")] == ["model.safetensors"]
    assert_same(parameters(url), parameters(GOLDEN))


def test_an_error_leaves_nothing_and_files_of_others_stay(store, monkeypatch):
    from qwen_jax.conversion import pipelines

    url = store.folder()
    files.write_text(f"{url}/other/notes.txt", "mine")
    with pytest.raises(ValueError, match=r"/other exists and is not an empty folder"):
        convert("qwen", GOLDEN, "qwen", f"{url}/other", progress=False)

    def failing(tensor, parts, dtype):
        if tensor.name == "transformer.ln_f.weight":
            raise OSError("the disk of the source is gone")
        return whole(tensor, parts, dtype)

    whole = pipelines.assemble
    monkeypatch.setattr(pipelines, "assemble", failing)
    with pytest.raises(OSError, match="is gone"):
        convert("qwen", GOLDEN, "qwen", f"{url}/out", max_shard_size="20KB", progress=False)
    assert names(url) == ["other", "other/notes.txt"]


def test_a_source_that_changes_while_it_is_read_is_refused(store):
    url = convert("qwen", GOLDEN, "qwen", store.folder("model"), progress=False)
    weights = open_weights(url)
    files.copy_file(url / "config.json", url / "model.safetensors")
    with pytest.raises(ObjectChangedError, match=r"model\.safetensors: another process has written"):
        weights.read("token_embedding", None)


def test_a_damaged_file_in_a_bucket_is_named(store, tmp_path):
    local = convert("qwen", GOLDEN, "qwen", tmp_path / "model", progress=False)
    data, url = (local / "model.safetensors").read_bytes(), files.as_path(store.folder("model"))
    files.copy_file(local / "config.json", url / "config.json")
    header = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + header])
    entries["lm_head.weight"]["data_offsets"][1] -= 2
    changed = json.dumps(entries, separators=(",", ":")).encode().ljust(header)
    assert len(changed) == header
    for damaged in (data[:-1], data[:100], b"", changed.join((data[:8], data[8 + header :]))):
        (url / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or was not downloaded whole"):
            open_weights(url)


@pytest.mark.parametrize(
    "source, target, words",
    [
        ("qwen:{url}/nowhere", "qwen2:{local}", "{url}/nowhere is not a folder"),
        ("qwen:{scheme}://no-such-bucket/model", "qwen2:{local}", "there is no bucket {scheme}://no-such-bucket"),
        (f"qwen:{GOLDEN}", "qwen2:{scheme}://no-such-bucket/model", "there is no bucket {scheme}://no-such-bucket"),
        (f"qwen:{GOLDEN}", "qwen2:{url}//model", "two slashes in a row"),
        (f"qwen:{GOLDEN}", "qwen2:hdfs://cluster/model", "unknown scheme hdfs://"),
    ],
)
def test_the_program_refuses_bad_paths_in_one_line(stores, tmp_path, source, target, words):  # noqa: F811
    values = {"url": stores["s3"].folder(), "scheme": "s3", "local": tmp_path / "out"}
    done = run(TOOL, "--from", source.format(**values), "--to", target.format(**values))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words.format(**values) in done.stderr
    assert not (tmp_path / "out").exists()
