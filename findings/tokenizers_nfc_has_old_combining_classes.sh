#!/usr/bin/env bash
# NFC of Hugging Face's tokenizers does not reorder combining marks that Unicode 11 added, such as U+07FD.
#
# One expects: NFC("\u07F3\u07FD") is "\u07FD\u07F3", as the canonical classes are 230 and 220 (Unicode 11 of 2018, and Python).
# What happens: the marks stay as they are, as if U+07FD had no class.
# Who suffers: whoever compares ids, or encodes with a tokenizer.json a corpus that was tokenized with another implementation
#   of NFC: rare texts in newer scripts get other ids.
# qwen_jax: corpora are normalized by Python (`qwen_jax.data.tokenizer`); exported tokenizer.json files leave it to tokenizers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 'tokenizers==0.23.3' 2>/dev/null
"$work/venv/bin/python" - <<'PYTHON'
import unicodedata
from importlib.metadata import version

from tokenizers import normalizers

text = "\u07f3\u07fd"
theirs, expected = normalizers.NFC().normalize_str(text), unicodedata.normalize("NFC", text)
print(f"tokenizers {version('tokenizers')}: {theirs!a}; Python's Unicode {unicodedata.unidata_version}: {expected!a}")
assert expected == "\u07fd\u07f3"
assert theirs == text, "tokenizers reorders U+07FD now"
print("as described")
PYTHON
