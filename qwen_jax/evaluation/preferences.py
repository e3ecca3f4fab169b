"""Models compared by people (report 3.3, A.2.2): win, tie and loss, Elo, Bradley-Terry, agreement of annotators.

A file of verdicts holds JSON lines of two kinds, which may be mixed. One comparison, as annotation pages write it:

    {"instruction": "17", "annotator": "ann", "left": "sft", "right": "base", "winner": "left" | "right" | "tie"}

or a ranking of several models, best first, with models that tie in a list:

    {"instruction": "17", "annotator": "ann", "ranking": ["rlhf", ["sft", "gpt"], "base"]}

which stands for the comparisons of all its pairs.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qwen_jax import files

WINNERS = ("left", "right", "tie")
# Elo: arXiv 2403.04132 (Chatbot Arena) rates with 400 points for odds of ten to one, and a step of 4. The report starts
# at 1,000.
ELO_SCALE, ELO_START, ELO_STEP = 400.0, 1000.0, 4.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The verdict of one annotator on two answers to one instruction.

    Attributes:
      instruction: its id.
      annotator: name of the person.
      left, right: the models, as the answers stood before the annotator; a ranking has no sides.
      winner: "left", "right" or "tie".
      sided: whether left and right are sides that the annotator saw.
    """

    instruction: str
    annotator: str
    left: str
    right: str
    winner: str
    sided: bool = True

    @property
    def pair(self) -> tuple[str, str]:
        """The two models in the order of their names."""
        return (self.left, self.right) if self.left < self.right else (self.right, self.left)

    def points(self, model: str) -> float:
        """1 if `model`, one of the two, won, 0 if it lost, 0.5 for a tie."""
        if self.winner == "tie":
            return 0.5
        return float((self.winner == "left") == (model == self.left))


def read_comparisons(paths: Iterable[str | Path]) -> list[Comparison]:
    """The comparisons of files of verdicts, in their order.

    Raises:
      OSError: no such file.
      ValueError: a line is no verdict, or an annotator has judged two models on an instruction before; the message has
        the file and the line.
    """
    found: list[Comparison] = []
    seen: dict[tuple, str] = {}
    for path in paths:
        for where, content in files.read_json_lines(path):
            for one in _comparisons_of(content, where):
                key = (one.instruction, one.annotator, one.pair)
                if key in seen:
                    raise ValueError(
                        f"{where}: {one.annotator} has judged {' and '.join(one.pair)} on instruction "
                        f"{one.instruction} before, in {seen[key]}: remove one of the two"
                    )
                seen[key] = where
                found.append(one)
    if not found:
        raise ValueError(f"{', '.join(str(path) for path in paths) or 'no file'}: no verdict; annotate some first")
    return found


def _comparisons_of(content, where: str) -> list[Comparison]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(content).__name__}")
    instruction, annotator = (_name(content.get(field), field, where) for field in ("instruction", "annotator"))
    if "ranking" in content:
        ranked = _ranking(content["ranking"], where)
        pairs = itertools.combinations(((place, model) for place, tied in enumerate(ranked) for model in tied), 2)
        return [
            Comparison(instruction, annotator, one, other, "left" if place < later else "tie", sided=False)
            for (place, one), (later, other) in pairs
        ]
    left, right = (_name(content.get(field), field, where) for field in ("left", "right"))
    if left == right:
        raise ValueError(f"{where}: left and right are the same model, {left!r}")
    if content.get("winner") not in WINNERS:
        raise ValueError(f"{where}: winner is {content.get('winner')!r}, expected {', '.join(WINNERS)}")
    return [Comparison(instruction, annotator, left, right, content["winner"])]


