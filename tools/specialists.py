"""Two specialists of one base model, trained and measured on this machine: code (report 4) and mathematics (report 5).

    make specialists
    python tools/specialists.py --output runs/specialists --seeds 3

A base model learns from documentation. From it, the code model goes on with code mixed with that text, and the math
model is fine-tuned on arithmetic made by rule. Bits per byte of code and of text, and arithmetic, are measured before
and after, on what no model was trained on. Every step is one command, printed before it runs, that works the same on
its own; a second call goes on where the first one was stopped. At the end it draws specialists.png, writes table.md,
and fails if a claim does not hold:

    code    at least {code_gain:.0%} fewer bits per byte of code, at most {text_margin:g} bits per byte more of text
    math    at most {math_before:.0%} of the calculations right before, at least {math_after:.0%} after
"""

import statistics
from pathlib import Path

from shown_commands import Step, run, tell

from qwen_jax import files

CODE_GAIN, TEXT_MARGIN = 0.10, 0.02
MATH_BEFORE, MATH_AFTER = 0.02, 0.50
# Windows of the length that the base model was trained on, so that no model is measured past its own.
WINDOW, STRIDE = 256, 128
# Held-out groups of texts, in the order of the table.
GROUPS = ("code", "text")
# The model of a rehearsal.
TOY = [f"ModelConfig.{one}" for one in ("num_layers=1", "hidden_size=64", "num_heads=1", "ffn_size=64")]
TOY += ["TRAIN_STEPS=2", "WARMUP_STEPS=1", "EVAL_BATCHES=1"]


def data_steps(folder: Path, rehearse: bool) -> list[Step]:
    """Texts, code, arithmetic and the vocabulary, which all seeds share."""
    data = folder / "data"
    sizes = ("--text_size=20000", "--code_size=15000", "--held_out_size=3000") if rehearse else ()
    calculations = ("--count=200", "--held_out=16") if rehearse else ("--count=14000", "--held_out=500")
    corpus = ("--input", f"en:{data / 'text'}", f"code:{data / 'code/documents'}")
    return [
        Step(
            "documentation as text, repositories as code, and both of packages that nothing is trained on",
            ("tools/make_specialist_data.py", "--output", f"{data}", *sizes),
        ),
        Step("", ("tools/make_code_corpus.py", "--input", f"{data / 'repositories'}", "--output", f"{data / 'code'}")),
        Step(
            "sums and differences of numbers up to 100, of which some are held out",
            (
                *("tools/make_arithmetic.py", "--output", f"{data / 'arithmetic'}"),
                *("--kinds", "add", "--levels", "2", "--worked", *calculations),
            ),
        ),
        Step(
            "a vocabulary for all of them",
            (
                *("tools/build_tokenizer.py", f"--size={640 if rehearse else 4096}", *corpus),
                f"--output={folder / 'vocabulary.tiktoken'}",
            ),
        ),
    ]


def model_steps(folder: Path, seed: int, settings: list[str]) -> list[Step]:
    """Training and measuring of the three models of one seed."""
    runs, data = run_folder(folder, seed), folder / "data"

    def train(heading: str, recipe: str, name: str, *bindings: str) -> Step:
        places = (f"VOCABULARY={folder / 'vocabulary.tiktoken'}", f"CACHE_DIR={folder / 'cache'}")
        names = (*bindings, *places, f"OUTPUT_DIR={runs / name}", f"SEED={seed}", *settings)
        recipes = (f"--gin_file=gin/runs/{recipe}.gin", "--gin_file=gin/hardware/cpu.gin")
        return Step(heading, ("-m", "qwen_jax.train", *recipes, *(f"--gin.{one}" for one in names)))

    def measure(heading: str, name: str) -> Step:
        windows = (f"--context_length={WINDOW}", f"--stride={STRIDE}")
        held_out = ("--texts", f"{data / 'held_out'}", "--output", f"{runs / 'measured' / name}")
        checkpoint = ("--checkpoint", f"{runs / name}")
        return Step(heading, ("tools/measure_perplexity.py", *checkpoint, *held_out, *windows))

    def answer(heading: str, name: str, *flags: str) -> Step:
        benchmark = ("--benchmarks", "arithmetic", "--data_dir", f"{data}")
        where = ("--checkpoint", f"{runs / name}", "--output_dir", f"{runs / 'measured' / f'{name}_arithmetic'}")
        return Step(heading, ("-m", "qwen_jax.evaluate", *where, *benchmark, *flags))

    text, base = f"local_files.pattern={data / 'text'}", f"INITIAL_CHECKPOINT={runs / 'base'}"
    code = f"code_files.pattern={data / 'code/documents'}"
    arithmetic = f"math_instructions.pattern={data / 'arithmetic/train.jsonl'}"
    return [
        train("the base model learns from text", "pretrain_tiny", "base", "MIXTURE_OR_TASK=local_files", text),
        train("the code model goes on from it with code and text", "code_tiny", "code", base, code, text),
        train("the math model is fine-tuned from it on arithmetic", "math_sft_tiny", "math", base, arithmetic),
        measure("bits per byte of held-out code and text, before and after", "base"),
        measure("", "code"),
        answer("held-out arithmetic, before and after", "base"),
        answer("", "math", "--chat"),
    ]


