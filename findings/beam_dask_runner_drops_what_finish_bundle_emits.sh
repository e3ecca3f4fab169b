#!/usr/bin/env bash
# Apache Beam's DaskRunner drops what `finish_bundle` emits; WriteToText ends in success and writes no file.
#
# One expects: what a DoFn emits at the end of a bundle goes to the next step, as with every other runner.
# What happens: the runner takes a bundle's results before it calls `finish_bundle` (apply_dofn_to_bundle of
#   transform_evaluator.py), so they are lost, without a word; the state is DONE. Beam's own sinks hand the names of their
#   files on in this way, so they finish with none. The steps before a sink also run twice.
# Who suffers: whoever takes the one distributed engine that pip can install for a first trial: a job of hours ends well, with
#   nothing to show for it.
# qwen_jax: `tools/cache_task.py` and `tools/curate.py` hand options through to Beam, so `--beam.runner=` may name it. No DoFn
#   of ours emits in `finish_bundle`; files are written by our own steps, and checked for after the pipeline.
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
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

work = sys.argv[1]


def seen(value, name):
    with open(f"{work}/{name}.seen", "a") as file:
        file.write(f"{value}\n")
    return str(value)


def rows(name):
    """Lines that `seen` wrote under a name."""
    return sorted(line.strip() for path in glob.glob(f"{work}/{name}.seen") for line in open(path))


class Emitting(beam.DoFn):
    """Emits each element, and "end" when a bundle does."""

    def process(self, element):
        yield element

    def finish_bundle(self):
        yield WindowedValue("end", 0, (GlobalWindow(),))


def emitted(name, runner):
    """(state, what the step after such a DoFn saw)."""
    pipeline = beam.Pipeline(options=PipelineOptions([f"--runner={runner}"]))
    _ = pipeline | beam.Create(["one"]) | beam.ParDo(Emitting()) | beam.Map(seen, name)
    return pipeline.run().wait_until_finish(), rows(name)


def written(name, runner):
    """(state, number of elements that passed the step before the write, lines in the files written)."""
    pipeline = beam.Pipeline(options=PipelineOptions([f"--runner={runner}"]))
    _ = pipeline | beam.Create(range(5)) | beam.Map(seen, name) | beam.io.WriteToText(f"{work}/{name}.txt")
    state = pipeline.run().wait_until_finish()
    return state, len(rows(name)), sorted(line.strip() for path in glob.glob(f"{work}/{name}.txt*") for line in open(path))


def main():
    print(f"apache-beam {version('apache-beam')}, distributed {version('distributed')}")
    runners = {"local": "FnApiRunner", "dask": "apache_beam.runners.dask.dask_runner.DaskRunner"}
    ends = {name: emitted(f"{name}-ends", runner) for name, runner in runners.items()}
    files = {name: written(f"{name}-files", runner) for name, runner in runners.items()}
    for name in runners:
        print(f"{name}: state, seen after finish_bundle = {ends[name]}; state, passed, written = {files[name]}")
    assert ends["local"][1] == ["end", "one"] and files["local"][2] == ["0", "1", "2", "3", "4"]
    assert ends["dask"] == ("DONE", ["one"]), "the DaskRunner hands on what finish_bundle emits now"
    assert files["dask"][0] == "DONE" and files["dask"][1] >= 5 and files["dask"][2] == [], "the DaskRunner writes now"
    print("as described: what finish_bundle emits is dropped, and no file written")


if __name__ == "__main__":
    main()
PYTHON
cd "$work"
venv/bin/python main.py "$work" 2> log || { tail -5 log; exit 1; }
