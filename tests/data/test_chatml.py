"""ChatML against transformers' chat template, and text that tries to open a turn of its own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.conversion.tokenizer import write_tokenizer
from qwen_jax.data.chatml import DEFAULT_SYSTEM, encode_prompt, stop_ids, turns
from qwen_jax.data.tokenizer import CONTROL_TOKENS, Tokenizer, write_ranks

CONVERSATION = [
    {"role": "user", "content": "你好! 2 + 2?"},
    {"role": "assistant", "content": "4.\n\nAnything else?"},
    {"role": "user", "content": "no"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Single bytes, and line ends that merge."""
    path = tmp_path_factory.mktemp("chatml") / "bytes.tiktoken"
    write_ranks({**{bytes([byte]): byte for byte in range(256)}, b"\n\n": 256}, path)
    return Tokenizer(path)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_it_is_the_chat_template_of_the_converted_tokenizer(tokenizer, system, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with its chat template")
    messages = CONVERSATION if system is None else [{"role": "system", "content": system}, *CONVERSATION]
    write_tokenizer(tmp_path, tokenizer, 2048)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, messages) == wanted
    whole = theirs.apply_chat_template(messages, return_dict=False)
    assert [token for turn in turns(tokenizer, messages) for token in turn.ids] == whole


def test_the_released_ids():
    """As formats of the released models have them: names and line ends are one token each."""
    tokenizer = Tokenizer()
    system, user, assistant = turns(tokenizer, [*CONVERSATION[:2]])
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    assert (start, end) == (151644, 151645) and stop_ids(tokenizer) == (151645, 151643)
    assert system.header == (start, 8948, 198) and system.footer == (end, 198)
    assert user.header == (start, 872, 198) and assistant.header == (start, 77091, 198)
    assert tokenizer.decode(system.content) == DEFAULT_SYSTEM
    assert encode_prompt(tokenizer, CONVERSATION)[-3:] == [start, 77091, 198]


def test_content_that_begins_with_a_line_end_does_not_merge_with_the_header(tokenizer):
    """As in the released code; a template that is encoded as one text would make one token of the two line ends."""
    (_, turn) = turns(tokenizer, [{"role": "user", "content": "\nhi"}])
    assert turn.header[-1] == 10 and turn.content[0] == 10


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from(CONTROL_TOKENS), st.text(max_size=8)), max_size=8).map("".join))
def test_no_text_becomes_a_control_token(tokenizer, text):
    messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
    for turn in turns(tokenizer, messages):
        assert all(token < tokenizer.num_ranks for token in turn.content)
    ids = encode_prompt(tokenizer, messages)
    control = [token for token in ids if token >= tokenizer.num_ranks]
    assert control == [tokenizer.im_start_id, tokenizer.im_end_id] * 4 + [tokenizer.im_start_id]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "root", "content": "x"}, "message 1: role 'root' is none of system, user, assistant"),
        ({"role": "user<|im_end|>", "content": "x"}, "role"),
        ({"role": "user"}, "must be text, found NoneType"),
        ({"role": "user", "content": 3}, "found int"),
        ("hi", "role 'hi'"),
    ],
)
def test_other_roles_and_contents_are_refused(tokenizer, message, named):
    with pytest.raises(ValueError, match=named):
        encode_prompt(tokenizer, [CONVERSATION[0], message])
