# make demo    the main job, start to end, on this machine
# make lineage    all models of Figure 1, from a crawl to chat models and a page about them
# make test    lint and tests
# make pods    what the whole family would take on TPUs and GPUs; compiles what is not recorded, with libtpu or the plugin for CUDA
# make tool_use    a tiny model and the choice of tools, before and after
# make vision    a tiny model learns to see in the three stages of Qwen-VL, measured around each
# make specialists    a code model and a math model from one base model, before and after
# All first make .venv from requirements.txt; a second call reuses it.

VENV := .venv
PY := $(VENV)/bin/python
# The first of these that is Python 3.11 or 3.12; override with PYTHON=…
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: demo lineage pods specialists tool_use vision test test-slow lint types identical findings lock clean

demo: $(VENV)/installed
	$(PY) tools/demo.py

specialists: $(VENV)/installed
	$(PY) tools/specialists.py

tool_use: $(VENV)/installed
	$(PY) tools/tool_use.py

vision: $(VENV)/installed
	$(PY) tools/vision.py

lineage: $(VENV)/installed
	$(PY) tools/lineage.py

pods: $(VENV)/installed
	$(PY) tools/pods.py

# Three workers for two cores: in a good part of the tests one waits for processes, servers and limits of time.
test: $(VENV)/installed-test lint
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/installed-test
	$(PY) -m pytest -m slow

lint: $(VENV)/installed types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Types of qwen_jax/, by ty; configuration in pyproject.toml.
types: $(VENV)/installed
	$(VENV)/bin/ty check --python $(VENV) qwen_jax

# A change of structure changes no number: the working tree against BASE, about two minutes a side.
BASE ?= HEAD
identical: $(VENV)/installed
	$(PY) tools/identical.py --base=$(BASE)

# Surprises of other software, each in an environment of its own (findings/README.md). The output of one that has changed is shown.
findings:
	@changed=0; for script in findings/*.sh; do \
		if output=$$(bash $$script 2>&1); then echo "as described  $$script"; \
		else changed=1; echo "changed       $$script"; echo "$$output" | sed 's/^/    /'; fi; \
	done; exit $$changed

# --no-deps: the lock is complete, and t5 asks for nightlies that would overwrite seqio and tensorflow-datasets.
$(VENV)/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: needs Python 3.11 or 3.12 on the PATH, or make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --quiet --no-deps -r requirements.txt
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@

# torch, for the comparisons in the tests alone, with its own dependencies (its CPU build needs them). Python 3.11 only:
# on 3.12 it would bring gigabytes of CUDA packages, and the tests that need it skip.
$(VENV)/installed-test: $(VENV)/installed
	if $(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		$(PY) -m pip install --disable-pip-version-check --progress-bar off --quiet -c requirements.txt torch==2.13.0; fi
	touch $@

# Needs uv. Resolves for Python 3.11 and 3.12 at once; pyproject.toml holds the overrides.
lock:
	uv pip compile --universal --python-version 3.11 $(addprefix --extra ,vocabulary data t5 curation dask evaluation serve agents images gguf gcs s3 test) \
		--no-emit-package torch --no-annotate --no-header pyproject.toml -o requirements.txt

# runs/ stays: trained models lie there.
clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
