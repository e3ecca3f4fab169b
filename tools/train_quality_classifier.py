"""Trains a classifier of text quality, or of offensive content, from labeled examples.

    python tools/train_quality_classifier.py --examples='labels/*.jsonl' --label=quality --output=quality.npz
    python tools/train_quality_classifier.py --examples='labels/*.jsonl' --label=offensive --output=offensive.npz

An example is a JSON line with `text` and a field named by `--label` that holds one of two values (0 and 1, true and
false, or two words); the score is the probability of the greater one, or of `--positive`. Features are hashed tokens
and pairs of tokens in any language; scikit-learn fits a logistic regression, with classes balanced. One example in
ten, chosen by a hash of its text, is held out to measure on. `LinearClassifier.path` of a curation run names the
written file.
"""

import argparse
import sys
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from qwen_jax import command_line

_HELD_OUT = 0.1


def read_examples(pattern: str, label: str) -> tuple[list[str], list]:
    """Texts and their labels.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a row without text or label; the file and line are named.
    """
    import glob

    from qwen_jax.files import read_json_lines

    texts, labels = [], []
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise FileNotFoundError(f"no file matches {pattern!r}")
    for path in files:
        for where, row in read_json_lines(path):
            if not isinstance(row, dict) or not {"text", label} <= row.keys():
                raise ValueError(f"{where}: expected an object with text and {label!r}")
            text, value = row["text"], row[label]
            texts.append(str(text))
            labels.append(value)
    return texts, labels


def matrix(texts: list[str], bits: int):
    """Features of texts, a scipy CSR matrix [texts, 2**bits], float64; see `scoring.features`."""
    from scipy.sparse import csr_array

    from qwen_jax.curation.scoring import features

    rows = [features(text, bits) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(slots) for slots, _ in rows])])
    slots, values = (np.concatenate([row[place] for row in rows]) for place in (0, 1))
    return csr_array((values, slots, offsets), shape=(len(texts), 1 << bits))


def train(texts: list[str], labels: list, *, positive=None, bits: int = 18, strength: float = 10.0):
    """Fits on nine tenths of the examples and measures on the rest.

    Args:
        texts, labels: see `read_examples`.
        positive: the label whose probability is the score; None is the greater of the two.
        bits: 2**bits features.
        strength: C of `sklearn.linear_model.LogisticRegression`, the inverse of regularization.

    Returns:
        The fitted `LogisticRegression`, the two labels with the positive one last, and a dict of measures.

    Raises:
        ValueError: there are not two labels, or too few examples of one.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, roc_auc_score

    from qwen_jax.curation.sampling import uniform

    classes = sorted({str(label) for label in labels})
    if len(classes) != 2:
        raise ValueError(f"expected two different labels, found {len(classes)}: {', '.join(classes[:5])}")
    if positive is not None:
        if str(positive) not in classes:
            raise ValueError(f"no example is labeled {positive!r}; there are {', '.join(classes)}")
        classes.sort(key=lambda one: one == str(positive))
    targets = np.array([str(label) == classes[1] for label in labels], int)
    held_out = np.array([uniform(text, "held out") < _HELD_OUT for text in texts])
    for part, name in ((~held_out, "to train on"), (held_out, "held out")):
        if len(np.unique(targets[part])) < 2:
            raise ValueError(f"the examples {name} are all of one kind: {part.sum()} of {len(texts)}; label more")
    features = matrix(texts, bits)
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
    model.fit(features[~held_out], targets[~held_out])
    scores = model.predict_proba(features[held_out])[:, 1]
    measures = {
        "trained on": int((~held_out).sum()),
        "held out": int(held_out.sum()),
        "ROC AUC": float(roc_auc_score(targets[held_out], scores)),
        "average precision": float(average_precision_score(targets[held_out], scores)),
        "accuracy at 0.5": float(((scores >= 0.5) == targets[held_out]).mean()),
    }
    return model, classes, measures


def main(argv: list[str] | None = None) -> None:
    """Trains, writes the file and prints the measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=command_line.pattern_argument, required=True, help="glob of .jsonl files")
    parser.add_argument("--label", required=True, help="name of the field with the label")
    parser.add_argument("--positive", help="label whose probability is the score")
    parser.add_argument("--output", required=True, type=command_line.path_argument, help=".npz file to write")
    parser.add_argument("--bits", type=int, default=18, help="number of features is 2**bits (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=10.0, help="inverse of regularization (default: %(default)s)")
    arguments = parser.parse_args(argv)
    from qwen_jax.curation.scoring import save_linear

    texts, labels = read_examples(arguments.examples, arguments.label)
    model, classes, measures = train(
        texts, labels, positive=arguments.positive, bits=arguments.bits, strength=arguments.strength
    )
    save_linear(arguments.output, model.coef_[0], float(model.intercept_[0]), bits=arguments.bits, classes=classes)
    print(f"{arguments.output}: probability of {arguments.label} = {classes[1]}")
    for name, value in measures.items():
        print(f"{name:18} {value:,}" if isinstance(value, int) else f"{name:18} {value:.4f}")


if __name__ == "__main__":
    command_line.run(main)
