"""Continuations that are constrained, beside others, by a constraint of a few lines and by grammars."""

import json

import numpy as np
import pytest

from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.inference import Engine, Request, SamplingConfig
from qwen_jax.inference.constraints import ConstraintFailed, FreeText, Way, words
from tests.fakes import random_run

SAMPLED = SamplingConfig(temperature=1.0)


class Digits:
    """A number of `count` digits in bytes, then the end; it fails after `known` of them."""

    def __init__(self, end_id, count, known=1000):
        self.end_ids, self.count, self.known = (end_id,), count, known

    def start(self):
        return _Digits(self)


class _Digits:
    def __init__(self, of):
        self.of, self.done = of, 0

    def allowed(self):
        if self.done == self.of.known:
            raise ConstraintFailed("it counts no further")
        allowed = np.zeros(words(464), np.uint32)
        for token in range(48, 58) if self.done < self.of.count else self.of.end_ids:
            allowed[token // 32] |= np.uint32(1 << token % 32)
        return allowed

    def advance(self, token):
        self.done += 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=256)
    folder = random_run(tmp_path_factory.mktemp("constraints"), **sizes)
    return Engine(*load_pretrained(folder), load_tokenizer(folder), slots=4, prefix_cache_tokens=256)


def by_request(results):
    return sorted(results, key=lambda result: result.index)


def test_a_constrained_row_ends_where_it_may_and_changes_no_other(engine):
    end = engine.tokenizer.im_end_id
    plain = [Request([i, 3, 7], 20, SAMPLED, seed=i) for i in range(2)]
    expected = [result.tokens for result in by_request(engine.generate(plain))]
    digits = Digits(end, 9)
    constrained = [
        Request([1, 3, 7], 20, sampling, (end,), constraint=digits, logit_bias={50: -100.0}, top_log_probs=1)
        for sampling in (SamplingConfig(frequency_penalty=1.0), SAMPLED)
    ]
    results = by_request(engine.generate([plain[0], *constrained, plain[1]]))
    assert [results[0].tokens, results[3].tokens] == expected
    for result in results[1:3]:
        assert len(result.text) == 9 and result.text.isdigit() and "2" not in result.text
        assert result.finish_reason == "stop_id" and result.tokens[9:] == (end,)
        # Of the model, which is not constrained: other tokens are more probable.
        assert any(token not in dict(top) for token, top in zip(result.tokens, result.top_log_probs, strict=True))
    assert results[1].text != results[2].text
    (streamed,) = ["".join(chunk.text for chunk in engine.stream(constrained[1]))]
    assert streamed == results[2].text
    (cut,) = engine.generate([Request([1], 4, SAMPLED, (end,), constraint=digits)])
    assert cut.finish_reason == "length" and len(cut.text) == 4


def test_a_constraint_that_fails_ends_its_row_alone(engine):
    end = engine.tokenizer.im_end_id
    requests = [
        Request([1], 20, SAMPLED, (end,), constraint=Digits(end, 9, known=4)),
        Request([1], 20, SAMPLED, (end,), constraint=Digits(end, 9, known=0)),
        Request([1], 20, SAMPLED, (end,), constraint=Digits(end, 9)),
    ]
    results = by_request(engine.generate(requests))
    assert [result.finish_reason for result in results] == ["failed", "failed", "stop_id"]
    assert [len(result.text) for result in results] == [4, 0, 9]
    assert engine.live == 0


def test_a_constraint_needs_its_end_tokens(engine):
    end = engine.tokenizer.im_end_id
    with pytest.raises(ValueError, match=f"the constraint ends with one of \\[{end}\\]: have all of them in stop_ids"):
        engine.submit(Request([1], 4, stop_ids=(5,), constraint=Digits(end, 2)))


@pytest.fixture(scope="module")
def grammars(engine):
    pytest.importorskip("llguidance", reason="the extra serve brings it")
    from qwen_jax.inference.grammars import Grammars

    tokenizer = engine.tokenizer
    return Grammars(tokenizer, (tokenizer.im_end_id, tokenizer.endoftext_id), 464)


def accepts(engine, grammar, text):
    """Whether text may be a whole continuation, token by token."""
    matcher = grammar.start()
    for token in [*engine.tokenizer.encode(text), engine.tokenizer.endoftext_id]:
        if not matcher.allowed()[token // 32] >> np.uint32(token % 32) & 1:
            return False
        matcher.advance(token)
    return True


def test_grammars_allow_what_the_schema_allows_and_control_tokens_at_the_end_alone(engine, grammars):
    schema = {
        "type": "object",
        "properties": {"城 \"'\\": {"enum": ["a", "你好"]}, "n": {"type": "integer", "minimum": 3, "maximum": 40}},
        "required": ["n"],
        "additionalProperties": False,
    }
    grammar = grammars.json_schema(schema)
    for value, fits in (({"n": 40}, True), ({"城 \"'\\": "你好", "n": 3}, True), ({"n": 41}, False), ({}, False)):
        assert accepts(engine, grammar, json.dumps(value, ensure_ascii=False)) == fits
        assert accepts(engine, grammar, json.dumps(value, ensure_ascii=False, indent=4)) == fits
    assert not accepts(engine, grammar, '{"n":' + " " * 50 + "3}")
    text = grammars.json_schema({"type": "string"})
    assert accepts(engine, text, '"<|im_end|>"')
    start = text.start()
    start.advance(ord('"'))
    allowed = np.unpackbits(start.allowed().view(np.uint8), bitorder="little")[:464]
    assert allowed[: engine.tokenizer.num_ranks].sum() > 90 and not allowed[engine.tokenizer.num_ranks :].any()
    either = grammars.choice([Way(' "a\\b"\nIn: ', {"type": "object"}), Way(" 你\nIn: ", {"type": "array"})])
    assert accepts(engine, either, ' "a\\b"\nIn: {"x": []}') and accepts(engine, either, " 你\nIn: [1]")
    assert not accepts(engine, either, ' "a\\b"\nIn: [1]')


def test_free_text_ends_at_its_mark_and_has_no_other(engine, grammars):
    free = FreeText("Think:", ("\nStop/[x]", "Halt"), "\nSay: ")
    ways = [Way("a=", {"type": "integer"}, free), Way("b=", {"type": "boolean"}, free), Way("", {"type": "null"})]
    grammar = grammars.choice(ways)
    for text in ("Think:\nSay: a=1", "Think: 你 \nSay\nSay:\n\nSay: b=true", "Think:Hal\nStop/\nSay: a=2", "null"):
        assert accepts(engine, grammar, text), text
    for text in (
        "Think: Halt\nSay: a=1",
        "Think:\nStop/[x]\nSay: a=1",
        "\nSay: a=1",
        "Think:\nSay: a=true",
        "Think:\nSay: null",
        "Think:",
        "Think:\nSay: x\nSay: a=1",
    ):
        assert not accepts(engine, grammar, text), text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, 'Unimplemented keys: \\["not"\\]'),
        ({"not": {}, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
        ({"type": "text"}, "Invalid type: text"),
        ({"$ref": "http://127.0.0.1/schema.json"}, "does not fetch"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ],
)
def test_schemas_without_a_grammar_are_refused_in_one_line(grammars, schema, message):
    with pytest.raises(ValueError, match=message) as refused:
        grammars.json_schema(schema)
    assert "\n" not in str(refused.value)
    if "Unimplemented" in message:
        grammars.choice([Way("", schema)], lenient=True)
