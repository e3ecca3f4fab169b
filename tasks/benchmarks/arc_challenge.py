"""ARC-Challenge (Clark et al. 2018): questions of ARC that retrieval and co-occurrence answer wrongly, without shots.

As `arc_easy.py`, with OpenCompass' ARC_c_ppl_a450bd.
"""

from qwen_jax.evaluation.benchmark import Benchmark, Choices, TfdsSet
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from tasks.benchmarks.arc_easy import read_files, read_tfds
from tasks.data_dir import benchmark_files

add_benchmark(
    Benchmark(
        name="arc_challenge",
        title="ARC-c",
        folder="arc",
        files="ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Dev.jsonl",
        shots=0,
        read=lambda folder: read_files(folder, "ARC-Challenge"),
        answers=Choices(normalization="text"),
        tfds=TfdsSet(name="ai2_arc/ARC-Challenge:1.0.0", read=lambda rows: read_tfds(rows, "ARC-Challenge")),
        table="Table 15",
        source="allenai ARC-V1-Feb2018; OpenCompass ARC_c_ppl_a450bd",
        size=295,
    ),
    benchmark_files,
)
