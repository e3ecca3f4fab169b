"""Rows with pictures in a run: what must go together of settings, data and model."""

from qwen_jax.data.default_tokenizer import default_tokenizer
from qwen_jax.models.config import ModelConfig


def check_images(
    images_per_row: int, sequence_length: int, model: ModelConfig, *, workers: int | None, with_reference: bool
) -> None:
    """Checks that a model can read the pictures of its rows.

    Args:
      workers: processes that decode.
      with_reference: whether another model computes a column of the rows (DPO).

    Raises:
      ValueError: the message names the settings.
    """
    if not isinstance(images_per_row, int) or images_per_row < 0:
        raise ValueError(f"IMAGES_PER_ROW must be an integer of at least 0, found {images_per_row!r}")
    if workers is not None and (not isinstance(workers, int) or workers < 0):
        raise ValueError(f"IMAGE_WORKERS must be an integer of at least 0, or None, found {workers!r}")
    if not images_per_row:
        return
    if model.vision is None:
        raise ValueError(
            f"IMAGES_PER_ROW is {images_per_row}, and the model has no image encoder: set ModelConfig.vision, as "
            "gin/models/vl_7b.gin does, or IMAGES_PER_ROW to 0"
        )
    if with_reference:
        raise ValueError(f"IMAGES_PER_ROW is {images_per_row}, and a reference model reads text alone: set it to 0")
    needed = model.vision.num_queries + 2
    if needed > sequence_length:
        raise ValueError(
            f"a picture takes {needed} tokens (VisionConfig.num_queries, <img> and </img>), more than SEQUENCE_LENGTH "
            f"{sequence_length}: raise it"
        )


def check_image_tokens(name: str, image_tokens: int, model: ModelConfig) -> None:
    """Compares the places of pictures in the data with those that the model fills with features.

    Args:
      name: of the task or mixture.
      image_tokens: places between the tags of a picture; 0: the data have no pictures.

    Raises:
      ValueError: the message has both, and the setting to change.
    """
    vision = model.vision
    if not image_tokens or vision is None:
        return
    if image_tokens != vision.num_queries:
        raise ValueError(
            f"{name} gives each picture {image_tokens} places, and the model fills VisionConfig.num_queries = "
            f"{vision.num_queries}: set NUM_QUERIES to that of the model and cache anew, or choose another model"
        )
    start = default_tokenizer().vision_tokens["<img>"]
    if vision.image_start_id != start:
        raise ValueError(
            f"<img> is {start} in VOCABULARY ({default_tokenizer().path}), and VisionConfig.image_start_id is "
            f"{vision.image_start_id}: set it to {start}"
        )