def run_folder(folder: Path, seed: int) -> Path:
    """Where the runs of a seed lie: those of the first one where the recipes expect them."""
    return folder if seed == 0 else folder / f"seed_{seed}"


def figures(runs: Path) -> dict[str, float]:
    """What was measured of the models of one seed: bits per byte by model and group, shares of right answers."""
    found = {}
    for name in ("base", "code"):
        groups = files.read_json(runs / "measured" / name / "perplexity.json")["groups"]
        found |= {f"{name}/{one['domain']}": one["bits_per_byte"] for one in groups}
    for name in ("base", "math"):
        entry = files.read_json(runs / "measured" / f"{name}_arithmetic" / "arithmetic" / "scores.json")
        found[f"{name}/arithmetic"] = entry["metrics"]["score"] / 100
    return found


def claims(found: dict[str, float]) -> list[tuple[str, bool]]:
    """What is claimed of one seed, with its figures, and whether it holds."""
    gain = 1 - found["code/code"] / found["base/code"]
    more = found["code/text"] - found["base/text"]
    before, after = found["base/arithmetic"], found["math/arithmetic"]
    return [
        (f"code: {gain:.1%} fewer bits per byte of code, at least {CODE_GAIN:.0%} expected", gain >= CODE_GAIN),
        (f"code: {more:+.3f} bits per byte of text, at most {TEXT_MARGIN:+g} expected", more <= TEXT_MARGIN),
        (f"math: {before:.1%} right before, at most {MATH_BEFORE:.0%} expected", before <= MATH_BEFORE),
        (f"math: {after:.1%} right after, at least {MATH_AFTER:.0%} expected", after >= MATH_AFTER),
    ]


def table(found: list[dict[str, float]]) -> str:
    """Markdown: a row for each model; over several seeds the mean, with the smallest and the largest."""

    def cell(key: str, form: str) -> str:
        values = [one[key] for one in found if key in one]
        if not values:
            return "–"
        shown = format(statistics.fmean(values), form)
        return shown if len(values) == 1 else f"{shown} ({min(values):{form}} to {max(values):{form}})"

    columns = {"code, bits per byte": ("code", ".3f"), "text, bits per byte": ("text", ".3f")}
    columns["arithmetic, right"] = ("arithmetic", ".1%")
    lines = [f"| model | {' | '.join(columns)} |", "|---" + "|--:" * len(columns) + "|"]
    for name in ("base", "code", "math"):
        cells = (cell(f"{name}/{key}", form) for key, form in columns.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, float]], path: Path) -> None:
    """Two panels: bits per byte of base and code model, right answers of base and math model; a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = (
        (("base/code", "code/code", "base/text", "code/text"), "bits per byte, held-out packages", 1.0),
        (("base/arithmetic", "math/arithmetic"), "held-out calculations right, %", 100.0),
    )
    colors = {"base": "tab:gray", "code": "tab:blue", "math": "tab:orange"}
    for panel, (keys, label, scale) in zip(figure.subplots(1, 2, width_ratios=(2, 1)), panels, strict=True):
        for place, key in enumerate(keys):
            values = [scale * one[key] for one in found]
            mean = statistics.fmean(values)
            panel.bar(place, mean, color=colors[key.split("/")[0]], width=0.7)
            panel.plot([place] * len(values), values, "k.", markersize=4)
            panel.text(place, mean, f"{mean:.2f}" if scale == 1 else f"{mean:.1f}", ha="center", va="bottom")
        names = ("{} model\non {}".format(*key.split("/")) for key in keys)
        panel.set_xticks(range(len(keys)), list(names))
        panel.set_ylabel(label)
        panel.margins(y=0.12)
    with files.new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def closing(folder: Path, seeds: int, seconds: float) -> bool:
    """Writes and prints the table, draws the picture, prints the claims; returns whether all hold."""
    found = [figures(run_folder(folder, seed)) for seed in range(seeds)]
    files.write_text(folder / "table.md", table(found))
    draw(found, folder / "specialists.png")
    print(f"\n== done in {seconds / 60:.1f} minutes\n\n{table(found)}")
    holds = True
    for seed, one in enumerate(found):
        for text, true in claims(one):
            print(f"{'holds' if true else 'FAILS'}  {f'seed {seed}, ' if seeds > 1 else ''}{text}")
            holds = holds and true
    print(f"\n{folder / 'specialists.png'} and table.md beside it; runs: {folder / 'base'}, code and math beside it")
    print("next: docs/how_to/specialists.md")
    return holds


def all_steps(folder: Path, seeds: int, rehearse: bool) -> list[Step]:
    """The data, once, and the models of each seed."""
    models = (model_steps(folder, seed, TOY if rehearse else []) for seed in range(seeds))
    return [*data_steps(folder, rehearse), *(step for of_seed in models for step in of_seed)]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 if a claim does not hold."""
    limits = {"code_gain": CODE_GAIN, "text_margin": TEXT_MARGIN, "math_before": MATH_BEFORE, "math_after": MATH_AFTER}
    return tell(
        argv,
        __doc__.format(**limits),
        "runs/specialists",
        lambda given: all_steps(given.output, given.seeds, given.rehearse),
        lambda given, seconds: closing(given.output, given.seeds, seconds),
        number=("seeds", 1, "models of each kind"),
    )


if __name__ == "__main__":
    run(main)
