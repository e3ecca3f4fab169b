#!/usr/bin/env bash
# choix gives a finite Bradley-Terry strength to a model that won every comparison, where none exists: the number is where
# the optimizer gave up. And it compares models that were never compared, even indirectly, without a word.
#
# One expects: infinity or an error from every estimator, since the likelihood has no maximum.
# What happens: opt_pairwise returns 8.76 for an unbeaten model after 10 wins, and another number when the same
#   comparisons are repeated 20 times (more data, same rates: the estimate should not move). lsr_pairwise and
#   rank_centrality return NaN and infinity; ilsr_pairwise raises. With two groups that never met, opt_pairwise
#   returns a full ranking of all four.
# Who suffers: bootstrap intervals of Elo or Bradley-Terry over few annotations: some resamples have an unbeaten
#   model, and their arbitrary numbers (or NaN) become the interval's end.
# qwen_jax: `bradley_terry` without a prior refuses data in which wins do not connect all models in both directions (one
#   strongly connected component); the ranking uses a weak prior in the data and in each resample, and marks such a model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'choix==0.4.1' 'numpy==2.4.6' 'scipy==1.17.1'
PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata

import choix
import numpy as np

print("choix", importlib.metadata.version("choix"))
# (winner, loser): 2 beats all, 0 and 1 are equal.
unbeaten = [(2, 0)] * 5 + [(2, 1)] * 5 + [(0, 1)] * 5 + [(1, 0)] * 5
once, repeated = (choix.opt_pairwise(3, unbeaten * times)[2] for times in (1, 20))
with np.errstate(all="ignore"):
    lsr = choix.lsr_pairwise(3, unbeaten)
try:
    ilsr = choix.ilsr_pairwise(3, unbeaten)
except RuntimeError as error:
    ilsr = error
strangers = choix.opt_pairwise(4, [(0, 1)] * 9 + [(1, 0)] + [(2, 3)] * 3 + [(3, 2)] * 2)
print(f"strength of the unbeaten: opt_pairwise {once:.2f}, the same data 20 times {repeated:.2f}, lsr {lsr}, ilsr {ilsr!r}")
print("0 and 1 never met 2 and 3, opt_pairwise:", strangers.round(2))
assert np.isfinite(once) and repeated - once > 1, "opt_pairwise no longer gives an arbitrary finite strength"
assert not np.isfinite(lsr).all() and isinstance(ilsr, RuntimeError)
assert np.isfinite(strangers).all() and strangers[0] > strangers[2]
print("as described: a number where there is none")
PYTHON
