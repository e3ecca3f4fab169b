"""Constraints by grammar: JSON, the JSON of a schema, and text around it, by llguidance.

A schema may come from outside. What it names is not fetched, its regular expressions run without backtracking, and the
library limits what a grammar and a step of it may cost.
"""

import functools
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np

from qwen_jax.inference.constraints import ConstraintFailed, FreeText, Way, words

# Where JSON may have whitespace: a model that is not sure of what comes next would go on with it for ever.
_WHITESPACE = r"[ \n\r\t]{0,40}"
_ANY = "/(?s:.*)/"
_MARK = b"\xff"  # llguidance's own, before names of tokens that are no text


class Grammar:
    """A `Constraint` of a grammar of llguidance.

    Attributes:
      end_ids: see `Constraint`.
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, source: str, vocab_size: int):
        """Compiles the grammar.

        Args:
          tokenizer: with the end tokens.
          source: as `LLMatcher.grammar_from_…` gives it.
          vocab_size: of the model; ids past the tokenizer's never come.

        Raises:
          ValueError: it is no grammar, or has what is not known or too large; the message says what.
        """
        self.end_ids = tuple(tokenizer.eos_tokens)
        self._tokenizer, self._words = tokenizer, words(vocab_size)
        # Its errors name the state of the parser, which is the text of the reply.
        limits = llguidance.LLParserLimits(verbose_errors=False)
        self._matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
        if self._matcher.is_error():
            raise ValueError(_line(self._matcher.get_error()))

    def start(self) -> "_Matcher":
        """See `Constraint`."""
        return _Matcher(self._matcher.deep_copy(), self._tokenizer.vocab_size, self._words)


class _Matcher:
    def __init__(self, matcher: llguidance.LLMatcher, known: int, size: int):
        self._matcher, self._known, self._size = matcher, words(known), size

    def allowed(self) -> np.ndarray:
        mask = np.zeros(max(self._size, self._known), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, 4 * self._known)
        if self._matcher.is_error() or not mask.any():
            raise ConstraintFailed(_line(self._matcher.get_error()) or "no token may come")
        return mask[: self._size]

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)  # an error is found by `allowed`


class Grammars:
    """Makes grammars over the tokens of a model.

    Args:
      tokenizer: as `Tokenizer`; its control tokens come nowhere but at the end.
      end_ids: the tokens that end a continuation.
      vocab_size: of the model.
    """

    def __init__(self, tokenizer, end_ids: Sequence[int], vocab_size: int):
        self._tokenizer, self._end_ids, self._vocab_size = tokenizer, list(end_ids), vocab_size
        self._lock = threading.Lock()

    def json_schema(self, schema: Mapping[str, Any], before: str = "") -> Grammar:
        """JSON that a schema allows, after the text `before`.

        Raises:
          ValueError: it is no schema, or has words that are not known.
        """
        return self.choice([Way(before, schema)])

    def check(self, schema: Mapping[str, Any]) -> None:
        """Raises the ValueError of `json_schema`, if it would."""
        _checked(schema, lenient=False)

    def choice(self, ways: Sequence[Way], *, lenient: bool = False) -> Grammar:
        """One of several ways.

        Args:
          ways: at least one.
          lenient: whether words of a schema that are not known are passed over.

        Raises:
          ValueError: as in `json_schema`.
        """
        # Each schema by itself first: errors of the whole grammar quote all of it.
        texts = [_checked(way.schema, lenient) for way in ways]
        names = {free: f"FREE_{number}" for number, free in enumerate(dict.fromkeys(way.free for way in ways)) if free}
        lines = []
        for way, text in zip(ways, texts, strict=True):
            parts = [] if way.free is None else [_quoted(way.free.before), names[way.free]]
            lines.append(" ".join([*parts, _quoted(way.before), "%json", text]))
        # The lexer does not go back, so the end of a free text is one terminal with it.
        terminals = [f"{name}: {_without(free)} {_quoted(free.after)}" for free, name in names.items()]
        source = llguidance.LLMatcher.grammar_from_lark("\n".join(["start: " + "\n  | ".join(lines), *terminals]))
        return Grammar(self._tokens(), source, self._vocab_size)

    def _tokens(self) -> llguidance.LLTokenizer:
        with self._lock:
            return self._known_tokens

    @functools.cached_property
    def _known_tokens(self) -> llguidance.LLTokenizer:
        # A second of work for a vocabulary of 150,000 tokens, so only where a grammar is asked for.
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._end_ids[0]))
        return llguidance.LLTokenizer(vocabulary, eos_token=self._end_ids)


class _Vocabulary:
    """A tokenizer as llguidance reads one."""

    bos_token_id = None

    def __init__(self, tokenizer, end_id: int):
        size = tokenizer.vocab_size
        self.eos_token_id = end_id
        self.special_token_ids = list(range(tokenizer.num_ranks, size))
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(tokenizer.num_ranks)]
        self.tokens += [_MARK + f"[{token}]".encode() for token in self.special_token_ids]
        self._encode = tokenizer.encode_bytes

    def __call__(self, data: bytes) -> list[int]:
        return self._encode(data)


def _line(message: str) -> str:
    return " ".join(message.split())[:300]


def _checked(schema: Mapping[str, Any], lenient: bool) -> str:
    """The text of a schema that is one, with options for the library, which reads them in schemas."""
    options = {"lenient": lenient, "coerce_one_of": lenient, "whitespace_pattern": _WHITESPACE}
    text = json.dumps({**schema, "x-guidance": options})
    source = llguidance.LLMatcher.grammar_from_json_schema(text)
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(source)
    if failed:
        raise ValueError(_line(messages[0]))
    return text


def _without(free: FreeText) -> str:
    """A terminal of the text itself."""
    found = " | ".join(map(_quoted, (*free.without, free.after)))
    return f"({_ANY} & ~({_ANY} ({found}) {_ANY}))"


def _quoted(text: str) -> str:
    """A string of the grammar's language."""
    return json.dumps(text, ensure_ascii=False)
