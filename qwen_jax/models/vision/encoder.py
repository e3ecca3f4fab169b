"""The image encoder of Qwen-VL: a vision transformer without class token, and the resampler on it.

The OpenCLIP ViT-bigG of arXiv 2308.12966, as the released visual.py computes it: LayerNorm before each half of a
block, exact GELU, biases everywhere but on the patches.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.models.config import ModelConfig
from qwen_jax.models.kernels import dot_product_attention
from qwen_jax.models.layers import LayerNorm, Projection, weight_init
from qwen_jax.models.transformer import rematerialized
from qwen_jax.models.vision.config import BASE_GRID, CHANNELS, PIXEL_DEVIATION, PIXEL_MEAN, VisionConfig
from qwen_jax.models.vision.positions import resize_positions
from qwen_jax.models.vision.resampler import Resampler
from qwen_jax.sharding import constrain


class EncoderBlock(nn.Module):
    """One pre-norm block: attention between all patches, then an MLP. Letters: b batch, l patches, d width, h heads, n
    query, key and value, k head_dim, f MLP width."""

    config: ModelConfig
    vision: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array, _=None) -> tuple[jax.Array, None]:
        """[batch, patches, width] to the same, for a scan."""
        c, dtype = self.vision, self.config.compute_dtype
        projection = functools.partial(Projection, std=self.config.init_std, dtype=dtype)
        norm = functools.partial(LayerNorm, c.norm_epsilon, dtype)
        # One kernel for all three, by head, is the released order.
        mixed = projection(
            "bld,dhnk->bhnlk",
            (c.width, c.num_heads, 3, c.head_dim),
            ("embed", "heads", None, "head_dim"),
            bias_names=("heads", None, "head_dim"),
            bias_shape=(c.num_heads, 3, 1, c.head_dim),
            name="query_key_value",
        )(norm(name="attention_norm")(x))
        mixed = checkpoint_name(constrain(mixed, "batch", "heads", None, "length", None), "query")
        query, key, value = (mixed[:, :, index] for index in range(3))
        attended = checkpoint_name(dot_product_attention(query, key, value, None), "attention")
        attended = projection(
            "bhlk,hkd->bld",
            (c.num_heads, c.head_dim, c.width),
            ("heads", "head_dim", "embed"),
            bias_names=("norm",),
            name="attention_output",
        )(constrain(attended, "batch", "heads", "length", None))
        x = checkpoint_name(constrain(x + attended, "batch", "length", "activation_embed"), "residual")
        up = projection("bld,df->blf", (c.width, c.mlp_size), ("embed", "mlp"), bias_names=("mlp",), name="up")
        down = projection("blf,fd->bld", (c.mlp_size, c.width), ("mlp", "embed"), bias_names=("norm",), name="down")
        wide = checkpoint_name(up(norm(name="mlp_norm")(x)), "up")
        hidden = constrain(nn.gelu(wide, approximate=False), "batch", "length", "mlp")
        return constrain(x + down(hidden), "batch", "length", "activation_embed"), None


class VisionEncoder(nn.Module):
    """Pictures to features: patches, encoder blocks, resampler, final norm and projection."""

    config: ModelConfig
    vision: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Features of pictures.

        Args:
          pixels: [batch, image_size, image_size, 3] in RGB: uint8, or floats less CLIP's mean, over its deviation. Any
            size that is a multiple of the patch: positions are resized to it.

        Returns:
          [batch, num_queries, hidden] in the compute dtype.

        Raises:
          ValueError: the pictures are not square, or their sides are no multiple of the patch.
        """
        c, dtype, std = self.vision, self.config.compute_dtype, self.config.init_std
        batch, height, width, channels = pixels.shape
        if height != width or height % c.patch_size or channels != CHANNELS:
            raise ValueError(
                f"pictures must be [batch, n, n, {CHANNELS}] with n a multiple of {c.patch_size}, found "
                f"{list(pixels.shape)}: squash them to a square of VisionConfig.image_size"
            )
        grid = height // c.patch_size
        if pixels.dtype == jnp.uint8:
            pixels = (pixels.astype(jnp.float32) / 255 - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_DEVIATION)
        patches = pixels.astype(dtype).reshape(batch, grid, c.patch_size, grid, c.patch_size, channels)
        patches = patches.swapaxes(2, 3).reshape(batch, grid * grid, c.patch_size, c.patch_size, channels)
        # b batch, l patches, i and j rows and columns of a patch, c colors, d width.
        shape, names = (c.patch_size, c.patch_size, channels, c.width), (None, None, None, "embed")
        x = Projection("blijc,ijcd->bld", shape, names, std, dtype, name="patch_embedding")(patches)
        # A patch enters with a norm of about its width: positions of the usual deviation would be lost beside it.
        spread = 1.0 if c.place_start else std
        positions = self.param("positions", weight_init(spread, (None, "embed")), (BASE_GRID**2, c.width))
        x = x + resize_positions(positions, grid).astype(dtype)
        x = LayerNorm(c.norm_epsilon, dtype, name="input_norm")(x)
        x = constrain(x, "batch", "length", "activation_embed")
        block = EncoderBlock if self.is_initializing() else rematerialized(EncoderBlock, self.config.remat)
        x, _ = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config, c, name="layers")(x, None)
        features = Resampler(self.config, c, name="resampler")(x)
        features = LayerNorm(c.norm_epsilon, dtype, name="output_norm")(features)
        shape, names, std = (self.config.hidden_size,) * 2, ("embed", None), self.config.hidden_size**-0.5
        if c.place_start:
            std *= self.config.init_std  # features as large as new embeddings
        out = Projection("bqd,de->bqe", shape, names, std, dtype, name="output")(features)
        return constrain(out, "batch", None, "activation_embed")
