"""The columns of a batch, which loaders and other producers declare and training reads.

Only the first axis of a batch is assumed, the rows. A row of a column has any shape; its axes have the logical names of
`qwen_jax.sharding.RULES`, or None where they are not split over devices.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Column:
    """One array of a batch.

    Attributes:
      name: key in the batch.
      dtype: numpy's name, such as "int32".
      shape: of one row: `(length,)`, `()` for one number, `(2, length)` for a pair, `(images, height, width, 3)`.
      axes: logical names of the axes of a row, as many as `shape` has.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"column {self.name!r} has {len(self.shape)} axes {self.shape} and {len(self.axes)} names {self.axes}: "
                f"name each axis, with None where it is not split"
            )


def token_columns(length: int, packed: bool = False) -> tuple[Column, ...]:
    """The columns of text: tokens, the weight of each as a target, and of packed rows segments and positions.

    Args:
      length: tokens of a row.
      packed: whether attention and positions keep to segments of the row.
    """
    names = {"tokens": "int32", "loss_weights": "float32"}
    names |= {"segment_ids": "int32", "positions": "int32"} if packed else {}
    return tuple(Column(name, dtype, (length,), ("length",)) for name, dtype in names.items())


def image_column(images_per_row: int, size: int) -> Column:
    """The pictures of a row in the order of its text: levels of red, green and blue; zeros where a row has fewer.

    Args:
      images_per_row: pictures of a row.
      size: height and width of a picture.
    """
    return Column("images", "uint8", (images_per_row, size, size, 3), (None, None, None, None))


def row_length(columns: Sequence[Column]) -> int | None:
    """Tokens of the longest axis named `length`; None where no column has one."""
    sizes = [
        size for column in columns for size, axis in zip(column.shape, column.axes, strict=True) if axis == "length"
    ]
    return max(sizes, default=None)


def is_packed(columns: Sequence[Column]) -> bool:
    """Whether rows consist of segments that attention keeps to."""
    return any(column.name == "segment_ids" for column in columns)


def logical_axes(columns: Sequence[Column]) -> dict[str, tuple[str | None, ...]]:
    """Name of each column to the logical names of a row's axes."""
    return {column.name: column.axes for column in columns}
