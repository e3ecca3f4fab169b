"""Makes a training set from crawled pages: extraction, languages, duplicates, rules, scores, benchmarks, sampling.

    python tools/curate.py --input 'web=crawl/**/*.warc.gz' --input books=books/ --output=corpus \\
        --config=gin/curation/english_and_chinese.gin

`--input NAME=FOLDER_OR_GLOB` names a source and may be given several times, for one source too; without a name it is
called `web`. Read are WARC (.warc, .warc.gz), HTML, text, JSON lines (.jsonl, .gz, .zst) and Parquet.
`--gin.NAME=VALUE` sets a parameter, `--beam.OPTION=VALUE` is handed to Beam as `--OPTION=VALUE`. Without
a runner it works in this process, some hundred pages a second. An interrupted run goes on where it stopped. Look at
`report.html` in the output.
"""

import argparse
import sys
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import command_line

_BEAM = "--beam."


def _source(text: str) -> tuple[str, str]:
    name, equals, pattern = text.partition("=")
    name, pattern = (name, pattern) if equals and "/" not in name and "*" not in name else ("web", text)
    return name, command_line.pattern_argument(pattern)


def main(argv: list[str] | None = None) -> None:
    """Runs `qwen_jax.curation.pipeline.curate` with arguments from the command line, and prints what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, action="append", type=_source, metavar="[NAME=]FOLDER_OR_GLOB")
    parser.add_argument(
        "--output", type=command_line.path_argument, required=True, help="where to; all Beam workers must see it"
    )
    parser.add_argument("--config", dest="gin_file_of_config", metavar="FILE", help="another name for --gin_file")
    parser.add_argument("--keep_work", action="store_true", help="leave the intermediate files, in OUTPUT/work")
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(argv)
    argv = [one.replace("--config=", "--gin_file=", 1) if one.startswith("--config=") else one for one in argv]
    argv = ["--gin_file" if one == "--config" else one for one in argv]
    with command_line.quiet():
        from qwen_jax.configuration import parse_args
        from qwen_jax.curation import configuration, pipeline
    arguments = parse_args(parser, [one for one in argv if not one.startswith(_BEAM)])
    inputs: dict[str, list[str]] = {}
    for name, pattern in arguments.input:
        inputs.setdefault(name, []).append(pattern)
    manifest = pipeline.curate(
        inputs,
        arguments.output,
        configuration.make_config(),
        beam_options=["--" + one.removeprefix(_BEAM) for one in argv if one.startswith(_BEAM)],
        keep_work=arguments.keep_work,
    )
    print(f"{'stage':14} {'read':>12} {'kept':>12} {'dropped':>12} {'kept bytes':>16}")
    for stage, counts in manifest["stages"].items():
        dropped = counts["in"][0] - counts["kept"][0]
        print(f"{stage:14} {counts['in'][0]:>12,} {counts['kept'][0]:>12,} {dropped:>12,} {counts['kept'][1]:>16,}")
    print(f"{arguments.output}/documents, {arguments.output}/dropped, {arguments.output}/report.html")


if __name__ == "__main__":
    command_line.run(main)
