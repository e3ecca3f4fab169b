"""Makes a training set from crawled pages: extraction, languages, duplicates, rules, scores, benchmarks, sampling.

    python tools/curate.py --input 'web=crawl/**/*.warc.gz' --input books=books/ --output=corpus \\
        --config=gin/curation/english_and_chinese.gin

`--input NAME=FOLDER_OR_GLOB` names a source and may be given several times, for one source too; without a name it is
called `web`. Formats: WARC and WET (.warc, .wet), HTML, text and JSON lines (.jsonl, .ndjson), each also as .gz or
.zst, .json.gz, .json.zst and Parquet.
`--gin.NAME=VALUE` sets a parameter. `--num_workers=N` works in N processes of this machine, some hundred pages a second
each; `--beam.OPTION=VALUE` is handed to Beam as `--OPTION=VALUE`, for an engine on many machines
(docs/how_to/clusters.md). An interrupted run goes on where it stopped. Look at
`report.html` in the output. If more than 1% of the bytes of an input file cannot be read, the run ends with exit code 2
(`--max_unread_share`).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import command_line

_BEAM = "--beam."
_SHOWN_NAMES = 10


def _source(text: str) -> tuple[str, str]:
    name, equals, pattern = text.partition("=")
    name, pattern = (name, pattern) if equals and "/" not in name and "*" not in name else ("web", text)
    return name, command_line.pattern_argument(pattern)


def main(argv: list[str] | None = None) -> None:
    """Runs `qwen_jax.curation.pipeline.curate` with arguments of the command line; prints the counts of each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, action="append", type=_source, metavar="[NAME=]FOLDER_OR_GLOB")
    parser.add_argument(
        "--output",
        type=command_line.path_argument,
        required=True,
        help="folder of the training set, also gs://… or s3://…; all workers must see it",
    )
    parser.add_argument("--config", dest="gin_file_of_config", metavar="FILE", help="another name for --gin_file")
    parser.add_argument(
        "--max_unread_share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="largest unreadable share of a file; above it, the run ends with exit code 2 (default: %(default)s)",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=1,
        metavar="N",
        help="worker processes on this machine (default: %(default)s)",
    )
    parser.add_argument("--keep_work", action="store_true", help="keep the intermediate files in OUTPUT/work")
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        parser.parse_args(argv)
    argv = [one.replace("--config=", "--gin_file=", 1) if one.startswith("--config=") else one for one in argv]
    argv = ["--gin_file" if one == "--config" else one for one in argv]
    with command_line.quiet():
        from qwen_jax.configuration import parse_args
        from qwen_jax.curation import configuration, pipeline

        beam_options = ["--" + one.removeprefix(_BEAM) for one in argv if one.startswith(_BEAM)]
        if beam_options:
            import qwen_jax.beam  # noqa: F401
    arguments = parse_args(parser, [one for one in argv if not one.startswith(_BEAM)])
    inputs: dict[str, list[str]] = {}
    for name, pattern in arguments.input:
        inputs.setdefault(name, []).append(pattern)
    manifest = pipeline.curate(
        inputs,
        arguments.output,
        configuration.make_config(),
        num_workers=arguments.num_workers,
        beam_options=beam_options,
        keep_work=arguments.keep_work,
    )
    print(f"{'stage':14} {'read':>12} {'kept':>12} {'dropped':>12} {'kept bytes':>16}")
    for stage, counts in manifest["stages"].items():
        dropped = counts["in"][0] - counts["kept"][0]
        print(f"{stage:14} {counts['in'][0]:>12,} {counts['kept'][0]:>12,} {dropped:>12,} {counts['kept'][1]:>16,}")
    for line in _inputs(manifest):
        print(line)
    print(f"{arguments.output}/documents, {arguments.output}/dropped, {arguments.output}/report.html")
    pipeline.check_read(manifest, arguments.max_unread_share)


def _inputs(manifest: dict) -> Iterator[str]:
    """What was read of each source, and what was left out and why."""
    for source, counts in manifest["bytes_read"].items():
        outcomes = dict(counts["outcomes"])
        records, size = outcomes.pop("read", (0, 0))
        yield f"{source}: {counts['bytes']:,} bytes in files; read {size:,} ({records:,} records)"
        for reason, (records, size) in outcomes.items():
            yield f"{source}: left out {size:,} ({records:,} records): {reason}"
        names = manifest["files_left_out"][source]
        for reason in sorted({reason for _, reason in names}):
            found = [path for path, why in names if why == reason]
            more = f" and {len(found) - _SHOWN_NAMES} more" if len(found) > _SHOWN_NAMES else ""
            yield f"{source}: {len(found):,} files not read: {reason}: {', '.join(found[:_SHOWN_NAMES])}{more}"


if __name__ == "__main__":
    command_line.run(main)
