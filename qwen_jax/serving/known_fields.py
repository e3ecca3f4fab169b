"""What becomes of each field of a body: it is taken, has no effect by its nature, is refused, or is reported.

A field whose effect a client would miss is refused by its name, with what to do instead, be it OpenAI's or one that the
servers of vLLM, SGLang and llama.cpp know. A field that is not known here is left out of account, and the answer says
so.
"""

import re
from collections.abc import Mapping, Sequence

from qwen_jax.serving.errors import bad_request
from qwen_jax.serving.fields import shown

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "logit_bias", "logprobs")
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_BOTH = ("model", "max_tokens", "max_completion_tokens", "stream", "stream_options", *_SAMPLING, *_PENALTIES)
CHAT = frozenset((*_BOTH, "messages", "tools", "tool_choice", "response_format", "top_logprobs"))
COMPLETION = frozenset((*_BOTH, "prompt", "echo"))

# Fields without effect on an answer, and their types: they name who asks, or what is so without them.
NO_EFFECT = {
    "user": (str, "text"),
    "safety_identifier": (str, "text"),
    "prompt_cache_key": (str, "text"),
    "metadata": (dict, "an object"),
}
# A reply makes at most one call, so that both values are obeyed.
NO_EFFECT_OF_CHAT = {"parallel_tool_calls": (bool, "true or false")}

# (values that ask for what is so without them, what to do instead), by name.
Refused = Mapping[str, tuple[Sequence, str]]
_OF_OPENAI: Refused = {
    "best_of": ((1,), "ask for n and choose"),
    "store": ((False,), "answers are not kept"),
    "service_tier": (("auto", "default"), "all requests are served alike"),
    "prompt_cache_retention": (("in_memory",), "the server says how much is kept, --prefix_cache_tokens"),
    "prompt_cache_options": (({},), "the server says how much is kept, --prefix_cache_tokens"),
}
_OF_CHAT: Refused = {
    "functions": (([],), "describe them in tools"),
    "function_call": ((), "use tool_choice"),
    "modalities": ((["text"],), "replies are text"),
    "audio": ((), "replies are text"),
    "web_search_options": ((), "give a tool that searches"),
    "moderation": ((), "ask a model that moderates"),
    "prediction": ((), "leave it out, as replies are generated without one"),
    "reasoning_effort": (("none",), "ask for it in a message, as these models have no mode of reasoning"),
    "verbosity": (("medium",), "ask for it in a message"),
    "prompt": ((), "use /v1/completions"),
    "echo": ((False,), "use /v1/completions"),
    "suffix": (("",), "use /v1/completions"),
}
_ON_CHAT = "use /v1/chat/completions"
_OF_COMPLETIONS: Refused = {
    "suffix": (("",), "leave it out"),
    "messages": ((), _ON_CHAT),
    "tools": (([],), _ON_CHAT),
    "tool_choice": (("none",), _ON_CHAT),
    "response_format": (({"type": "text"},), _ON_CHAT),
    "top_logprobs": ((), "give their number as logprobs"),
}
_JSON = "use response_format of /v1/chat/completions"
_SAMPLER = "use temperature, top_p, top_k and min_p"
_PROMPT = "write the prompt yourself and use /v1/completions"
_OF_OTHERS: Refused = {
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ((), _JSON)),
    **dict.fromkeys(("structured_outputs", "grammar", "json_schema", "regex", "ebnf", "structural_tag"), ((), _JSON)),
    **dict.fromkeys(("mirostat", "dynatemp_range", "xtc_probability", "dry_multiplier", "top_a"), ((0,), _SAMPLER)),
    **dict.fromkeys(("typical_p", "tfs_z"), ((1,), _SAMPLER)),
    "top_n_sigma": ((-1,), _SAMPLER),
    **dict.fromkeys(("samplers", "sampler_seq", "logits_processors"), (([],), _SAMPLER)),
    **dict.fromkeys(("chat_template", "documents", "lora_path"), ((), _PROMPT)),
    "chat_template_kwargs": (({},), _PROMPT),
    "continue_final_message": ((False,), _PROMPT),
    "add_generation_prompt": ((True,), _PROMPT),
    "use_beam_search": ((False,), "ask for n and choose"),
    "length_penalty": ((1, 0), "ask for n and choose"),
    "repeat_penalty": ((1,), "use repetition_penalty"),
    "n_predict": ((), "use max_tokens"),
    "n_probs": ((0,), "use logprobs"),
    "prompt_logprobs": ((), "use echo and logprobs of /v1/completions"),
    "min_tokens": ((0,), "leave it out"),
    "ignore_eos": ((False,), "ban the tokens that end a reply by logit_bias"),
    "stop_token_ids": (([],), "use stop"),
    "include_stop_str_in_output": ((False,), "add it to the text"),
    "no_stop_trim": ((False,), "add it to the text"),
    "skip_special_tokens": ((False,), "control tokens of a reply are shown as text"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "allowed_token_ids": ((), "use logit_bias"),
    "bad_words": (([],), "use logit_bias"),
    "return_tokens_as_token_ids": ((False,), "leave it out"),
    "return_token_ids": ((False,), "leave it out"),
    "priority": ((0,), "all requests are served alike"),
}
REFUSED_BY_CHAT = {**_OF_OTHERS, **_OF_OPENAI, **_OF_CHAT}
REFUSED_BY_COMPLETIONS = {**_OF_OTHERS, **_OF_OPENAI, **_OF_COMPLETIONS}

