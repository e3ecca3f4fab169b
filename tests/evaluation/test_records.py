"""Records of answers: what a kill, a full disk, other settings and other people's lines do to them."""

import errno
import json
import os
import threading

import pytest

from qwen_jax.evaluation import records
from qwen_jax.evaluation.records import Records, keep_settings

IDS = [f"anatomy/{index}" for index in range(40)]


def row(index, **fields):
    return {"id": IDS[index], "extracted": {"choice": index % 4}, "score": {"choice": 1.0}, **fields}


def lines(folder):
    return (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()


def test_answers_are_there_again_and_none_is_written_twice(tmp_path):
    with Records(tmp_path, IDS) as one:
        one.add(row(3, output="问题\u2028\n", target="\ud800"))
        one.add(row(1))
        with pytest.raises(ValueError, match="anatomy/1 has an answer already"):
            one.add(row(1))
    with Records(tmp_path, IDS) as again:
        assert list(again.rows) == [IDS[3], IDS[1]] and again.rows[IDS[3]] == row(
            3, output="问题\u2028\n", target="\ud800"
        )
        again.add(row(2))
    assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize("kept", [1, 20, 60])
def test_a_half_written_last_line_is_removed_and_answered_again(tmp_path, kept):
    with Records(tmp_path, IDS) as one:
        for index in range(3):
            one.add(row(index))
    path = tmp_path / "answers.jsonl"
    content = path.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    path.write_bytes(content[: -len(last)] + last[:kept])
    with Records(tmp_path, IDS) as again:
        assert list(again.rows) == IDS[:2]
        again.add(row(2))
    assert path.read_bytes() == content


def test_threads_write_whole_lines(tmp_path):
    with Records(tmp_path, IDS) as one:
        threads = [threading.Thread(target=one.add, args=[row(index, output="x" * 5000)]) for index in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {json.loads(line)["id"] for line in lines(tmp_path)} == set(IDS)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    write, free = os.write, [150]

    def limited(file, data):
        count = min(len(data), free[0])
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        free[0] -= count
        return write(file, bytes(data[:count]))

    with Records(tmp_path, IDS) as one:
        monkeypatch.setattr(records.os, "write", limited)
        one.add(row(0))
        with pytest.raises(OSError, match=r"answers.jsonl cannot be written: No space left on device. The answers"):
            one.add(row(1, output="y" * 100))
        assert lines(tmp_path) == [json.dumps(row(0))]
        free[0] = 10_000
        one.add(row(1))
    assert [json.loads(line)["id"] for line in lines(tmp_path)] == IDS[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({**row(0), "id": "law/0"}), r"answers.jsonl:2: no answer to an example of this benchmark"),
        ('{"id": "anatomy/5"}', r"answers.jsonl:2: no answer"),
        ("[]", r"answers.jsonl:2: no answer"),
        (json.dumps(row(1)), r"answers.jsonl:2: a second answer to the example anatomy/1"),
        ("{", r"answers.jsonl:2: not JSON"),
    ],
)
def test_lines_of_others_are_named(tmp_path, line, message):
    (tmp_path / "answers.jsonl").write_text(f"{json.dumps(row(1))}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        Records(tmp_path, IDS)


def test_other_settings_are_refused_by_name(tmp_path):
    folder = tmp_path / "mmlu"
    keep_settings(folder, {"examples": "abc", "limit": None, "stop": ("\n",)})
    keep_settings(folder, {"examples": "abc", "limit": None, "stop": ("\n",)})
    with pytest.raises(ValueError, match=r"mmlu holds answers with other settings \(limit None there, 3 now\): choose"):
        keep_settings(folder, {"examples": "abc", "limit": 3, "stop": ("\n",)})
