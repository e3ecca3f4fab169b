"""ScienceQA (Lu et al. 2022), questions with a picture of the test split, ranked by letters.

Files of the publisher: `data/scienceqa/problems.json` and `pid_splits.json` (or both beside each other), and pictures
in `test/ID/image.png`. Questions without a picture are left out, as in the released conversion. Prompt, and ranking
by the mean log-likelihood of the letter, as in eval_mm/evaluate_multiple_choice.py.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_object
from qwen_jax.evaluation.vision.prompts import LETTERS, options, pictured
from tasks.data_dir import benchmark_files


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """The questions of the test split."""
    place = folder / "data/scienceqa" if (folder / "data/scienceqa").is_dir() else folder
    problems = json_object(place / "problems.json")
    for name in json_object(place / "pid_splits.json").texts("test"):
        row = Row(f"{problems.where}: item {name}", problems.row(name).fields)
        if row.fields.get("image") is None:
            yield LeftOut(where=row.where, reason="a question without a picture")
            continue
        choices = row.texts("choices")
        hint = row.get("hint", str) or "N/A"
        text = f"Context: {hint}\nQuestion: {row.text('question')}\nOptions: {options(choices)}\nAnswer:"
        yield Example(
            id=name,
            choices=tuple(f" {letter}" for letter in LETTERS[: len(choices)]),
            target=row.one_of("answer", range(len(choices))),
            **pictured(folder / "test" / name / row.text("image"), text),
        )


add_benchmark(
    Benchmark(
        name="scienceqa",
        title="ScienceQA img",
        folder="scienceqa",
        files="problems.json, pid_splits.json and test/ID/image.png",
        shots=0,
        read=read,
        answers=Choices(normalization="tokens", apart=True),
        table="Qwen-VL, Table 4",
        report={"Qwen-VL": 67.1, "Qwen-VL-Chat": 68.2},
        source="lupantech/ScienceQA; QwenLM/Qwen-VL eval_mm/evaluate_multiple_choice.py",
        size=2017,
    ),
    benchmark_files,
)
