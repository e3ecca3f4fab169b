"""What the project uses of other libraries beyond their stable interfaces: each in one place, each with a canary.

When an upgrade breaks one of these tests, its message names the file to change. Nothing else uses what they check.
"""

import ast
import importlib

import gin
import numpy as np
import pytest

from qwen_jax import gin_internals
from qwen_jax.checkpoints import arrays
from qwen_jax.models.config import ModelConfig

# Prefix of a private or experimental module, to the files that may use it.
PRIVATE = {
    "gin.config": ("qwen_jax/gin_internals.py", "tasks/__init__.py"),
    "gin.config_parser": ("qwen_jax/gin_internals.py",),
    "jax._src": ("qwen_jax/distributed/hosts.py",),
    "jax.experimental.multihost_utils": ("qwen_jax/distributed/preemption.py",),
    "jax.experimental.topologies": ("qwen_jax/hardware.py",),
    "jax.experimental.mesh_utils": ("qwen_jax/sharding.py",),
    "jax.experimental.compilation_cache": ("qwen_jax/compilation_cache.py",),
    "jax.experimental.pallas": ("qwen_jax/models/splash.py",),
    "orbax.checkpoint.experimental": (
        "qwen_jax/checkpoints/manager.py",
        "qwen_jax/checkpoints/bucket.py",
        "qwen_jax/checkpoints/arrays.py",
    ),
}


def used(file):
    """Full dotted names that a file reaches through its imports, such as `jax.experimental.mesh_utils.create_…`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    named = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {one.asname or one.name.partition(".")[0]: one.name if one.asname else one.name.partition(".")[0]
                      for one in node.names}  # fmt: skip
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
            yield from (f"{node.module}.{one.name}" for one in node.names)
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in named:
            yield ".".join([named[node.id], *reversed(parts)])


def sources(root):
    return [file for folder in ("qwen_jax", "tasks", "tools", "benchmarks") for file in (root / folder).rglob("*.py")]


def matches(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def test_private_interfaces_are_used_in_the_files_named_here(root):
    found = {prefix: set() for prefix in PRIVATE}
    for file in sources(root):
        for name in used(file):
            for prefix in PRIVATE:
                if matches(name, prefix):
                    found[prefix].add(str(file.relative_to(root)))
    for prefix, allowed in PRIVATE.items():
        assert found[prefix] == set(allowed), f"{prefix}: used in {found[prefix]}, expected {set(allowed)}"


@pytest.mark.parametrize("prefix", PRIVATE)
def test_every_name_that_is_used_still_exists(root, prefix):
    for path in PRIVATE[prefix]:
        for name in sorted({name for name in used(root / path) if matches(name, prefix)}):
            parts = name.split(".")
            for end in range(len(parts), 0, -1):
                try:
                    thing = importlib.import_module(".".join(parts[:end]))
                    break
                except ModuleNotFoundError:
                    continue
            for attribute in parts[end:]:
                assert hasattr(thing, attribute), f"{path}: this version has no {name}"
                thing = getattr(thing, attribute)


def test_jax_still_has_a_key_value_store_without_devices():
    """qwen_jax/distributed/hosts.py: the state of `jax.distributed`, and the methods of its client."""
    from jax._src import distributed
    from jax._src.lib import _jax

    for attribute in ("client", "coordinator_address", "process_id", "num_processes"):
        assert hasattr(distributed.global_state, attribute), f"qwen_jax/distributed/hosts.py uses {attribute}"
    client = _jax.DistributedRuntimeClient
    for method in ("key_value_set", "key_value_try_get", "key_value_dir_get", "blocking_key_value_get"):
        assert hasattr(client, method), f"qwen_jax/distributed/hosts.py uses {method}"


def test_orbax_still_has_the_policies_of_a_run():
    """qwen_jax/checkpoints/manager.py: what is kept of a run's checkpoints."""
    import orbax.checkpoint.experimental.v1 as ocp

    for name in ("LatestN", "EveryNSteps", "AnyPreservationPolicy"):
        assert hasattr(ocp.training.preservation_policies, name), f"qwen_jax/checkpoints/manager.py uses {name}"
    assert hasattr(ocp.training.save_decision_policies, "FixedIntervalPolicy"), "qwen_jax/checkpoints/manager.py"
    for name in ("checkpoints", "save_checkpointables_async", "wait", "close"):
        assert hasattr(ocp.training.Checkpointer, name), f"qwen_jax/checkpoints/manager.py uses {name}"