def _name(value, field: str, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {field} must be a name, found {value!r}")
    return value


def _ranking(value, where: str) -> list[list[str]]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: ranking must be a list of models, best first, found {type(value).__name__}")
    ranked = [[_name(one, "ranking", where) for one in (tied if isinstance(tied, list) else [tied])] for tied in value]
    models = [model for tied in ranked for model in tied]
    if twice := next((model for model in models if models.count(model) > 1), None):
        raise ValueError(f"{where}: ranking has {twice!r} twice")
    if len(models) < 2:
        raise ValueError(f"{where}: ranking has fewer than two models")
    return ranked


def models_of(comparisons: Iterable[Comparison]) -> list[str]:
    """Names of all models, sorted."""
    return sorted({model for one in comparisons for model in one.pair})


def majority(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """One comparison for each instruction and pair: what more than half of its annotators say, otherwise a tie."""
    groups: dict[tuple, list[Comparison]] = collections.defaultdict(list)
    for one in comparisons:
        groups[one.instruction, one.pair].append(one)
    found = []
    for (instruction, (first, second)), several in groups.items():
        wins = collections.Counter(one.points(first) for one in several)
        value, count = wins.most_common(1)[0]
        winner = {1.0: "left", 0.0: "right", 0.5: "tie"}[value] if 2 * count > len(several) else "tie"
        found.append(Comparison(instruction, "majority", first, second, winner, sided=False))
    return found


def against(comparisons: Iterable[Comparison], reference: str) -> dict[str, tuple[int, int, int]]:
    """(wins, ties, losses) of every other model against `reference` (Figure 4 of the report).

    Raises:
      ValueError: the reference was never compared.
    """
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    seen = set()
    for one in comparisons:
        seen |= {one.left, one.right}
        if reference in one.pair:
            other = one.left if one.right == reference else one.right
            counts[other][{1.0: 0, 0.5: 1, 0.0: 2}[one.points(other)]] += 1
    if not counts:
        raise ValueError(f"reference {reference!r} was not compared; the models are {', '.join(sorted(seen))}")
    return {model: (wins, ties, losses) for model, (wins, ties, losses) in sorted(counts.items())}


def elo(
    comparisons: Sequence[Comparison], *, step: float = ELO_STEP, shuffles: int = 200, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Elo ratings, all starting at 1,000, averaged over orders of the comparisons.

    Each comparison moves as many points from one model to the other, so ratings keep their mean of 1,000 (the report's
    five models have a mean of 1,000.6 after rounding). One order favors models that win late; the mean over shuffled
    orders does not, and the spread between orders says how much it would have mattered.

    Args:
      step: points that a win between equals is worth, doubled ("K").
      shuffles: number of orders.
      seed: for the orders.

    Returns:
      Name to (mean rating, standard deviation between orders), best first.

    Raises:
      ValueError: no positive step, or no order.
    """
    if not step > 0 or shuffles < 1:
        raise ValueError(f"elo needs a positive step and at least one order, found step={step}, shuffles={shuffles}")
    models = models_of(comparisons)
    place = {model: index for index, model in enumerate(models)}
    first = np.array([place[one.pair[0]] for one in comparisons])
    second = np.array([place[one.pair[1]] for one in comparisons])
    points = np.array([one.points(one.pair[0]) for one in comparisons])
    random = np.random.default_rng(seed)
    orders = np.stack([random.permutation(len(comparisons)) for _ in range(shuffles)], axis=1)
    ratings = np.full((shuffles, len(models)), ELO_START)
    rows = np.arange(shuffles)
    for chosen in orders:  # the next comparison of every order
        a, b = first[chosen], second[chosen]
        expected = 1 / (1 + 10 ** ((ratings[rows, b] - ratings[rows, a]) / ELO_SCALE))
        change = step * (points[chosen] - expected)
        ratings[rows, a] += change
        ratings[rows, b] -= change
    means, spread = ratings.mean(axis=0), ratings.std(axis=0)
    return {models[i]: (float(means[i]), float(spread[i])) for i in np.argsort(-means, kind="stable")}


def win_matrix(comparisons: Iterable[Comparison], models: Sequence[str]) -> np.ndarray:
    """float64 [models, models]: how often the row won against the column; a tie is half a win for each."""
    place, wins = {model: index for index, model in enumerate(models)}, np.zeros((len(models), len(models)))
    for one in comparisons:
        left = one.points(one.left)
        wins[place[one.left], place[one.right]] += left
        wins[place[one.right], place[one.left]] += 1 - left
    return wins


def is_connected(wins: np.ndarray) -> bool:
    """Whether, for any split of the models in two, each side has won against the other: Bradley-Terry has a maximum."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(len(wins).bit_length()):
        reach = reach @ reach
    return bool(reach.all())


def bradley_terry(wins: np.ndarray, prior: float = 0.0) -> np.ndarray:
    """Strengths that make the wins most likely: the model wins with probability 1 / (1 + exp(other - own)).

    Newton's method on the negative log-likelihood plus prior · sum of squared strengths, as `choix.opt_pairwise` has it
    with its `alpha`. Without a prior there is no maximum where a model never won or never lost.

    Args:
      wins: [..., models, models] as of `win_matrix`, several at once on the leading axes.
      prior: weight of the squares.

    Returns:
      float64 [..., models], of mean 0.

    Raises:
      ValueError: there is no prior and no maximum.
    """
    if prior <= 0 and not all(is_connected(one) for one in wins.reshape(-1, *wins.shape[-2:])):
        raise ValueError(
            "Bradley-Terry has no finite strengths here: some models never won against the others, or were never "
            "compared with them. Use a prior, or compare more"
        )
    count = wins.shape[-1]
    games, theta = wins + wins.swapaxes(-1, -2), np.zeros(wins.shape[:-1])
    identity = np.eye(count)
    for _ in range(200):
        probability = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))  # that the row wins
        gradient = (games * probability - wins).sum(-1) + 2 * prior * theta
        curvature = games * probability * (1 - probability)
        hessian = curvature.sum(-1)[..., None] * identity - curvature + 2 * prior * identity
        # The likelihood does not change when all strengths grow alike: one more term holds their mean.
        change = np.linalg.solve(hessian + 1 / count, gradient[..., None])[..., 0]
        # A full step may overshoot where games are few; the function is convex, so that shorter steps get there.
        theta = theta - change / np.maximum(np.abs(change).max(-1, keepdims=True), 1.0)
        if np.abs(change).max() < 1e-10:
            break
    return theta - theta.mean(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Strength:
    """A Bradley-Terry rating on Elo's scale, with the bootstrap interval of 95%.

    Attributes:
      rating: 1,000 is the mean of all models.
      low, high: ends of the interval.
      unbounded: whether the model never lost or never won: without the prior its strength is infinite.
    """

    rating: float
    low: float
    high: float
    unbounded: bool


def strengths(
    comparisons: Sequence[Comparison], *, prior: float = 0.01, samples: int = 1000, seed: int = 0
) -> dict[str, Strength]:
    """Bradley-Terry ratings with intervals, best first.

    The bootstrap draws instructions, with all their verdicts, and not single verdicts: those of one instruction are
    alike, and an interval that took them for independent would be too narrow.

    Args:
      prior: as in `bradley_terry`; with it, a resample in which a model never lost has a finite strength. 0.01 is a
        normal distribution with a standard deviation of 7.07, or 1,228 Elo points.
      samples: number of resamples.
      seed: for the resamples.

    Raises:
      ValueError: a number is out of range, or as `bradley_terry`.
    """
    if not prior >= 0 or samples < 1:
        raise ValueError(f"strengths need a prior of at least 0 and a resample, found prior={prior}, samples={samples}")
    models = models_of(comparisons)
    groups: dict[str, list[Comparison]] = collections.defaultdict(list)
    for one in comparisons:
        groups[one.instruction].append(one)
    of_instruction = np.stack([win_matrix(group, models) for group in groups.values()])
    whole = of_instruction.sum(0)
    drawn = np.random.default_rng(seed).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), samples)
    resampled = np.tensordot(drawn.astype(np.float64), of_instruction, 1)
    scale = ELO_SCALE / np.log(10)
    rating = ELO_START + scale * bradley_terry(whole, prior)
    low, high = np.percentile(ELO_START + scale * bradley_terry(resampled, prior), [2.5, 97.5], axis=0)
    unbounded = (whole.sum(0) == 0) | (whole.sum(1) == 0)
    return {
        models[i]: Strength(float(rating[i]), float(low[i]), float(high[i]), bool(unbounded[i]))
        for i in np.argsort(-rating, kind="stable")
    }


