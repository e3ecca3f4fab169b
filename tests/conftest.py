"""Eight virtual CPU devices for the sharding tests; set before JAX is imported anywhere."""

import gc
import importlib
import logging
import os
import pathlib
import signal
import sys

from tests import environment

environment.set_up()
# A shell that starts the tests in the background lets them ignore Ctrl-C, and all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
environment.collect_garbage_rarely()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# On a machine that does other things too an example may take any time, and so may making it up.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Files of a few long tests: begun last, one of them would keep a single worker busy at the end.
LONGEST = (
    "test_hosts.py",
    "test_train.py",
    "test_train_images.py",
    "test_images.py",
    "test_gpu_clusters.py",
    "test_add_a_task.py",
    "test_tpu_pods.py",
    "test_curate.py",
)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names bytes by their number: compressed ones hold the time, and all workers must collect the same names."""
    return f"{argname}_of_{len(val)}_bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, the others in their order; `--no-loadscope-reorder` keeps it so."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What the tests import stays: no collection of garbage need walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def plain_environment() -> dict[str, str]:
    """Environment for a command started as a user would: one CPU device."""
    return environment.one_device()


@pytest.fixture(scope="session")
def compiler_environment() -> dict[str, str]:
    """Environment for a command that compiles for TPUs: nothing that the tests set makes other programs of it."""
    return environment.for_compilers()


@pytest.fixture(scope="session")
def tool():
    """Imports a module of tools/ by name."""
    for folder in (ROOT, ROOT / "tools"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module


@pytest.fixture(autouse=True)
def no_log_of_another_test():
    """An entry point that a test has called leaves a log handler that writes to that test's captured output."""
    before = set(logging.root.handlers)
    yield
    for handler in set(logging.root.handlers) - before:
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


@pytest.fixture
def single_device(monkeypatch):
    """JAX names one of the eight virtual devices, as on a user's computer: a program for all takes more time."""
    import jax

    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)


@pytest.fixture
def run_main(capsys, single_device):
    """Runs `qwen_jax.train` in this process (a process each would take minutes), on one device."""
    import gin

    from qwen_jax import command_line, train

    def run(arguments):
        gin.clear_config()
        with pytest.raises(SystemExit) as ended:
            command_line.run(lambda: train.main(arguments))
        return ended.value.code, capsys.readouterr().err

    return run
