"""Qwen-VL (arXiv 2308.12966): the decoder, in which features of pictures take the place of some embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.models.transformer import InputEmbeddings, Qwen
from qwen_jax.models.vision.config import CHANNELS, VisionConfig
from qwen_jax.models.vision.encoder import VisionEncoder
from qwen_jax.sharding import constrain


def feature_places(tokens: jax.Array, vision: VisionConfig) -> jax.Array:
    """Which feature stands at each position.

    The features of the k-th picture of a row stand at the `num_queries` positions after its k-th `<img>`. Tags keep
    their embeddings. What a row cuts off has no place.

    Args:
      tokens: int32 [batch, length]. `<img>` in it is a control token; text that reads so is not.

    Returns:
      int32 [batch, length]: k * num_queries + index of the feature, or -1 for a token.
    """
    begins = tokens == vision.image_start_id
    positions = jnp.arange(tokens.shape[1])
    begun = jax.lax.cummax(jnp.where(begins, positions, -1), axis=1)
    index = positions - begun - 1
    inside = (begun >= 0) & ~begins & (index < vision.num_queries)
    return jnp.where(inside, (jnp.cumsum(begins, axis=1) - 1) * vision.num_queries + index, -1)


def splice(tokens: jax.Array, features: jax.Array, vision: VisionConfig) -> InputEmbeddings:
    """The features of each row's pictures in their places; gradients go to them.

    Args:
      tokens: int32 [batch, length].
      features: [batch, pictures, num_queries, hidden], those of a row in the order of its text. Rows with fewer
        pictures are padded; a picture beyond them leaves the embeddings of `<imgpad>`.
    """
    batch, pictures, count, hidden = features.shape
    places = feature_places(tokens, vision)
    given = (places >= 0) & (places < pictures * count)
    flat = features.reshape(batch, pictures * count, hidden)
    values = jnp.take_along_axis(flat, jnp.where(given, places, 0)[..., None], axis=1)
    return InputEmbeddings(constrain(values, "batch", "length", "activation_embed"), given)


class QwenVL(Qwen):
    """A decoder with an image encoder, under `vision` among its parameters.

    `model.apply({"params": params}, tokens, images=images)` gives float32 logits. Without pictures, it is the decoder,
    and the encoder does not run.
    """

    def setup(self):
        super().setup()
        assert self.config.vision is not None  # see `build_model`
        self.vision = VisionEncoder(self.config, self.config.vision)

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Features [..., num_queries, hidden] of pictures [..., image_size, image_size, 3]; see `VisionEncoder`."""
        leading = images.shape[:-3]
        features = self.vision(images.reshape(-1, *images.shape[-3:]))
        return features.reshape(*leading, *features.shape[1:])

    @nn.nowrap
    def count_images(self, tokens: jax.Array) -> jax.Array:
        """Number of pictures in rows of tokens int32 [batch, length], float32."""
        assert self.config.vision is not None
        return jnp.sum(tokens == self.config.vision.image_start_id, dtype=jnp.float32)

    def hidden_states(self, tokens, *, images=None, embeddings=None, **arguments) -> jax.Array:
        """As of a decoder, with pictures as in `__call__`."""
        return super().hidden_states(tokens, embeddings=self._spliced(tokens, images, embeddings), **arguments)

    def inference_hidden_states(self, tokens, lengths=None, *, images=None, embeddings=None) -> jax.Array:
        """As of a decoder, with pictures as in `__call__`."""
        return super().inference_hidden_states(tokens, lengths, embeddings=self._spliced(tokens, images, embeddings))

    def __call__(self, tokens, *, images=None, embeddings=None, **arguments) -> jax.Array:
        """The training-mode forward pass.

        Args:
          tokens: int32 [batch, length], with `num_queries` places after each `<img>`.
          images: [batch, pictures, image_size, image_size, 3], the pictures of each row in the order of its text, as
            `VisionEncoder` takes them; rows with fewer are padded. None: no row has one.
          embeddings: features that are known already; not together with `images`.
          arguments: as of a decoder.

        Returns:
          float32 [batch, length, vocab_size].

        Raises:
          ValueError: both images and embeddings are given.
        """
        return super().__call__(tokens, embeddings=self._spliced(tokens, images, embeddings), **arguments)

    def _spliced(self, tokens, images, embeddings: InputEmbeddings | None) -> InputEmbeddings | None:
        if images is not None and embeddings is not None:
            raise ValueError("give images, or the embeddings that take the place of tokens, not both")
        vision = self.config.vision
        assert vision is not None
        if self.is_initializing():
            self.encode_images(jnp.zeros((1, vision.image_size, vision.image_size, CHANNELS)))
        return embeddings if images is None else splice(tokens, self.encode_images(images), vision)
