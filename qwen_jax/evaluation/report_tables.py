"""Scores in the layout of the report's tables, with its rows beside ours."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.evaluation.benchmark import Benchmark

# Tables of the report with the benchmarks that are their columns, in its order.
LAYOUTS = {
    "Table 2": ("mmlu", "ceval", "gsm8k", "math", "humaneval", "mbpp", "bbh"),
    "Table 10": ("humaneval", "mbpp"),
    "Table 12": ("gsm8k", "math_500", "math401", "math23k"),
    "Table 15": ("cmmlu", "agieval", "gaokao_bench", "arc_easy", "arc_challenge"),
    "Table 16": ("boolq", "commonsenseqa", "natural_questions", "lambada"),
    "Table 17": ("hellaswag", "piqa", "siqa", "ocnli"),
    "Qwen-VL, Table 4": ("nocaps", "flickr30k", "vqav2", "okvqa", "scienceqa"),
    "Qwen-VL, Table 5": ("textvqa", "docvqa"),
    "Qwen-VL, Table 6": ("refcoco", "refcoco_plus", "refcocog"),
    "Qwen-VL, Table 7": ("seed_bench", "mme"),
}
# Tables whose columns are the subject groups of one benchmark.
GROUP_TABLES = {"mmlu": "Table 13", "ceval": "Table 14"}
NOTHING = "–"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Results of one benchmark.

    Attributes:
        metrics: as `benchmark.scores` gives them.
        examples: number of those that were answered; `score` is over these.
        written: number of those that were answered by a text; the others by ranking choices.
        left_out: number of the publisher's rows that are no examples, by reason.
        cut: number of examples whose prompt was cut from the left.
        unfinished: number of texts that the limit of tokens ended.
        limit: only so many examples of each subject were answered; None: all.
        wrong: records of the first wrong answers.
    """

    benchmark: Benchmark
    metrics: Mapping[str, float]
    examples: int
    written: int = 0
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    cut: int = 0
    unfinished: int = 0
    limit: int | None = None
    wrong: Sequence[Mapping[str, Any]] = ()

    @property
    def heading(self) -> str:
        """Title and name: titles of columns, such as Python, are not clear alone."""
        return f"{self.benchmark.title} ({self.benchmark.name})"

    @property
    def score(self) -> str:
        """Score and standard error in percent."""
        return f"{self.metrics['score']:.1f} ± {self.metrics['score_stderr']:.1f}"

    def to_json(self) -> dict[str, Any]:
        """Everything but the benchmark."""
        return {field: getattr(self, field) for field in _STORED}

    @classmethod
    def from_json(cls, benchmark: Benchmark, content: Mapping[str, Any]) -> "Entry":
        """The entry of `to_json`."""
        return cls(benchmark=benchmark, **content)


_STORED = [field.name for field in dataclasses.fields(Entry) if field.name != "benchmark"]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: heading.
        header: names of the columns.
        rows: cells, as many as columns.
        ours: number of rows at the end that are ours.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ours: int = 0


def report_tables(model: str, entries: Mapping[str, Entry], registry: Mapping[str, Benchmark]) -> list[Table]:
    """The tables of the report that have one of these benchmarks, then one of the benchmarks that no table has.

    Args:
        model: name of our row.
        entries: results by name of the benchmark.
        registry: all benchmarks by name.
    """
    layouts = {title: [name for name in names if name in registry] for title, names in LAYOUTS.items()}
    for name, benchmark in registry.items():
        listed = any(name in names for names in layouts.values())
        if benchmark.table and not listed and name not in GROUP_TABLES:
            layouts.setdefault(benchmark.table, []).append(name)
    found = {
        title: _columns_of_benchmarks(title, model, entries, [registry[name] for name in names])
        for title, names in layouts.items()
        if any(name in entries for name in names)
    }
    for name, entry in entries.items():
        if groups := [key for key in entry.metrics if key.startswith("group/")]:
            shown = f"{entry.benchmark.title} by group ({entry.benchmark.shots}-shot)"
            caption = f"{GROUP_TABLES[name]}: {shown}" if name in GROUP_TABLES else shown
            found[caption] = _columns_of_groups(caption, model, entry, groups)
    placed = {name for names in layouts.values() for name in names}
    others = [entry.benchmark for name, entry in entries.items() if name not in placed]
    tables = [found[title] for title in sorted(found, key=place)]
    return tables + ([_columns_of_benchmarks("Not in the report", model, entries, others)] if others else [])


