"""What the worker processes of one machine share: importing this reads the model and makes the tables that all need."""

from qwen_jax.curation import language, normalize, quality, stages  # noqa: F401

language.model()
normalize.character_classes()
quality.character_flags()
