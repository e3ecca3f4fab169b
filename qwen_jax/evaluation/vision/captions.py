"""CIDEr-D of captions (Vedantam et al. 2015), equal to pycocoevalcap's, with which the Qwen-VL paper's table was made.

A caption is cut into words, counts of n-grams of 1 to 4 words are weighted by how few pictures have them in a reference
caption (TF-IDF), and the score is the mean cosine similarity to the reference captions of the picture, with counts
clipped to those of the reference and a Gaussian penalty on the difference of lengths; times 10.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence

_ORDERS = 4
_SIGMA = 6.0

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"\u2018": "`", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
# Words that keep their full stop within a caption.
_ABBREVIATIONS = "mr mrs ms dr st jr sr vs etc jan feb mar apr jun jul aug sep sept oct nov dec inc co corp ltd ft mt"
_TOKEN = re.compile(
    rf"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | @\w+                    # addresses
    | <[a-z/][^<>\s]*>                                                   # markup
    | '\d0s\b | \d+(?:[.,:]\d+)*(?=[ap]m\b)                             # '90s; 10:30 before am
    | \d*[.,]?\d+(?:[.,:/-]\d+)*(?:st|nd|rd|th|s)?(?![^\W_])          # 3,000; 1.5; 1/2; 5th; 1990s
    | (?:[^\W\d_]\.){{2,}} | no\.(?=\s*\d) | (?:{_ABBREVIATIONS.replace(" ", "|")})\.(?!\w)   # u.s.; p.m.; st.
    | (?:o|d)'[^\W\d_]+ | 'n'                                            # o'clock; rock 'n' roll
    | [^\W_]+(?:[-/.&](?=[^\W_])[^\W_]+)*(?:'[^\W\d_]+)*                  # words, black-and-white and file.txt
    | 't(?=is\b|was\b) | '(?:s|d|m|ll|re|ve)\b | '(?=\w) | --+ | \.{{3}} | [?!]+ | \S
    """,
    re.VERBOSE,
)
# `isn't` is two words, `cannot` too.
_PARTS = re.compile(
    r"(.+?)(n't|'(?:s|m|d|re|ve|ll))|(can)(not)|(gon|wan|got)(na|ta)|"
    r"(gim|lem)(me)"
)
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}


def words(caption: str) -> list[str]:
    """The words of a caption, as pycocoevalcap has them from Stanford's PTBTokenizer (CoreNLP 3.4.1).

    In lower case, without punctuation; `isn't` is `is n't` and `man's` is `man 's`. The names of brackets stay, since
    that program drops them in upper case only. The tokenizer itself needs Java; this one equals it on ordinary English
    captions (tests/evaluation/test_vision_metrics.py has the cases), not on every abbreviation and emoticon.
    """
    found: list[str] = []
    for token in _TOKEN.findall(caption.lower().translate(_QUOTES)):
        parts = _PARTS.fullmatch(token)
        found += [part for part in parts.groups() if part] if parts else [_BRACKETS.get(token, token)]
    return [word for word in found if word not in _PUNCTUATION]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of the caption of each picture; their mean is the score of the set, usually given times 100.

    Args:
        candidates: one caption a picture, as words with spaces between them (`" ".join(words(text))`).
        references: captions of people for the same pictures, at least one each, in the same form. All references of
            the set decide the weights, so scores of parts of a set are others.

    Raises:
        ValueError: no picture, another number of candidates than of references, or a picture without a reference.
    """
    if len(candidates) != len(references) or not candidates:
        raise ValueError(f"{len(candidates)} captions for the references of {len(references)} pictures")
    if not all(references):
        raise ValueError(f"picture {[bool(one) for one in references].index(False)} has no reference caption")
    counted = [[_counts(caption) for caption in of] for of in references]
    pictures_with = collections.Counter(ngram for of in counted for ngram in {n for one in of for n in one})
    log_pictures = math.log(len(references))

    def weighted(counts: Mapping[tuple[str, ...], int]) -> tuple[list[dict], list[float], int]:
        vectors: list[dict] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * (log_pictures - math.log(max(1, pictures_with[ngram])))
        norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
        # The length is counted in pairs of words, as the reference implementation does.
        return vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    return [
        10 * sum(_similarity(weighted(_counts(caption)), weighted(one)) for one in of) / len(of)
        for caption, of in zip(candidates, counted, strict=True)
    ]


def _counts(caption: str) -> collections.Counter[tuple[str, ...]]:
    found = caption.split()
    return collections.Counter(
        tuple(found[start : start + order])
        for order in range(1, _ORDERS + 1)
        for start in range(len(found) - order + 1)
    )


def _similarity(candidate: tuple, reference: tuple) -> float:
    """Mean over orders of the clipped cosine similarity, less for other lengths."""
    total = 0.0
    for mine, theirs, norm, other in zip(candidate[0], reference[0], candidate[1], reference[1], strict=True):
        product = sum(min(value, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0) for ngram, value in mine.items())
        total += product / (norm * other) if norm and other else product
    return total / _ORDERS * math.exp(-((candidate[2] - reference[2]) ** 2) / (2 * _SIGMA**2))
