"""Which room imports which: read off the sources, and off a fresh interpreter."""

import ast
import subprocess
import sys

import pytest

# Room: prefixes of modules that nothing in it may import.
WALLS = {
    "qwen_jax/models": (
        "qwen_jax.data",
        "qwen_jax.training",
        "qwen_jax.inference",
        "qwen_jax.conversion",
        "tasks",
        "tensorflow",
        "seqio",
        "t5",
        "torch",
        "transformers",
        "optax",
        "gin",
    ),
    "qwen_jax/data": (
        "qwen_jax.models",
        "qwen_jax.training",
        "qwen_jax.conversion",
        "qwen_jax.inference",
        "jax",
        "flax",
        "torch",
        "transformers",
    ),
    "qwen_jax/curation": (
        "qwen_jax.models",
        "qwen_jax.training",
        "qwen_jax.conversion",
        "qwen_jax.inference",
        "jax",
        "flax",
        "torch",
        "transformers",
        "tensorflow",
        "seqio",
    ),
    "qwen_jax/training": (
        "qwen_jax.data",
        "qwen_jax.conversion",
        "tasks",
        "tensorflow",
        "seqio",
        "gin",
        "torch",
        "transformers",
    ),
    "qwen_jax/programs": (
        "qwen_jax.models",
        "qwen_jax.data",
        "qwen_jax.training",
        "qwen_jax.inference",
        "jax",
        "flax",
        "tensorflow",
        "gin",
    ),
    "qwen_jax/inference": ("qwen_jax.data", "qwen_jax.training", "qwen_jax.conversion", "tensorflow", "gin", "torch"),
    "qwen_jax/conversion": ("tensorflow", "seqio", "t5", "tasks", "gin", "torch", "transformers"),
}


@pytest.mark.parametrize("room", WALLS)
def test_a_room_does_not_import_what_it_should_not_know(room, root):
    files = sorted((root / room).glob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                assert not any(name == w or name.startswith(w + ".") for w in WALLS[room]), f"{file}: {name}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("qwen_jax.models.transformer", ("tensorflow", "seqio", "torch", "transformers", "gin", "optax")),
        ("qwen_jax.conversion", ("tensorflow", "seqio", "torch", "transformers", "gin")),
        # tensorboardX imports torch where it is installed.
        ("qwen_jax.training.trainer", ("tensorflow", "seqio", "transformers", "gin")),
        ("qwen_jax.generate", ("tensorflow", "seqio", "torch", "transformers", "gin")),
        ("qwen_jax.chat", ("tensorflow", "seqio", "torch", "transformers", "gin")),
        ("qwen_jax.data.tokenizer", ("tensorflow", "seqio", "jax", "torch")),
        ("qwen_jax.data.chatml", ("tensorflow", "seqio", "jax", "torch")),
    ],
)
def test_importing_a_module_does_not_load_what_it_does_not_need(module, absent, plain_environment):
    program = f"import {module}, sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=plain_environment)
    assert done.stdout.strip() == "[]", done.stderr


def test_nothing_but_gin_files_lies_in_the_gin_folder(root):
    assert {path.suffix for path in (root / "gin").rglob("*") if path.is_file()} == {".gin"}
