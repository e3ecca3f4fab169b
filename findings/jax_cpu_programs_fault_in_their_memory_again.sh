#!/usr/bin/env bash
# On CPU with glibc, a compiled program gets its temporary memory from the system anew at each call, page by page.
#
# One expects: a program that runs a thousand times with the same shapes finds its buffers where it left them.
# What happens: jaxlib takes them from malloc at each call and frees them after it. glibc returns blocks of more than
#   32 MiB to the system at once, and trims the heap below; the next call pays a page fault, and a cleared page, for each
#   4 KiB. With one heap that does not shrink (MALLOC_ARENA_MAX=1, MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_ large) about
#   half of the processes have no such faults; in the others malloc reports the same heap, and the faults stay.
# Who suffers: training and benchmarks on CPUs: in one step of a small decoder 112,000 faults took a fourth of the CPU
#   time, as system time that no profile of the program shows. Ratios between machines and frameworks move with it.
# qwen_jax: `host_memory.keep_freed_memory` sets the same by mallopt before JAX starts its threads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null 'jax[cpu]==0.10.2' 'numpy==2.4.6'
cat > "$work/count.py" <<'PYTHON'
"""The median number of page faults of a call, of a program that needs seven arrays of 9 MB at once."""

import resource

import jax
import jax.numpy as jnp


@jax.jit
def program(x):
    products = [jnp.outer(x, x)]
    for _ in range(6):
        products.append(products[-1] @ products[0])
    return sum((product * products[-1]).sum() for product in products)


x = jnp.linspace(0.0, 1e-3, 1536)
counts = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(counts)[len(counts) // 2])
PYTHON
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" -c 'import jax, platform; print("jax", jax.__version__, *platform.libc_ver())'
default=$("$work/venv/bin/python" "$work/count.py")
echo "faults of a call, settings of glibc as they are: $default"
for try in 1 2 3 4 5 6 7 8 9 10 11 12; do
    kept=$(MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 \
        "$work/venv/bin/python" "$work/count.py")
    echo "faults of a call, one heap that does not shrink: $kept"
    if ((kept < 1000)); then break; fi
done
((default > 10000)) || { echo "the memory of a program is kept now"; exit 1; }
((kept < 1000)) || { echo "the settings do not help any more"; exit 1; }
echo "as described: by default each call faults its memory in again"
