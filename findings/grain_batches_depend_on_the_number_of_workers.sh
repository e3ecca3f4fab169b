#!/usr/bin/env bash
# grain: the same pipeline makes other batches with worker processes than without, and `drop_remainder` drops more of the
# examples the more workers there are.
#
# One expects: mp_prefetch reads ahead and changes nothing else, since grain is deterministic.
# What happens: mp_prefetch gives each of n workers every n-th example and runs all that stands before it there, batch()
#   included. Batches are made of every n-th example and delivered in turn. Each worker has a remainder of its own:
#   of 22 examples in batches of 4, 2 are dropped without workers, 6 with three. A batch() of the MapDataset before
#   to_iter_dataset() is not affected.
# Who suffers: runs that resume on a machine with another number of cores see other batches; small evaluation sets lose
#   examples. The result is deterministic for one number of workers, so no test with a fixed one finds it.
# qwen_jax: `data/loader.py` takes only the shuffle of grain's MapDataset and reads by global index. Loaders of pictures with worker
#   processes must batch by index (or after the workers), as issue 15 asks for data order by global index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'grain==0.2.18' 'numpy==2.4.6'
cat > "$work/main.py" <<'PYTHON'
from importlib.metadata import version

import grain
from absl import flags


def batches(examples, workers, *, by_index=False, drop_remainder=False):
    """Batches of 4 of range(examples), made before the workers deliver."""
    dataset = grain.MapDataset.range(examples)
    if by_index:
        dataset = dataset.batch(4, drop_remainder=drop_remainder).to_iter_dataset()
    else:
        dataset = dataset.to_iter_dataset().batch(4, drop_remainder=drop_remainder)
    if workers:
        dataset = dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=workers))
    return [batch.tolist() for batch in dataset]


def main():
    print("grain", version("grain"))
    flags.FLAGS.mark_as_parsed()  # mp_prefetch refuses to work in a program that does not parse absl's flags
    none, two = batches(16, 0), batches(16, 2)
    print("no workers: ", none)
    print("two workers:", two)
    kept = [sum(map(len, batches(22, workers, drop_remainder=True))) for workers in (0, 3)]
    print(f"of 22 examples, drop_remainder keeps {kept[0]} without workers, {kept[1]} with three")
    by_index = batches(16, 2, by_index=True)
    print("batched by index, two workers:", by_index)
    assert two == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]] != none, "workers make other batches now"
    assert kept == [20, 16] and by_index == none
    print("as described: batches depend on the number of workers")


if __name__ == "__main__":
    main()
PYTHON
"$work/venv/bin/python" "$work/main.py" 2> "$work/log" || { cat "$work/log"; exit 1; }
