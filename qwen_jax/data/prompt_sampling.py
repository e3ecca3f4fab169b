"""Choice of prompts for annotation by their tags: diverse and complex ones (report 3.2.1, which has about 6,600 tags).

The report does not say how it samples. Here it is done as in InsTag (arXiv 2308.07074): a prompt is the more complex
the more tags it has, and a set is the more diverse the more tags it covers. In each round the prompts left are visited
in order of complexity, and one is taken if it has a tag that the round has not yet; when no prompt adds a tag, the next
round begins with no tags.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

ORDERS = ("complexity", "random")


@dataclasses.dataclass(frozen=True)
class Tagged:
    """One prompt for annotation.

    Attributes:
        prompt: its text, or its messages as JSON.
        tags: distinct tags, sorted.
        row: the row as it was read.
    """

    prompt: str
    tags: tuple[str, ...]
    row: Mapping


@dataclasses.dataclass(frozen=True)
class Pool:
    """Prompts to choose from, and reasons to the number of rows that are none."""

    prompts: list[Tagged]
    left_out: collections.Counter[str]


def read_pool(rows: Iterable[tuple[str, object]]) -> Pool:
    """The prompts of rows with `prompt` or `messages`, and `tags`, a list of names.

    Tags that differ only in case or blanks are one. Rows without a tag, and further rows of a prompt, are left out.

    Args:
        rows: (place, row), as `files.read_json_rows` gives them.

    Raises:
        ValueError: a row has no prompt or no list of tags; the message has its place.
    """
    prompts: list[Tagged] = []
    left_out: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()
    for where, row in rows:
        if not isinstance(row, Mapping) or not isinstance(row.get("tags"), list):
            found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"{where}: expected an object with a list 'tags', found {found or 'no field'}")
        prompt = row.get("prompt", row.get("messages"))
        if not isinstance(prompt, str | list) or not all(isinstance(tag, str) for tag in row["tags"]):
            raise ValueError(f"{where}: expected a 'prompt' or 'messages', and tags that are text")
        text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)
        tags = tuple(sorted({name for tag in row["tags"] if (name := " ".join(tag.casefold().split()))}))
        reason = "no prompt" if not prompt else "no tag" if not tags else "a prompt that came before" * (text in seen)
        if reason:
            left_out[reason] += 1
            continue
        seen.add(text)
        prompts.append(Tagged(text, tags, row))
    return Pool(prompts, left_out)


def sample(prompts: Sequence[Tagged], count: int, *, seed: int = 0, order: str = "complexity") -> list[Tagged]:
    """`count` of the prompts, in the order in which they were chosen; see the module.

    The choice depends on the prompts, their tags and the seed, not on the order of the files. The first `n` prompts of
    a sample are the sample of `n`.

    Args:
        prompts: distinct ones.
        count: number of prompts to choose.
        seed: seed for the order of prompts of equal complexity.
        order: in which prompts are visited: "complexity", most tags first, as InsTag does, or "random", which covers
            tags as well with fewer prompts of many tags.

    Raises:
        ValueError: there are fewer prompts, or an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}: it must be one of {', '.join(ORDERS)}")
    if not 0 < count <= len(prompts):
        raise ValueError(f"asked for {count:,} prompts, and there are {len(prompts):,} to choose from: ask for fewer")
    by_complexity = order == "complexity"
    left = collections.deque(
        sorted(prompts, key=lambda one: (-len(one.tags) if by_complexity else 0, _place(one, seed)))
    )
    waiting = collections.Counter(tag for one in left for tag in one.tags)
    chosen: list[Tagged] = []
    while len(chosen) < count:
        covered: set[str] = set()
        passed: list[Tagged] = []
        # The prompts after the one that completes the tags add none: with few tags, a round ends early.
        possible = len(waiting)
        while len(covered) < possible and len(chosen) < count:
            one = left.popleft()
            if covered.issuperset(one.tags):
                passed.append(one)
            else:
                covered.update(one.tags)
                chosen.append(one)
                waiting.subtract(one.tags)
        waiting = +waiting  # without the tags that no prompt left has
        left.extendleft(reversed(passed))
    return chosen


def draw(prompts: Sequence[Tagged], count: int, seed: int = 0) -> list[Tagged]:
    """`count` prompts whatever their tags: what a sample is compared with."""
    return sorted(prompts, key=lambda one: _place(one, seed))[:count]


def _place(one: Tagged, seed: int) -> bytes:
    return hashlib.blake2b(
        one.prompt.encode("utf-8", "replace"), digest_size=16, key=f"prompts:{seed}".encode()
    ).digest()


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What a set of prompts covers.

    Attributes:
        prompts: its number of prompts.
        tags: distinct tags it has.
        mean_tags: tags of a prompt, on average: its complexity.
        least, most: prompts of the rarest tag that it has, and of the most frequent one.
    """

    prompts: int
    tags: int
    mean_tags: float
    least: int
    most: int

    @classmethod
    def of(cls, prompts: Sequence[Tagged]) -> "Coverage":
        """That of at least one prompt."""
        counts = collections.Counter(tag for one in prompts for tag in one.tags)
        total = counts.total()
        return cls(len(prompts), len(counts), total / len(prompts), min(counts.values()), max(counts.values()))


def covered_after(prompts: Sequence[Tagged]) -> list[int]:
    """Number of distinct tags of the first 1, 2, … prompts."""
    seen: set[str] = set()
    result = []
    for one in prompts:
        seen.update(one.tags)
        result.append(len(seen))
    return result
