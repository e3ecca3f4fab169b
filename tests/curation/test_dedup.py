"""Duplicates, against exact Jaccard similarities and against datasketch."""

import random

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.curation import dedup, normalize

datasketch = pytest.importorskip("datasketch")


def jaccard(left: str, right: str, size: int = 5) -> float:
    def shingles(text):
        tokens = text.casefold().split()
        return {tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)}

    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def planted():
    """400 texts and a copy of each, 2, 5, 10, 20 or 40% of it edited in one run, or less here and there."""
    generator = random.Random(1)
    words = [f"w{number}" for number in range(5000)]
    originals = [generator.choices(words, k=generator.randint(80, 400)) for _ in range(400)]
    texts = [" ".join(one) for one in originals]
    pairs = []
    for number, original in enumerate(originals):
        share = (0.02, 0.05, 0.1, 0.2, 0.4)[number % 5]
        copy, count = list(original), round(share * len(original))
        if number % 8 < 6:
            start = generator.randrange(len(copy) - count)
            places = range(start, start + count)
        else:
            places = generator.sample(range(len(copy)), max(1, count // 6))
        for place in places:
            copy[place] = generator.choice(words)
        pairs.append((number, len(texts)))
        texts.append(" ".join(copy))
    for number in range(0, 400, 10):
        pairs.append((number, len(texts)))
        texts.append(texts[number].upper().replace(" ", " ,\n", 3))
    return texts, pairs


@pytest.mark.parametrize(("threshold", "bands", "rows"), [(0.6, 30, 4), (0.7, 24, 5), (0.8, 20, 6), (0.9, 20, 6)])
def test_planted_copies_are_found_and_others_are_not(planted, threshold, bands, rows):
    texts, pairs = planted
    truth = np.array([jaccard(texts[a].replace(",\n", ""), texts[b].replace(",\n", "")) for a, b in pairs])
    found = dedup.find_clusters(texts, dedup.FuzzyConfig(threshold, bands=bands, rows=rows))
    together = np.array([found[a] == found[b] for a, b in pairs])
    alike = truth >= threshold
    assert 0.1 < alike.mean() < 0.9
    assert (together & alike).sum() / alike.sum() >= 0.95
    assert (together & alike).sum() / together.sum() >= 0.95
    near = np.abs(truth - threshold) < 0.1
    assert (together == alike)[near].mean() >= 0.95
    assert (found[:400] == np.arange(400)).all()  # nothing but the planted pairs is alike


def test_estimates_are_as_good_as_those_of_datasketch(planted):
    texts, pairs = planted
    hashes = 256
    sets, offsets = normalize.shingles(normalize.tokenize(texts), 5)
    ours = dedup.signatures(sets, offsets, hashes)
    theirs = [
        made.hashvalues
        for made in datasketch.MinHash.generator(
            (
                [int(one).to_bytes(4, "little") for one in sets[a:b]]
                for a, b in zip(offsets[:-1], offsets[1:], strict=True)
            ),
            num_perm=hashes,
        )
    ]
    errors = []
    for a, b in pairs:
        left, right = sets[offsets[a] : offsets[a + 1]], sets[offsets[b] : offsets[b + 1]]
        exact = len(np.intersect1d(left, right)) / len(np.union1d(left, right))
        errors.append(
            [
                (ours[a] == ours[b]).mean() - exact,
                (theirs[a] == theirs[b]).mean() - exact,
                np.sqrt(exact * (1 - exact) / hashes),
            ]
        )
    our_errors, their_errors, deviations = np.array(errors).T
    # Of n estimates, the mean error is within four standard errors of 0, and the spread is that of sampling.
    limit = 4 * np.sqrt((deviations**2).sum()) / len(pairs)
    assert abs(our_errors.mean()) < limit and abs(their_errors.mean()) < limit
    scale = np.sqrt((deviations**2).mean())
    assert 0.8 < np.sqrt((our_errors**2).mean()) / scale < 1.2
    assert 0.8 < np.sqrt((their_errors**2).mean()) / scale < 1.2
    assert np.abs(our_errors - their_errors).max() < 6 * np.sqrt(2) * deviations.max()


def test_bands_propose_pairs_as_often_as_the_formula_says():
    generator = np.random.default_rng(0)
    config = dedup.FuzzyConfig(bands=8, rows=4)
    size, shared = 200, 120
    similarity = shared / (2 * size - shared)
    found, tries = 0, 1500
    for start in range(0, tries, 500):
        common = generator.integers(0, 1 << 32, (500, shared), np.uint32)
        keys = []
        for _ in range(2):
            own = generator.integers(0, 1 << 32, (500, size - shared), np.uint32)
            sets = np.sort(np.concatenate([common, own], 1), 1)
            signature = dedup.signatures(sets.ravel(), np.arange(501) * size, config.num_hashes, seed=start)
            keys.append(dedup.band_keys(signature, config.bands, config.rows))
        found += (keys[0] == keys[1]).any(0).sum()
    expected = config.proposal_probability(similarity)
    assert abs(found / tries - expected) < 5 * np.sqrt(expected * (1 - expected) / tries)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60))
def test_components_are_those_of_networkx(edges):
    pairs = np.array([edge for edge in edges if edge[0] != edge[1]], np.uint64).reshape(-1, 2)
    documents, component = dedup.components(pairs)
    mine = {frozenset(documents[component == one].tolist()) for one in set(component.tolist())}
    graph = networkx.Graph(pairs.tolist())
    assert mine == {frozenset(one) for one in networkx.connected_components(graph)}


def test_one_document_is_kept_by_the_stated_rule():
    component = np.array([0, 0, 0, 1, 1, 2])
    priority = np.array([1, 0, 0, 0, 0, 3])
    length = np.array([9, 5, 7, 4, 4, 1])
    assert dedup.representatives(component, priority, length).tolist() == [2, 2, 2, 3, 3, 5]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40))
def test_all_pairs_of_a_bucket_are_proposed(buckets):
    keys = np.array(buckets, np.uint64)
    documents = np.arange(len(keys), dtype=np.uint64) * np.uint64(10)
    pairs = dedup.candidate_pairs(keys, documents)
    expected = {(10 * a, 10 * b) for b in range(len(keys)) for a in range(b) if keys[a] == keys[b]}
    if max(map(buckets.count, range(4)), default=0) <= 16:
        assert set(map(tuple, pairs.tolist())) == expected
    assert set(map(tuple, pairs.tolist())) <= expected


def test_a_huge_bucket_gives_few_pairs_and_one_component():
    pairs = dedup.candidate_pairs(np.zeros(20_000, np.uint64), np.arange(20_000, dtype=np.uint64))
    assert len(pairs) < 18 * 20_000
    assert set(dedup.components(pairs)[1].tolist()) == {0}


def test_clusters_do_not_depend_on_batches(planted, monkeypatch):
    texts, _ = planted
    expected = dedup.find_clusters(texts)
    monkeypatch.setattr(dedup, "_BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(dedup, "_PAIRS_AT_ONCE", 7)
    assert (dedup.find_clusters(texts) == expected).all()
    assert dedup.find_clusters([]).tolist() == []
    assert dedup.find_clusters(["", "...", ""]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("changes", [{"threshold": 0.0}, {"threshold": 1.1}, {"bands": 0}, {"shingle": 0}, {"rows": 9}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dedup.FuzzyConfig(**changes)
