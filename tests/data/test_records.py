"""Tasks on conversations, pairs and prompts, from files to packed rows."""

import json
import logging
import re

import gin
import numpy as np
import pytest
import seqio

import tasks  # noqa: F401  registers them
from qwen_jax.data import cache, chat, packing
from qwen_jax.data.conversations import from_openai
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.data.pairs import PairRows
from qwen_jax.data.queries import QueryRows
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.files import read_json_rows

LENGTH = 96
THREADS = ("--runner=FnApiRunner", "--direct_running_mode=multi_threading", "--direct_num_workers=2")


@pytest.fixture
def configure(vocabulary_file):
    """Sets gin's parameters until the end of the test."""
    gin.clear_config()
    gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))

    def bind(**values):
        for name, value in values.items():
            gin.bind_parameter(name.replace("__", "."), value)

    yield bind
    gin.clear_config()


@pytest.fixture
def tokenizer(vocabulary_file) -> Tokenizer:
    return Tokenizer(vocabulary_file)


def _write(path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _chat(number: int, turns: int = 1) -> dict:
    said = [("user", f"q{number}"), ("assistant", f"a{number}")] * turns
    return {"messages": [{"role": "system", "content": "s"}, *({"role": r, "content": c} for r, c in said)]}


def _segments(loader: ExampleLoader) -> list[tuple[list[int], list[int]]]:
    batch = loader.read(0, len(loader))
    found = []
    for row in range(len(loader)):
        ids = batch["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            place = ids == segment
            assert batch["positions"][row][place].tolist() == list(range(place.sum()))
            found.append((batch["tokens"][row][place].tolist(), batch["loss_weights"][row][place].tolist()))
        assert not batch["loss_weights"][row][ids == 0].any()
    return found


def _files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_conversations_are_whole_segments_and_every_one_is_accounted_for(configure, tokenizer, tmp_path, caplog):
    rows = [_chat(number, 1 + number % 3) for number in range(30)]
    long, endless = _chat(100, 9), _chat(101)
    endless["messages"][2]["content"] = "x " * 200
    bad = [{"messages": []}, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}] * 2
    path = _write(tmp_path / "chat.jsonl", [*rows, bad[0], long, endless, *bad[1:]])
    configure(chat_messages__pattern=path, chat_messages__validation_share=0.0, chat_messages__unusable="leave_out")
    settings = {"cache_dir": tmp_path / "one", "sequence_length": LENGTH, "packing": "whole", "num_shards": 2}
    with caplog.at_level(logging.WARNING, "qwen_jax"):
        (prepared,) = cache.prepare("chat_messages", **settings)
    manifest = prepared.manifest
    encoded = [chat.encode(tokenizer, from_openai(row)) for row in rows]
    whole = chat.encode(tokenizer, from_openai(long))
    cut = int(max(end for end in whole.turn_ends if end <= LENGTH))
    expected = [(one.tokens.tolist(), one.loss_weights.tolist()) for one in encoded]
    expected.append((whole.tokens[:cut].tolist(), whole.loss_weights[:cut].tolist()))
    loader = ExampleLoader(
        "chat_messages", cache_dir=tmp_path / "one", sequence_length=LENGTH, packing="whole", repeat=False
    )
    assert sorted(_segments(loader)) == sorted(expected)
    endless_tokens = len(chat.encode(tokenizer, from_openai(endless)).tokens)
    assert (manifest.packing, manifest.documents) == ("whole", 31)
    assert manifest.truncated == {"cut at the end of a turn": {"documents": 1, "tokens": len(whole.tokens) - cut}}
    assert manifest.left_out == {
        "empty conversation": {"documents": 2, "tokens": 0},
        "empty turn of the assistant": {"documents": 2, "tokens": 0},
        f"no turn ends within {LENGTH} tokens": {"documents": 1, "tokens": endless_tokens},
    }
    logged = [record.getMessage() for record in caplog.records]
    assert f"{path}:31: left out: empty conversation" in logged
    assert f"{path}:34: left out: empty turn of the assistant (message 1)" in logged
    assert any(line.endswith("left out 2 documents, 0 tokens: empty conversation") for line in logged)
    assert any("truncated 1 document, " in line for line in logged)
    # The same bytes, whatever the number of workers.
    cache.prepare("chat_messages", **settings | {"cache_dir": tmp_path / "two"}, beam_options=THREADS)
    packed = [_files(tmp_path / name / "chat_messages" / f"packed-{LENGTH}-whole") for name in ("one", "two")]
    assert packed[0] == packed[1]


def test_bad_rows_stop_with_their_place(configure, tmp_path):
    path = _write(tmp_path / "chat.jsonl", [_chat(0), {"messages": [{"role": "root", "content": "x"}]}])
    configure(chat_messages__pattern=path, chat_messages__validation_share=0.0)
    wanted = (
        (
            f"{path}:2: unknown role (message 0: 'root' is none of .*): correct the row, or leave such rows out, "
            "counted, with chat_messages.unusable = 'leave_out'"
        )
        .replace("(", r"\(")
        .replace(")", r"\)")
    )
    with pytest.raises(ValueError, match=wanted):
        cache.prepare("chat_messages", cache_dir=tmp_path / "cache", sequence_length=LENGTH, packing="whole")
    assert not (tmp_path / "cache" / "chat_messages").exists()
    # A row of another layout is never left out.
    _write(tmp_path / "chat.jsonl", [_chat(0), {"text": "x"}])
    configure(chat_messages__unusable="leave_out")
    with pytest.raises(ValueError, match=f"{path}:2: expected an object with a list 'messages', found text"):
        cache.prepare("chat_messages", cache_dir=tmp_path / "cache", sequence_length=LENGTH, packing="whole")


def test_nothing_usable_at_all_is_an_error_with_the_reasons(configure, tmp_path):
    path = _write(tmp_path / "chat.jsonl", [{"messages": []}] * 3)
    configure(chat_messages__pattern=path, chat_messages__validation_share=0.0, chat_messages__unusable="leave_out")
    message = "no document of task chat_messages is left in split 'train': left out 3 documents, 0 tokens: empty"
    with pytest.raises(ValueError, match=message):
        cache.prepare(
            "chat_messages", cache_dir=tmp_path / "cache", sequence_length=LENGTH, splits=("train",), packing="whole"
        )


def test_pairs_are_never_parted(configure, tokenizer, tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": "bad" * (1 + n % 4)} for n in range(40)]
    rows += [{"prompt": "q", "chosen": "x " * 60, "rejected": "y"}, {"prompt": "q", "chosen": "x", "rejected": "x"}]
    path = _write(tmp_path / "pairs.jsonl", rows)
    configure(
        preference_pairs__pattern=path,
        preference_pairs__validation_share=0.0,
        preference_pairs__unusable="leave_out",
        preference_pairs__system="s",
    )
    (prepared,) = cache.prepare("preference_pairs", cache_dir=tmp_path, sequence_length=LENGTH, packing="whole")
    too_long = len(PairRows(system="s").encode(rows[40], tokenizer).tokens)
    assert prepared.manifest.documents == 40 and prepared.manifest.left_out == {
        "equal sides": {"documents": 1, "tokens": 0},
        f"longer than {LENGTH} tokens": {"documents": 1, "tokens": too_long},
    }
    loader = ExampleLoader(
        "preference_pairs", cache_dir=tmp_path, sequence_length=LENGTH, packing="whole", repeat=False, seed=3
    )
    batch = loader.read(0, len(loader))
    found = []
    for tokens, weights, ids in zip(batch["tokens"], batch["loss_weights"], batch["segment_ids"], strict=True):
        assert ids.max() % 2 == 0
        for chosen in range(1, ids.max() + 1, 2):
            answers = [tokens[(ids == side) & (weights == 1)].tolist() for side in (chosen, chosen + 1)]
            found.append(tuple(tokenizer.decode(ids) for ids in answers))
    assert sorted(found) == sorted((f"{r['chosen']}<|im_end|>", f"{r['rejected']}<|im_end|>") for r in rows[:40])
    with pytest.raises(ValueError, match="cannot be packed by 'concat'"):
        cache.prepare("preference_pairs", cache_dir=tmp_path, sequence_length=LENGTH)


def test_prompts_are_packed_one_a_row_with_their_answers(configure, tokenizer, tmp_path):
    rows = [{"prompt": f"{n} + 1?"} | ({"answer": n + 1} if n % 2 else {}) for n in range(12)]
    path = _write(tmp_path / "queries.jsonl", rows)
    configure(queries__pattern=path, queries__validation_share=0.0, queries__system="s")
    (prepared,) = cache.prepare("queries", cache_dir=tmp_path, sequence_length=64, packing="padded")
    assert prepared.manifest.records == 12
    loader = ExampleLoader("queries", cache_dir=tmp_path, sequence_length=64, packing="padded", repeat=False)
    batch = loader.read(0, 12)
    found = []
    for tokens, weights, ids in zip(batch["tokens"], batch["loss_weights"], batch["segment_ids"], strict=True):
        assert (weights == (ids == 1)).all()
        found.append((tokens[ids == 1].tolist(), tokenizer.decode(tokens[ids == 2].tolist())))
    wanted = [
        (QueryRows("s").encode({"prompt": r["prompt"]}, tokenizer).tokens.tolist(), str(r.get("answer", "")))
        for r in rows
    ]
    assert sorted(found) == sorted(wanted)


def test_seqio_reads_the_same_features(configure, tmp_path):
    """The task's own pipeline, without our packing."""
    path = _write(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    configure(preference_pairs__pattern=path, preference_pairs__validation_share=0.0)
    dataset = seqio.get_mixture_or_task("preference_pairs").get_dataset(
        sequence_length=None, split="train", shuffle=False, use_cached=False
    )
    (example,) = dataset.as_numpy_iterator()
    assert example["segment_lengths"].dtype == np.int32 and example["segment_lengths"].sum() == len(example["targets"])
    assert example["loss_weights"].dtype == np.int32 and example["source"] == f"{path}:1".encode()


def test_another_mask_is_another_cache(configure, tmp_path):
    path = _write(tmp_path / "chat.jsonl", [_chat(n) for n in range(4)])
    configure(chat_messages__pattern=path, chat_messages__validation_share=0.0)
    settings = {"cache_dir": tmp_path, "sequence_length": LENGTH, "packing": "whole", "splits": ("train",)}
    cache.prepare("chat_messages", **settings)
    configure(chat_messages__loss_on="report")
    with pytest.raises(ValueError, match="another corpus .loss_on released; now: report.*delete that folder"):
        cache.prepare("chat_messages", **settings)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"n": 1},\n {"n": 2}]'),
        ("b.json", '{"n": 1}\n{"n": 2}\n'),
        ("c.jsonl", '\ufeff{"n": 1}\n\n{"n": 2}'),
    ],
)
def test_arrays_and_lines_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = list(read_json_rows(tmp_path / name))
    assert [row for _, row in rows] == [{"n": 1}, {"n": 2}]
    assert all(re.fullmatch(rf".*{name}(:\d|: item \d)", where) for where, _ in rows)


