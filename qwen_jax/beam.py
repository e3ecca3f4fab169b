"""Apache Beam as qwen_jax starts it: in this process unless a runner is named, and without its log on the screen."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

# In one process: Beam's other direct runners first try to download a program called Prism.
DEFAULT_RUNNER = "FnApiRunner"


def is_local(options: Sequence[str]) -> bool:
    """Whether these options name no runner, so that the pipeline runs in this process."""
    return not any(option.startswith("--runner") for option in options)


@contextlib.contextmanager
def pipeline_of(options: Sequence[str]) -> Iterator[beam.Pipeline]:
    """A pipeline that runs when the block ends.

    Args:
      options: Beam's, as on a command line: "--runner=FlinkRunner". Without a runner among them, this process runs it.
    """
    local = is_local(options)
    options = [*options, f"--runner={DEFAULT_RUNNER}"] if local else list(options)
    # SeqIO logs whole examples (documents of others, thousands of tokens each); Beam's local runner logs its internals.
    levels = {"absl": logging.WARNING} | ({"apache_beam": logging.ERROR} if local else {})
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            yield pipeline
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
