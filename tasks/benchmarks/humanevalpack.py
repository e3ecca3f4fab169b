"""HumanEvalPack (Muennighoff et al. 2023): HumanEval's functions in six languages, written from their description.

A benchmark for each language, as in the report's Table 11: `humanevalpack_python`, `_js`, `_java`, `_go`, `_cpp` and
`_rust`. Files: `LANGUAGE.jsonl`, or the publisher's `LANGUAGE/data/humanevalpack.jsonl`. As bigcode-evaluation-harness'
humanevalsynthesize, a base model continues the prompt without its last line end, up to that task's stop words and to
the end of the function; at most 1,024 tokens (there 2,048 with the prompt). A chat model gets the instruction, a blank
line and the prompt; of its reply the fenced block with the function counts. Programs run in the sandbox, which needs
the language's compiler: where it is missing, judging ends with an error. Problems that need a library which the sandbox
lacks (crates in Rust) are left out. pass@1 of greedy decoding.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction, pack_programs, programs
from qwen_jax.evaluation.benchmark import Benchmark, Example, Generation, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import json_rows
from tasks.data_dir import benchmark_files

LANGUAGES = {"python": "Python", "js": "JavaScript", "java": "Java", "go": "Go", "cpp": "C++", "rust": "Rust"}
STOP = {
    "python": ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\nassert"),
    "go": ("\n//", "\nfunc main(", "struct", "\nfunc"),
}
FIELDS = ("prompt", "declaration", "canonical_solution", "test", "entry_point")


def read(language: str, folder: Path) -> Iterator[Example | LeftOut]:
    """The problems of a language that the sandbox can judge."""
    file = folder / f"{language}.jsonl"
    published = folder / language / "data" / "humanevalpack.jsonl"
    for row in json_rows(file if file.is_file() or not published.is_file() else published):
        fields = {name: row.text(name) for name in FIELDS}
        if missing := pack_programs.missing_library(fields, language):
            yield LeftOut(where=row.where, reason=missing)
            continue
        yield Example(
            id=row.text("task_id"),
            prompt=fields["prompt"].strip(),
            chat=f"{row.text('instruction')}\n\n{fields['prompt'].strip()}",
            target=fields["canonical_solution"],
            extra=fields,
        )


def continued(language: str, text: str, example: Example) -> str:
    """The program of a continuation."""
    text = extraction.cut(text, STOP.get(language, ()))
    return pack_programs.solution(example.extra, language, text)


def answered(language: str, text: str, example: Example) -> str:
    """The program of a chat model's reply."""
    text = extraction.without_thinking(text)
    if language == "python":
        return programs.humaneval_answer(example.extra, text)
    return pack_programs.answer(example.extra, language, text)


def judge(language: str, solution: str, example: Example) -> bool:
    """Whether a program passes the tests.

    Raises:
        ValueError: the language's compiler is not installed.
    """
    verdict = programs.judge_humanevalpack(example.extra, language, solution)
    if not verdict.run:
        raise ValueError(f"{example.id}: {verdict.reason}: install it, or leave humanevalpack_{language} out")
    return verdict.correct


for _language, _title in LANGUAGES.items():
    add_benchmark(
        Benchmark(
            name=f"humanevalpack_{_language}",
            title=_title,
            folder="humanevalpack",
            files=f"{_language}.jsonl or {_language}/data/humanevalpack.jsonl",
            shots=0,
            read=functools.partial(read, _language),
            answers=Generation(
                max_new_tokens=1024,
                stop=STOP.get(_language, ()),
                extract={"program": functools.partial(continued, _language)},
                chat_extract={"program": functools.partial(answered, _language)},
                judge=functools.partial(judge, _language),
            ),
            table="Table 11",
            source="bigcode-project/octopack; bigcode-evaluation-harness humanevalsynthesize",
            size=164,
        ),
        benchmark_files,
    )