def cohen_kappa(table: np.ndarray) -> float | None:
    """Agreement of two annotators beyond chance (Cohen 1960); None where both always gave one and the same verdict.

    Args:
      table: [verdicts, verdicts], items by the verdict of each.
    """
    shares = table / table.sum()
    expected = float(shares.sum(0) @ shares.sum(1))
    return None if expected == 1 else (float(np.trace(shares)) - expected) / (1 - expected)


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Agreement of several annotators beyond chance (Fleiss 1971); None where all verdicts are one and the same.

    Args:
      counts: [items, verdicts], number of annotators with each verdict; every item has as many annotators.
    """
    raters = counts[0].sum()
    agreeing = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    expected = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return None if expected == 1 else (float(agreeing.mean()) - expected) / (1 - expected)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far annotators agree.

    Attributes:
      pairs: two annotators to (items that both judged, share of equal verdicts, Cohen's kappa or None).
      items: number of items that all annotators judged.
      kappa: Fleiss' kappa on these, or None.
    """

    pairs: dict[tuple[str, str], tuple[int, float, float | None]]
    items: int
    kappa: float | None


def agreement(comparisons: Iterable[Comparison]) -> Agreement:
    """Agreement of the annotators; an item is an instruction with two models."""
    verdicts: dict[str, dict[tuple, int]] = collections.defaultdict(dict)
    for one in comparisons:
        verdicts[one.annotator][one.instruction, one.pair] = int(2 * one.points(one.pair[0]))
    pairs = {}
    for first, second in itertools.combinations(sorted(verdicts), 2):
        table = np.zeros((3, 3))
        for item in verdicts[first].keys() & verdicts[second].keys():
            table[verdicts[first][item], verdicts[second][item]] += 1
        if table.sum():
            pairs[first, second] = int(table.sum()), float(np.trace(table) / table.sum()), cohen_kappa(table)
    shared = set.intersection(*(set(of_one) for of_one in verdicts.values()))
    if len(verdicts) < 2 or not shared:
        return Agreement(pairs, len(shared) if len(verdicts) > 1 else 0, None)
    counts = np.array([[sum(of_one[item] == v for of_one in verdicts.values()) for v in range(3)] for item in shared])
    return Agreement(pairs, len(shared), fleiss_kappa(counts))


def left_share(comparisons: Iterable[Comparison]) -> float | None:
    """Share of wins by the answer on the left, of all wins; 0.5 but for a habit of the annotators. None: no sides."""
    wins = [one.winner == "left" for one in comparisons if one.sided and one.winner != "tie"]
    return sum(wins) / len(wins) if wins else None
