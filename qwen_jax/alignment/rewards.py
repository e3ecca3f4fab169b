"""Rewards that a program computes: functions `(prompt, response, answer) -> float` of texts.

Write your own in a module that the gin file imports, decorated with `gin.configurable`.
"""

import json
import math
import numbers
import re
from collections.abc import Callable, Sequence

# (prompt, response without its end token, reference answer or None) -> reward.
RewardFunction = Callable[[str, str, str | None], float]


def exact_answer(prompt: str, response: str, answer: str | None) -> float:
    """1 where the response is the reference answer, up to white space around it; else 0.

    Raises:
      ValueError: the prompt has no reference answer.
    """
    if answer is None:
        raise ValueError(
            f"the prompt {prompt[:60]!r} has no reference answer: give one as `answer` in the file of prompts, or use "
            f"another reward"
        )
    return float(response.strip() == answer.strip())


def match_count(prompt: str, response: str, answer: str | None, pattern: str = "", best: int = 3) -> float:
    """1 where the regular expression `pattern` matches `best` times in the response; 1 / best less for each one off.

    Raises:
      ValueError: there is no pattern, or it is no regular expression; or `best` is below 1.
    """
    if not pattern:
        raise ValueError("match_count has no pattern to look for: set --gin.match_count.pattern")
    if best < 1:
        raise ValueError(f"match_count.best must be at least 1, found {best!r}")
    return 1.0 - abs(len(_compiled("match_count", pattern).findall(response)) - best) / best


def near_length(prompt: str, response: str, answer: str | None, characters: int = 100) -> float:
    """1 for a response of `characters` characters, less by the relative distance, at least -1.

    Raises:
      ValueError: `characters` is below 1.
    """
    if characters < 1:
        raise ValueError(f"near_length.characters must be at least 1, found {characters!r}")
    return max(1.0 - abs(len(response) - characters) / characters, -1.0)


def matches_format(prompt: str, response: str, answer: str | None, pattern: str = r".+") -> float:
    """1 where the whole response matches the regular expression `pattern` (`.` matches line ends, too); else 0.

    Raises:
      ValueError: `pattern` is no regular expression.
    """
    return float(_compiled("matches_format", pattern, re.DOTALL).fullmatch(response) is not None)


def _compiled(name: str, pattern: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"{name}.pattern {pattern!r} is no regular expression: {error}") from error


def compute_rewards(
    function: RewardFunction, name: str, texts: Sequence[tuple[str, str, str | None]], first: int, group_size: int
) -> list[float]:
    """The rewards of responses.

    Args:
      name: of the function, for errors.
      texts: (prompt, response, answer) of each; the responses to one prompt side by side.
      first: index of the first prompt in the order of the data.
      group_size: responses to each prompt.

    Raises:
      ValueError: a reward is not a finite number; the message names the prompt and shows the response.
    """
    rewards = [function(*text) for text in texts]
    for index, (reward, (_, response, _)) in enumerate(zip(rewards, texts, strict=True)):
        if isinstance(reward, bool) or not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            raise ValueError(
                f"reward {name} gave {reward!r} for prompt {first + index // group_size} of the order, response "
                f"{json.dumps(response[:80], ensure_ascii=False)}: it must give a finite number"
            )
    return [float(reward) for reward in rewards]


def check_scores(scores: Sequence[float], first: int, group_size: int) -> None:
    """Refuses numbers of a reward model that are not finite.

    Raises:
      ValueError: the message names the prompt.
    """
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(
                f"the reward model gave {score} for prompt {first + index // group_size} of the order: is its "
                f"checkpoint whole? tools/score.py shows its rewards"
            )
