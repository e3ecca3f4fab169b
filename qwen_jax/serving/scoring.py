"""Log-probabilities of the tokens of prompts, for answers that echo them."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from qwen_jax.inference import Engine, Handle, Request, StreamChunk
from qwen_jax.inference.requests import LENGTH, Score
from qwen_jax.inference.row import Row

# Tokens of prompts that are computed before other requests go on.
TOKENS_AT_ONCE = 4096


def first_prompts(requests: Sequence[Request]) -> Sequence[Request]:
    """The first requests, at least one, whose prompts have at most `TOKENS_AT_ONCE` tokens together."""
    ends = np.cumsum([len(request.prompt) for request in requests])
    return requests[: max(1, int(np.searchsorted(ends, TOKENS_AT_ONCE, side="right")))]


def score_prompts(engine: Engine, requests: Sequence[Request], top: int) -> list[tuple[Score, StreamChunk | None]]:
    """Scores of the tokens of prompts after their first, and the only chunk of each request that needs no more.

    That is one without new tokens, or with one that is the most probable one: the scores tell it, too, so that the
    prompt is computed once. (lm-evaluation-harness asks for nothing else.)

    Args:
        engine: scores them.
        requests: requests that pass `check_request`, but for `max_new_tokens`, which may be 0.
        top: how many of the most probable tokens are told in the place of each token.
    """
    greedy = [_is_most_probable_token(request) for request in requests]
    # Any token does in the place of the one that is not known.
    texts = [[*request.prompt, *[0] * more] for request, more in zip(requests, greedy, strict=True)]
    pairs = [(text[:1], text[1:]) for text in texts if len(text) > 1]
    alternatives = max(top, 1) if any(greedy) else top
    found = iter(engine.score(*zip(*pairs, strict=True), top_log_probs=alternatives) if pairs else ())
    results: list[tuple[Score, StreamChunk | None]] = []
    for request, more, text in zip(requests, greedy, texts, strict=True):
        score = next(found) if len(text) > 1 else Score(np.zeros(0, np.float32), np.zeros(0, bool))
        part, chunk = slice(len(request.prompt) - 1), None
        handle = Handle(-1, request)
        if more:
            ranking = score.top_log_probs[-1]
            row = Row(handle, engine.tokenizer, False, deque())
            # A token that is not drawn has the probability 1.
            chunk = row.take([ranking[0][0]], [(ranking[0][1], 0.0)], [ranking])
        elif not request.max_new_tokens:
            chunk = empty_chunk(request)
        told = tuple(ranking[:top] for ranking in score.top_log_probs[part]) if top else ()
        results.append((Score(score.log_probs[part], score.most_likely[part], told), chunk))
    return results


def empty_chunk(request: Request) -> StreamChunk:
    """The only chunk of a request for no tokens."""
    return StreamChunk(Handle(-1, request), (), (), "", LENGTH)


def _is_most_probable_token(request: Request) -> bool:
    """Whether a request generates one token, which is the most probable one."""
    rules = request.sampling
    penalties = rules.repetition_penalty != 1 or rules.presence_penalty or rules.frequency_penalty
    ruled = penalties or request.logit_bias or request.constraint is not None
    return request.max_new_tokens == 1 and rules.temperature == 0 and not ruled
