"""Language of a text, by py3langid (Lui and Baldwin, "langid.py", 2012): 139 languages and `zxx`, no language.

The model comes in the wheel. The library finds its features, which are byte n-grams, by a loop over bytes; here it is a
few steps over arrays, with the same probabilities to the last bit.
"""

import functools
import math
import operator
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from py3langid.langid import MODEL_FILE, LanguageIdentifier

# As many characters from the start, the middle and the end: a page may begin with a menu in another language.
_SAMPLE = 400
UNKNOWN = "und"
_IDEOGRAPH = re.compile("[\u4e00-\u9fff]")
# The model spreads written Chinese, most of all in traditional characters, over Mandarin, Cantonese and Wu.
GROUPS: Mapping[str, Sequence[str]] = {"zh": ("yue", "wuu")}


class Model:
    """The library's model: an Aho-Corasick automaton that finds features, and naive Bayes over their counts."""

    def __init__(self):
        library = LanguageIdentifier.from_model_file(MODEL_FILE)
        self._next = np.asarray(library.tk_nextmove, np.uint32)
        self._rows = np.asarray(library.tk_row, np.uint32) << np.uint32(8)
        self._features = np.asarray(library.tk_output, np.int64)
        # The library keeps half precision and converts what it takes, for each text.
        self._weights, self._priors = library.nb_ptc.astype(np.float32), library.nb_pc
        self.labels = list(library.nb_classes)
        # Scripts of one language have a column each; all are counted to its first.
        first = {label: place for place, label in reversed(list(enumerate(self.labels)))}
        self._same = [(first[label], place) for place, label in enumerate(self.labels) if first[label] != place]
        self._depth = self._measure_depth()

    def _measure_depth(self) -> int:
        """The longest n-gram in bytes: so many last bytes decide the state, whatever came before."""
        letters = np.arange(256, dtype=np.uint32)
        seen = np.zeros(len(self._rows), bool)
        seen[0], states, depth = True, np.zeros(1, np.int64), 0
        while True:
            reached = seen.copy()
            reached[self._next[self._rows[states][:, None] + letters]] = True
            states = np.flatnonzero(reached & ~seen)
            if not len(states):
                return depth
            seen, depth = reached, depth + 1

    def probabilities(self, text: str) -> np.ndarray:
        """Probability of each of `labels`, float32; 0 for the further columns of a label."""
        if text.isupper():
            text = text.lower()
        data = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
        features = self._features[self._states(np.frombuffer(data, np.uint8))]
        features, first, counts = np.unique(features[features >= 0], return_index=True, return_counts=True)
        if len(features):
            # As the library adds them, in order of the text: sums of floats depend on it.
            order = np.argsort(first)
            scores = np.log1p(counts[order].astype(np.float32)) @ self._weights[features[order]] + self._priors
        else:
            scores = np.zeros(len(self.labels), np.float32)
        scores *= 1.0 / math.sqrt(len(data) or 1)
        np.exp(scores - scores.max(), out=scores)
        scores /= scores.sum()
        for kept, place in self._same:
            scores[kept] += scores[place]
            scores[place] = 0.0
        return scores

    def _states(self, data: np.ndarray) -> np.ndarray:
        """State of the automaton after each byte: all walks over the last bytes at once."""
        states = np.zeros(len(data), np.uint32)
        for back in reversed(range(min(self._depth, len(data)))):
            ahead = states[back:]
            states[back:] = self._next[self._rows[ahead] + data[: len(ahead)]]
        return states


@functools.cache
def model() -> Model:
    """The model, read once in a process."""
    return Model()


def identify(text: str, groups: Mapping[str, Sequence[str]] = GROUPS) -> tuple[str, float]:
    """Language of a text.

    Args:
        text: any text; a long one is judged by its start, middle and end.
        groups: code to the codes whose probabilities are added to its own; empty keeps all languages apart.

    Returns:
        ISO 639 code and its probability in [0, 1]; `und` and 0 for a text without letters.
    """
    if len(text) > 3 * _SAMPLE:
        middle = (len(text) - _SAMPLE) // 2
        text = "\n".join((text[:_SAMPLE], text[middle : middle + _SAMPLE], text[-_SAMPLE:]))
    if not any(character.isalpha() for character in text):
        return UNKNOWN, 0.0
    # The model knows capitals as initials only; the library helps texts without any small letter.
    if _mostly_capitals(text):
        text = text.lower()
    labels, probabilities = model().labels, model().probabilities(text)
    best = int(probabilities.argmax())
    code, probability = labels[best], float(probabilities[best])
    grouped = groups and _IDEOGRAPH.search(text)
    # Nothing that adds up can come before a language with half of the probability.
    if grouped or (groups and (probability < 0.5 or any(code == one or code in groups[one] for one in groups))):
        names = {member: name for name, members in groups.items() for member in members}
        sums: dict[str, float] = {}
        for place in np.argsort(-probabilities, kind="stable"):
            name = names.get(labels[place], labels[place])
            sums[name] = sums.get(name, 0.0) + float(probabilities[place])
        code, probability = max(sums.items(), key=lambda pair: pair[1])
    return code, min(1.0, round(float(probability), 4))


def _mostly_capitals(text: str) -> bool:
    if text.isascii():  # the same, at a fourth of the time
        capitals = sum(map(text.count, string.ascii_uppercase))
        return 4 * capitals > len(text) and capitals > sum(map(text.count, string.ascii_lowercase))
    small = text.lower()
    capitals = sum(map(operator.ne, text, small)) if small != text else 0
    return 4 * capitals > len(text) and capitals > sum(map(operator.ne, text, text.upper()))
