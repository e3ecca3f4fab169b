"""Measures reward models on held-out comparisons: the report's Table 4, a calibration plot and histograms of margins.

python tools/evaluate_rewards.py --model PMP=runs/pmp_tiny --model RM=runs/reward_tiny \\
    --set courtesy=runs/courtesy/held_out.jsonl --output runs/rewards

`--model NAME=CHECKPOINT` is a row of the table, `--set NAME=FILE` a column; both may be repeated. A checkpoint is a run
folder or an exported folder. A set is a file of comparisons in a layout of qwen_jax/data/pairs.py, the project's own or
another: `--set 'Anthropic Harmless=hh_rlhf:harmless-base/test.jsonl.gz'`.

The output folder gets table.md, calibration.png, margins.png, and results.json with all figures and margins. A finished
pair of model and set is kept there: the same command goes on after an interruption.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from score import load_reward_model, settings_of
from tqdm import tqdm

from qwen_jax import files
from qwen_jax.alignment.reward_model import RewardModel
from qwen_jax.command_line import path_argument, run
from qwen_jax.compilation_cache import programs_kept
from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.conversations import Unusable
from qwen_jax.data.pairs import LAYOUTS, PairRows
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.evaluation.reward_accuracy import PairAccuracy, accuracy_table, pair_accuracy


@dataclasses.dataclass(frozen=True)
class ComparisonSet:
    """One column of the table: a file of comparisons, and its layout (a key of `LAYOUTS`)."""

    name: str
    layout: str
    path: Path


def named(text: str) -> tuple[str, str]:
    """NAME and the rest of `NAME=…`."""
    name, equals, rest = text.partition("=")
    if not equals or not name.strip() or not rest:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=…")
    return name.strip(), rest


def comparison_set(text: str) -> ComparisonSet:
    """The set of `NAME=FILE` or `NAME=LAYOUT:FILE`."""
    name, rest = named(text)
    layout, colon, path = rest.partition(":")
    if not colon or layout not in LAYOUTS:
        layout, path = "pairs", rest
    return ComparisonSet(name, layout, path_argument(path))


def model_of(text: str) -> tuple[str, Path]:
    """Name and checkpoint of `NAME=CHECKPOINT`."""
    name, path = named(text)
    return name, path_argument(path)


def sides_of(one: ComparisonSet, model: RewardModel, tokenizer: Tokenizer, system: str) -> tuple[list, dict[str, int]]:
    """(token ids of the chosen and the rejected side of each comparison, reason to number of rows left out)."""
    rows, sides, left_out = PairRows(layout=one.layout, system=system), [], {}
    for where, row in files.read_json_lines(one.path):
        try:
            encoded = rows.encode(row, tokenizer)
            split = int(encoded.segment_lengths[0])
            both = encoded.tokens[:split].tolist(), encoded.tokens[split:].tolist()
            problems = [problem for ids in both if (problem := model.problem(ids)) is not None]
            if problems:
                raise Unusable("too long or not of this vocabulary", problems[0])
            sides += both
        except Unusable as error:
            if not left_out.get(error.reason):
                print(f"{where}: left out: {error}", file=sys.stderr)
            left_out[error.reason] = left_out.get(error.reason, 0) + 1
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return sides, left_out


def margins_of(one: ComparisonSet, model: RewardModel, tokenizer: Tokenizer, system: str, label: str) -> dict:
    """Margins of all comparisons of a set, and what was left out."""
    sides, left_out = sides_of(one, model, tokenizer, system)
    rewards = np.empty(len(sides), np.float32)
    with tqdm(total=len(sides), unit="conversation", desc=label, disable=None) as bar:
        for indices, found in model.score_in_groups(sides):
            rewards[indices] = found
            bar.update(len(indices))
    return {"margins": (rewards[::2] - rewards[1::2]).tolist(), "left_out": left_out}


def measure(models: dict[str, Path], sets: list[ComparisonSet], folder: Path, system: str, dtype: str) -> dict:
    """Model to set to margins; each pair of both is kept in `folder`/parts when it is done."""
    found: dict[str, dict[str, dict]] = {}
    for name, checkpoint in models.items():
        loaded, found[name] = None, {}
        for one in sets:
            identity = json.dumps([one.layout, settings_of(checkpoint, one.path, system, dtype)])
            part = folder / "parts" / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"
            if not part.is_file():
                loaded = loaded or load_reward_model(checkpoint, dtype)
                files.write_json(part, margins_of(one, *loaded, system, f"{name}, {one.name}"), indent=None)
            found[name][one.name] = files.read_json(part)
            for reason, count in found[name][one.name]["left_out"].items():
                print(f"{one.name}: {count:,} rows left out: {reason}", file=sys.stderr)
    return found


def panels(results: dict[str, dict], height: float) -> tuple[plt.Figure, dict[str, plt.Axes]]:
    """A figure with one panel for each set."""
    sets = list(next(iter(results.values())))
    figure, axes = plt.subplots(
        1, len(sets), figsize=(4 * len(sets) + 0.5, height), squeeze=False, layout="constrained"
    )
    return figure, dict(zip(sets, axes[0], strict=True))


def draw_calibration(results: dict[str, dict[str, PairAccuracy]]) -> plt.Figure:
    """Observed accuracy against the probability that the model gives to the side it prefers."""
    figure, of_set = panels(results, 4.2)
    for name, axes in of_set.items():
        axes.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", linewidth=1, label="calibrated")
        for model, found in results.items():
            bins = found[name].bins
            share = np.array([one.accuracy for one in bins])
            bars = np.array([one.interval for one in bins]).T
            axes.errorbar(
                [one.confidence for one in bins],
                share,
                yerr=np.abs(bars - share),
                marker="o",
                markersize=4,
                capsize=2,
                label=f"{model} (error {found[name].calibration_error:.3f})",
            )
        axes.set(title=name, xlabel="predicted probability", ylabel="observed share", xlim=(0.49, 1.01))
        axes.legend(fontsize="small")
    return figure


def draw_margins(margins: dict[str, dict[str, np.ndarray]]) -> plt.Figure:
    """Histograms of chosen - rejected; what lies left of 0 is ranked wrongly."""
    figure, of_set = panels(margins, 3.4)
    for name, axes in of_set.items():
        widest = max(np.abs(found[name]).max() for found in margins.values()) or 1.0
        edges = np.linspace(-widest, widest, 41)
        for model, found in margins.items():
            axes.hist(found[name], bins=edges, histtype="step", label=f"{model} (mean {found[name].mean():.2f})")
        axes.axvline(0, color="gray", linestyle="--", linewidth=1)
        axes.set(title=name, xlabel="reward margin, chosen - rejected", ylabel="comparisons")
        axes.legend(fontsize="small")
    return figure


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with files.new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


@programs_kept()
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=model_of, action="append", required=True, metavar="NAME=CHECKPOINT", help="row of the table"
    )
    parser.add_argument(
        "--set", type=comparison_set, action="append", required=True, metavar="NAME=FILE", help="column of the table"
    )
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--system", default=DEFAULT_SYSTEM, help="system message of prompts without one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    args = parser.parse_args(argv)
    for kind, names in (("--model", [name for name, _ in args.model]), ("--set", [one.name for one in args.set])):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            parser.error(f"{kind} {twice[0]} is given twice: names must differ")
    found = measure(dict(args.model), args.set, args.output, args.system, args.dtype)
    margins = {
        model: {name: np.asarray(one["margins"]) for name, one in of_set.items()} for model, of_set in found.items()
    }
    results = {}
    for model, of_set in margins.items():
        results[model] = {}
        for name, values in of_set.items():
            try:
                results[model][name] = pair_accuracy(values)
            except ValueError as error:
                raise ValueError(f"{model} on {name}: {error}") from error
    table = accuracy_table(results)
    files.write_text(args.output / "table.md", table)
    save(draw_calibration(results), args.output / "calibration.png")
    save(draw_margins(margins), args.output / "margins.png")
    figures = {
        model: {name: dataclasses.asdict(one) | found[model][name] for name, one in of_set.items()}
        for model, of_set in results.items()
    }
    files.write_json(args.output / "results.json", figures)
    print(table, end="")
    for name in ("table.md", "calibration.png", "margins.png", "results.json"):
        print(args.output / name)


if __name__ == "__main__":
    run(main)
