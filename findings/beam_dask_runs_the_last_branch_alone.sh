#!/usr/bin/env bash
# Apache Beam's DaskRunner runs the last branch of a pipeline alone, and ends in success.
#
# One expects: two steps that take the same elements are both run, as with every other runner.
# What happens: the runner computes the last of the collections that it has translated, on the assumption that all others lead
#   to it. A step beside it never sees an element. No error, no warning; the state is DONE.
# Who suffers: whoever writes two outputs from one pipeline, such as documents and counts: the first is missing.
# qwen_jax: `qwen_jax.beam.open_engine` gives Beam pipelines of one branch, and `qwen_jax.workers` checks that each piece of
#   work has left its output.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'apache-beam==2.77.0' 'distributed==2026.8.0' 'dask==2026.8.0'
cat > "$work/main.py" <<'PYTHON'
import os
import sys
from importlib.metadata import version

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

work = sys.argv[1]


def touch(number, name):
    open(f"{work}/{name}-{number}", "w").close()


def seen(runner):
    """(state, files that the two branches made)."""
    pipeline = beam.Pipeline(options=PipelineOptions([f"--runner={runner}"]))
    numbers = pipeline | beam.Create([1, 2])
    _ = numbers | "first" >> beam.Map(touch, "first")
    _ = numbers | "second" >> beam.Map(touch, "second")
    state = pipeline.run().wait_until_finish()
    names = sorted(name for name in os.listdir(work) if name.startswith(("first-", "second-")))
    for name in names:
        os.remove(f"{work}/{name}")
    return state, names


def main():
    print(f"apache-beam {version('apache-beam')}, distributed {version('distributed')}")
    local = seen("FnApiRunner")
    dask = seen("apache_beam.runners.dask.dask_runner.DaskRunner")
    print("local runner:", local)
    print("DaskRunner:  ", dask)
    assert local[1] == ["first-1", "first-2", "second-1", "second-2"]
    assert dask == ("DONE", ["second-1", "second-2"]), "the DaskRunner runs both branches now"
    print("as described: the first branch was not run")


if __name__ == "__main__":
    main()
PYTHON
cd "$work"
venv/bin/python main.py "$work" 2> log || { tail -5 log; exit 1; }
