"""tools/score.py: rewards of conversations in files, resumed, and what cannot be scored is named."""

import json

import jax
import numpy as np
import pytest

from qwen_jax.alignment.reward_model import RewardModel
from qwen_jax.conversion import convert, load_pretrained, load_tokenizer
from qwen_jax.data.chatml import encode_conversation
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.fakes import outputs_of_row, random_run

SIZES = dict(hidden_size=32, num_layers=2, num_heads=4, ffn_size=48, context_length=256, head="scalar")


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("reward"), spread=0.1, **SIZES)


@pytest.fixture
def score(tool):
    return tool("score")


def conversation(*contents, **fields):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **fields}


GOOD = [
    conversation("hi", "hello", id="first"),
    conversation("a", "b", "c" * 40, "d" * 30),
    conversation("你好", "你好！<|im_end|>", id=7),
    {"messages": [{"role": "system", "content": "Be kind."}, *conversation("hm", "no")["messages"]]},
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def expected_rewards(folder, rows):
    """Each conversation by itself, without padding or batch."""
    model, params = load_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    found = []
    for row in rows:
        ids = encode_conversation(tokenizer, row["messages"])
        found.append(float(outputs_of_row(model, params, ids, 256, method="scalars")[-1]))
    return found


def test_rewards_stand_in_the_order_of_the_input(score, reward_run, tmp_path, capsys):
    source = write(tmp_path / "talks.jsonl", GOOD)
    arguments = ["--checkpoint", str(reward_run), "--input", str(source), "--output", str(tmp_path / "out" / "r.jsonl")]
    assert score.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "r.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == [f"{source}:{number}" for number in range(1, 5)]
    assert [row.get("id") for row in rows] == ["first", None, 7, None]
    np.testing.assert_allclose([row["reward"] for row in rows], expected_rewards(reward_run, GOOD), atol=1e-5)
    assert "4 conversations on 8 device(s)" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["r.jsonl"]
    with pytest.raises(ValueError, match="exists: choose another --output"):
        score.main(arguments)


def test_an_id_that_utf8_lacks_is_written_as_it_was_read(score, reward_run, tmp_path):
    """A text that was cut within an emoji has half of it in JSON."""
    source = write(tmp_path / "talks.jsonl", [conversation("\ud83d", "hello", id="\ud83d"), GOOD[0]])
    score.score_file(reward_run, source, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["\ud83d", "first"] and all("reward" in row for row in rows)


def test_an_exported_folder_gives_the_same_rewards(score, reward_run, tmp_path):
    exported = convert("orbax", reward_run, "qwen2_reward", tmp_path / "exported", progress=False)
    source = write(tmp_path / "talks.jsonl", GOOD)
    rows = score.score_file(exported, source, tmp_path / "out.jsonl")
    np.testing.assert_allclose([row["reward"] for row in rows], expected_rewards(reward_run, GOOD), atol=1e-5)


@pytest.mark.parametrize("axes", [dict(data=4, fsdp=2), dict(fsdp=2, tensor=4)])
def test_rewards_do_not_depend_on_the_devices_nor_on_the_other_conversations(reward_run, axes):
    mesh = make_mesh(MeshConfig(**axes))
    model = RewardModel(*load_pretrained(reward_run, mesh=mesh), mesh)
    random = np.random.default_rng(0)
    ids = [random.integers(0, 256, length).tolist() for length in (3, 16, 17, 100, 40, 5, 256, 33, 1)]
    together = model.score(ids)
    one_device = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    alone = RewardModel(*load_pretrained(reward_run, mesh=one_device), one_device)
    np.testing.assert_allclose(together, [alone.score([one])[0] for one in ids], atol=2e-5)
    np.testing.assert_allclose(model.score(ids[::-1]), together[::-1], atol=2e-5)


BAD = [
    ("{not json", "not JSON"),
    ({"text": "x"}, "expected an object with a list"),
    (conversation("only the user"), "the last message is of role 'user'|no turn of the assistant"),
    ({"messages": []}, "no message|empty conversation"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "'robot'"),
    (conversation("x" * 300, "y"), "tokens, and the reward model's context_length is 256"),
]


def test_lines_that_cannot_be_scored_are_named_and_the_others_scored(score, reward_run, tmp_path, capsys):
    source = write(tmp_path / "talks.jsonl", [GOOD[0], *(row for row, _ in BAD), GOOD[1]])
    arguments = ["--checkpoint", str(reward_run), "--input", str(source), "--output", str(tmp_path / "r.jsonl")]
    assert score.main(arguments) == 1
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(
        [rows[0]["reward"], rows[-1]["reward"]], expected_rewards(reward_run, GOOD[:2]), atol=1e-5
    )
    said = capsys.readouterr().err
    for number, (row, (_, message)) in enumerate(zip(rows[1:-1], BAD, strict=True), start=2):
        assert "reward" not in row
        assert any(part in row["error"] for part in message.split("|")), row
        assert f"{source}:{number}: {row['error']}" in said
    assert "error: 6 of 8 lines could not be scored" in said


def test_an_interrupted_command_goes_on_and_gives_the_same_file(score, reward_run, tmp_path, monkeypatch, capsys):
    rows = [conversation(f"question {index}", "answer " * (1 + index % 7)) for index in range(23)]
    source = write(tmp_path / "talks.jsonl", rows)
    monkeypatch.setattr(score, "LINES_AT_ONCE", 8)
    whole = score.score_file(reward_run, source, tmp_path / "whole.jsonl")
    scored, calls = score.scored, []

    def killed(lines, *arguments):
        calls.append(len(lines))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scored(lines, *arguments)

    monkeypatch.setattr(score, "scored", killed)
    with pytest.raises(KeyboardInterrupt):
        score.score_file(reward_run, source, tmp_path / "parts.jsonl")
    unfinished = tmp_path / ".parts.jsonl.unfinished"
    assert unfinished.exists() and not (tmp_path / "parts.jsonl").exists()
    with open(unfinished, "ab") as stream:
        stream.write(b'{"line": "cut o')
    with pytest.raises(ValueError, match="results of another checkpoint, input or setting"):
        score.score_file(reward_run, source, tmp_path / "parts.jsonl", system="Other.")
    again = score.score_file(reward_run, source, tmp_path / "parts.jsonl")
    assert calls == [8, 8, 8, 7] and "going on after 8 of 23 conversations" in capsys.readouterr().err
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and again == whole
    assert not unfinished.exists()


def test_a_kill_as_the_file_is_opened_again_loses_no_result(score, tmp_path, monkeypatch):
    made = score.Results(tmp_path / "r.jsonl", {"a": 1})
    made.add([{"line": "x:1", "reward": 0.5}])
    before = made.path.read_bytes()

    def killed(*arguments):
        open(*arguments).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "open", killed, raising=False)
    with pytest.raises(KeyboardInterrupt):
        score.Results(tmp_path / "r.jsonl", {"a": 1})
    assert made.path.read_bytes() == before and before.count(b"\n") == 2
    monkeypatch.undo()
    assert score.Results(tmp_path / "r.jsonl", {"a": 1}).rows == [{"line": "x:1", "reward": 0.5}]


def test_models_that_give_no_rewards_are_named(score, reward_run, tmp_path):
    source = write(tmp_path / "talks.jsonl", GOOD)
    language = random_run(tmp_path, **{**SIZES, "head": "tokens"})
    with pytest.raises(ValueError, match="run: this is a language model"):
        score.score_file(language, source, tmp_path / "r.jsonl")
    (tmp_path / "nan").mkdir()
    broken = random_run(tmp_path / "nan", spread=float("nan"), **SIZES)
    rows = score.score_file(broken, source, tmp_path / "broken.jsonl")
    assert all(row["error"] == "the reward is nan: the model is damaged" for row in rows)
    (tmp_path / "small").mkdir()
    small = random_run(tmp_path / "small", **SIZES)
    with pytest.raises(
        ValueError, match="conversation 1 cannot be scored: it has ids from 3 to 470.*another vocabulary"
    ):
        mesh = make_mesh(MeshConfig())
        RewardModel(*load_pretrained(small, mesh=mesh), mesh).score([[1], [3, 470]])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl has no line"):
        score.score_file(reward_run, tmp_path / "empty.jsonl", tmp_path / "none.jsonl")


def test_the_command_tells_how_to_use_it(score, capsys):
    with pytest.raises(SystemExit):
        score.main(["--help"])
    said = capsys.readouterr().out
    assert "--checkpoint" in said and "the same command goes on with them" in said
