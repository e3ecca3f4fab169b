"""The field `visual` of a config.json of format qwen: sizes of the image encoder (released configuration_qwen.py)."""

import math
from pathlib import Path

from qwen_jax.models.vision.config import VisionConfig

# Ours and theirs. `mlp_ratio` and `output_dim` follow from other sizes.
_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "width",
    "num_layers": "layers",
    "num_heads": "heads",
    "image_start_id": "image_start_id",
}
_RATIO, _QUERIES = "mlp_ratio", "n_queries"
_RELEASED_RATIO = 4.9231


def read_config(path: Path, content: object, hidden_size: int) -> VisionConfig:
    """The sizes in `content`, the value of `visual` in the file `path`.

    Raises:
      ValueError: a field is missing or makes no sense; the message names the file.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path}: visual is {content!r}, expected an object")
    missing = [name for name in (*_FIELDS.values(), _RATIO) if name not in content]
    if missing:
        raise ValueError(f"{path}: visual has no {', '.join(missing)}: is it a whole config.json?")
    if content.get("output_dim", hidden_size) != hidden_size:
        raise ValueError(
            f"{path}: visual.output_dim is {content['output_dim']}, expected the hidden_size {hidden_size}: features "
            "take the place of embeddings"
        )
    values = {ours: content[theirs] for ours, theirs in _FIELDS.items()}
    try:
        mlp_size = int(values["width"] * content[_RATIO])
        return VisionConfig(**values, mlp_size=mlp_size, num_queries=content.get(_QUERIES, VisionConfig.num_queries))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: visual: {error}") from error


def external_config(vision: VisionConfig, hidden_size: int) -> dict:
    """The value of `visual` from which `read_config` makes these sizes."""
    ratio = vision.mlp_size / vision.width
    while int(vision.width * ratio) < vision.mlp_size:
        ratio = math.nextafter(ratio, math.inf)
    if int(vision.width * _RELEASED_RATIO) == vision.mlp_size:
        ratio = _RELEASED_RATIO
    content = {theirs: getattr(vision, ours) for ours, theirs in _FIELDS.items()}
    content |= {_RATIO: ratio, "output_dim": hidden_size}
    if vision.num_queries != VisionConfig.num_queries:
        content[_QUERIES] = vision.num_queries
    return dict(sorted(content.items()))
