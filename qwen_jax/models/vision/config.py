"""The sizes of an image encoder and its resampler."""

import dataclasses
import math

# Positions are learned on this grid and resized to that of the picture.
BASE_GRID = 16
RESAMPLER_HEAD_DIM = 128
CHANNELS = 3
# Of CLIP's training pictures, RGB in [0, 1] (released visual.py).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What fixes the shapes of the encoder and its resampler; defaults are Qwen-VL's (1,935,610,624 parameters).

    Features have the decoder's hidden size. Compute dtype, remat policy and initial weights follow `ModelConfig`.

    Attributes:
      image_size: height and width of a picture in pixels (224 in stage 1 of training, 448 later). No parameter
        depends on it.
      patch_size: height and width of a patch in pixels.
      width: width of the encoder's residual stream.
      num_layers: encoder blocks.
      num_heads: heads of the encoder's attention.
      mlp_size: width inside the encoder's MLP.
      num_queries: features of a picture; a square number. Released: 256.
      norm_epsilon: added to the variance inside LayerNorm.
      place_start: how strongly each feature looks at the patch in its own place before training. 0: as released, where
        that is chance, and a model of billions learns it. Above 0, for small models trained from random weights: the
        resampler's sines are this many times as large, of wavelengths that differ between the cells of a small grid,
        its query and key projections start equal, the encoder's learned positions have a standard deviation of 1, and
        features start as large as embeddings.
      image_start_id: token before the features of a picture, `<img>`; `</img>` is the next one, and `<imgpad>`, which
        stands in the places of the features, the one after that.
    """

    image_size: int = 448
    patch_size: int = 14
    width: int = 1664
    num_layers: int = 48
    num_heads: int = 16
    mlp_size: int = 8192
    num_queries: int = 256
    norm_epsilon: float = 1e-6
    place_start: float = 0.0
    image_start_id: int = 151857

    def __post_init__(self):
        for name in ("image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_size", "num_queries"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"VisionConfig.{name} must be a positive integer, found {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"VisionConfig.image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"VisionConfig.width {self.width} must be a multiple of num_heads {self.num_heads}")
        for name in ("place_start", "norm_epsilon"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"VisionConfig.{name} must be a number of at least 0, found {value!r}")
        if not isinstance(self.image_start_id, int) or self.image_start_id < 0:
            raise ValueError(f"VisionConfig.image_start_id must be the id of a token, found {self.image_start_id!r}")
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ValueError(f"VisionConfig.num_queries must be a square number, found {self.num_queries}")

    @property
    def head_dim(self) -> int:
        """Width of one head of the encoder."""
        return self.width // self.num_heads

    @property
    def query_grid(self) -> int:
        """Queries along each side of their square."""
        return math.isqrt(self.num_queries)

    @property
    def image_end_id(self) -> int:
        """Token after the features of a picture, `</img>`."""
        return self.image_start_id + 1

    @property
    def image_pad_id(self) -> int:
        """Token in the places of the features, `<imgpad>`."""
        return self.image_start_id + 2
