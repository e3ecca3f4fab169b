"""Into how many parts a batch is divided so that it fits on a mesh."""

import dataclasses

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.trainer_config import TrainerConfig


def trainer_config(batch_size, length=16, **changes):
    return TrainerConfig(train_steps=1, batch_size=batch_size, sequence_length=length, **changes)


def test_the_report_s_batch_on_other_numbers_of_devices():
    """What a device computes at once stays, whatever their number is."""
    parts = [
        trainer_config(64, tokens_per_device=64).accumulation(make_mesh(MeshConfig(fsdp=n), jax.devices()[:n]))
        for n in (1, 2, 4, 8)
    ]
    assert parts == [16, 8, 4, 2]


def test_a_number_of_parts_is_taken_whatever_fits():
    mesh = make_mesh(MeshConfig(fsdp=8))
    assert trainer_config(64, tokens_per_device=16, accumulation_steps=2).accumulation(mesh) == 2
    assert trainer_config(64).accumulation(mesh) == 1


def test_long_rows_over_a_sequence_axis():
    """A device has a quarter of each row, and at least one row is computed at once."""
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=4))
    assert trainer_config(8, length=64, tokens_per_device=32).accumulation(mesh) == 2
    assert trainer_config(8, length=64, tokens_per_device=1).accumulation(mesh) == 4


@given(
    st.integers(1, 96),
    st.sampled_from([8, 16, 128]),
    st.integers(1, 600),
    st.sampled_from([(1, 1, 1, 1), (2, 2, 1, 1), (1, 2, 2, 2), (1, 8, 1, 1)]),
)
def test_parts_are_the_fewest_that_fit(rows, length, limit, layout):
    devices = jax.devices()[: layout[0] * layout[1] * layout[2] * layout[3]]
    mesh = make_mesh(MeshConfig(data=layout[0], fsdp=layout[1], sequence=layout[2], tensor=layout[3]), devices)
    ways = layout[0] * layout[1]
    config = trainer_config(rows * ways, length, tokens_per_device=limit)
    parts = config.accumulation(mesh)
    assert rows % parts == 0

    def fits(number):
        return rows % number == 0 and rows // number * ways * length <= limit * len(devices)

    assert fits(parts) or parts == rows
    assert not any(fits(number) for number in range(1, parts))


@given(st.integers(1, 500), st.integers(1, 64), st.floats(0.01, 5), st.integers(1, 400))
def test_epochs_end_a_run_once_every_row_was_read(examples, batch_size, epochs, most):
    config = dataclasses.replace(trainer_config(batch_size), train_steps=most)
    steps = config.within_epochs(epochs, examples).train_steps
    assert config.within_epochs(None, examples) == config
    assert 1 <= steps <= most
    if steps < most:
        assert (steps - 1) * batch_size < epochs * examples <= steps * batch_size


def test_a_number_of_epochs_that_is_none_is_named():
    for wrong in (0, -1.0, "one"):
        with pytest.raises(ValueError, match="EPOCHS must be a positive number"):
            trainer_config(8).within_epochs(wrong, 10)
