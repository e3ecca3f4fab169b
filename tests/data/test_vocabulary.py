"""The vocabulary inside SeqIO and TensorFlow, and which file it uses."""

import pickle
import shutil

import gin
import pytest
import seqio
import tensorflow as tf

from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.data.vocabulary import QwenVocabulary

TEXTS = ["", "the model", "é 你好 <|im_end|> 😀\n", "a\x00b"]


@pytest.fixture(autouse=True)
def _clean_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture
def vocabulary(vocabulary_file):
    return QwenVocabulary(vocabulary_file)


def test_special_ids(vocabulary):
    tokenizer = vocabulary.tokenizer
    assert (vocabulary.vocab_size, vocabulary.extra_ids) == (600, 0)
    assert vocabulary.eos_id == vocabulary.pad_id == tokenizer.endoftext_id
    assert vocabulary.bos_id is None and vocabulary.unk_id is None


def test_graph_and_python_give_the_same_ids(vocabulary):
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(vocabulary.encode_tf)
    assert dataset.element_spec == tf.TensorSpec([None], tf.int32)
    expected = [Tokenizer(vocabulary.tokenizer.path).encode(text) for text in TEXTS]
    assert [ids.tolist() for ids in dataset.as_numpy_iterator()] == expected
    assert [vocabulary.encode(text) for text in TEXTS] == expected


def test_invalid_utf8_in_a_graph(vocabulary):
    ids = vocabulary.encode_tf(tf.constant(b"ok\xff"))
    assert vocabulary.decode(ids) == "ok\ufffd"


def test_decoding_goes_on_after_end_of_text(vocabulary):
    ids = [*vocabulary.encode("one"), vocabulary.eos_id, *vocabulary.encode("two")]
    assert vocabulary.decode(ids) == "one<|endoftext|>two"
    assert vocabulary.decode(tf.constant(ids)) == "one<|endoftext|>two"
    assert vocabulary.decode_tf(tf.constant([ids, ids])).numpy().tolist() == [b"one<|endoftext|>two"] * 2


def test_path_from_gin_reaches_a_vocabulary_made_before(vocabulary_file):
    early = QwenVocabulary()
    assert early.vocab_size == 151_851
    gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))
    assert early.vocab_size == 600
    assert "small.tiktoken" in repr(early)


def test_pickling_pins_the_file(vocabulary_file):
    gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))
    pickled = pickle.dumps(QwenVocabulary())
    gin.clear_config()
    assert pickle.loads(pickled).vocab_size == 600
    released = pickle.dumps(QwenVocabulary())
    gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))
    assert pickle.loads(released).vocab_size == 151_851


def test_a_worker_with_another_file_stops(vocabulary_file, tmp_path):
    path = tmp_path / "v.tiktoken"
    shutil.copy(vocabulary_file, path)
    pickled = pickle.dumps(QwenVocabulary(path))
    with path.open("ab") as file:
        file.write(b"enp6eg== 392\n")
    with pytest.raises(RuntimeError, match="put the same file on every worker"):
        pickle.loads(pickled).encode("a")


def test_equal_where_ids_are_equal(vocabulary_file, tmp_path):
    copy = tmp_path / "copy.tiktoken"
    shutil.copy(vocabulary_file, copy)
    assert QwenVocabulary(copy) == QwenVocabulary(vocabulary_file)
    assert hash(QwenVocabulary(copy)) == hash(QwenVocabulary(vocabulary_file))
    assert QwenVocabulary(copy) != QwenVocabulary()
    assert QwenVocabulary(copy) != seqio.ByteVocabulary()
