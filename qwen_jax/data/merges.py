"""The list of merges of a byte-pair vocabulary.

tiktoken joins the neighbors that make the token of lowest rank; `tokenizers` and llama.cpp follow an explicit list of
merges. In a vocabulary that byte-pair encoding produced, each token has one last merge: the two parts that are left
when its bytes are encoded with lower ranks only. These merges in the order of rank give the same ids for every text.
"""

from collections.abc import Mapping, Sequence


def derive_merges(ranks: Mapping[bytes, int], where: object = "the vocabulary") -> list[tuple[bytes, bytes]]:
    """The last merge of every token of more than one byte, in the order of rank.

    Args:
      ranks: token bytes to rank, all 256 single bytes among them.
      where: names the vocabulary in errors.

    Raises:
      ValueError: byte-pair encoding with these ranks never makes some token, so no merge can; the message names them.
    """
    merges, unreachable = [], []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _encode_below(token, rank, ranks)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            unreachable.append(f"{token!r} (rank {rank}, stays {' + '.join(map(repr, parts))})")
    if unreachable:
        raise ValueError(
            f"{where}: {len(unreachable)} tokens cannot be written as merges, because no sequence of merges of lower "
            f"rank makes them: {_listing(unreachable)}. Were words appended? Build the vocabulary by byte-pair "
            "encoding (tools/build_tokenizer.py --base)"
        )
    return merges


def _encode_below(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """`token` encoded with the ranks below `limit`: the lowest first, the leftmost of equals."""
    parts = [token[i : i + 1] for i in range(len(token))]
    joined = [ranks.get(token[i : i + 2], limit) for i in range(len(token) - 1)]
    while joined and (lowest := min(joined)) < limit:
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del joined[i]
        for j in (i - 1, i):
            if 0 <= j < len(joined):
                joined[j] = ranks.get(parts[j] + parts[j + 1], limit)
    return parts


def _listing(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
