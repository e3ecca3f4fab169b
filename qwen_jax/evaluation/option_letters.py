"""Which option of a question a chat model chooses in its reply.

The rules follow evaluate_chat_mmlu.py and evaluate_chat_ceval.py of the released code, in their order: texts of options
become their letters, then the letter that the reply states as the answer counts, then the one that it calls right, the
one that it begins with, and the first one that stands alone. Thinking is cut first. A reply without any letter is no
answer; the released code takes the option whose text resembles it most.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from qwen_jax.evaluation.benchmark import Example
from qwen_jax.evaluation.extraction import without_thinking

LETTERS = "ABCDEFG"


@dataclasses.dataclass(frozen=True)
class _Language:
    """Words that point to an option.

    Attributes:
        choose: verbs that a letter follows.
        answer: nouns that a letter follows, with `link` between them.
        link: words between noun and letter, or "" where there may be none.
        right: words that follow the right letter.
        negation: words between one of these and a letter that take the statement back.
        reach: largest number of characters between `choose`, between `answer`, and `right` and the letter.
        before, after: what stands on the left of a stated letter, and what follows it.
        opening: what may come before a letter that the reply begins with.
        closing: what follows such a letter.
    """

    choose: str
    answer: str
    link: str
    right: str
    negation: str
    reach: tuple[int, int, int]
    before: str
    after: str
    opening: str
    closing: str


_ENGLISH = _Language(
    choose=r"[Cc]hoose",
    answer=r"[Aa]nswer|[Cc]hoice",
    link="",
    right=r"\b(?:correct|right)\b",
    negation=r"n't|not",
    reach=(20, 30, 10),
    before=r"\b",
    after=r"\b",
    opening="",
    closing=r"[.,:]|$",
)
_CHINESE = _Language(
    choose=r"选定|选择|选",
    answer=r"答案|选项",
    link=r"[是选为：:】]",
    right=r"正确|对[的，。：]|符合",
    negation=r"[不非]",
    reach=(2, 20, 4),
    before="",
    after=r"(?:选项)?(?:[)）。.．,，、：:A-G]|$)",
    opening=r"[(（]?",
    closing=r"[)）。.．,，：:]|$",
)


def english_option(reply: str, example: Example) -> int | None:
    """Index of the option that an English reply chooses, of `example.extra["options"]`; None: none.

    The texts of options become letters in any case of letters.
    """
    options, reply = example.extra["options"], without_thinking(reply)
    for index, option in _longest_first(options):
        if text := option.rstrip("."):
            reply = re.sub(re.escape(text), LETTERS[index], reply, flags=re.IGNORECASE)
    return _index(reply, _ENGLISH, len(options))


def chinese_option(reply: str, example: Example) -> int | None:
    """Index of the option that a Chinese reply chooses, of `example.extra["options"]`; None: none.

    Where the reply repeats the last sentence of `example.extra["question"]`, what stands before the gap ("____") means
    "the answer is", and what stands after it is dropped.
    """
    options, reply = example.extra["options"], without_thinking(reply)
    last = example.extra["question"].rstrip("。").split("。")[-1].split("_")
    before, after = last[0], last[-1]
    if len(before.strip()) > 4:
        reply = reply.replace(before, "答案是")
    if len(after.strip()) > 4:
        reply = reply.replace(after, "")
    for index, option in _longest_first(options):
        if text := option.rstrip("。"):
            reply = reply.replace(text, LETTERS[index])
    return _index(reply, _CHINESE, len(options))


def is_target(option: int, example: Example) -> bool:
    """Whether the index of an option is the right one."""
    return option == example.target


def _longest_first(options: Sequence[str]) -> list[tuple[int, str]]:
    return sorted(enumerate(options), key=lambda pair: len(pair[1]), reverse=True)


def _index(reply: str, language: _Language, count: int) -> int | None:
    letters = LETTERS[:count]
    for candidates in (_stated, _called_right, _leading, _alone):
        for letter in candidates(reply, language, letters):
            return letters.index(letter)
    return None


def _stated(reply: str, language: _Language, letters: str) -> Iterator[str]:
    """Letters soon after "choose" or "the answer", with no negation and no other letter between."""
    for word in re.finditer(f"(?P<choose>{language.choose})|{language.answer}", reply):
        letter = re.compile(f"[{letters}]").search(reply, word.end())
        if letter is None:
            return
        between = reply[word.end() : letter.start()]
        reach = language.reach[0] if word["choose"] else language.reach[1]
        linked = word["choose"] or re.search(language.link, between)
        stated = re.compile(f"{language.before}[{letters}]{language.after}").match(reply, letter.start())
        if len(between) <= reach and linked and stated and not re.search(language.negation, between):
            yield letter[0]


def _called_right(reply: str, language: _Language, letters: str) -> Iterator[str]:
    """Letters soon before "is correct", with no negation and no other letter between."""
    for letter in re.finditer(f"(?<![A-Za-z])[{letters}](?![A-Za-z])", reply):
        right = re.compile(f"[^{letters}]{{0,{language.reach[2]}}}?(?:{language.right})").match(reply, letter.end())
        if right and not re.search(language.negation, right[0]):
            yield letter[0]


def _leading(reply: str, language: _Language, letters: str) -> Iterator[str]:
    if found := re.match(f"{language.opening}([{letters}])(?:{language.closing})", reply):
        yield found[1]


def _alone(reply: str, language: _Language, letters: str) -> Iterator[str]:
    """Letters beside no other Latin letter, that are no quantity such as "A=2"."""
    del language
    for found in re.finditer(f"(?<![A-Za-z])[{letters}](?![A-Za-z=])", reply):
        yield found[0]
