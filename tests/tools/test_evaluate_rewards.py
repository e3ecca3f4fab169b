"""tools/evaluate_rewards.py and tools/make_preferences.py: the table of comparisons whose reward is known."""

import json
import random

import pytest

from qwen_jax.alignment import courtesy
from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.data.chatml import encode_conversation
from tests.fakes import outputs_of_row, random_run

SIZES = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=512, head="scalar")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random reward models."""
    return {
        name: random_run(tmp_path_factory.mktemp(name), spread=s, **SIZES) for name, s in (("PMP", 0.1), ("RM", 0.2))
    }


@pytest.fixture
def world(tool, tmp_path):
    tool("make_preferences").main(
        ["--output", str(tmp_path), "--pretraining", "40", "--pairs", "20", "--held_out", "12", "--conversations", "5"]
    )
    return tmp_path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def gap(row):
    return courtesy.courtesy_reward(row["prompt"], row["chosen"]) - courtesy.courtesy_reward(
        row["prompt"], row["rejected"]
    )


def test_the_world_has_the_labels_and_names_that_it_says(world):
    assert {path.name: len(rows_of(path)) for path in world.iterdir()} == {
        "pretraining.jsonl": 40, "pairs.jsonl": 20, "held_out.jsonl": 12, "prompts.jsonl": 240, "conversations.jsonl": 5
    }  # fmt: skip
    assert all(gap(row) >= 0.5 for name in ("pairs", "held_out") for row in rows_of(world / f"{name}.jsonl"))
    wrong = [gap(row) < 0 for row in rows_of(world / "pretraining.jsonl")]
    assert 2 <= sum(wrong) <= 20  # a quarter of 40, by chance
    seen = {row["prompt"].rpartition(" ")[2] for row in rows_of(world / "prompts.jsonl")}
    held_out = {row["prompt"].rpartition(" ")[2] for row in rows_of(world / "held_out.jsonl")}
    assert not seen & held_out


def test_the_known_reward():
    prompt = "Greet the guest at the door: Mona"
    assert courtesy.courtesy_reward(prompt, "welcome Mona, please come in.") == 2.5
    assert courtesy.courtesy_reward(prompt, "stop there, hurry up.") == -2
    assert courtesy.courtesy_reward(prompt, "glad " + "so " * 13) == pytest.approx(1 - 0.2)
    assert courtesy.courtesy_reward(prompt, " ") == -1
    one = courtesy.pair(prompt, random.Random(0), noise=0.0)
    assert gap({"prompt": prompt, "chosen": one.chosen, "rejected": one.rejected}) >= 0.5


def own_margin(folder, row):
    """The margin of one comparison, each side by itself."""
    model, params = load_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    sides = []
    for name in ("chosen", "rejected"):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
        ids = encode_conversation(tokenizer, messages)
        sides.append(float(outputs_of_row(model, params, ids, 256, method="scalars")[-1]))
    return sides[0] - sides[1]


def test_models_and_sets_make_a_table_two_pictures_and_all_margins(tool, models, world, tmp_path, capsys, monkeypatch):
    evaluate = tool("evaluate_rewards")
    longer = "Human: a\n\nAssistant: b\n\nHuman: c"
    answers = (("Human: hi", "yes", "yonder"), ("Human: hi", "same", "same"), (longer, "d", "e"))
    hh = [
        {side: f"\n\n{talk}\n\nAssistant: {text}" for side, text in (("chosen", good), ("rejected", bad))}
        for talk, good, bad in answers
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hh))
    arguments = [f"--model={name}={folder}" for name, folder in models.items()]
    arguments += [f"--set=courtesy={world / 'held_out.jsonl'}", f"--set=Anthropic HH=hh_rlhf:{tmp_path / 'hh.jsonl'}"]
    arguments += ["--output", str(tmp_path / "out")]
    evaluate.main(arguments)
    said = capsys.readouterr()
    assert "hh.jsonl:2: left out: equal sides" in said.err and "Anthropic HH: 1 rows left out: equal sides" in said.err
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in said.out and table.splitlines()[0] == "| | courtesy | Anthropic HH |"
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| PMP", "| RM", "| comparisons"]
    assert table.splitlines()[-1] == "| comparisons | 12 | 2 |"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    row = rows_of(world / "held_out.jsonl")[3]
    for name, folder in models.items():
        assert results[name]["courtesy"]["margins"][3] == pytest.approx(own_margin(folder, row), abs=2e-5)
    assert sum(one["pairs"] for one in results["RM"]["courtesy"]["bins"]) == 12
    for picture in ("calibration.png", "margins.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    # Again: what was measured is not measured anew.
    monkeypatch.setattr(evaluate, "load_reward_model", None)
    evaluate.main(arguments)
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_mistakes_are_named(tool, models, world, tmp_path, capsys):
    evaluate = tool("evaluate_rewards")
    model, held_out = f"--model=RM={models['RM']}", f"--set=x={world / 'held_out.jsonl'}"
    for arguments, message in (
        ([model, "--set=noname", "--output=o"], "'noname' is not NAME="),
        ([model, model, held_out, "--output=o"], "--model RM is given twice"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert message in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "chosen": "y"}\n')
    with pytest.raises(ValueError, match="bad.jsonl:1: expected a field 'rejected'"):
        evaluate.main([model, f"--set=x={tmp_path / 'bad.jsonl'}", f"--output={tmp_path / 'o'}"])
    broken = random_run(tmp_path, spread=float("nan"), **SIZES)
    with pytest.raises(ValueError, match="broken on x: the margin of comparison 0 is nan"):
        evaluate.main([f"--model=broken={broken}", held_out, f"--output={tmp_path / 'o'}"])
    (tmp_path / "language").mkdir()
    language = random_run(tmp_path / "language", **{**SIZES, "head": "tokens"})
    with pytest.raises(ValueError, match="this is a language model"):
        evaluate.main([f"--model=LM={language}", held_out, f"--output={tmp_path / 'o'}"])
