"""SeqIO tasks and mixtures. Importing this package registers all of them: each module here is imported in turn."""

import importlib
import pkgutil

import gin

import qwen_jax.data.quick_seqio  # noqa: F401  before a task imports SeqIO

# Interactive: what gin can configure here takes the place of its stand-ins (`qwen_jax.data.task_configuration`).
with gin.config.interactive_mode():
    for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{_module}")