def place(title: str) -> tuple[int, str]:
    """Where a table stands among others: those of the report by number, then those of other papers by name."""
    number = title.removeprefix("Table ").split()[0].removesuffix(":")
    return (int(number) if number.isdigit() else 1000, title)


def _columns_of_benchmarks(
    title: str, model: str, entries: Mapping[str, Entry], benchmarks: Sequence[Benchmark]
) -> Table:
    # A model belongs to the table if the report has it there: most columns have a figure of it.
    columns = [benchmark.report for benchmark in benchmarks if benchmark.report]
    models = dict.fromkeys(name for column in columns for name in column)
    rows = [
        (f"{name} (report)", *(_figure(benchmark.report.get(name)) for benchmark in benchmarks))
        for name in models
        if 2 * sum(name in column for column in columns) > len(columns)
    ]
    ours = (model, *(entries[b.name].score if b.name in entries else NOTHING for b in benchmarks))
    header = ("model", *(f"{benchmark.title} ({benchmark.shots}-shot)" for benchmark in benchmarks))
    return Table(title, header, (*rows, ours), 1)


def _columns_of_groups(caption: str, model: str, entry: Entry, groups: Sequence[str]) -> Table:
    nothing = [NOTHING] * len(groups)
    rows = [(f"{name} (report)", *nothing, _figure(figure)) for name, figure in entry.benchmark.report.items()]
    ours = (model, *(f"{entry.metrics[group]:.1f}" for group in groups), entry.score)
    header = ("model", *(group.removeprefix("group/") for group in groups), "all")
    return Table(caption, header, (*rows, ours), 1)


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def counts_table(entries: Mapping[str, Entry]) -> Table:
    """Every benchmark with its score by each way of extraction, and what was counted."""
    rows = []
    for entry in entries.values():
        benchmark, metrics = entry.benchmark, entry.metrics
        others = {
            key.removeprefix("score_"): value
            for key, value in metrics.items()
            if key.startswith("score_") and key != "score_stderr"
        } | {key.removeprefix("mean/"): value for key, value in metrics.items() if key.startswith("mean/")}
        counted = f"{entry.examples:,}" + (f" of {benchmark.size:,}" if benchmark.size > entry.examples else "")
        if entry.limit is not None:
            each = " of each subject" if any(key.startswith("subject/") for key in metrics) else ""
            counted += f" (first {entry.limit:,}{each})"
        rows.append(
            (
                entry.heading,
                " and ".join(["ranked"] * (entry.written < entry.examples) + ["written"] * (entry.written > 0)),
                str(benchmark.shots),
                entry.score,
                ", ".join(f"{name} {value:.1f}" for name, value in others.items()) or NOTHING,
                counted,
                "; ".join(f"{count:,}: {reason}" for reason, count in entry.left_out.items()) or "0",
                f"{entry.cut:,}",
                f"{metrics['no_answer']:,.0f}" if entry.written else NOTHING,
                f"{entry.unfinished:,}" if entry.written else NOTHING,
            )
        )
    header = ("benchmark", "answers", "shots", "score", "by other extraction", "examples", "rows left out")
    return Table("Counts", (*header, "prompts cut", "no answer found", "ended by the limit"), tuple(rows))


def subjects_table(entry: Entry) -> Table | None:
    """Scores of the subjects of a benchmark; None where it has none."""
    found = {key: value for key, value in entry.metrics.items() if key.startswith("subject/")}
    if not found:
        return None
    rows = tuple((key.removeprefix("subject/"), f"{value:.1f}") for key, value in found.items())
    return Table(f"{entry.heading} by subject", ("subject", "score"), rows)
