"""MATH-500: the 500 test problems of MATH that Lightman et al. (2023) held out, as in the report's Table 12.

File of the publisher, openai/prm800k: `test.jsonl` with `problem`, `solution`, `answer`, `subject`, `level` and
`unique_id`, and the worked examples of `tasks.benchmarks.math` in `solved.jsonl`. Prompt and comparison as there.
"""

from qwen_jax.evaluation.benchmark import Benchmark
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from tasks.benchmarks import math
from tasks.data_dir import benchmark_files

MATH_500 = Benchmark(
    name="math_500",
    title="MATH-500",
    folder="math_500",
    files="test.jsonl, and solved.jsonl with four worked examples",
    shots=math.SHOTS,
    read=math.read,
    answers=math.ANSWERS,
    table="Table 12",
    report={"Math-Qwen-7B-Chat": 17.2, "Math-Qwen-14B-Chat": 24.2},
    source="openai/prm800k math_splits/test.jsonl; see `math`",
    size=500,
)
add_benchmark(MATH_500, benchmark_files)
