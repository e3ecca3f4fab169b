"""What is wrong with a bucket, or with what lies there, ends each command with one line and exit code 2."""

import contextlib
import importlib
import re

import gin
import pytest

from qwen_jax import command_line, files
from tests.fakes import random_run
from tests.object_stores import Fault, FaultProxy, environment, s3, stores  # noqa: F401
from tests.test_evaluate import write_mmlu

SIZES = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=1024)
# Name: module, and arguments; AT is the path that is wrong, HERE a local folder with a model, data and texts.
COMMANDS = {
    "train OUTPUT_DIR": ("qwen_jax.train", "--gin_file=gin/runs/pretrain_tiny.gin --gin.OUTPUT_DIR=AT"),
    "train INITIAL_CHECKPOINT": (
        "qwen_jax.train",
        "--gin_file=gin/runs/pretrain_tiny.gin --gin.OUTPUT_DIR=HERE/new --gin.CACHE_DIR=HERE/cache "
        "--gin.INITIAL_CHECKPOINT=AT",
    ),
    "rlhf REWARD_CHECKPOINT": (
        "qwen_jax.rlhf",
        "--gin_file=gin/runs/ppo_tiny.gin --gin.OUTPUT_DIR=HERE/new --gin.INITIAL_CHECKPOINT=HERE/run "
        "--gin.REWARD_CHECKPOINT=AT",
    ),
    "generate": ("qwen_jax.generate", "--checkpoint=AT --prompt=a"),
    "generate --prompts": ("qwen_jax.generate", "--checkpoint=HERE/run --prompts=AT"),
    "chat": ("qwen_jax.chat", "--checkpoint=AT"),
    "serve": ("qwen_jax.serve", "--checkpoint=AT --port=0"),
    "evaluate --checkpoint": (
        "qwen_jax.evaluate",
        "--checkpoint=AT --benchmarks=mmlu --data_dir=HERE/data --output_dir=HERE/scores",
    ),
    "evaluate --data_dir": (
        "qwen_jax.evaluate",
        "--checkpoint=HERE/run --benchmarks=mmlu --data_dir=AT --output_dir=HERE/scores",
    ),
    "evaluate --output_dir": (
        "qwen_jax.evaluate",
        "--checkpoint=HERE/run --benchmarks=mmlu --data_dir=HERE/data --output_dir=AT",
    ),
    "measure_perplexity --texts": ("tools.measure_perplexity", "--checkpoint=HERE/run --texts AT"),
    "rewind": ("tools.rewind", "--run=AT --to=1"),
    "plot_run": ("tools.plot_run", "AT"),
    "convert from": ("tools.convert_checkpoint", "--from orbax:AT --to qwen2:HERE/qwen2"),
    "convert to": ("tools.convert_checkpoint", "--from orbax:HERE/run --to qwen2:AT"),
    "cache_task pattern": (
        "tools.cache_task",
        "local_files --cache_dir=HERE/cache --sequence_length=32 --gin.local_files.pattern=AT",
    ),
    "cache_task --cache_dir": (
        "tools.cache_task",
        "local_files --cache_dir=AT --sequence_length=32 --gin.local_files.pattern=HERE/texts",
    ),
    "curate --input": ("tools.curate", "--input=AT --output=HERE/corpus"),
    "curate --output": ("tools.curate", "--input=HERE/texts --output=AT"),
}
BAD = {
    "no such bucket": ("s3://no-such-bucket/a", None, "there is no bucket s3://no-such-bucket"),
    "no permission": ("s3://s3-bucket-of-tests/a", "403", "s3://s3-bucket-of-tests/[^ ]*: no permission"),
    "another region": ("s3://s3-bucket-of-tests/a", "region", "the bucket is in another region: set AWS_REGION"),
    "no answer": ("s3://s3-bucket-of-tests/a", "503", "s3://s3-bucket-of-tests/[^ ]*: .*503 Service Unavailable"),
    "two slashes": ("s3://s3-bucket-of-tests//a", None, "two slashes in a row"),
    "something else": ("s3://s3-bucket-of-tests/other", None, "s3://s3-bucket-of-tests/other"),
}
# A prefix with files of others is a place to write to as any other.
TAKES_OTHERS = {"evaluate --output_dir", "cache_task --cache_dir"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    random_run(folder, **SIZES)
    write_mmlu(folder / "data", test_rows=1)
    (folder / "texts").mkdir()
    (folder / "texts" / "a.jsonl").write_text('{"text": "a"}\n')
    return folder


# The others differ by their message alone.
OFTEN = ("no such bucket", "no permission")


@pytest.mark.parametrize("bad", [one if one in OFTEN else pytest.param(one, marks=pytest.mark.slow) for one in BAD])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_with_one_line(s3, here, tool, capsys, command, bad):  # noqa: F811
    if bad == "something else" and command in TAKES_OTHERS:
        pytest.skip("it may write beside files of others")
    files.write_text("s3://s3-bucket-of-tests/other/notes.bin", "")
    module, arguments = COMMANDS[command]
    path, kind, message = BAD[bad]
    main = (tool(module[6:]) if module.startswith("tools.") else importlib.import_module(module)).main
    given = arguments.replace("HERE", str(here)).replace("AT ", f"{path} ").split()
    given = [one.removesuffix("AT") + path if one.endswith("AT") else one for one in given]
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(s3))
        stack.enter_context(
            environment(s3.through(proxy) | ({"QWEN_JAX_STORE_RETRY_SECONDS": "0.1"} if kind == "503" else {}))
        )
        proxy.faults = [Fault("", kind, count=1_000_000)] if kind else []
        gin.clear_config()
        stack.callback(gin.clear_config)
        ended = stack.enter_context(pytest.raises(SystemExit))
        command_line.run(lambda: main(given))
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if "error: " in line]
    assert ended.value.code == 2, said
    assert len(errors) == 1 and "Traceback" not in said, said
    assert re.search(message, errors[0]), said


def test_an_object_that_changes_while_it_is_read_is_named(s3, here, tool, capsys):  # noqa: F811
    texts = files.as_path(s3.folder())
    files.copy_file(here / "texts" / "a.jsonl", texts / "a.jsonl")
    with FaultProxy(s3) as proxy, environment(s3.through(proxy)), pytest.raises(SystemExit) as ended:
        proxy.faults = [Fault(r"GET .*/a\.jsonl", "412")]
        given = [f"--checkpoint={here / 'run'}", "--texts", str(texts), "--context_length=16"]
        command_line.run(lambda: tool("measure_perplexity").main(given))
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert ended.value.code == 2 and len(errors) == 1
    assert f"{texts}/a.jsonl: another process has written this object in the meantime" in errors[0]
