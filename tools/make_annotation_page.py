"""Makes a page on which people compare the answers of models side by side (docs/how_to/compare_models.md).

python tools/make_annotation_page.py runs/compare/answers.jsonl --output runs/compare/page.html
python tools/make_annotation_page.py answers_*.jsonl --reference gpt --output page.html
"""

import argparse

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.evaluation.annotation_page import make_page, read_answers


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "answers", nargs="+", type=path_argument, help="JSON lines of answers, as tools/answer.py writes"
    )
    parser.add_argument("--reference", help="compare the other models with this one only (default: all pairs)")
    parser.add_argument("--output", type=path_argument, required=True, metavar="FILE.html", help="the page")
    parser.add_argument("--seed", type=int, default=0, help="for the order of the comparisons and for the sides")
    arguments = parser.parse_args(argv)
    page = make_page(read_answers(arguments.answers), reference=arguments.reference, seed=arguments.seed)
    files.write_text(arguments.output, page.html)
    if page.left_out:
        print(f"{len(page.left_out)} instruction(s) left out, without two models to compare: {page.left_out[0]}, …")
    if page.ties:
        print(f"{page.ties} comparison(s) not shown, since both answers are the same text: ties in all verdicts")
    print(f"wrote {arguments.output} with {page.items} comparisons: open it in a browser, or send it to the annotators")


if __name__ == "__main__":
    run(main)
