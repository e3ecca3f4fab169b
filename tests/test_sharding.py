"""The mesh: which device lies where, also in several slices; and the rule table."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from qwen_jax.sharding import MESH_AXES, RULES, MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """All that arranging asks of a device."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def slices_of(count, size, platform="tpu"):
    """Devices listed in turns, as nothing promises that a job lists them slice by slice."""
    devices = [FakeDevice(index, index // size, platform) for index in range(count * size)]
    return devices[::2] + devices[1::2]


def slice_indices(mesh):
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


def test_the_axes_multiply_to_the_devices_and_one_takes_the_rest():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, sequence=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}
    assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.devices()]


def test_only_replicas_of_the_parameters_lie_in_different_slices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, tensor=2), slices_of(2, 8, "gpu"))
    indices = slice_indices(mesh)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "sequence": 1, "tensor": 2}
    for replica in indices:
        assert len(np.unique(replica)) == 1
    # Neighboring replicas share a slice as far as it reaches.
    np.testing.assert_array_equal(indices[:, 0, 0, 0], [0, 0, 1, 1])


def test_parameters_do_not_span_slices():
    with pytest.raises(ValueError, match="data=1.*2 slices.*multiple of 2"):
        make_mesh(MeshConfig(), slices_of(2, 4))


def test_of_gpus_a_slice_is_a_node_and_parameters_may_span_it():
    mesh = make_mesh(MeshConfig(fsdp=-1, tensor=2), slices_of(2, 4, "gpu"))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    # What exchanges most stays within a node.
    np.testing.assert_array_equal(slice_indices(mesh)[0, :, 0, :], [[0, 0], [0, 0], [1, 1], [1, 1]])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3), "does not divide 8 device"),
        (MeshConfig(data=-1), "at most one"),
        (MeshConfig(0), "at least 1"),
        (MeshConfig(fsdp=2, sequence=2), "sequence=2.*does not divide 8"),
        (MeshConfig(fsdp="eight"), "an integer"),
        (MeshConfig(fsdp=8.0), "an integer"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_the_rules_speak_of_the_axes_of_the_mesh_and_name_each_once():
    for name, axes in RULES.items():
        axes = (axes,) if isinstance(axes, str) else axes or ()
        assert set(axes) <= set(MESH_AXES) and len(set(axes)) == len(axes), name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="descriptions of TPUs need libtpu (jax[tpu])")
def test_two_slices_of_tpus(root):
    """In another process: libtpu is loaded once per machine."""
    program = """
from jax.experimental import topologies
from qwen_jax.sharding import MeshConfig, make_mesh
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2).devices
mesh = make_mesh(MeshConfig(data=2, fsdp=4, sequence=2, tensor=2), devices)
assert [len({device.slice_index for device in copy.flat}) for copy in mesh.devices] == [1, 1]
assert {device.slice_index for device in mesh.devices.flat} == {0, 1}
"""
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
