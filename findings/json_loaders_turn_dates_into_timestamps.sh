#!/usr/bin/env bash
# pyarrow.json, and with it `datasets.load_dataset("json")`, turns a column of strings that look like dates into timestamps:
# the answer "2020-05-17" of a benchmark is read as a datetime, and its text is lost.
#
# One expects: a JSON string stays a string; JSON has no dates.
# What happens: pyarrow infers timestamp[s] when every string of a column (in the first block, of 1 MB) looks like
#   ISO 8601. str() of the value is "2020-05-17 00:00:00", which no exact match finds. One other string in the
#   column and all stay text, so it depends on the subset that is loaded, or on --limit.
# Who suffers: question answering by exact match over local JSON lines, through lm-eval's `dataset_path: json` too.
# qwen_jax: reads JSON lines with Python's json (`data/sources.py`, `curation/readers.py`) and is not affected. Benchmark
#   loaders must do so, too, and tasks written for lm-eval must name `features`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'pyarrow==25.0.1' 'datasets==5.2.0'
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" 2> "$work/log" <<'PYTHON'
import json
import sys

import datasets
import pyarrow
import pyarrow.json

print(f"pyarrow {pyarrow.__version__}, datasets {datasets.__version__}")


def loaded(name, answers):
    """The answers as pyarrow.json and as datasets give them back, of a file of JSON lines."""
    path = f"{sys.argv[1]}/{name}.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"question": "When?", "answer": answer}) + "\n" for answer in answers)
    arrow = pyarrow.json.read_json(path)["answer"].to_pylist()
    return [str(x) for x in arrow], [str(x) for x in datasets.load_dataset("json", data_files=path, split="train")["answer"]]


dates = ["2020-05-17", "1999-12-31 23:59:00"]
mixed = [*dates, "in spring"]
of_dates, of_mixed = loaded("dates", dates), loaded("mixed", mixed)
print("answers", dates, "are read as", of_dates)
print("answers", mixed, "are read as", of_mixed)
assert of_dates[0][0] == "2020-05-17 00:00:00" and of_mixed[0] == mixed, "pyarrow.json keeps strings now"
assert of_dates[1][0] == "2020-05-17 00:00:00" and of_mixed[1] == mixed, "datasets keeps strings now"
print("as described: strings became timestamps")
PYTHON
