#!/usr/bin/env bash
# Apache Beam discards an option it does not know: --runer=FlinkRunner runs the whole pipeline in the local process, and
# says so only in one warning of the logger apache_beam.options.pipeline_options.
#
# One expects: an unknown option is an error, as a bad value is: --direct_num_workers=2x ends the program with exit code 2.
# What happens: misspelt options, abbreviations ("--run=FlinkRunner") and left-over words are dropped. A program that turns Beam's
#   logging down, as most do because the local runner is loud, shows nothing at all.
# Who suffers: a job meant for a cluster runs on the launching machine; --machine_typ or --num_wrkers are never applied.
# qwen_jax: `qwen_jax/beam.py` suffers from it. It sets the logger apache_beam to ERROR when no runner is named,
#   before it makes PipelineOptions, so `--beam.runer=FlinkRunner` runs here in silence.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'apache-beam==2.77.0'
"$work/venv/bin/python" - 2> "$work/log" <<'PYTHON'
import logging

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions

print("apache-beam", beam.__version__)
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("apache_beam.options.pipeline_options").addHandler(handler)


def runner_of(*arguments):
    """The runner that these options choose, and the warnings that they cause."""
    warnings.clear()
    runner = PipelineOptions(list(arguments)).get_all_options(drop_default=True).get("runner")
    return runner, list(warnings)


right, misspelt, short = (runner_of(f"--{name}=FlinkRunner") for name in ("runner", "runer", "run"))
logging.getLogger("apache_beam").setLevel(logging.ERROR)
silent = runner_of("--runer=FlinkRunner")
try:
    PipelineOptions(["--direct_num_workers=2x"]).view_as(DirectOptions)
    bad_value = "accepted"
except SystemExit as error:
    bad_value = f"exit code {error.code}"
print("--runner=FlinkRunner:", right)
print("--runer=FlinkRunner: ", misspelt)
print("--run=FlinkRunner:   ", short)
print("--runer with apache_beam's logger at ERROR:", silent)
print("--direct_num_workers=2x:", bad_value)
assert right[0] == "FlinkRunner" and bad_value == "exit code 2"
assert misspelt[0] == short[0] == silent[0] != "FlinkRunner", "unknown options are no longer dropped"
assert misspelt[1] and not silent[1], "the warning is given otherwise now"
print("as described: unknown options vanish")
PYTHON
