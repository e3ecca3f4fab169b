"""Tasks on conversations, pairs and prompts, from files to packed rows."""

import contextlib
import io
import json
import logging
import re
from types import SimpleNamespace

import gin
import numpy as np
import pytest
import seqio

import tasks  # noqa: F401  registers them
from qwen_jax.beam import short_errors
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


@pytest.fixture(scope="module")
def chats(tool, vocabulary_file, tmp_path_factory):
    """Thirty conversations, a long one, one that never fits and four bad rows, cached by the tool."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [_chat(number, 1 + number % 3) for number in range(30)]
    long, endless = _chat(100, 9), _chat(101)
    endless["messages"][2]["content"] = "x " * 200
    bad = [{"messages": []}, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}] * 2
    path = _write(folder / "chat.jsonl", [*rows, bad[0], long, endless, *bad[1:]])
    settings = {"pattern": path, "validation_share": 0.0, "unusable": "leave_out"}
    arguments = [
        "chat_messages",
        f"--cache_dir={folder / 'cache'}",
        f"--sequence_length={LENGTH}",
        "--packing=whole",
        "--num_shards=2",
        f"--gin.vocabulary_path.path={vocabulary_file}",
        *(f"--gin.chat_messages.{name}={value}" for name, value in settings.items()),
    ]
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("qwen_jax").addHandler(handler)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            tool("cache_task").main(arguments)
    finally:
        logging.getLogger("qwen_jax").removeHandler(handler)
        gin.clear_config()
    return SimpleNamespace(
        path=path,
        cache=folder / "cache",
        settings={f"chat_messages__{name}": value for name, value in settings.items()},
        rows=rows,
        long=long,
        endless=endless,
        logged=logged,
        shown=shown.getvalue(),
    )


def test_conversations_are_whole_segments_and_every_one_is_accounted_for(chats, tokenizer):
    encoded = [chat.encode(tokenizer, from_openai(row)) for row in chats.rows]
    whole = chat.encode(tokenizer, from_openai(chats.long))
    cut = int(max(end for end in whole.turn_ends if end <= LENGTH))
    expected = [(one.tokens.tolist(), one.loss_weights.tolist()) for one in encoded]
    expected.append((whole.tokens[:cut].tolist(), whole.loss_weights[:cut].tolist()))
    loader = ExampleLoader(
        "chat_messages", cache_dir=chats.cache, sequence_length=LENGTH, packing="whole", repeat=False
    )
    assert sorted(_segments(loader)) == sorted(expected)
    manifest = packing.Manifest.load(chats.cache / "chat_messages" / f"packed-{LENGTH}-whole" / "train")
    endless_tokens = len(chat.encode(tokenizer, from_openai(chats.endless)).tokens)
    assert (manifest.packing, manifest.documents, len(manifest.shards)) == ("whole", 31, 2)
    assert manifest.truncated == {"cut at the end of a turn": {"documents": 1, "tokens": len(whole.tokens) - cut}}
    assert manifest.left_out == {
        "empty conversation": {"documents": 2, "tokens": 0},
        "empty turn of the assistant": {"documents": 2, "tokens": 0},
        f"no turn ends within {LENGTH} tokens": {"documents": 1, "tokens": endless_tokens},
    }


def test_what_is_missing_is_logged_with_its_place_and_shown_in_the_table(chats):
    assert f"{chats.path}:31: left out: empty conversation" in chats.logged
    assert f"{chats.path}:34: left out: empty turn of the assistant (message 1)" in chats.logged
    assert any(line.endswith("left out 2 documents, 0 tokens: empty conversation") for line in chats.logged)
    assert re.search(r"\n    truncated 1 document, \d+ tokens: cut at the end of a turn\n", chats.shown)
    assert "    left out 2 documents, 0 tokens: empty conversation\n" in chats.shown


def test_packed_bytes_do_not_depend_on_the_number_of_workers(chats, configure, tmp_path):
    configure(**chats.settings)
    settings = {"sequence_length": LENGTH, "packing": "whole", "num_shards": 2, "beam_options": THREADS}
    cache.prepare("chat_messages", cache_dir=tmp_path, **settings)
    packed = [_files(folder / "chat_messages" / f"packed-{LENGTH}-whole") for folder in (chats.cache, tmp_path)]
    assert packed[0] == packed[1]


def test_a_packed_row_is_shown_by_segments(chats, tool, vocabulary_file, capsys):
    where = [f"--cache_dir={chats.cache}", f"--sequence_length={LENGTH}", "--packing=whole", "--num_examples=99"]
    tool("inspect_task").main(["chat_messages", *where, f"--gin.vocabulary_path.path={vocabulary_file}"])
    several = 0
    for example in capsys.readouterr().out.split("--- example ")[1:]:
        numbers = [int(number) for number in re.findall(r"--- segment (\d):", example)]
        lengths = [int(length) for length in re.findall(r"--- (?:segment \d|filling): (\d+) tokens", example)]
        if numbers:
            several += 1
            assert numbers == list(range(1, len(numbers) + 1)) and sum(lengths) == LENGTH
    assert several > 5


def test_another_mask_is_another_cache(chats, configure):
    configure(**chats.settings, chat_messages__loss_on="report")
    with pytest.raises(ValueError, match="another corpus .loss_on released; now: report.*delete that folder"):
        cache.prepare("chat_messages", cache_dir=chats.cache, sequence_length=LENGTH, packing="whole")


def _read(task: str) -> list[dict]:
    with short_errors():
        dataset = seqio.get_mixture_or_task(task).get_dataset(
            sequence_length=None, split="train", shuffle=False, use_cached=False
        )
        return list(dataset.as_numpy_iterator())


def test_bad_rows_stop_with_their_place(configure, tmp_path):
    path = _write(tmp_path / "chat.jsonl", [_chat(0), {"messages": [{"role": "root", "content": "x"}]}])
    configure(chat_messages__pattern=path, chat_messages__validation_share=0.0)
    with pytest.raises(ValueError) as error:
        _read("chat_messages")
    assert str(error.value).startswith(f"{path}:2: unknown role (message 0: 'root' is none of system, user, ")
    wanted = ": correct the row, or leave such rows out, counted, with chat_messages.unusable = 'leave_out'"
    assert str(error.value).endswith(wanted)
    # A row of another layout is never left out.
    _write(tmp_path / "chat.jsonl", [_chat(0), {"text": "x"}])
    configure(chat_messages__unusable="leave_out")
    with pytest.raises(ValueError, match=f"{path}:2: expected an object with a list 'messages', found text"):
        _read("chat_messages")


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
    (example,) = _read("preference_pairs")
    assert example["segment_lengths"].dtype == np.int32 and example["segment_lengths"].sum() == len(example["targets"])
    assert example["loss_weights"].dtype == np.int32 and example["source"] == f"{path}:1".encode()


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


def test_the_tools_know_every_packing(tool):
    assert tool("task_arguments").PACKINGS == tuple(packing.PACKINGS)


def test_the_public_comparisons_are_mixed_by_their_sizes():
    mixture = seqio.get_mixture_or_task("preference_public")
    assert {task.name for task in mixture.tasks} == {"hh_rlhf", "stanford_shp", "openai_summaries"}
    assert set(mixture.rate_per_task_name.values()) == {seqio.mixing_rate_num_examples}
