"""SeqIO is imported without Keras, which is still there for who uses it."""

import subprocess
import sys


def test_tasks_load_no_keras_until_it_is_used(root, plain_environment):
    program = """
import sys
import tasks
import tensorflow as tf
import tensorflow_text
loaded = ("keras.src", "sklearn", "pandas", "matplotlib")
assert not [name for name in loaded if name in sys.modules]
print(tf.keras.optimizers.Adam.__name__, tensorflow_text.keras.layers.ToDense.__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, env=plain_environment
    )
    assert done.stdout == "Adam ToDense\n", done.stderr
