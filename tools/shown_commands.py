"""Commands that a tool runs one after the other, each printed as one would type it, and each finished one once only."""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qwen_jax import command_line, files

# Lines of JSON in the folder of a tool: the words of each finished step, and its seconds.
DONE = "steps.jsonl"
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
      heading: what it does; empty: the step belongs to the one before.
      words: its arguments, after `python`.
      makes: a folder or file that the command makes whole or not at all, and refuses to make twice. Where it exists,
        the step is finished, also if the tool was killed before it could write that down.
    """

    heading: str
    words: tuple[str, ...]
    makes: Path | None = None


def title(text: str) -> None:
    """Announces a step."""
    print(f"\n== {text}", flush=True)


def show(arguments: list) -> list[str]:
    """The command for these arguments, after printing it as one would type it."""
    words = [str(argument) for argument in arguments]
    print(f"$ python {shlex.join(words)}", flush=True)
    return [sys.executable, *words]


def call(*arguments) -> None:
    """Runs a command to its end, after Ctrl-C as well. On Linux it ends with this process, also where that is killed.

    Raises:
      subprocess.CalledProcessError: it fails.
    """
    parent = os.getpid()
    # Loaded before the fork: between fork and exec only what is already there is safe to call.
    kernel = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_parent() -> None:
        if kernel is not None:
            kernel.prctl(_DIES_WITH_PARENT, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    process = subprocess.Popen(show(list(arguments)), cwd=ROOT, preexec_fn=end_with_parent)
    try:
        process.wait()
    except BaseException:
        # Ctrl-C came to the command as well, which may save what it has done; it does not wait for a second one.
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)


def finished(folder: Path) -> dict[tuple[str, ...], float]:
    """Words of the finished steps of a folder to the seconds that each took, in the order in which they ended."""
    if not (folder / DONE).exists():
        return {}
    return {tuple(row["words"]): row["seconds"] for _, row in files.read_json_lines(folder / DONE)}


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def check_finished(folder: Path, steps: Sequence[Step]) -> None:
    """Refuses to go on in a folder after the steps of another call, whose files later steps would take for theirs.

    Raises:
      ValueError: steps are left to run, and one that is none of `steps` was finished here.
    """
    done, words = finished(folder), [step.words for step in steps]
    others = [one for one in done if one not in words]
    if others and any(one not in done for one in words):
        raise ValueError(
            f"{folder} holds finished steps of another call, such as `python {shlex.join(others[0])}`: with another "
            "seed, --rehearse or version of this program choose another --output, or remove the folder"
        )


def go(folder: Path, steps: Sequence[Step]) -> None:
    """Runs the steps that have not been run, and says how long each took.

    Raises:
      ValueError: see `check_finished`.
      subprocess.CalledProcessError: a step fails.
    """
    check_finished(folder, steps)
    done = finished(folder)
    number, headings = 0, sum(bool(step.heading) for step in steps)
    for step in steps:
        if step.heading:
            number += 1
            title(f"{number} of {headings}. {step.heading}")
        if step.words in done:
            print(f"done before: python {' '.join(step.words[:2])} …", flush=True)
            continue
        began = time.monotonic()
        if step.makes is not None and step.makes.exists():
            print(f"done before: {step.makes}", flush=True)
        else:
            call(*step.words)
        done[step.words] = round(time.monotonic() - began, 1)
        print(f"took {clock(done[step.words])}, all so far {clock(sum(done.values()))}", flush=True)
        rows = [{"words": words, "seconds": seconds} for words, seconds in done.items()]
        files.write_text(folder / DONE, "".join(json.dumps(row) + "\n" for row in rows))


def tell(
    argv: Sequence[str] | None,
    description: str,
    output: str,
    steps: Callable[[argparse.Namespace], Sequence[Step]],
    closing: Callable[[argparse.Namespace, float], bool],
    number: tuple[str, int, str] = ("seed", 0, "of the data and the models"),
) -> int:
    """The command line of a tool that goes through steps and then asserts what came of them.

    Args:
      argv: words after the program's name; None: of this process.
      description: of the help.
      output: folder for everything, unless `--output` is given. Relative paths begin where the tool is started.
      steps: of the arguments `output`, in the repository as a path from there, `rehearse` and `number`.
      closing: of the same and the seconds that it took; writes the results, returns whether all claims hold.
      number: name, default, which is the least, and help of the one flag of the tool's own, an integer.

    Returns:
      The exit code: 1 if a claim does not hold, unless it was a rehearsal.
    """
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=command_line.path_argument, default=Path(output), help="default: %(default)s")
    name, default, meaning = number
    parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    rehearsal = "every step with a toy and little data; the claims are not expected"
    parser.add_argument("--rehearse", action="store_true", help=rehearsal)
    arguments = parser.parse_args(argv)
    if (given := getattr(arguments, name)) < default:
        parser.error(f"argument --{name}: must be at least {default}, found {given}")
    if isinstance(arguments.output, Path):
        whole = Path(os.path.abspath(arguments.output))
        arguments.output = whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole
    with contextlib.chdir(ROOT):  # where the steps run
        arguments.output.mkdir(parents=True, exist_ok=True)
        with files.locked(arguments.output), _going_on_later():
            go(arguments.output, steps(arguments))
            holds = closing(arguments, time.monotonic() - began)
    return 0 if holds or arguments.rehearse else 1


@contextlib.contextmanager
def _going_on_later() -> Generator[None]:
    """Says after Ctrl-C what comes next."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None


def run(main: Callable[[], int]) -> None:
    """Runs a tool's `main` as this process; a step that failed has said why."""
    try:
        command_line.run(main)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: a step failed with exit code {error.returncode}; its message is above")
