#!/usr/bin/env bash
# LLTokenizer of llguidance takes n_vocab, and has no effect of it for a TokenizerWrapper.
#
# One expects: LLTokenizer(wrapper, n_vocab=300) has a vocab_size of 300, as its docstring says ("override the size of the
#   vocabulary"), so that masks have the width of a model whose rows are padded.
# What happens: the size is that of the wrapper's tokens, 257, for a larger and for a smaller n_vocab, and nothing is said. The same
#   vocabulary as a tiktoken encoding gets 300.
# Who suffers: whoever allocates masks by the model's padded vocabulary: filling one raises "Invalid buffer size", far from the cause.
# qwen_jax: masks are filled by the tokenizer's own size and padded with zeros (`qwen_jax/inference/grammars.py`).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 'llguidance==1.9.1' 2>/dev/null
"$work/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from llguidance import LLTokenizer, TokenizerWrapper
from llguidance.tiktoken import lltokenizer_from_encoding


class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([byte]) for byte in range(256)] + [b"<end>"]

    def __call__(self, data):
        return list(data)


class Encoding:
    _mergeable_ranks, _special_tokens = {bytes([byte]): byte for byte in range(256)}, {"<end>": 256}
    _pat_str, eot_token = r"(?s:.)", 256


wrapped = {size: LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=size).vocab_size for size in (None, 100, 300)}
tiktoken = lltokenizer_from_encoding(Encoding, n_vocab=300).vocab_size
print(f"llguidance {version('llguidance')}: vocab_size by n_vocab {wrapped}; of a tiktoken encoding with 300: {tiktoken}")
assert tiktoken == 300
assert wrapped == {None: 257, 100: 257, 300: 257}, "n_vocab has an effect now"
print("as described")
PYTHON