def test_orbax_still_lays_out_arrays_as_tensorstore_reads_them(tmp_path):
    """qwen_jax/checkpoints/arrays.py replaces the arrays' data, so the format on disk matters, both ways."""
    config = ModelConfig(vocab_size=8, hidden_size=4, num_layers=2, num_heads=2, ffn_size=4, head_dim=2)
    value = np.arange(24, dtype=np.float32).reshape(6, 4)
    arrays.save_params(tmp_path / "saved", config, {"layers": {"kernel": value}}, None)
    stored = arrays.StoredParams(tmp_path / "saved")
    assert stored.shapes == {"layers/kernel": (6, 4)}, "qwen_jax/checkpoints/arrays.py: names or shapes on disk"
    np.testing.assert_array_equal(stored.read("layers/kernel", slice(1, 3)), value[1:3])
    with arrays.writing_params(tmp_path / "written", config, None, {"layers/kernel": value.shape}) as writer:
        writer.write("layers/kernel", slice(0, 6), value)
    one = arrays.restore_params(tmp_path / "written", {"layers": {"kernel": arrays.jax.ShapeDtypeStruct(
        value.shape, value.dtype, sharding=arrays.SingleDeviceSharding(arrays.jax.devices()[0]))}})  # fmt: skip
    np.testing.assert_array_equal(one["layers"]["kernel"], value)


def canary(size: int = 1, path: "gin.REQUIRED" = None):
    """A configurable of this test."""
    return size, path


def test_gin_still_works_as_gin_internals_takes_it_to():
    """qwen_jax/gin_internals.py, function by function."""
    gin.external_configurable(canary, module="canaries")
    gin.clear_config()
    assert gin_internals.parse_value("(1, 'a')") == (1, "a")
    text = "include 'x.gin'\nSIZE = %gin.REQUIRED\n\na/canary.size = %SIZE\ncanary.path = [@canary, '1']\n"
    include, *found = gin_internals.statements(text, "f.gin")
    assert include == gin_internals.Include("x.gin", 1)
    assert found == [
        gin_internals.Binding("", "SIZE", "", "'%gin.REQUIRED'", 2),
        gin_internals.Binding("a", "canary", "size", "'%SIZE'", 4),
        gin_internals.Binding("", "canary", "path", "['@canary', '1']", 5),
    ]
    with pytest.raises(SyntaxError, match="f.gin"):
        gin_internals.statements("SIZE = \n", "f.gin")
    gin_internals.execute(text.partition("\n")[2], "f.gin")
    bound = gin_internals.bindings()
    assert gin_internals.is_required(bound["SIZE", gin_internals.MACRO]["value"])
    assert gin_internals.macros_in(bound["a", "canaries.canary"]["size"]) == {"SIZE"}
    key = ("a", "canaries.canary", "size")
    assert gin_internals.key_of("a", "canary", "size") == gin_internals.key_of("a", "canaries.canary", "size") == key
    assert gin_internals.key_of("", "SIZE", "") == ("SIZE", gin_internals.MACRO, "value")
    assert gin_internals.key_of(*gin_internals.split_name("a/canary.size")) == key
    assert gin_internals.split_name("SIZE") == ("", "SIZE", "")
    gin_internals.execute("SIZE = 3\nb/canary.size = @a/canary()\n", "g.gin")
    assert gin_internals.resolve(bound["b", "canaries.canary"]["size"])[0] == 3
    assert "canary" in gin_internals.configurable_names()
    assert gin_internals.wrapped("canary") is canary and gin_internals.parameters("canary") == ["size", "path"]
    assert gin_internals.annotation("canary", "size") is None or gin_internals.annotation("canary", "size") is int
    gin.clear_config()
