"""Teaches a tiny model which tool to call, and when none, and measures it on tools that it never saw (report 3.4).

    make tool_use
    python tools/tool_use.py --output runs/tool_use

Questions with tools are made by rule. A base model learns to look names up in lists; a chat model is fine-tuned from it
on calls with one tool each, and knows the form but not the choice; from that one, the model that counts is fine-tuned
on traces with up to five tools, some of which need no call. Both chat models answer the same held-out questions, whose
tools are in no training file. Every step is one command, printed before it runs, that works the same on its own; a
second call goes on where the first one was stopped. At the end it draws tool_use.png, writes table.md, and fails if a
claim does not hold:

    before    at most {before:.0%} of the right tools, at least {positive_before:.0%} false positives
    after     at least {after:.0%} of the right tools, at most {positive_after:.0%} false positives
"""

from pathlib import Path

from shown_commands import Step, run, tell

from qwen_jax import files

BEFORE, AFTER = 0.50, 0.90
POSITIVE_BEFORE, POSITIVE_AFTER = 0.50, 0.10
MODELS = ("one_tool", "tools")
BENCHMARKS = ("tool_use", "tool_use_none")
# The model of a rehearsal.
TOY = [f"ModelConfig.{one}" for one in ("num_layers=1", "hidden_size=64", "num_heads=2", "ffn_size=64")]
TOY += ["ModelConfig.vocab_size=640", "TRAIN_STEPS=2", "WARMUP_STEPS=1", "EVAL_BATCHES=1", "BATCH_SIZE=2"]


def steps(folder: Path, seed: int, rehearse: bool, settings: list[str]) -> list[Step]:
    """All commands: data, vocabulary, three trainings, and the measuring of two models."""
    data = folder / "data"
    sizes = ("--count=60", "--one_tool=60", "--texts=200", "--held_out=4") if rehearse else ()
    texts = ("--input", f"{data / 'text.jsonl'}")

    def train(heading: str, recipe: str, name: str, *bindings: str) -> Step:
        places = (f"VOCABULARY={folder / 'vocabulary.tiktoken'}", f"CACHE_DIR={folder / 'cache' / name}")
        names = (*bindings, *places, f"OUTPUT_DIR={folder / name}", f"SEED={seed}", *settings)
        recipes = (f"--gin_file=gin/runs/{recipe}.gin", "--gin_file=gin/hardware/cpu.gin")
        return Step(heading, ("-m", "qwen_jax.train", *recipes, *(f"--gin.{one}" for one in names)))

    def answer(heading: str, name: str) -> Step:
        what = ("--benchmarks", ",".join(BENCHMARKS), "--data_dir", f"{data}", "--chat")
        return Step(
            heading,
            (
                *("-m", "qwen_jax.evaluate", "--checkpoint", f"{folder / name}"),
                *("--output_dir", f"{folder / 'measured' / name}", *what),
            ),
        )

    return [
        Step(
            "questions with tools, of which those to evaluate on have tools of their own",
            ("tools/make_tool_use.py", "--output", f"{data}", f"--seed={seed}", *sizes),
        ),
        Step(
            "a vocabulary for them",
            ("tools/build_tokenizer.py", f"--size={640 if rehearse else 1536}", *texts)
            + (f"--output={folder / 'vocabulary.tiktoken'}",),
        ),
        train(
            "a base model learns to look names up in lists",
            *("tool_base_tiny", "base", f"local_files.pattern={data / 'text.jsonl'}"),
        ),
        train(
            "a chat model learns the form of a call, with one tool in each question",
            *("tool_sft_tiny", "one_tool", f"INITIAL_CHECKPOINT={folder / 'base'}"),
            f"chat_messages.pattern={data / 'one_tool.jsonl'}",
            *(() if rehearse else ("TRAIN_STEPS=100", "EVAL_EVERY=0", "SEQUENCE_LENGTH=640", "BATCH_SIZE=4")),
        ),
        train(
            "from it, the model that chooses learns from traces with up to five tools",
            *("tool_sft_tiny", "tools", f"INITIAL_CHECKPOINT={folder / 'one_tool'}"),
            f"chat_messages.pattern={data / 'train.jsonl'}",
        ),
        answer("held-out questions, before and after", "one_tool"),
        answer("", "tools"),
    ]


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """What was measured of each model: shares of right tools and of false positives, and Rouge-L of the inputs."""
    found = {}
    for name in MODELS:
        chosen, none = (
            files.read_json(folder / "measured" / name / benchmark / "scores.json")["metrics"]
            for benchmark in BENCHMARKS
        )
        found[name] = {
            "selection": chosen["score"] / 100,
            "rouge_l": chosen["mean/rouge_l"],
            "false_positive": none["mean/false_positive"],
        }
    return found