def test_a_damaged_array_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"n": 1},')
    with pytest.raises(ValueError, match=r"a\.json: not JSON: Expecting"):
        list(read_json_rows(tmp_path / "a.json"))


@pytest.mark.parametrize(
    "task",
    ["chat_messages", "chat_sharegpt", "preference_pairs", "hh_rlhf", "stanford_shp", "openai_summaries", "queries"],
)
def test_a_task_without_files_says_where_to_name_them(configure, task):
    with pytest.raises(ValueError, match=rf"set {task}\.pattern = 'FOLDER OR GLOB' in a gin file"):
        seqio.get_mixture_or_task(task).source.list_shards("train")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ({"chat_messages__loss_on": "all"}, "loss_on is 'all': it must be one of released, report"),
        ({"chat_messages__unusable": "skip"}, "chat_messages.unusable is 'skip': it must be 'stop', or 'leave_out'"),
    ],
)
def test_misspelt_options(configure, tmp_path, binding, message):
    configure(chat_messages__pattern=_write(tmp_path / "a.jsonl", [_chat(0)]), **binding)
    with pytest.raises(ValueError, match=message):
        seqio.get_mixture_or_task("chat_messages").source.list_shards("train")


def test_columns_of_the_files_of_each_packing(tmp_path):
    for name in packing.PACKINGS:
        names = [column.name for column in packing.columns_for(600, 8, name)]
        assert ("segment_ids" in names) == packing.has_segments(name) == (name != "concat")


