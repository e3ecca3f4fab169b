"""Languages: which toolchain this machine has, and the commands that compile and run a program with it."""

import dataclasses
import functools
import os
import shutil
import subprocess
from pathlib import Path

from qwen_jax.sandbox.sandbox import ENVIRONMENT, FOLDER, TEMPORARY_FOLDER, Plan, Step

LANGUAGES = ("python", "javascript", "java", "go", "cpp", "rust")
# Seconds for a program, and at least as many for its compiler: bigcode-evaluation-harness's for HumanEvalPack.
TIMEOUT_S = {"python": 10.0, "javascript": 10.0, "java": 10.0, "go": 20.0, "cpp": 60.0, "rust": 300.0}
_COMPILER_MB = 3072  # MiB for a compiler


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """How programs of one language are run here.

    Attributes:
      language: one of `LANGUAGES`.
      folder: where compiler and runtime lie; commands are below its `bin`.
      mounts: what programs must see of this machine besides `SYSTEM`.
    """

    language: str
    folder: str
    mounts: tuple[str, ...] = ()


@functools.cache
def toolchain(language: str) -> Toolchain | str:
    """The toolchain of a language, or one line that says what is missing.

    Raises:
      ValueError: an unknown language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language: {language!r}: expected one of {', '.join(LANGUAGES)}")
    if language == "python":
        return Toolchain(language, "")
    command = {"javascript": "node", "java": "javac", "go": "go", "cpp": "g++", "rust": "rustc"}[language]
    found = shutil.which(command)
    if found is None:
        return f"{command} is not installed"
    if language == "rust":  # often a proxy of rustup, which looks the compiler up in the home folder
        asked = subprocess.run([found, "--print", "sysroot"], capture_output=True, text=True)
        if asked.returncode != 0:
            return f"{command} does not run: {asked.stderr.strip().splitlines()[-1:]}"
        folder = asked.stdout.strip()
        if shutil.which("cc") is None:
            return "cc, the linker of rustc, is not installed"
    elif language == "cpp":
        folder = os.path.dirname(os.path.dirname(found))  # the name chooses the language, so links are kept
    else:
        folder = os.path.dirname(os.path.dirname(os.path.realpath(found)))
    settings = sorted(str(path) for path in Path("/etc").glob("java-*")) if language == "java" else []
    outside = [] if folder == "/usr" or folder.startswith("/usr/") else [folder]
    return Toolchain(language, folder, (*outside, *settings))


def mounts() -> list[str]:
    """What programs of all installed languages must see."""
    found = [toolchain(language) for language in LANGUAGES]
    return [path for one in found if isinstance(one, Toolchain) for path in one.mounts]


def plan(
    code: str,
    language: str,
    *,
    timeout_s: float,
    memory_mb: int,
    compile_timeout_s: float | None = None,
    unit_test: bool = False,
) -> Plan:
    """The files and commands of a program.

    Args:
      code: text of one source file. Java's public class is `Main`; Go's package is `main`.
      timeout_s: limit of the program.
      compile_timeout_s: limit of the compiler; default: `TIMEOUT_S`.
      unit_test: whether the language's own test harness runs the tests in the file (Go and Rust).

    Raises:
      LookupError: the toolchain is not installed; the message says what is missing.
      ValueError: an unknown language, or a language without such a harness.
    """
    found = toolchain(language)
    if isinstance(found, str):
        raise LookupError(f"{language}: {found}")
    if unit_test and language not in ("go", "rust"):
        raise ValueError(f"unit_test: {language} has no test harness of its own")
    limit = compile_timeout_s or max(TIMEOUT_S[language], 30.0)
    return _PLANS[language](found, code, timeout_s, limit, memory_mb, unit_test)


def _python(found: Toolchain, code: str, timeout_s: float, _: float, memory_mb: int, __: bool) -> Plan:
    step = Step("run", file="main.py", timeout_s=timeout_s, memory_mb=memory_mb, limit_addresses=True)
    return Plan({"main.py": code}, [step])


def _javascript(found: Toolchain, code: str, timeout_s: float, _: float, memory_mb: int, __: bool) -> Plan:
    heap = f"--max-old-space-size={max(memory_mb - 128, 64)}"
    argv = [f"{found.folder}/bin/node", heap, "main.js"]
    return Plan({"main.js": code}, [_step("run", argv, timeout_s, memory_mb)], proc=True)


def _java(found: Toolchain, code: str, timeout_s: float, limit_s: float, memory_mb: int, _: bool) -> Plan:
    small = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xss16m")
    compiler = [f"{found.folder}/bin/javac", *(f"-J{flag}" for flag in (*small, "-Xmx1g")), "-nowarn", "Main.java"]
    argv = [f"{found.folder}/bin/java", *small, f"-Xmx{max(memory_mb - 256, 64)}m", "-cp", ".", "Main"]
    steps = [_step("compile", compiler, limit_s, _COMPILER_MB, log=True), _step("run", argv, timeout_s, memory_mb)]
    return Plan({"Main.java": code}, steps, proc=True)


def _go(found: Toolchain, code: str, timeout_s: float, limit_s: float, memory_mb: int, unit_test: bool) -> Plan:
    own = {
        **ENVIRONMENT,
        "GOROOT": found.folder,
        "GOPATH": f"{TEMPORARY_FOLDER}/go",
        "GOCACHE": f"{TEMPORARY_FOLDER}/go-cache",
        "GO111MODULE": "off",
        "GOFLAGS": "-vet=off" if unit_test else "",
        "CGO_ENABLED": "0",
    }
    go = f"{found.folder}/bin/go"
    compiler = [go, "test", "-c", "-o", "main"] if unit_test else [go, "build", "-o", "main", "main.go"]
    name = "main_test.go" if unit_test else "main.go"
    argv = [f"{FOLDER}/main"]
    steps = [
        _step("compile", compiler, limit_s, _COMPILER_MB, log=True, environment=own),
        _step("run", argv, timeout_s, memory_mb),
    ]
    return Plan({name: code}, steps, disk_mb=1024, proc=True)


def _cpp(found: Toolchain, code: str, timeout_s: float, limit_s: float, memory_mb: int, _: bool) -> Plan:
    compiler = [f"{found.folder}/bin/g++", "-std=c++17", "-w", "main.cpp", "-o", "main"]
    steps = [
        _step("compile", compiler, limit_s, _COMPILER_MB, log=True),
        _step("run", [f"{FOLDER}/main"], timeout_s, memory_mb, limit_addresses=True),
    ]
    return Plan({"main.cpp": code}, steps, disk_mb=256)


def _rust(found: Toolchain, code: str, timeout_s: float, limit_s: float, memory_mb: int, unit_test: bool) -> Plan:
    flags = ["--edition", "2021", "-A", "warnings", "-o", "main", *(["--test"] if unit_test else [])]
    argv = [f"{FOLDER}/main", *(["--test-threads=1"] if unit_test else [])]
    steps = [
        _step("compile", [f"{found.folder}/bin/rustc", *flags, "main.rs"], limit_s, _COMPILER_MB, log=True),
        _step("run", argv, timeout_s, memory_mb, limit_addresses=True),
    ]
    return Plan({"main.rs": code}, steps, disk_mb=256, proc=True)


def _step(name: str, argv: list[str], timeout_s: float, memory_mb: int, **others) -> Step:
    return Step(name, argv=argv, timeout_s=timeout_s, memory_mb=memory_mb, processes=256, open_files=1024, **others)


_PLANS = {"python": _python, "javascript": _javascript, "java": _java, "go": _go, "cpp": _cpp, "rust": _rust}