def chance(data: Path) -> float:
    """Share of right tools of a model that calls any of the listed ones with equal probability."""
    rows = [row for _, row in files.read_json_lines(data / "tool_use/exam_plugin_made_react_positive.jsonl")]
    return sum(1 / row["tools"] for row in rows if isinstance(row, dict)) / len(rows)


def claims(found: dict[str, dict[str, float]]) -> list[tuple[str, bool]]:
    """What is claimed, with its figures, and whether it holds."""
    before, after = (found[name] for name in MODELS)
    right, positive = "{:.1%} right tools, {} {:.0%} expected", "{:.1%} false positives, {} {:.0%} expected"
    return [
        (f"before: {right.format(before['selection'], 'at most', BEFORE)}", before["selection"] <= BEFORE),
        (
            f"before: {positive.format(before['false_positive'], 'at least', POSITIVE_BEFORE)}",
            before["false_positive"] >= POSITIVE_BEFORE,
        ),
        (f"after: {right.format(after['selection'], 'at least', AFTER)}", after["selection"] >= AFTER),
        (
            f"after: {positive.format(after['false_positive'], 'at most', POSITIVE_AFTER)}",
            after["false_positive"] <= POSITIVE_AFTER,
        ),
    ]


def table(found: dict[str, dict[str, float]], by_chance: float) -> str:
    """Markdown: a row for each model, and one for a model that takes any tool."""
    lines = ["| model | right tool | Rouge-L of the input | false positives |", "|---|--:|--:|--:|"]
    lines.append(f"| any tool, always | {by_chance:.1%} | – | 100.0% |")
    for name, titled in zip(MODELS, ("one tool in training", "up to five"), strict=True):
        one = found[name]
        lines.append(f"| {titled} | {one['selection']:.1%} | {one['rouge_l']:.3f} | {one['false_positive']:.1%} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, dict[str, float]], by_chance: float, path: Path) -> None:
    """Right tools and false positives of both models, with what chance gives."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    for panel, (key, label) in zip(
        figure.subplots(1, 2), (("selection", "right tool, %"), ("false_positive", "false positives, %")), strict=True
    ):
        for place, name in enumerate(MODELS):
            value = 100 * found[name][key]
            panel.bar(place, value, color=("tab:gray", "tab:blue")[place], width=0.6)
            panel.text(place, value, f"{value:.1f}", ha="center", va="bottom")
        if key == "selection":
            panel.axhline(100 * by_chance, color="black", linestyle=":", linewidth=1)
            panel.text(-0.4, 100 * by_chance, "chance", ha="left", va="bottom", fontsize="small")
        panel.set_xticks(range(2), ["one tool\nin training", "up to\nfive"])
        panel.set_ylabel(label)
        panel.set_ylim(0, 110)
    with files.new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def closing(folder: Path, seconds: float) -> bool:
    """Writes and prints the table, draws the picture, prints the claims; returns whether all hold."""
    found, by_chance = figures(folder), chance(folder / "data")
    files.write_text(folder / "table.md", table(found, by_chance))
    draw(found, by_chance, folder / "tool_use.png")
    print(f"\n== done in {seconds / 60:.1f} minutes\n\n{table(found, by_chance)}")
    held = claims(found)
    for text, true in held:
        print(f"{'holds' if true else 'FAILS'}  {text}")
    print(f"\n{folder / 'tool_use.png'} and table.md beside it; runs: {folder / 'base'}, one_tool and tools beside it")
    print("next: docs/how_to/tools.md")
    return all(true for _, true in held)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 if a claim does not hold."""
    limits = {"before": BEFORE, "after": AFTER, "positive_before": POSITIVE_BEFORE, "positive_after": POSITIVE_AFTER}
    return tell(
        argv,
        __doc__.format(**limits),
        "runs/tool_use",
        lambda given: steps(given.output, given.seed, given.rehearse, TOY if given.rehearse else []),
        lambda given, seconds: closing(given.output, seconds),
    )


if __name__ == "__main__":
    run(main)
