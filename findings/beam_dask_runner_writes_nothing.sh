#!/usr/bin/env bash
# Apache Beam's DaskRunner ends a pipeline with WriteToText in success and writes no file.
#
# One expects: the lines in sharded files, as with the local runner, or an error for what the runner cannot do.
# What happens: the steps before the write run on the Dask workers (twice: 10 passes for 5 elements), the pipeline's state
#   is DONE, and no file appears.
# Who suffers: whoever takes the one distributed engine that pip can install for a first trial: a job of hours ends well, with
#   nothing to show for it.
# qwen_jax: `tools/cache_task.py` and `tools/curate.py` hand options through to Beam, so `--beam.runner=` may name it. Jobs
#   must check after the pipeline that the files they wrote are there (counts, not only the state).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'apache-beam==2.77.0' 'distributed==2026.8.0' 'dask==2026.8.0'
cat > "$work/main.py" <<'PYTHON'
import glob
import sys
from importlib.metadata import version

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

work = sys.argv[1]


def seen(number, name):
    with open(f"{work}/{name}.seen", "a") as file:
        file.write(f"{number}\n")
    return str(number)


def written(name, runner):
    """(state, numbers that passed the step before the write, lines in the files written)."""
    pipeline = beam.Pipeline(options=PipelineOptions([f"--runner={runner}"]))
    numbers = pipeline | beam.Create(range(5)) | beam.Map(seen, name)
    _ = numbers | beam.io.WriteToText(f"{work}/{name}.txt")
    result = pipeline.run()
    state = result.wait_until_finish()
    passed = len(open(f"{work}/{name}.seen").readlines())
    return state, passed, sorted(line.strip() for path in glob.glob(f"{work}/{name}.txt*") for line in open(path))


def main():
    print(f"apache-beam {version('apache-beam')}, distributed {version('distributed')}")
    local = written("local", "FnApiRunner")
    dask = written("dask", "apache_beam.runners.dask.dask_runner.DaskRunner")
    print("local runner: state, passed, written =", local)
    print("DaskRunner:   state, passed, written =", dask)
    assert local[2] == ["0", "1", "2", "3", "4"]
    assert dask[1] >= 5 and dask[2] == [], "the DaskRunner writes now"
    print("as described: success without output")


if __name__ == "__main__":
    main()
PYTHON
cd "$work"
venv/bin/python main.py "$work" 2> log || { tail -5 log; exit 1; }
