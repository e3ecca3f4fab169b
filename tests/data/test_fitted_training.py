"""Fitted examples in training: each document of a row is learned as if it stood alone."""

import flax.linen as nn
import jax
import numpy as np

from qwen_jax.data import chat, packing
from qwen_jax.data.conversations import from_openai
from qwen_jax.data.tokenizer import Tokenizer, write_ranks
from qwen_jax.models.transformer import Qwen
from qwen_jax.training.objectives import next_token_loss
from tests.fakes import small_model

EOS = 9


def test_the_loss_of_a_row_is_that_of_its_documents():
    generator = np.random.default_rng(0)
    documents = [packing.Document(generator.integers(0, 9, size)) for size in (3, 9, 5, 1, 30)]
    examples = list(packing.best_fit(documents, sequence_length=16, eos_id=EOS))
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    assert batch["segment_ids"].max() > 1
    model = Qwen(small_model())
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch["tokens"])["params"])
    loss_of = jax.jit(lambda params, batch: next_token_loss(model, params, batch, None))
    loss, sums = loss_of(params, batch)
    # Each document, or piece of one, in a row of its own, which knows nothing of segments.
    ended = [np.append(document.tokens, EOS) for document in documents]
    pieces = [tokens[start : start + 16] for tokens in ended for start in range(0, len(tokens), 16)]
    rows = {"tokens": np.zeros((len(pieces), 16), np.int32), "loss_weights": np.zeros((len(pieces), 16), np.float32)}
    for row, piece in enumerate(pieces):
        rows["tokens"][row, : len(piece)], rows["loss_weights"][row, : len(piece)] = piece, 1
    alone, sums_alone = loss_of(params, rows)
    assert float(sums["weight"]) == float(sums_alone["weight"]) == sum(len(piece) - 1 for piece in pieces)
    np.testing.assert_allclose(float(loss), float(alone), rtol=1e-5)


def test_the_loss_of_a_conversation_does_not_depend_on_its_neighbours(tmp_path):
    """Packing `whole`, with the released mask: the loss of a row is the sum of its conversations' own."""
    path = tmp_path / "bytes.tiktoken"
    write_ranks({bytes([byte]): byte for byte in range(256)}, path)
    tokenizer = Tokenizer(path)
    talks = [
        (("user", "Hi"), ("assistant", "Hello!")),
        (("user", "1+1?"), ("assistant", "2"), ("user", "?"), ("assistant", "Two")),
    ]
    encoded = [
        chat.encode(tokenizer, from_openai({"messages": [{"role": r, "content": c} for r, c in talk]}), system="")
        for talk in talks
    ]
    documents = [packing.Document(one.tokens, one.loss_weights) for one in encoded]
    model = Qwen(small_model(vocab_size=tokenizer.vocab_size, context_length=256))

    def batch(rows: list[packing.Document]) -> dict:
        examples = list(packing.whole(rows, sequence_length=256, eos_id=tokenizer.endoftext_id))
        assert len(examples) == 1
        stacked = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        return stacked | {"loss_weights": stacked["loss_weights"].astype(np.float32)}

    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch(documents)["tokens"])["params"])
    loss_of = jax.jit(lambda params, batch: next_token_loss(model, params, batch, None))
    together, sums = loss_of(params, batch(documents))
    alone = [loss_of(params, batch([document])) for document in documents]
    assert float(sums["weight"]) == sum(float(one["weight"]) for _, one in alone)
    np.testing.assert_allclose(float(together), sum(float(loss) for loss, _ in alone), rtol=1e-5)
