"""Which prompts of new requests are computed together, and what of them is there already."""

import dataclasses
from collections.abc import Sequence

from qwen_jax.inference.prefix_cache import PrefixCache
from qwen_jax.inference.programs import BLOCK_TOKENS
from qwen_jax.inference.requests import Request
from qwen_jax.inference.row import Row

SMALLEST_PROMPT = 16
# Tokens of a long prompt that are computed at once, and the least of them.
PREFILL_CHUNK, SMALLEST_CHUNK = 1024, 64
# Prompts that are computed at once, and how many tokens they may have together with their padding.
PREFILL_ROWS, PREFILL_TOKENS = (1, 4, 16), 8192


def bucket(length: int, smallest: int) -> int:
    """`length` rounded up to a power of two, so that few programs are compiled."""
    return max(smallest, 1 << (length - 1).bit_length())


def prefill_rows(size: int) -> int:
    """The largest number of prompts of `size` tokens to compute at once."""
    return max(count for count in PREFILL_ROWS if count == 1 or count * size <= PREFILL_TOKENS)


def prefill_count(prompts: int, size: int, ways: int) -> int:
    """For how many prompts of `size` tokens to compile the program that computes the first of `prompts`.

    Padding is work: of more than a quarter, a program for fewer prompts runs more often instead.

    Args:
      ways: into how many parts the mesh splits rows.
    """
    counts = [count * ways for count in PREFILL_ROWS if count <= prefill_rows(size)]
    filled = [count for count in counts if 4 * prompts >= 3 * count]
    return max(filled, default=counts[0])


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt and the requests for continuations of it.

    Attributes:
      rows: the requests, all with this prompt.
      places: of the blocks of the prefix cache that it begins with.
      long: whether it is computed in chunks.
      size: number of the tokens after those of `places`, with padding unless it is long.
      slots: number of all tokens, with padding.
    """

    rows: list[Row]
    places: tuple[int, ...] = ()
    long: bool = False
    size: int = 0
    slots: int = 0

    @property
    def request(self) -> Request:
        """One of the requests."""
        return self.rows[0].request

    @property
    def cached(self) -> int:
        """Number of tokens that are not computed."""
        return len(self.places) * BLOCK_TOKENS

    @property
    def embedded(self) -> bool:
        """Whether embeddings, or features of pictures, stand for tokens that are computed."""
        request = self.request
        return request.embeddings is not None or bool(request.images and min(self.rows[0].key[self.cached :]) < 0)

    @property
    def shape(self) -> tuple[bool, int, int, bool]:
        """Which program computes it: long ones have the same, others go by their sizes and `embedded`."""
        return (True, 0, 0, False) if self.long else (False, self.size, self.slots, self.embedded)


def prompts_of_rows(rows: Sequence[Row], ways: int) -> list[Prompt]:
    """The different prompts of requests in their order; one that very many requests have comes several times."""
    found: dict[object, list[list[Row]]] = {}
    for row in rows:
        # Embeddings are not compared.
        key = row.key if row.request.embeddings is None else id(row)
        groups = found.setdefault(key, [[]])
        if len(groups[-1]) == PREFILL_ROWS[-1] * ways:
            groups.append([])
        groups[-1].append(row)
    return [Prompt(rows) for groups in found.values() for rows in groups]


def next_prompts(
    waiting: Sequence[Prompt], prefixes: PrefixCache | None, ways: int, chunk: int = PREFILL_CHUNK
) -> list[Prompt]:
    """Those of `waiting`, at least one, that are computed next, together: of one shape, short ones first.

    A prompt that begins as another one does waits for it where it then has less to compute itself; a short one does not
    wait for a long one.

    Args:
      prefixes: the cache as it is now; None: there is none.
      chunk: prompts of more tokens are long; of these, one for each part of the rows comes next.
    """
    groups: dict[tuple[bool, int, int, bool], list[Prompt]] = {}
    leaders: dict[tuple[bool, tuple[int, ...]], tuple[int, ...]] = {}
    for prompt in waiting:
        tokens = prompt.rows[0].key
        sharing = prefixes is not None and prompt.request.embeddings is None
        places = tuple(prefixes.find(tokens)) if prefixes is not None and sharing else ()
        planned = _planned(prompt, places, chunk)
        beginning = tokens[: (len(places) + 1) * BLOCK_TOKENS]
        if sharing and len(beginning) < len(tokens):
            leader = leaders.setdefault((planned.long, beginning), tokens)
            if leader is not tokens and _after(prompt, tokens, leader, chunk).size < planned.size:
                continue
        groups.setdefault(planned.shape, []).append(planned)
    group = groups[min(groups)]
    if group[0].long:
        return group[:ways]
    rows = 0
    for number, prompt in enumerate(group):
        rows += len(prompt.rows)
        if rows > PREFILL_ROWS[-1] * ways:
            group = group[:number]
            break
    return group[: prefill_count(len(group), group[0].size, ways)]


def _planned(prompt: Prompt, places: tuple[int, ...], chunk: int) -> Prompt:
    """The prompt, with as many of the cached blocks as leave room for the padding of the rest."""
    length = prompt.request.prompt_length
    slots = bucket(length, SMALLEST_PROMPT)
    if length > chunk:
        size = length - len(places) * BLOCK_TOKENS
        return dataclasses.replace(prompt, places=places, long=True, size=size, slots=slots)
    used = len(places)
    while used and used * BLOCK_TOKENS + bucket(length - used * BLOCK_TOKENS, SMALLEST_PROMPT) > slots:
        used -= 1
    size = bucket(length - used * BLOCK_TOKENS, SMALLEST_PROMPT)
    return dataclasses.replace(prompt, places=places[:used], size=size, slots=slots)


def _after(prompt: Prompt, tokens: tuple[int, ...], leader: tuple[int, ...], chunk: int) -> Prompt:
    """The prompt as it would be planned once `leader` is in the cache."""
    common, longest = 0, (min(len(tokens) - 1, len(leader))) // BLOCK_TOKENS
    while common < longest and all(
        a == b for a, b in zip(*(x[common * BLOCK_TOKENS :][:BLOCK_TOKENS] for x in (tokens, leader)), strict=True)
    ):
        common += 1
    return _planned(prompt, (0,) * common, chunk)
