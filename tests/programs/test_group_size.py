"""How many devices exchange with each other, in each way that XLA writes it."""

import pytest

from qwen_jax.programs.hlo import Program, group_size

PROGRAM = """HloModule small, num_partitions=8

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %sum = f32[4]{{0}} all-reduce(%x), channel_id=1, {groups}, use_global_device_ids=true, to_apply=%add
}}
"""


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1':(1)2}", 4),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", 4),
        ("replica_groups={}", 8),
    ],
)
def test_group_sizes(groups, size):
    program = Program(PROGRAM.format(groups=groups))
    assert group_size(program.entry.by_name["sum"], program.partitions) == size
