"""Prompts for annotation: covered tags, complexity, and every row accounted for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data.prompt_sampling import ORDERS, Coverage, Tagged, covered_after, draw, read_pool, sample

POOLS = st.lists(st.sets(st.sampled_from("abcdefghij"), min_size=1), min_size=1, max_size=30).map(
    lambda tags: [Tagged(f"prompt {n}", tuple(sorted(one)), {"n": n}) for n, one in enumerate(tags)]
)


@given(pool=POOLS, data=st.data(), order=st.sampled_from(ORDERS), seed=st.integers(0, 3))
def test_a_sample_is_a_prefix_of_larger_ones_and_depends_on_no_order_of_files(pool, data, order, seed):
    count = data.draw(st.integers(1, len(pool)))
    whole = sample(pool, len(pool), seed=seed, order=order)
    assert sorted(one.prompt for one in whole) == sorted(one.prompt for one in pool)
    shuffled = data.draw(st.permutations(pool))
    assert sample(shuffled, count, seed=seed, order=order) == whole[:count]


@given(pool=POOLS, order=st.sampled_from(ORDERS))
def test_each_round_covers_every_tag_that_is_left_before_any_is_repeated_alone(pool, order):
    """The first round ends with all tags of the pool: no prompt is taken that adds none while others could."""
    chosen = sample(pool, len(pool), order=order)
    counts = covered_after(chosen)
    everything = Coverage.of(pool).tags
    first = counts.index(everything) + 1
    assert counts[:first] == sorted(set(counts[:first]))
    if order == "complexity":
        assert len(chosen[0].tags) == max(len(one.tags) for one in pool)


def test_the_rule_of_instag_by_hand():
    tags = {"p": "abc", "q": "ab", "r": "cd", "s": "a", "t": "e"}
    pool = [Tagged(name, tuple(letters), {}) for name, letters in tags.items()]
    # Round 1: p (abc), r adds d, t adds e; q and s add nothing. Round 2: q, and s adds nothing. Round 3: s.
    assert [one.prompt for one in sample(pool, 5)] == ["p", "r", "t", "q", "s"]


def test_a_sample_covers_more_than_a_draw_and_is_more_complex():
    pool = [Tagged(f"p{n}", tuple(f"t{(n * k) % 97}" for k in range(1, 2 + n % 5)), {}) for n in range(1, 900)]
    by_tags, drawn = Coverage.of(sample(pool, 60)), Coverage.of(draw(pool, 60))
    assert by_tags.tags > drawn.tags and by_tags.mean_tags > drawn.mean_tags
    assert Coverage.of(sample(pool, 60, order="random")).tags > drawn.tags


@pytest.mark.parametrize("count", [0, 3])
def test_impossible_counts(count):
    pool = [Tagged("p", ("a",), {}), Tagged("q", ("b",), {})]
    with pytest.raises(ValueError, match=f"asked for {count} prompts, and there are 2"):
        sample(pool, count)


@pytest.mark.parametrize(
    "row", [{"prompt": "x"}, {"tags": ["a"]}, {"prompt": 3, "tags": []}, {"prompt": "x", "tags": [1]}, []]
)
def test_a_malformed_row_is_named(row):
    with pytest.raises(ValueError, match="^here:3: expected"):
        read_pool([("here:3", row)])


def test_the_tool_writes_rows_table_and_picture(tool, tmp_path, capsys):
    rows = [{"prompt": f"p{n}", "tags": [f"T{n % 7}", f"t{n % 11} "], "id": n} for n in range(50)]
    rows += [{"prompt": "p0", "tags": ["x"]}, {"prompt": "no tag", "tags": [" "]}, {"prompt": "", "tags": ["x"]}]
    rows += [{"messages": [{"role": "user", "content": "é \ud83d"}], "tags": ["a", "b", "c"]}]  # half of an emoji
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out" / "chosen.jsonl"
    main = tool("sample_prompts").main
    main([str(tmp_path / "in.jsonl"), "--count=12", f"--output={output}"])
    chosen = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(chosen) == 12 and chosen[0] == rows[-1] and all(row in rows for row in chosen)
    shown = capsys.readouterr().out
    assert "54 rows read; left out: 1 a prompt that came before, 1 no prompt, 1 no tag." in shown
    assert output.with_suffix(".md").read_text() in shown and "| chosen | 12 | 14 (" in shown
    assert output.with_suffix(".png").stat().st_size > 5000
    before = output.read_bytes()
    main([str(tmp_path / "in.jsonl"), "--count=12", f"--output={output}"])
    assert output.read_bytes() == before
