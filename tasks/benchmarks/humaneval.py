"""HumanEval (Chen et al. 2021): 164 Python functions to complete, judged by their tests in the sandbox.

File of the publisher: `HumanEval.jsonl.gz`, or unpacked. A base model continues the bare prompt, without shots, in at
most 512 tokens. Two cuts of its text are reported: `released` as evaluate_humaneval.py (a blank line, or "def "), and
`function`, before the first line that is not of the function. A chat model gets the prompt after the sentence of
evaluate_chat_humaneval.py; of its reply `block` takes the fenced block that defines the function, whole, and `released`
the three regular expressions of that script, which keep the body alone. Where evalplus is installed, its number stands
beside them as `evalplus`. pass@1 of greedy decoding.
"""

from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import code_answers, extraction, programs
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_rows
from tasks.data_dir import benchmark_files


def read(folder: Path) -> Iterator[Example]:
    """All problems."""
    file = folder / "HumanEval.jsonl"
    for row in json_rows(file if file.is_file() else folder / "HumanEval.jsonl.gz"):
        fields = {name: row.text(name) for name in ("prompt", "entry_point", "test")}
        yield Example(
            id=row.text("task_id"),
            prompt=fields["prompt"],
            chat=f"Help me fill the following code.\n{fields['prompt']}",
            target=row.text("canonical_solution"),
            extra=fields,
        )


HUMANEVAL = Benchmark(
    name="humaneval",
    title="HumanEval",
    folder="humaneval",
    files="HumanEval.jsonl.gz",
    shots=0,
    read=read,
    answers=Generation(
        max_new_tokens=512,
        # No line of a function begins so.
        stop=("\nclass ", "\ndef ", "\nif ", "\nprint", "\nassert ", "\n#"),
        extract={
            "released": lambda text, example: programs.humaneval_solution(example.extra, text, "released"),
            "function": lambda text, example: programs.humaneval_solution(example.extra, text, "function"),
        },
        chat_extract={
            rule: lambda text, example, rule=rule: programs.humaneval_answer(
                example.extra, extraction.without_thinking(text), rule
            )
            for rule in code_answers.RULES
        },
        judge=lambda solution, example: programs.judge_humaneval(example.extra, solution).correct,
    ),
    table="Table 2",
    report={
        "Qwen-1.8B": 17.1,
        "Qwen-7B": 29.9,
        "Qwen-14B": 32.3,
        "Code-Qwen-7B": 40.2,
        "Code-Qwen-14B": 45.1,
        "Code-Qwen-7B-Chat": 43.3,
        "Code-Qwen-14B-Chat": 66.4,
    },
    source="openai/human-eval; QwenLM/Qwen eval/evaluate_humaneval.py, eval/evaluate_chat_humaneval.py",
    size=164,
)
add_benchmark(HUMANEVAL, benchmark_files)
