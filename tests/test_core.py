"""The core without its extras: a run on cached data, conversion and generation, where nothing else can be imported."""

import re
import subprocess
import sys

import numpy as np
import pytest

from qwen_jax.data import packing
from qwen_jax.data.tokenizer import Tokenizer, write_ranks

LENGTH = 32
# Runs a module or a tool as where the extras are not installed.
WITHOUT_EXTRAS = """
import importlib.machinery, runpy, sys

class Installed(importlib.machinery.PathFinder):
    absent = {"tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "t5", "apache_beam", "sklearn",
              "pyarrow", "fastwarc", "resiliparse", "py3langid", "tokenizers", "regex", "gguf", "torch", "transformers",
              "starlette", "uvicorn", "prometheus_client", "jsonschema", "referencing", "obstore", "boto3"}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in cls.absent else super().find_spec(name, path, target)

sys.meta_path = [Installed if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def core(root, plain_environment):
    """Runs a module or a tool without the extras."""

    def run(*command):
        arguments = [sys.executable, "-c", WITHOUT_EXTRAS, *map(str, command)]
        return subprocess.run(arguments, cwd=root, env=plain_environment, capture_output=True, text=True)

    return run


@pytest.fixture
def cached(tmp_path):
    """A vocabulary of single bytes, and `local_files` cached and packed with it."""
    write_ranks({bytes([byte]): byte for byte in range(256)}, tmp_path / "bytes.tiktoken")
    vocabulary = Tokenizer(tmp_path / "bytes.tiktoken")
    columns = packing.columns_for(vocabulary.vocab_size, LENGTH)
    for split, count in (("train", 40), ("validation", 4)):
        rows = [
            np.array(vocabulary.encode(f"def function_{number}(): return {number}\n" * 3)) for number in range(count)
        ]
        documents = [packing.Document(row) for row in rows]
        folder = packing.packed_folder(tmp_path / "cache", "local_files", LENGTH, split)
        folder.mkdir(parents=True)
        shard = packing.write_shard(
            folder / "part-0",
            [(packing.document_key(one, 0), one) for one in documents],
            sequence_length=LENGTH,
            eos_id=vocabulary.endoftext_id,
            columns=columns,
            token_bytes=np.ones(vocabulary.vocab_size, np.int64),
            method="concat",
        )
        made = (vocabulary.vocab_size, vocabulary.fingerprint, 0, columns, (shard,), {})
        packing.Manifest("local_files", split, LENGTH, *made).save(folder)
    return tmp_path


def training(folder, **changes):
    settings = {
        "MIXTURE_OR_TASK": "local_files",
        "OUTPUT_DIR": folder / "run",
        "CACHE_DIR": folder / "cache",
        "VOCABULARY": folder / "bytes.tiktoken",
        # Configures a function of tasks/, which cannot be imported.
        "local_files.pattern": folder / "text",
        "SEQUENCE_LENGTH": LENGTH,
        "BATCH_SIZE": 4,
        "TRAIN_STEPS": 2,
        "WARMUP_STEPS": 1,
        "EVAL_BATCHES": 1,
        "ModelConfig.vocab_size": 512,
        "ModelConfig.hidden_size": 32,
        "ModelConfig.num_layers": 1,
        "ModelConfig.ffn_size": 64,
        **changes,
    }
    bindings = (f"--gin.{name}={value}" for name, value in settings.items())
    return "qwen_jax.train", "--gin_file=gin/runs/pretrain_tiny.gin", *bindings


def test_the_core_alone_trains_on_a_cache_and_converts_and_generates(core, cached):
    trained = core(*training(cached))
    assert trained.returncode == 0, trained.stderr
    assert "step 2" in trained.stdout
    assert "local_files is used as it is cached" in trained.stderr
    assert f"'{cached / 'text'}'" in (cached / "run" / "config.gin").read_text()
    converted = core(
        "tools/convert_checkpoint.py", "--from", f"orbax:{cached / 'run'}", "--to", f"qwen2:{cached / 'qwen2'}"
    )
    assert converted.returncode == 0, converted.stderr
    said = core("qwen_jax.generate", "--checkpoint", cached / "qwen2", "--prompt=def f", "--max_new_tokens=4")
    assert said.returncode == 0, said.stderr
    assert said.stdout


def test_a_missing_extra_is_one_line_that_says_what_to_install(core, cached):
    line = (
        r"error: (\w+) is not installed: in the repository, `pip install -c requirements.txt -e '\.\[(data|serve)\]'` "
        r"brings it"
    )
    for command in (
        training(cached, CACHE_DIR=cached / "nothing_here"),
        ("tools/cache_task.py", "local_files", f"--cache_dir={cached}", "--sequence_length=32"),
        ("qwen_jax.serve", "--checkpoint", cached / "nothing_here"),
    ):
        done = core(*command)
        assert done.returncode == 2 and re.fullmatch(line, done.stderr.strip()), done.stderr
