"""Answers and rewards in a bucket: uploaded while they come, and gone on with after a kill."""

import json

import pytest

from qwen_jax import files
from qwen_jax.evaluation import records
from qwen_jax.evaluation.records import Records, keep_settings
from tests.object_stores import stores  # noqa: F401
from tools.score import Results


@pytest.fixture(params=["s3", "gs"])
def folder(stores, request):  # noqa: F811
    return files.as_path(stores[request.param].folder())


def answer(name: str) -> dict:
    return {"id": name, "extracted": "A", "score": 1.0}


def test_answers_go_on_where_they_were_uploaded_last(folder, monkeypatch):
    keep_settings(folder, {"chat": True})
    with Records(folder, ["a", "b", "c"]) as found:
        found.add(answer("a"))
    monkeypatch.setattr(records, "UPLOAD_SECONDS", -1)
    killed = Records(folder, ["a", "b", "c"])  # never closed, as after a kill
    killed.add(answer("b"))
    with Records(folder, ["a", "b", "c"]) as found:
        assert list(found.rows) == ["a", "b"]
        found.add(answer("c"))
    assert [json.loads(line)["id"] for line in (folder / "answers.jsonl").read_text().splitlines()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=f"{folder} holds answers with other settings"):
        keep_settings(folder, {"chat": False})
    with pytest.raises(ValueError, match=rf"{folder}/answers\.jsonl:1: no answer to an example"):
        Records(folder, ["b", "c"])


def test_rewards_go_on_after_a_kill_and_appear_whole(folder):
    settings = {"dtype": "float32"}
    Results(folder / "rewards.jsonl", settings).add([{"line": "1", "reward": 0.5}])
    assert not (folder / "rewards.jsonl").exists()
    with pytest.raises(ValueError, match="holds results of another checkpoint"):
        Results(folder / "rewards.jsonl", {"dtype": "bfloat16"})
    again = Results(folder / "rewards.jsonl", settings)
    assert again.rows == [{"line": "1", "reward": 0.5}]
    again.add([{"line": "2", "reward": 1.5}])
    again.finish()
    assert [path.name for path in folder.iterdir()] == ["rewards.jsonl"]
    assert [row["line"] for _, row in files.read_json_lines(folder / "rewards.jsonl")] == ["1", "2"]
