"""Which room imports which: read off the sources, and off a fresh interpreter."""

import ast
import json
import subprocess
import sys

import pytest

# What only the upper rooms know.
ENTRY_POINTS = (
    "qwen_jax.train",
    "qwen_jax.rlhf",
    "qwen_jax.generate",
    "qwen_jax.chat",
    "qwen_jax.agent",
    "qwen_jax.evaluate",
    "qwen_jax.serve",
    "qwen_jax.serving",
    "qwen_jax.configuration",
)
DATA_LIBRARIES = ("tensorflow", "seqio", "t5", "apache_beam", "tasks")
TORCH = ("torch", "transformers")
# Room (a folder or a file): prefixes of modules that nothing in it may import. Arrows run down, never back up.
WALLS = {
    "qwen_jax/files": ("qwen_jax", "jax", "gin", *DATA_LIBRARIES, *TORCH),
    "qwen_jax/host_memory.py": ("qwen_jax", "jax", "gin", *DATA_LIBRARIES, *TORCH),
    "qwen_jax/beam.py": ("qwen_jax", "jax", "flax", "gin", *TORCH),
    "qwen_jax/workers.py": ("jax", "flax", "gin", *DATA_LIBRARIES, *TORCH),
    "qwen_jax/batch_spec.py": ("qwen_jax", "jax", "flax", "optax", "gin", *DATA_LIBRARIES, *TORCH),
    "qwen_jax/sharding.py": ("qwen_jax", "optax", "gin", *DATA_LIBRARIES, *TORCH),
    "qwen_jax/models": (
        "qwen_jax.data",
        "qwen_jax.curation",
        "qwen_jax.training",
        "qwen_jax.inference",
        "qwen_jax.conversion",
        "qwen_jax.checkpoints",
        "qwen_jax.distributed",
        "qwen_jax.files",
        "optax",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/distributed": (
        "qwen_jax.models",
        "qwen_jax.data",
        "qwen_jax.training",
        "qwen_jax.inference",
        "qwen_jax.conversion",
        "qwen_jax.checkpoints",
        "flax",
        "optax",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/checkpoints": (
        "qwen_jax.data",
        "qwen_jax.training",
        "qwen_jax.inference",
        "qwen_jax.conversion",
        "optax",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/data": (
        "qwen_jax.models",
        "qwen_jax.training",
        "qwen_jax.conversion",
        "qwen_jax.inference",
        "qwen_jax.checkpoints",
        "qwen_jax.distributed",
        "jax",
        "flax",
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/curation": (
        "qwen_jax.models",
        "qwen_jax.training",
        "qwen_jax.conversion",
        "qwen_jax.inference",
        "qwen_jax.checkpoints",
        "qwen_jax.distributed",
        "jax",
        "flax",
        "tensorflow",
        "seqio",
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/training": (
        "qwen_jax.data",
        "qwen_jax.inference",
        "qwen_jax.conversion",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/alignment": (
        "qwen_jax.data",
        "qwen_jax.curation",
        "qwen_jax.conversion",
        "qwen_jax.evaluation",
        "qwen_jax.reference_column",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/programs": (
        "qwen_jax.models",
        "qwen_jax.data",
        "qwen_jax.training",
        "qwen_jax.inference",
        "qwen_jax.conversion",
        "qwen_jax.checkpoints",
        "jax",
        "flax",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/inference": (
        "qwen_jax.data",
        "qwen_jax.training",
        "qwen_jax.conversion",
        "qwen_jax.checkpoints",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/evaluation": (
        "qwen_jax.conversion",
        "qwen_jax.training",
        "qwen_jax.alignment",
        "optax",
        "gin",
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/agents": (
        "qwen_jax.training",
        "qwen_jax.alignment",
        "qwen_jax.conversion",
        "qwen_jax.evaluation",
        "flax",
        "optax",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *ENTRY_POINTS,
    ),
    "qwen_jax/serving": (
        "qwen_jax.training",
        "qwen_jax.alignment",
        "qwen_jax.evaluation",
        "qwen_jax.conversion",
        "qwen_jax.checkpoints",
        "flax",
        "optax",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *(name for name in ENTRY_POINTS if name != "qwen_jax.serving"),
    ),
    "qwen_jax/conversion": (
        "qwen_jax.training",
        "qwen_jax.inference",
        "gin",
        *DATA_LIBRARIES,
        *TORCH,
        *ENTRY_POINTS,
    ),
}


