"""What the tests of the data room share: a small vocabulary, small tasks, and one Beam cache of them."""

import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

LENGTH = 32


def write_corpus(folder: Path, count: int, seed: int) -> Path:
    """A file of `count` documents of 1 to 60 words."""
    generator = random.Random(seed)
    words = "the of model data café 你好 x = 1\n return 2023 <|im_end|> 😀 token".split(" ")
    rows = [{"text": " ".join(generator.choices(words, k=generator.randint(1, 60)))} for _ in range(count)]
    path = folder / f"corpus{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def vocabulary_file(tool, tmp_path_factory) -> Path:
    """A vocabulary of 600 ids."""
    from qwen_jax.data.tokenizer import write_ranks

    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(300)]
    texts = [" ".join(generator.choices(words, k=80)) for _ in range(50)] + ["return the model café 你好\n" * 20]
    path = tmp_path_factory.mktemp("vocabulary") / "small.tiktoken"
    write_ranks(tool("build_tokenizer").train(texts, 600), path)
    return path


@pytest.fixture(scope="session")
def registry(vocabulary_file, tmp_path_factory):
    """Registers `test_a` (90 documents), `test_b` (60), `test_chat` (loss weights) and two mixtures of a and b."""
    import seqio
    import tensorflow as tf

    from qwen_jax.data.corpora import Corpus
    from qwen_jax.data.sources import DocumentSource
    from qwen_jax.data.vocabulary import QwenVocabulary

    folder = tmp_path_factory.mktemp("corpus")
    vocabulary = QwenVocabulary(vocabulary_file)
    plain = {"targets": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)}
    chat = plain | {"loss_weights": seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False, dtype=tf.int32)}

    def add_weights(dataset):
        """Loss on every second token, and on the end-of-text that is added here."""

        def add(example):
            tokens = tf.concat([example["targets"], [vocabulary.eos_id]], 0)
            return {"targets": tokens, "loss_weights": tf.range(tf.size(tokens)) % 2}

        return dataset.map(add)

    def steps(last):
        return [
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.CacheDatasetPlaceholder(),
            last,
        ]

    files = {}
    for seed, (name, count) in enumerate({"test_a": 90, "test_b": 60, "test_chat": 40}.items()):
        files[name] = [write_corpus(folder, count, seed)]
        seqio.TaskRegistry.add(
            name,
            source=DocumentSource(functools.partial(Corpus, files[name], validation_share=0.2), num_shards=4),
            preprocessors=steps(add_weights if name == "test_chat" else seqio.preprocessors.append_eos),
            output_features=chat if name == "test_chat" else plain,
        )
    seqio.MixtureRegistry.add("test_mixture", [("test_a", 0.7), ("test_b", 0.3)])
    yield SimpleNamespace(files=files, vocabulary=vocabulary, plain=plain, steps=steps, folder=folder)
    for name in ("test_a", "test_b", "test_chat"):
        seqio.TaskRegistry.remove(name)
    seqio.MixtureRegistry.remove("test_mixture")


@pytest.fixture(scope="session")
def cache_dir(registry, tmp_path_factory) -> Path:
    """The tasks of `registry`, cached and packed to 32 tokens in several shards."""
    from qwen_jax.data import cache

    folder = tmp_path_factory.mktemp("cache")
    cache.prepare("test_mixture", cache_dir=folder, sequence_length=LENGTH, num_shards=3)
    cache.prepare("test_chat", cache_dir=folder, sequence_length=LENGTH, splits=("train",))
    return folder