_REFUSED_OF_STREAM: Refused = {
    "include_obfuscation": ((False,), "events have no padding"),
    "continuous_usage_stats": ((False,), "the last event has the usage"),
}
_MESSAGE = frozenset(("role", "content", "tool_calls", "tool_call_id", "function_call", "refusal", "audio"))
_REFUSED_OF_MESSAGE: Refused = {"refusal": ((), "write it as content"), "audio": ((), "write what was said as content")}
# Names that an answer reports.
MAX_REPORTED, _NAME = 20, re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_chat(body: Mapping) -> tuple[str, ...]:
    """Names of the fields of a chat that are left out of account, sorted; those of messages as `messages.NAME`.

    Raises:
        ApiError: a field is refused, or has no effect and the wrong type.
    """
    found = _checked(body, CHAT, NO_EFFECT | NO_EFFECT_OF_CHAT, REFUSED_BY_CHAT)
    for message in body["messages"] if isinstance(body.get("messages"), list) else ():
        if isinstance(message, dict):
            _refuse(message, _REFUSED_OF_MESSAGE, "messages", "messages.")
            # The name of a result is that of its tool.
            known = _MESSAGE | {"name"} if message.get("role") in ("tool", "function") else _MESSAGE
            found |= {f"messages.{name}" for name in _given(message) - known}
    return _reported(found)


def check_completion(body: Mapping) -> tuple[str, ...]:
    """As `check_chat`, of a completion."""
    return _reported(_checked(body, COMPLETION, NO_EFFECT, REFUSED_BY_COMPLETIONS))


def _checked(body: Mapping, taken: frozenset[str], no_effect: Mapping, refused: Refused) -> set[str]:
    _refuse(body, refused)
    for name, (kind, described) in no_effect.items():
        value = body.get(name)
        if value is not None and not isinstance(value, kind):
            raise bad_request(name, f"must be {described}, found {shown(value)}")
    unknown = _given(body) - taken - no_effect.keys() - refused.keys()
    options = body.get("stream_options")
    if isinstance(options, dict):
        if not body.get("stream"):
            raise bad_request("stream_options", "is for streams: set stream to true, or leave it out")
        _refuse(options, _REFUSED_OF_STREAM, "stream_options", "stream_options.")
        known = {"include_usage", *_REFUSED_OF_STREAM}
        unknown |= {f"stream_options.{name}" for name in _given(options) - known}
    return unknown


def _given(body: Mapping) -> set[str]:
    return {name for name, value in body.items() if value is not None}


def _refuse(body: Mapping, refused: Refused, param: str | None = None, prefix: str = "") -> None:
    for name in sorted(body.keys() & refused.keys()):
        value, (harmless, instead) = body[name], refused[name]
        if value is not None and value not in harmless:
            message = f"{shown(value)} is not supported by this server: {instead}"
            message = f"{prefix}{name}: {message}" if prefix else message
            raise bad_request(param or name, message, "unsupported_value")


def _reported(names: set[str]) -> tuple[str, ...]:
    # They stand in a header, and come from outside.
    plain = sorted(name for name in names if _NAME.fullmatch(name))
    return (*plain[:MAX_REPORTED], *["..."] * (len(names) > min(len(plain), MAX_REPORTED)))
