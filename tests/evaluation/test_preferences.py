"""Ratings and agreement against values of others, and what must hold for any verdicts."""

import itertools
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen_jax.evaluation.preferences import (
    Comparison,
    against,
    agreement,
    bradley_terry,
    cohen_kappa,
    elo,
    fleiss_kappa,
    is_connected,
    left_share,
    majority,
    models_of,
    read_comparisons,
    strengths,
    win_matrix,
)

# The report's five models (A.2.2): Elo ratings as published.
PUBLISHED = {"gpt35": 1037, "7b-sft": 1011, "14b-rlhf": 1090, "14b-sft": 910, "7b-rlhf": 955}


def drawn(theta: dict[str, float], count: int, seed: int = 0, tie: float = 0.2) -> list[Comparison]:
    """Verdicts of annotators who prefer with the odds of exp(theta)."""
    random, found = np.random.default_rng(seed), []
    pairs = list(itertools.combinations(sorted(theta), 2))
    for index in range(count):
        left, right = pairs[index % len(pairs)]
        wins = random.random() < 1 / (1 + np.exp(theta[right] - theta[left]))
        winner = "tie" if random.random() < tie else ("left" if wins else "right")
        found.append(Comparison(str(index // len(pairs)), "ann", left, right, winner))
    return found


def test_the_published_ratings_come_back_from_verdicts_with_their_odds():
    """Elo of verdicts drawn with the odds of the report's ratings: the same ratings, within their sampling error."""
    theta = {model: rating * np.log(10) / 400 for model, rating in PUBLISHED.items()}
    comparisons = drawn(theta, 12_000, tie=0.0)
    mean = sum(PUBLISHED.values()) / len(PUBLISHED)
    assert round(mean) == 1001  # zero-sum from a start of 1,000 but for rounding
    for found in (
        {model: rating for model, (rating, _) in elo(comparisons, shuffles=20).items()},
        {model: one.rating for model, one in strengths(comparisons, samples=20).items()},
    ):
        for model, rating in PUBLISHED.items():
            assert found[model] - 1000 == pytest.approx(rating - mean, abs=20), model
    assert list(elo(comparisons, shuffles=5)) == sorted(PUBLISHED, key=PUBLISHED.get, reverse=True)


def test_one_comparison_moves_half_a_step_each_way():
    found = elo([Comparison("1", "ann", "a", "b", "left")], step=32, shuffles=3)
    assert found == {"a": (1016.0, 0.0), "b": (984.0, 0.0)}
    # 1 / (1 + 10^(-32 / 400)) = 0.54592: the second win of the stronger is worth less.
    twice = elo([Comparison(i, "ann", "a", "b", "left") for i in "12"], step=32, shuffles=3)
    assert twice["a"][0] == pytest.approx(1016 + 32 * (1 - 0.5459219), abs=1e-4)


VERDICTS = st.lists(
    st.builds(
        Comparison,
        st.sampled_from("123456"),
        st.sampled_from(["ann", "bob", "cy"]),
        st.sampled_from("ab"),
        st.sampled_from("cd"),
        st.sampled_from(["left", "right", "tie"]),
    ),
    min_size=1,
    max_size=30,
)


def mirrored(comparisons):
    other = {"left": "right", "right": "left", "tie": "tie"}
    return [Comparison(c.instruction, c.annotator, c.right, c.left, other[c.winner]) for c in comparisons]


@hypothesis.given(VERDICTS)
@hypothesis.settings(max_examples=50)
def test_ratings_are_zero_sum_and_blind_to_sides(comparisons):
    models = models_of(comparisons)
    for find in (lambda c: elo(c, shuffles=8), lambda c: strengths(c, samples=20)):
        ratings = find(comparisons), find(mirrored(comparisons))
        means = [{m: r[m][0] if isinstance(r[m], tuple) else r[m].rating for m in models} for r in ratings]
        assert np.mean(list(means[0].values())) == pytest.approx(1000, abs=1e-6)
        for model in models:
            assert means[0][model] == pytest.approx(means[1][model], abs=1e-6)
    wins = win_matrix(comparisons, models)
    assert wins.sum() == pytest.approx(len(comparisons))
    for model in models:
        for other, (won, tied, lost) in against(comparisons, model).items():
            i, j = models.index(other), models.index(model)
            assert (won + tied / 2, lost + tied / 2) == (wins[i, j], wins[j, i])
    found = bradley_terry(wins, prior=0.1)
    # At the maximum, expected points equal points, but for the pull of the prior.
    games = wins + wins.T
    expected = (games / (1 + np.exp(found[None] - found[:, None]))).sum(1)
    np.testing.assert_allclose(wins.sum(1) - expected, 0.2 * found, atol=1e-6)


def test_bradley_terry_equals_choix():
    choix = pytest.importorskip("choix", reason="choix is not installed")
    theta = dict(zip("abcde", (0.8, 0.3, 0.0, -0.4, -0.7), strict=True))
    comparisons = drawn(theta, 600)
    models = models_of(comparisons)
    place = {model: index for index, model in enumerate(models)}
    # A tie is half a win for each: every comparison stands twice, a tie once each way.
    pairs = []
    for one in comparisons:
        for points in (one.points(one.left), one.points(one.left) if one.winner != "tie" else 0.0):
            wins = points > 0
            pairs.append((place[one.left], place[one.right]) if wins else (place[one.right], place[one.left]))
    wins = 2 * win_matrix(comparisons, models)
    assert len(pairs) == wins.sum()
    np.testing.assert_allclose(bradley_terry(wins), choix.ilsr_pairwise(5, pairs), atol=1e-5)
    np.testing.assert_allclose(bradley_terry(wins, 0.5), choix.opt_pairwise(5, pairs, alpha=0.5), atol=1e-5)


def test_bradley_terry_equals_recorded_values_of_choix():
    """choix 0.4.1: ilsr_pairwise and opt_pairwise(alpha=0.5) of 5, 2, 3, 1, 4 and 2 wins."""
    wins = np.zeros((3, 3))
    wins[0, 1], wins[1, 0], wins[0, 2], wins[2, 0], wins[1, 2], wins[2, 1] = 5, 2, 3, 1, 4, 2
    np.testing.assert_allclose(bradley_terry(wins), [0.71616558, -0.0775019, -0.63866368], atol=1e-6)
    np.testing.assert_allclose(bradley_terry(wins, 0.5), [0.53863173, -0.06758289, -0.47104884], atol=1e-5)


def test_a_model_that_never_loses_has_no_strength_without_a_prior():
    comparisons = [Comparison(str(i), "ann", "a", "b", "left") for i in range(5)]
    wins = win_matrix(comparisons, ["a", "b"])
    assert not is_connected(wins)
    with pytest.raises(ValueError, match="no finite strengths here: .* Use a prior"):
        bradley_terry(wins)
    found = strengths(comparisons, prior=0.01)
    assert found["a"].unbounded and np.isfinite([found["a"].rating, found["a"].low, found["a"].high]).all()
    # Two groups that never met.
    apart = win_matrix([Comparison("1", "x", *pair, "tie") for pair in ("ab", "cd")], list("abcd"))
    assert not is_connected(apart)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    theta = {"a": 0.5, "b": 0.0, "c": -0.5}
    held = []
    for seed in range(40):
        found = strengths(drawn(theta, 150, seed, tie=0.0), samples=200, seed=seed)
        held += [one.low <= 1000 + 400 / np.log(10) * theta[model] <= one.high for model, one in found.items()]
    assert 0.85 <= np.mean(held) <= 1.0
    # All verdicts of an instruction are alike: three annotators who agree are no three times as much evidence.
    once = drawn({"a": 0.4, "b": 0.0}, 60)
    thrice = [Comparison(c.instruction, who, c.left, c.right, c.winner) for c in once for who in "xyz"]
    width = [one["a"].high - one["a"].low for one in (strengths(once, prior=1e-4), strengths(thrice, prior=1e-4))]
    assert width[1] == pytest.approx(width[0], rel=0.1)


def test_kappas_are_those_of_scikit_learn_and_of_fleiss():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    random = np.random.default_rng(0)
    one = random.integers(0, 3, 80)
    other = np.where(random.random(80) < 0.6, one, random.integers(0, 3, 80))
    table = np.zeros((3, 3))
    np.add.at(table, (one, other), 1)
    assert cohen_kappa(table) == pytest.approx(metrics.cohen_kappa_score(one, other))
    # Fleiss 1971 as tabulated in textbooks: 10 items, 14 raters, 5 verdicts, kappa 0.210.
    counts = np.array(
        [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ]
    )
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert cohen_kappa(np.diag([5.0, 0, 0])) is None and fleiss_kappa(np.array([[3, 0, 0]] * 4)) is None


def test_agreement_ignores_sides_and_counts_shared_items():
    verdicts = [("1", "left"), ("2", "right"), ("3", "tie"), ("4", "left")]
    ann = [Comparison(item, "ann", "a", "b", winner) for item, winner in verdicts]
    bob = mirrored([Comparison(item, "bob", "a", "b", winner) for item, winner in verdicts[:3]])
    found = agreement([*ann, *bob])
    assert found.pairs == {("ann", "bob"): (3, 1.0, 1.0)} and found.items == 3 and found.kappa == pytest.approx(1.0)
    assert agreement(ann).items == 0 and agreement(ann).kappa is None


def test_the_majority_and_the_left_share():
    votes = {"1": ("left", "left", "right"), "2": ("left", "right", "tie"), "3": ("tie", "tie", "left")}
    comparisons = [
        Comparison(item, who, "b", "a", winner)
        for item, winners in votes.items()
        for who, winner in zip("xyz", winners, strict=True)
    ]
    assert against(majority(comparisons), "a") == {"b": (1, 2, 0)}
    assert left_share(comparisons) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="reference 'c' was not compared; the models are a, b"):
        against(comparisons, "c")


def write(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_rankings_stand_for_the_comparisons_of_their_pairs(tmp_path):
    ranked = {"instruction": 7, "annotator": "ann", "ranking": ["a", ["b", "c"], "d"]}
    sided = {"instruction": "7", "annotator": "bob", "left": "d", "right": "a", "winner": "left"}
    found = read_comparisons([write(tmp_path / "verdicts.jsonl", ranked, sided)])
    assert [(one.left, one.right, one.winner) for one in found] == [
        ("a", "b", "left"), ("a", "c", "left"), ("a", "d", "left"), ("b", "c", "tie"), ("b", "d", "left"),
        ("c", "d", "left"), ("d", "a", "left"),
    ]  # fmt: skip
    assert left_share(found) == 1.0  # a ranking has no sides


SIDED = {"instruction": "1", "annotator": "ann", "left": "a", "right": "b", "winner": "left"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([3], r"verdicts.jsonl:1: expected an object, found int"),
        ([{**SIDED, "winner": "both"}], "winner is 'both', expected left, right, tie"),
        ([{**SIDED, "right": "a"}], "left and right are the same model, 'a'"),
        ([{**SIDED, "annotator": " "}], "annotator must be a name, found ' '"),
        ([{"instruction": 1, "annotator": "x", "ranking": ["a"]}], "ranking has fewer than two models"),
        ([{"instruction": 1, "annotator": "x", "ranking": ["a", ["b", "a"]]}], "ranking has 'a' twice"),
        ([{"instruction": 1, "annotator": "x", "ranking": "a>b"}], "ranking must be a list of models, best first"),
        (
            [SIDED, {**SIDED, "left": "b", "right": "a"}],
            r"verdicts.jsonl:2: ann has judged a and b on instruction 1 before, in .*verdicts.jsonl:1",
        ),
        ([], "no verdict; annotate some first"),
    ],
)
def test_wrong_verdicts_are_named_with_their_line(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        read_comparisons([write(tmp_path / "verdicts.jsonl", *records)])


@pytest.mark.parametrize(
    "changes", [{"step": 0.0}, {"shuffles": 0}, {"prior": -1.0}, {"prior": float("nan")}, {"samples": 0}]
)
def test_numbers_that_give_no_rating_are_named(changes):
    rate = strengths if {"prior", "samples"} & changes.keys() else elo
    (name,) = changes
    with pytest.raises(ValueError, match=f"found .*{name}={changes[name]}"):
        rate([Comparison("1", "ann", "a", "b", "left")], **changes)