def test_the_mask_is_shown_for_conversations_pairs_and_prompts(configure, tool, vocabulary_file, tmp_path, capsys):
    files = {
        "chat_messages": [{"messages": []}, _chat(7, 2)],
        "preference_pairs": [{"prompt": "q", "chosen": "good", "rejected": "bad"}],
        "queries": [{"prompt": "6 * 7?", "answer": 42}],
    }
    shown = {}
    for task, rows in files.items():
        path = _write(tmp_path / f"{task}.jsonl", rows)
        settings = {"pattern": path, "validation_share": 0.0, "unusable": "leave_out", "system": "s"}
        settings |= {"loss_on": "report"} if task == "chat_messages" else {}
        bindings = [f"--gin.{task}.{name}={value}" for name, value in settings.items()]
        tool("inspect_task").main([task, f"--gin.vocabulary_path.path={vocabulary_file}", *bindings])
        shown[task] = capsys.readouterr().out
    start, end = "⟪<|im_start|>⟫", "⟪<|im_end|>⟫"
    system = f"{start}system\ns{end}\n"
    turn = f"{start}user\nq7{end}\n{start}assistant\n⟦a7{end}⟧\n"
    assert f"{system}{turn}{turn}" in shown["chat_messages"]
    assert re.search(r"left out: +1: empty conversation", shown["chat_messages"])
    asked = f"{system}{start}user\nq{end}\n{start}assistant\n"
    for number, answer in ((1, "good"), (2, "bad")):
        header = rf"--- segment {number}: \d+ tokens\n"
        assert re.search(header + re.escape(f"{asked}⟦{answer}{end}⟧\n"), shown["preference_pairs"])
    assert f"⟦{system}{start}user\n6 * 7?{end}\n{start}assistant\n⟧\n--- segment 2: 2 tokens\n42\n" in shown["queries"]


