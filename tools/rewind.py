"""Returns a run to an earlier checkpoint, and skips a span of its data.

    python tools/rewind.py --run runs/tiny --to 200 --skip_examples 1600

The run then goes on with its usual command. Nothing is deleted: later checkpoints and the metrics as they were lie in
`rewound_1`, `rewound_2`, … of the run's folder, and `rewinds.json` there lists all rewinds.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qwen_jax.checkpoints.rewind import rewind
from qwen_jax.checkpoints.run_folder import read_config
from qwen_jax.command_line import path_argument, run
from qwen_jax.files import locked


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=path_argument, help="OUTPUT_DIR of a stopped run")
    parser.add_argument("--to", required=True, type=int, metavar="STEP", help="step of one of its checkpoints")
    parser.add_argument(
        "--skip_examples",
        type=int,
        default=0,
        metavar="N",
        help="examples to skip after that step (steps times BATCH_SIZE; default: %(default)s)",
    )
    parser.add_argument(
        "--stream", default="train", metavar="NAME", help="data stream of these examples (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if not arguments.run.is_dir():
        raise ValueError(f"--run {arguments.run}: no such folder")
    read_config(arguments.run)  # the lock is a file: none in a folder that is no run
    with locked(arguments.run):
        made = rewind(arguments.run, arguments.to, arguments.skip_examples, arguments.stream)
    start, stop = made.skipped
    passed = f"passes over examples {start:,} to {stop - 1:,}" if stop > start else f"goes on with example {start:,}"
    print(
        f"{arguments.run} goes on after step {made.to_step} (was {made.from_step}) and {passed}; what came after lies "
        f"in {arguments.run / made.folder}. Start the usual command."
    )


if __name__ == "__main__":
    run(main)
