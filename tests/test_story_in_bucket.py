"""The story of `make demo` with everything in a bucket: the bytes, losses and exit codes of a local disk."""

import signal
import subprocess

import pytest

from qwen_jax import files
from qwen_jax.checkpoints.run_folder import METRICS_FILE, saved_steps
from tests.fakes import text_corpus
from tests.object_stores import FaultProxy, environment, stores  # noqa: F401
from tests.test_hosts import SETTINGS, Job, losses
from tests.warm_python import python

STEPS, SAVED = 60, 20
CHANGES = {"TRAIN_STEPS": STEPS, "CHECKPOINT_EVERY": SAVED, "EVAL_EVERY": 30, "MeshConfig.data": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return text_corpus(tmp_path_factory.mktemp("story"), documents=20)


def story(corpus, place, root, environment_of_commands, saved):
    """All steps in one place; what each of them says or ends with, by its name."""
    told = {}

    def tool(*arguments):
        command = [python(), *(str(one) for one in arguments)]
        done = subprocess.run(command, cwd=root, env=environment_of_commands, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.replace(str(place), "PLACE")

    for path in [*corpus.glob("text/*"), corpus / "small.tiktoken"]:
        files.copy_file(path, place / path.relative_to(corpus).as_posix())
    data = {"local_files.pattern": place / "text", "local_files.validation_share": 0.2}
    flags = [f"--gin.{name}={value}" for name, value in data.items()]
    vocabulary, length = place / "small.tiktoken", SETTINGS["SEQUENCE_LENGTH"]
    told["cache"] = tool(
        *("tools/cache_task.py", "local_files", f"--cache_dir={place / 'cache'}", f"--sequence_length={length}"),
        *(f"--gin.vocabulary_path.path={vocabulary}", *flags),
    )
    settings = {**CHANGES, **data, "CACHE_DIR": place / "cache", "VOCABULARY": vocabulary}
    first = Job(corpus, place / "run", processes=1, **settings)
    saved(first)
    first.processes[0].send_signal(signal.SIGTERM)
    told["code after SIGTERM"] = first.wait()
    (stopped,) = saved_steps(place / "run")[-1:]
    assert SAVED <= stopped < STEPS, first.said(0)
    Job(corpus, place / "run", processes=1, **settings).done()
    told["losses"], told["last"] = losses(place / "run"), saved_steps(place / "run")[-1]
    told["convert"] = tool(
        *("tools/convert_checkpoint.py", "--from", f"orbax:{place / 'run'}", "--to", f"qwen2:{place / 'qwen2'}")
    ).partition("load it:")[0]  # other software does not load it from a bucket
    for name in ("run", "qwen2"):
        speak = ("--prompt=the cat", "--max_new_tokens=8", "--temperature=0")
        told[f"generate {name}"] = tool("-m", "qwen_jax.generate", "--checkpoint", place / name, *speak)
    assert told["generate run"] == told["generate qwen2"] != ""
    for folder in ("cache", "qwen2"):
        found = [path for path in (place / folder).rglob("*") if path.is_file()]
        told |= {f"{folder}/{path.relative_to(place / folder)}": path.read_bytes() for path in found}
    assert (place / "run" / METRICS_FILE).is_file()
    return told


@pytest.fixture(scope="module")
def local(corpus, root, plain_environment, tmp_path_factory):
    """What the steps say and write on a disk."""
    told = story(corpus, tmp_path_factory.mktemp("local"), root, plain_environment, lambda job: job.saved(SAVED))
    assert told["code after SIGTERM"] == [0]
    return told


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_the_story_in_a_bucket_is_that_of_a_disk(scheme, corpus, local, stores, root, plain_environment):  # noqa: F811
    store = stores[scheme]
    with FaultProxy(store) as proxy, environment(store.through(proxy)):
        committed = rf"PUT .*/checkpoints/{SAVED}/commit\.json"
        told = story(
            corpus,
            files.as_path(store.folder()),
            root,
            plain_environment | store.through(proxy),
            lambda job: proxy.wait_for(committed, timeout=3000),
        )
    assert told.keys() == local.keys()
    # The step at which SIGTERM came is in none of them.
    assert [name for name, one in local.items() if told[name] != one] == []
