"""`python -m qwen_jax.evaluate` on a random model and hand-made files in MMLU's layout: scores, kills, mistakes."""

import csv
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qwen_jax import command_line
from qwen_jax import evaluate as command
from qwen_jax.conversion import convert, load_pretrained, load_tokenizer
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.evaluation import records
from qwen_jax.inference import Engine
from qwen_jax.sharding import MeshConfig
from tests.fakes import random_run
from tests.warm_python import python

SIZES = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=1024)
SUBJECTS = ("anatomy", "world_religions")


def write_mmlu(folder, test_rows=3):
    for split, rows in (("dev", 5), ("test", test_rows)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with open(folder / "mmlu" / split / f"{subject}_{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows(
                    [f"{subject} {n}, which <b>?", "one", "two", "three, or 3", "four", "ABCD"[n % 4]]
                    for n in range(rows)
                )
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_mmlu(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("evaluated"), **SIZES)


@pytest.fixture(scope="module")
def unbroken(run, data_dir, tmp_path_factory):
    """The folder of an evaluation that nothing interrupted, on eight devices, and its results."""
    folder = tmp_path_factory.mktemp("unbroken")
    mesh = MeshConfig(fsdp=4, tensor=2)
    found = command.evaluate(
        checkpoint=run, benchmarks=["mmlu"], data_dir=data_dir, output_dir=folder, mesh=mesh, name="tiny|model"
    )
    return folder, found["mmlu"]


def answers(folder, name="mmlu"):
    return {row["id"]: row for row in map(json.loads, (folder / name / "answers.jsonl").read_text().splitlines())}


def same_answers(found, expected):
    assert found.keys() == expected.keys()
    for name, row in found.items():
        likelihoods = pytest.approx(expected[name]["output"]["log_likelihoods"], abs=1e-3)
        assert row | {"output": 0} == expected[name] | {"output": 0}
        assert row["output"] | {"log_likelihoods": likelihoods} == row["output"]


def test_every_answer_is_that_of_a_forward_pass(run, unbroken):
    folder, entry = unbroken
    model, params = load_pretrained(run)
    tokenizer = load_tokenizer(run)
    forward = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)))
    rows = answers(folder)
    assert sorted(rows) == [f"{subject}/{n}" for subject in SUBJECTS for n in range(3)]
    for row in rows.values():
        ids = tokenizer.encode(row["prompt"])
        tokens = jnp.zeros((1, 1024), int).at[0, : len(ids)].set(jnp.asarray(ids))
        blank = float(forward(tokens)[0, len(ids) - 1, ord(" ")])
        after = forward(tokens.at[0, len(ids)].set(ord(" ")))[0, len(ids)]
        expected = [blank + float(after[ord(letter)]) for letter in "ABCD"]
        assert row["output"]["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        assert row["extracted"] == {"choice": max(range(4), key=expected.__getitem__)} and not row["cut_tokens"]
    right = sum(row["right"] for row in rows.values())
    assert entry.metrics["score"] == pytest.approx(100 * right / 6) and entry.examples == 6
    assert [row["id"] for row in entry.wrong] == [name for name in sorted(rows) if not rows[name]["right"]]


def test_results_are_written_beside_the_report(unbroken):
    folder, entry = unbroken
    content = json.loads((folder / "results.json").read_text())
    assert content["benchmarks"]["mmlu"]["metrics"] == entry.metrics
    assert content["benchmarks"]["mmlu"]["left_out"] == {"no files of this subject": 55}
    markdown, page = (folder / "results.md").read_text(), (folder / "results.html").read_text()
    assert "| Qwen-7B (report) | 58.2 |" in markdown and "| **tiny\\|model** |" in markdown
    assert "which &lt;b&gt;?" in page and "<b>" not in page and "<script" not in page


def test_an_export_gives_the_same_answers_and_its_own_folder(run, unbroken, data_dir, tmp_path):
    exported = convert("orbax", run, "qwen2", tmp_path / "qwen2", progress=False)
    given = {"checkpoint": exported, "benchmarks": ["mmlu"], "data_dir": data_dir}
    with pytest.raises(ValueError, match=r"answers with other settings \(weights '\w+' there, '\w+' now\): cho"):
        command.evaluate(output_dir=unbroken[0], **given)
    command.evaluate(output_dir=tmp_path / "out", **given)
    same_answers(answers(tmp_path / "out"), answers(unbroken[0]))


# A job that waits to be killed once it has answered two windows of two examples.
HELD = """
import time
from qwen_jax import command_line, evaluate
from qwen_jax.evaluation import evaluator
from qwen_jax.inference import Engine
evaluator.FIRST_WINDOW, evaluator.next_window = 2, lambda size, seconds: 2
score, calls = Engine.score, []
def held(*arguments):
    calls.append(None)
    while len(calls) > 2:
        time.sleep(0.05)
    return score(*arguments)
Engine.score = held
command_line.run(evaluate.main)
"""


def start_job(program, arguments, environment, processes=2):
    """Processes of one job with a device each."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        address = f"localhost:{one.getsockname()[1]}"
    job = [f"--coordinator_address={address}", f"--num_processes={processes}", "--heartbeat_timeout=300"]
    return [
        subprocess.Popen(
            [python(), *program, *arguments, *job, f"--process_id={index}"],
            env=environment | {"JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def flags(run, data_dir, output):
    return [f"--checkpoint={run}", "--benchmarks=mmlu", f"--data_dir={data_dir}", f"--output_dir={output}"]


def test_a_killed_job_goes_on_without_asking_again(run, data_dir, unbroken, tmp_path, plain_environment, monkeypatch):
    """Two processes share the model until both are killed; one process with eight devices goes on."""
    path = tmp_path / "mmlu" / "answers.jsonl"
    processes = start_job(["-c", HELD], flags(run, data_dir, tmp_path), plain_environment)
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "results.json").exists()
    before = path.read_bytes()
    path.write_bytes(before + b'{"id": "world_religions/1", "subj')
    asked, score = [], Engine.score

    def counted(self, prompts, continuations):
        asked.extend(prompts)
        return score(self, prompts, continuations)

    monkeypatch.setattr(Engine, "score", counted)
    given = {"checkpoint": run, "data_dir": data_dir, "output_dir": tmp_path, "benchmarks": ["mmlu"]}
    found = command.evaluate(**given)["mmlu"]
    assert len(asked) == 8 and path.read_bytes().startswith(before)
    assert found.metrics == unbroken[1].metrics
    same_answers(answers(tmp_path), answers(unbroken[0]))
    # All is answered: nothing is asked, and the results are the same.
    assert command.evaluate(**given)["mmlu"] == found and len(asked) == 8


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(run, data_dir, unbroken, tmp_path, plain_environment):
    processes = start_job(["-m", "qwen_jax.evaluate"], flags(run, data_dir, tmp_path), plain_environment)
    (said, _), (silent, _) = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "| Qwen-7B (report) | 58.2 |" in said and "Table" not in silent
    same_answers(answers(tmp_path), answers(unbroken[0]))


def test_a_full_disk_ends_it_with_one_line_and_loses_nothing(run, data_dir, unbroken, tmp_path, monkeypatch, capsys):
    write, room = os.write, [1200]

    def limited(file, data):
        if file > 2 and room[0] < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data) * (file > 2)
        return write(file, data)

    monkeypatch.setattr(records.os, "write", limited)
    said = failure(flags(run, data_dir, tmp_path), capsys)
    assert "answers.jsonl cannot be written: No space left on device. The" in said and "goes on after them" in said
    monkeypatch.undo()
    kept = answers(tmp_path)
    assert 0 < len(kept) < 6 and sorted(path.name for path in tmp_path.iterdir()) == [".lock", "mmlu", "settings.json"]
    # Full again, when the results are written.
    replace, full = Path.replace, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.md")

    def no_room(self, target):
        if target.name == "results.md":
            raise full
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", no_room)
    assert "No space left on device" in failure(flags(run, data_dir, tmp_path), capsys)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    command.evaluate(checkpoint=run, data_dir=data_dir, output_dir=tmp_path, benchmarks=["mmlu"])
    same_answers(answers(tmp_path), answers(unbroken[0]))


def failure(arguments, capsys) -> str:
    """The one line with which a command ends, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda: command.main(arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]


def no_dev_split(folder):
    shutil.rmtree(folder / "mmlu" / "dev")


def no_file_of_a_subject(folder):
    (folder / "mmlu" / "test" / "anatomy_test.csv").unlink()


def cut_file(folder):
    path = folder / "mmlu" / "test" / "anatomy_test.csv"
    path.write_bytes(path.read_bytes()[:-20])


def no_folder(folder):
    shutil.rmtree(folder / "mmlu")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_dev_split, "anatomy_dev.csv: no such file"),
        (no_file_of_a_subject, "anatomy_test.csv: no such file"),
        (cut_file, "anatomy_test.csv"),
        (no_folder, "mmlu: no such folder; mmlu expects dev/SUBJECT_dev.csv"),
    ],
)
def test_missing_and_cut_files_are_named_before_the_model_is_read(run, tmp_path, monkeypatch, capsys, damage, message):
    damage(write_mmlu(tmp_path / "data"))
    monkeypatch.setattr(command, "load_engine", None)
    assert message in failure(flags(run, tmp_path / "data", tmp_path / "out"), capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_names_and_flags_that_are_wrong(run, data_dir, tmp_path, capsys):
    given = flags(run, data_dir, tmp_path)
    assert "no benchmark has the name 'mlmu': did you mean mmlu? --list shows all" in failure(
        [*given, "--benchmarks=mlmu"], capsys
    )
    assert "limit must be at least 1, found 0" in failure([*given, "--limit=0"], capsys)
    assert "wrong_answers must not be negative, found -1" in failure([*given, "--wrong_answers=-1"], capsys)
    assert "mesh data=1, fsdp=3, sequence=1, tensor=1 does not divide 8" in failure([*given, "--mesh=fsdp=3"], capsys)
    assert "is not a folder: name a run folder" in failure([*given, f"--checkpoint={tmp_path}/none"], capsys)
    for wrong in (["--mesh=rows=2"], ["--benchmarks="]):
        with pytest.raises(SystemExit) as ended:
            command.main([*given, *wrong])
        assert ended.value.code == 2
    assert "expected data=N or fsdp=N or tensor=N or sequence=N" in capsys.readouterr().err


def test_a_checkpoint_with_the_vocabulary_of_another_model_is_named(run, data_dir, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    other = shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
    (ranks,) = other.glob("*.tiktoken")
    more = {b"word%d" % number: 256 + number for number in range(300)}
    write_ranks({bytes([byte]): byte for byte in range(256)} | more, ranks)
    assert "this is the tokenizer of another model" in failure(flags(other, data_dir, tmp_path / "out"), capsys)


def test_a_reward_model_is_named(data_dir, tmp_path, capsys):
    other = random_run(tmp_path, **SIZES, head="scalar")
    assert "is a reward model" in failure(flags(other, data_dir, tmp_path / "out"), capsys)


def test_the_list_says_what_each_benchmark_expects(capsys):
    command.main(["--list"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["name", "title", "shots"]
    (row,) = [row for row in rows if row.startswith("mmlu ")]
    assert "ranked" in row and "mmlu/: dev/SUBJECT_dev.csv and test/SUBJECT_test.csv" in row


def test_chat_models_write_and_other_settings_are_another_folder(run, data_dir, tmp_path):
    given = {"checkpoint": run, "data_dir": data_dir, "output_dir": tmp_path, "benchmarks": ["mmlu"], "limit": 1}
    found = command.evaluate(chat=True, context_length=300, **given)["mmlu"]
    assert (found.examples, found.written, found.limit) == (2, 2, 1) and found.unfinished <= 2
    rows = answers(tmp_path)
    assert all(row["chat"] and row["prompt"].startswith("The following is a multiple-choice") for row in rows.values())
    assert found.cut == sum(row["cut_tokens"] > 0 for row in rows.values()) == 2
    with pytest.raises(ValueError, match=r"\(chat True there, False now; context_length 300 there, 1024 now\)"):
        command.evaluate(**given)
    with pytest.raises(ValueError, match=r"mmlu holds answers with .* \(examples .*; limit 1 there, 2 now\)"):
        command.evaluate(chat=True, context_length=300, **{**given, "limit": 2})
