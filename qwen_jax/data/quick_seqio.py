"""SeqIO and TensorFlow, imported without Keras: modules of this project take them from here.

TensorFlow imports Keras at its end, and the layers of tensorflow-text do so again. Keras imports scikit-learn, pandas
and matplotlib where they are installed: together half of the time of `import tensorflow`, for something that no task
uses. `tf.keras` and `tensorflow_text.keras` are still there; they are imported when they are first used.
"""

import importlib
import sys
import types

_EAGER = "keras.src.optimizers"  # TensorFlow goes on without it
_LAYERS = "tensorflow_text.python.keras"


class _Later(types.ModuleType):
    """The module of `_LAYERS`, which is imported when something of it is used."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        sys.modules.pop(_LAYERS, None)
        vars(self).update(vars(importlib.import_module(_LAYERS)))
        return getattr(self, name)


if "tensorflow" not in sys.modules:
    sys.modules[_EAGER] = None  # ty: ignore[invalid-assignment]  importing it raises ImportError
    try:
        importlib.import_module("tensorflow")
    finally:
        del sys.modules[_EAGER]
sys.modules.setdefault(_LAYERS, _Later(_LAYERS))

import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

__all__ = ["seqio", "tf"]
