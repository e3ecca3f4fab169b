"""Accuracy and calibration of reward models on held-out comparisons (report 3.2.1, Table 4)."""

import dataclasses
import math

import numpy as np

# Two-sided 95%.
_NORMAL_QUANTILE = 1.959964


def wilson_interval(correct: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), which stays within [0, 1]."""
    z = _NORMAL_QUANTILE
    share = correct / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(center - half, 0.0), min(center + half, 1.0)


@dataclasses.dataclass(frozen=True)
class CalibrationBin:
    """Pairs of similar confidence, the probability of the side that the model prefers.

    Attributes:
      low, high: the confidences of the bin, in [0.5, 1].
      pairs: number of pairs.
      confidence: their mean confidence.
      accuracy: share of them in which the preferred side is the chosen one.
    """

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy."""
        return wilson_interval(self.accuracy * self.pairs, self.pairs)


@dataclasses.dataclass(frozen=True)
class PairAccuracy:
    """How a reward model does on one set of comparisons.

    Attributes:
      pairs: number of comparisons.
      accuracy: share whose chosen side has the higher reward; equal rewards count half.
      margin: mean of chosen - rejected.
      loss: mean of -log sigmoid(chosen - rejected), in nats.
      confidence: mean probability of the preferred side.
      calibration_error: mean distance of accuracy and confidence over the bins, weighted by pairs (ECE).
      bins: those that are not empty.
    """

    pairs: int
    accuracy: float
    margin: float
    loss: float
    confidence: float
    calibration_error: float
    bins: tuple[CalibrationBin, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy."""
        return wilson_interval(self.accuracy * self.pairs, self.pairs)


def pair_accuracy(margins: np.ndarray, num_bins: int = 10) -> PairAccuracy:
    """Figures of a set of comparisons.

    Args:
      margins: float [pairs], reward of the chosen side - reward of the rejected one.
      num_bins: bins of equal width over confidences from 0.5 to 1.

    Raises:
      ValueError: there are no pairs, or a margin is not finite; the message has its index.
    """
    margins = np.asarray(margins, np.float64)
    if not len(margins):
        raise ValueError("there is no comparison to measure: the set is empty, or all of its rows were left out")
    if not np.isfinite(margins).all():
        index = int(np.flatnonzero(~np.isfinite(margins))[0])
        raise ValueError(f"the margin of comparison {index} is {margins[index]}: the reward model is damaged")
    right = (margins > 0) + 0.5 * (margins == 0)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    places = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, num_bins - 1)
    bins = tuple(
        CalibrationBin(
            float(edges[place]),
            float(edges[place + 1]),
            int(inside.sum()),
            float(confidence[inside].mean()),
            float(right[inside].mean()),
        )
        for place in range(num_bins)
        if (inside := places == place).any()
    )
    return PairAccuracy(
        pairs=len(margins),
        accuracy=float(right.mean()),
        margin=float(margins.mean()),
        loss=float(np.logaddexp(0, -margins).mean()),
        confidence=float(confidence.mean()),
        calibration_error=sum(one.pairs * abs(one.accuracy - one.confidence) for one in bins) / len(margins),
        bins=bins,
    )


def accuracy_table(results: dict[str, dict[str, PairAccuracy]]) -> str:
    """A Markdown table in the layout of the report's Table 4: a row for each model, a column for each set.

    Args:
      results: model to set to figures. All models have the same sets.

    Returns:
      Accuracy in percent with half of its 95% interval, and the numbers of comparisons in the last row.
    """
    sets = list(next(iter(results.values())))
    lines = ["| | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    for model, found in results.items():
        cells = []
        for name in sets:
            low, high = found[name].interval
            cells.append(f"{100 * found[name].accuracy:.2f} ± {50 * (high - low):.2f}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    first = next(iter(results.values()))
    lines.append("| comparisons | " + " | ".join(f"{first[name].pairs:,}" for name in sets) + " |")
    return "\n".join(lines) + "\n"
