"""Log-probabilities of given continuations, many at a time, in the buckets of prompts."""

from collections.abc import Sequence

import jax
import numpy as np

from qwen_jax.inference import programs
from qwen_jax.inference.batch import PREFILL_ROWS, SMALLEST_PROMPT, bucket, prefill_rows
from qwen_jax.inference.programs import Programs
from qwen_jax.inference.requests import Score, check_ids
from qwen_jax.models.config import ModelConfig

SMALLEST_CONTINUATION = 8


def checked_pairs(
    prompts: Sequence, continuations: Sequence, config: ModelConfig, context_length: int, length_rule: str
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of prompt and continuation as tuples of integers.

    Raises:
      ValueError: naming the pair that is empty, too long, or not of the model's ids; or their numbers differ.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"one continuation for each prompt: found {len(continuations)} for {len(prompts)} prompts")
    pairs = []
    for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        prompt = check_ids(prompt, f"prompt {index}", config.vocab_size)
        continuation = check_ids(continuation, f"continuation {index}", config.vocab_size)
        for name, ids in (("prompt", prompt), ("continuation", continuation)):
            if not ids:
                raise ValueError(f"{name} {index} is empty: give at least one token, such as <|endoftext|>")
        if len(prompt) + len(continuation) > context_length:
            raise ValueError(
                f"prompt {index} of {len(prompt)} tokens + its continuation of {len(continuation)}: both together may "
                f"have at most {context_length} tokens, {length_rule}; cut the prompt from the left"
            )
        pairs.append((prompt, continuation))
    return pairs


def score(call: Programs, config: ModelConfig, params, ways: int, pairs: Sequence) -> list[Score]:
    """The score of each of `checked_pairs`; rows of similar lengths are computed together.

    Args:
      params: as `weights.prepare` gives them.
      ways: into how many parts the mesh splits rows.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (prompt, continuation) in enumerate(pairs):
        # The last token predicts no token of the continuation.
        size = bucket(len(prompt) + len(continuation) - 1, SMALLEST_PROMPT)
        groups.setdefault((size, bucket(len(continuation), SMALLEST_CONTINUATION)), []).append(index)
    scores: dict[int, Score] = {}
    for (size, width), indices in sorted(groups.items()):
        most = prefill_rows(size) * ways
        for start in range(0, len(indices), most):
            some = indices[start : start + most]
            found = _score_rows(call, config, params, ways, [pairs[index] for index in some], size, width)
            for index, one in zip(some, found, strict=True):
                scores[index] = one
    return [scores[index] for index in range(len(pairs))]


def _score_rows(call, config, params, ways, pairs, size: int, width: int) -> list[Score]:
    count = next(count * ways for count in PREFILL_ROWS if count * ways >= len(pairs))
    tokens, targets = np.zeros((count, size), np.int32), np.zeros((count, width), np.int32)
    lengths, starts = np.ones(count, np.int32), np.zeros(count, np.int32)
    for row, (prompt, continuation) in enumerate(pairs):
        whole = (*prompt, *continuation[:-1])
        tokens[row, : len(whole)] = whole
        targets[row, : len(continuation)] = continuation
        lengths[row], starts[row] = len(whole), len(prompt) - 1
    key = ("score", f"{count} x {size} tokens", f"{width} of the continuation")
    found = call(programs.score, key, config, params, tokens, lengths, starts, targets)
    log_probs, most_likely = jax.device_get(found)
    return [
        Score(log_probs[row, : len(continuation)], most_likely[row, : len(continuation)] > 0)
        for row, (_, continuation) in enumerate(pairs)
    ]