def test_a_packed_row_is_shown_by_segments(configure, tool, vocabulary_file, tmp_path, capsys):
    path = _write(tmp_path / "chat.jsonl", [_chat(n) for n in range(3)])
    configure(chat_messages__pattern=path, chat_messages__validation_share=0.0)
    cache.prepare("chat_messages", cache_dir=tmp_path, sequence_length=256, packing="whole", splits=("train",))
    where = [f"--cache_dir={tmp_path}", "--sequence_length=256", "--packing=whole", "--num_examples=1"]
    tool("inspect_task").main(["chat_messages", *where, f"--gin.vocabulary_path.path={vocabulary_file}"])
    shown = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"--- segment (\d):", shown)] == [1, 2, 3]
    lengths = [int(length) for length in re.findall(r"--- (?:segment \d|filling): (\d+) tokens", shown)]
    assert len(lengths) == 4 and sum(lengths) == 256


def test_the_table_of_cache_task_says_what_is_missing(configure, tool, vocabulary_file, tmp_path, capsys):
    path = _write(tmp_path / "chat.jsonl", [_chat(0), _chat(1, 9), {"messages": []}])
    tool("cache_task").main(
        [
            "chat_messages",
            f"--cache_dir={tmp_path / 'cache'}",
            f"--sequence_length={LENGTH}",
            "--packing=whole",
            "--splits=train",
            f"--gin.chat_messages.pattern={path}",
            "--gin.chat_messages.validation_share=0",
            "--gin.chat_messages.unusable=leave_out",
            f"--gin.vocabulary_path.path={vocabulary_file}",
        ]
    )
    shown = capsys.readouterr().out
    assert re.search(r"\n    truncated 1 document, \d+ tokens: cut at the end of a turn\n", shown)
    assert "    left out 1 document, 0 tokens: empty conversation\n" in shown


def test_the_tools_know_every_packing(tool):
    assert tool("task_arguments").PACKINGS == tuple(packing.PACKINGS)
