#!/usr/bin/env bash
# Apache Beam ignores pipeline options that it does not know: a job with a misspelt --runner runs in this process.
#
# One expects: PipelineOptions(["--runer=FlinkRunner"]) is refused, as argparse refuses it.
# What happens: the option is dropped with a log line at WARNING (the level that programs turn off to be rid of Beam's
#   other warnings); the pipeline runs to its end on the default runner, and the exit code is 0. A hyphen for an
#   underscore (--flink-master) is dropped in the same way. A wrong value of a known option ends the process with
#   SystemExit from within the library.
# Who suffers: a job meant for a cluster occupies one machine; --num_worker=64 changes nothing.
# qwen_jax: `beam.check_options` compares with the options of Beam's classes before anything starts, and names the
#   nearest. (Runners with a job server may know more: an option that resembles none is left to them.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 2>/dev/null 'apache-beam==2.77.0'
"$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import apache_beam as beam
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions, StandardOptions, WorkerOptions

print(f"apache-beam {beam.__version__}")
options = PipelineOptions(["--runer=FlinkRunner", "--flink-master=cluster:8081", "--num_worker=64"])
runner = options.view_as(StandardOptions).runner
master = options.view_as(FlinkRunnerOptions).flink_master
workers = options.view_as(WorkerOptions).num_workers
print(f"runner {runner}, flink_master {master}, num_workers {workers}")
assert (runner, master, workers) == (None, "[auto]", None), "the options are no longer ignored"
seen = []
# The runner within this process, which the default one falls back to, so that nothing is downloaded here.
with beam.Pipeline(runner="FnApiRunner", options=options) as pipeline:
    _ = pipeline | beam.Create([1, 2]) | beam.Map(print, "was seen by this process")
try:
    PipelineOptions(["--direct_num_workers=many"]).get_all_options()
    raise AssertionError("a wrong value no longer ends the process")
except SystemExit as ended:
    print(f"a wrong value: SystemExit({ended.code})")
print("as described: three misspelt options, no error")
PYTHON
