"""Benchmarks of the report, one file each; importing this package registers all of them as SeqIO tasks.

Each file reads what its publisher ships, from the folder of its name in the data directory, or the TFDS dataset.
"""

import importlib
import pkgutil

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