@pytest.mark.parametrize("room", WALLS)
def test_a_room_does_not_import_what_it_should_not_know(room, root):
    files = [root / room] if room.endswith(".py") else sorted((root / room).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                assert not any(name == w or name.startswith(w + ".") for w in WALLS[room]), f"{file}: {name}"


def test_training_knows_a_model_protocol_and_no_decoder_or_metric(root):
    """Only the arithmetic of a decoder's program knows how one is built; only its objective knows what it reports."""
    for file in (root / "qwen_jax/training").glob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        texts = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        assert "Qwen" not in names, file
        assert file.name == "objectives.py" or not texts & {"correct", "accuracy", "perplexity", "bits_per_byte"}, file


# Modules, and packages that importing them must not load.
LIGHT = [
    ("qwen_jax.models.transformer", ("tensorflow", "seqio", "torch", "transformers", "gin", "optax")),
    ("qwen_jax.conversion", ("tensorflow", "seqio", "torch", "transformers", "gin")),
    ("qwen_jax.training.trainer", ("tensorflow", "seqio", "torch", "transformers", "gin")),
    ("qwen_jax.train", ("tensorflow", "seqio", "apache_beam", "torch", "transformers", "matplotlib", "obstore")),
    ("qwen_jax.generate", ("tensorflow", "seqio", "torch", "transformers", "gin")),
    ("qwen_jax.chat", ("tensorflow", "seqio", "torch", "transformers", "gin")),
    ("qwen_jax.serve", ("tensorflow", "seqio", "torch", "transformers", "gin", "openai")),
    ("qwen_jax.agent", ("tensorflow", "seqio", "torch", "transformers", "gin")),
    ("qwen_jax.evaluate", ("tensorflow", "seqio", "torch", "transformers", "gin", "optax")),
    ("qwen_jax.evaluation.perplexity", ("tensorflow", "seqio", "torch", "transformers", "gin", "optax")),
    ("qwen_jax.data.tokenizer", ("tensorflow", "seqio", "jax", "torch")),
    ("qwen_jax.data.pack_cache", ("tensorflow", "seqio", "apache_beam", "jax", "gin", "torch")),
    ("qwen_jax.data.corpora", ("tensorflow", "seqio", "apache_beam", "jax", "gin", "torch")),
    ("qwen_jax.data.chatml", ("tensorflow", "seqio", "jax", "torch")),
    ("qwen_jax.agents.react", ("tensorflow", "seqio", "jax", "torch")),
]
# Imports each of `modules` in a fork: `before`, where JAX is imported first, it is not imported fifteen times.
IMPORT = """
import importlib, json, os, sys
packages, *groups = json.loads(sys.argv[1])
for before, modules in groups:
    for name in before:
        importlib.import_module(name)
    for module in modules:
        process = os.fork()
        if not process:
            importlib.import_module(module)
            print(json.dumps([module, [name for name in packages if name in sys.modules]]), flush=True)
            os._exit(0)
        os.waitpid(process, 0)
"""


@pytest.fixture(scope="module")
def loaded_packages(plain_environment):
    """By module, which of the packages named in LIGHT importing it loads."""
    groups = [[[], []], [["jax", "flax.linen"], []]]
    for module, absent in LIGHT:
        groups["jax" not in absent][1].append(module)
    packages = sorted({name for _, absent in LIGHT for name in absent})
    command = [sys.executable, "-c", IMPORT, json.dumps([packages, *groups])]
    done = subprocess.run(command, capture_output=True, text=True, env=plain_environment)
    return dict(map(json.loads, done.stdout.splitlines())), done.stderr


@pytest.mark.parametrize(("module", "absent"), LIGHT)
def test_importing_a_module_does_not_load_what_it_does_not_need(module, absent, loaded_packages):
    found, errors = loaded_packages
    assert module in found, errors
    assert not set(absent) & set(found[module])


def test_the_sandbox_imports_the_standard_library_and_itself_alone(root):
    for file in (root / "qwen_jax/sandbox").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                own = name == "qwen_jax.sandbox" or name.startswith("qwen_jax.sandbox.")
                assert own or name.partition(".")[0] in sys.stdlib_module_names, f"{file}: {name}"


def test_what_tests_draw_is_the_same_everywhere(root):
    """A generator without a seed, or Pillow's noise, makes a test that fails now and then and cannot be repeated."""
    for file in (root / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                seeded = node.args or called.rpartition(".")[2] not in ("default_rng", "Random", "RandomState")
                drawn = called.endswith(".effect_noise") or called in ("np.random.rand", "np.random.randn")
                assert seeded and not drawn, f"{file}:{node.lineno}: {called} without a seed"


def test_nothing_but_gin_files_lies_in_the_gin_folder(root):
    assert {path.suffix for path in (root / "gin").rglob("*") if path.is_file()} == {".gin"}
