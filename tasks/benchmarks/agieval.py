"""AGIEval (Zhong et al. 2023): examinations of people in English and Chinese, 21 sets, without shots.

Files as in the publisher's repository: `data/v1/SET.jsonl`, with or without the folders (passage, question, options,
label or answer). As in OpenCompass' agieval_mixed_e33d83, with which the report's table was made: its introductions and
hints; base models rank the letters of sets with one answer, and write the others in at most 1,024 tokens, of which the
first run of letters counts, or the expression in the first paragraph, compared as mathematics and not as a string as
there. Seven questions of gaokao-mathqa with several right letters, and one of jec-qa-kd with none, which no answer gets
right there, are left out; one label of jec-qa-ca ends in "。", which is dropped. Macro average over the sets, and
OpenCompass' groups. TFDS has no AGIEval.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from qwen_jax.evaluation import extraction, mathematics
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, Generation, LeftOut
from qwen_jax.evaluation.benchmark_tasks import add_benchmark
from qwen_jax.evaluation.rows import Row, json_rows
from tasks.data_dir import benchmark_files

_CHINESE = "以下是一道{}，请选择正确的答案。".format
_ENGLISH = "The following is a {} question. Please select the correct answer.".format
INTRODUCTIONS = {
    **{
        f"gaokao-{name}": _CHINESE(f"中国高考{subject}选择题")
        for name, subject in (
            ("chinese", "语文"),
            ("english", "英语"),
            ("geography", "地理"),
            ("history", "历史"),
            ("biology", "生物"),
            ("chemistry", "化学"),
            ("physics", "物理"),
            ("mathqa", "数学"),
        )
    },
    "logiqa-zh": _CHINESE("中国公务员考试题"),
    "jec-qa-kd": _CHINESE("中国司法考试基础知识题"),
    "jec-qa-ca": _CHINESE("中国司法考试案例分析题"),
    "gaokao-mathcloze": "以下是一道中国高考数学填空题，请填入正确的答案。",
    "lsat-ar": _ENGLISH("LSAT Analytical Reasoning"),
    "lsat-lr": _ENGLISH("LSAT Logical Reasoning"),
    "lsat-rc": _ENGLISH("LSAT Reading Comprehension"),
    "logiqa-en": _ENGLISH("Logic Reasoning"),
    "sat-math": _ENGLISH("SAT Math"),
    "sat-en": _ENGLISH("SAT English"),
    "sat-en-without-passage": _ENGLISH("SAT English"),
    "aqua-rat": _ENGLISH("AQUA-RAT"),
    "math": "The following is a Math question. Please give the correct answer.",
}
CHINESE = [
    name for name in INTRODUCTIONS if name.startswith("gaokao") or name in ("logiqa-zh", "jec-qa-kd", "jec-qa-ca")
]
SEVERAL = ("gaokao-physics", "jec-qa-kd", "jec-qa-ca")
CLOZE = ("gaokao-mathcloze", "math")
FIVE = ("lsat-ar", "lsat-lr", "lsat-rc", "aqua-rat")


def answer(text: str, example: Example) -> str | None:
    """The first run of letters that a text has, or the number or expression of its first paragraph; None: neither."""
    text = extraction.without_thinking(text)
    if example.extra["set"] in CLOZE:
        # The prompt ends with these words, or the same in Chinese.
        return extraction.mathematical("The answer is " + text.strip().split("\n\n")[0])
    found = re.search("[A-D]+", text)
    return found[0] if found else None


def is_right(found: str, example: Example) -> bool:
    """Whether letters are all right ones and no others, or an expression has the right value."""
    if example.extra["set"] in CLOZE:
        return mathematics.same(found, example.target)
    return found == example.target


def example(row: Row, name: str, index: int) -> Example | LeftOut:
    """One question of a set.

    Raises:
        ValueError: the row is not as published.
    """
    passage = row.fields.get("passage") or ""
    ready = f"{INTRODUCTIONS[name]}\n{passage}{row.text('question')}"
    hint = "答案是：" if name in CHINESE else "The answer is "
    given = {"id": f"{name}/{index}", "subject": name, "extra": {"set": name}}
    if name in CLOZE:
        return Example(prompt=ready + hint, target=row.text("answer"), **given)
    letters = "ABCDE" if name in FIVE else "ABCD"
    ready = "\n".join([ready, *row.texts("options", len(letters)), hint])
    if name in SEVERAL:
        label = "".join(row.get("label", (str, list))).removesuffix("。")
        if not label:
            return LeftOut(where=row.where, reason="no right letter is given")
        if not set(label) <= set(letters):
            raise row.error(f"letters {letters} in 'label', found {label!r}")
        return Example(prompt=ready + " ", target=label, **given)
    if re.fullmatch("[A-E]([ ,]*[A-E])+", row.text("label")):
        return LeftOut(where=row.where, reason="several right letters in a set with one")
    return Example(prompt=ready, choices=tuple(letters), target=letters.index(row.one_of("label", letters)), **given)


def read(folder: Path) -> Iterator[Example | LeftOut]:
    """The questions of the sets that are there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a row is not as published.
    """
    folder = folder / "data/v1" if (folder / "data/v1").is_dir() else folder
    if not any((folder / f"{name}.jsonl").is_file() for name in INTRODUCTIONS):
        raise FileNotFoundError(f"{folder}: no file of any set; expected {AGIEVAL.files}")
    for name in INTRODUCTIONS:
        file = folder / f"{name}.jsonl"
        if not file.is_file():
            yield LeftOut(where=str(file), reason="no file of this set")
            continue
        for index, row in enumerate(json_rows(file)):
            yield example(row, name, index)


AGIEVAL = Benchmark(
    name="agieval",
    title="AGIEval",
    folder="agieval",
    files="data/v1/SET.jsonl",
    shots=0,
    read=read,
    answers=Choices(),
    written=Generation(max_new_tokens=1024, extract={"choice": answer}, judge=is_right),
    groups={
        "Chinese": CHINESE,
        "English": [name for name in INTRODUCTIONS if name not in CHINESE],
        "Gaokao": [name for name in INTRODUCTIONS if name.startswith("gaokao")],
    },
    average="subjects",
    table="Table 15",
    source="ruixiangcui/AGIEval; OpenCompass agieval_mixed_e33d83",
    size=8261,
)
add_benchmark(AGIEVAL, benchmark_files)
