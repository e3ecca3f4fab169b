"""Source files: their programming language, and why one is no text to learn from (report section 4).

The report describes no filters. These are the usual ones of open corpora of code (The Stack, StarCoder, Codex): lines
that are too long, too few letters, generated and vendored files. Every file that is left out has one reason.
"""

import dataclasses
import re
from pathlib import PurePosixPath

# Suffix, or whole name in lower case, to the language.
LANGUAGES = {
    suffix: language
    for language, suffixes in {
        "assembly": ".asm .s",
        "c": ".c .h",
        "c#": ".cs",
        "c++": ".cc .cpp .cxx .hh .hpp .hxx .cu .cuh",
        "clojure": ".clj .cljs",
        "cmake": ".cmake cmakelists.txt",
        "css": ".css .scss .sass .less",
        "dart": ".dart",
        "dockerfile": "dockerfile .dockerfile",
        "elixir": ".ex .exs",
        "erlang": ".erl .hrl",
        "fortran": ".f .f90 .f95 .for",
        "go": ".go",
        "haskell": ".hs",
        "html": ".html .htm",
        "java": ".java",
        "javascript": ".js .jsx .mjs .cjs",
        "julia": ".jl",
        "kotlin": ".kt .kts",
        "lua": ".lua",
        "makefile": "makefile .mk",
        "markdown": ".md",
        "matlab": ".m",
        "objective-c++": ".mm",
        "ocaml": ".ml .mli",
        "perl": ".pl .pm",
        "php": ".php",
        "powershell": ".ps1",
        "protobuf": ".proto",
        "python": ".py .pyi",
        "r": ".r",
        "restructuredtext": ".rst",
        "ruby": ".rb",
        "rust": ".rs",
        "scala": ".scala",
        "shell": ".sh .bash .zsh",
        "sql": ".sql",
        "swift": ".swift",
        "tex": ".tex",
        "typescript": ".ts .tsx",
        "verilog": ".v .sv",
        "vhdl": ".vhd .vhdl",
        "zig": ".zig",
    }.items()
    for suffix in suffixes.split()
}
VENDORED = frozenset(
    ("vendor", "vendors", "vendored", "_vendor", "node_modules", "bower_components", "third_party", "third-party")
    + ("3rdparty", "thirdparty", "external", "externals", "site-packages", "dist-packages", ".venv", "venv", "pods")
)
# Folders of tools, not of authors.
_TOOLS = frozenset((".git", ".hg", ".svn", "__pycache__", ".tox", ".idea", ".vscode"))
_GENERATED_NAMES = re.compile(
    r"(\.min\.(js|css)|[_.](pb2|pb2_grpc)\.pyi?|\.pb\.(go|cc|h)|\.g\.dart|\.designer\.cs|[-_.]lock(\.\w+)?|\.bundle\.js)$"
)
_GENERATED_TEXT = re.compile(
    r"@generated|auto-?generated|automatically generated|generated (automatically )?by|do not edit|do not modify",
    re.IGNORECASE,
)
_GENERATED_LINES = 5


@dataclasses.dataclass(frozen=True)
class SourceRules:
    """Which files are left out.

    Attributes:
        max_bytes: of a file.
        max_line: characters of its longest line.
        max_mean_line: characters of its lines on average.
        min_letters: least share of letters and digits among its characters that are no white space.
        languages: names of `LANGUAGES` that are taken; empty: all.
    """

    max_bytes: int = 1_000_000
    max_line: int = 1_000
    max_mean_line: int = 100
    min_letters: float = 0.25
    languages: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = sorted(set(self.languages) - set(LANGUAGES.values()))
        if unknown:
            known = ", ".join(sorted(set(LANGUAGES.values())))
            raise ValueError(f"languages has {', '.join(unknown)}: known are {known}")

    def by_name(self, path: str) -> str | None:
        """Why a file of this path in its repository is left out whatever it holds, or None."""
        parts = PurePosixPath(path.lower()).parts
        if _TOOLS & set(parts[:-1]):
            return "of a tool"
        if VENDORED & set(parts[:-1]):
            return "vendored"
        language = language_of(path)
        if language is None:
            return "no known language"
        if self.languages and language not in self.languages:
            return "another language"
        return "generated" if _GENERATED_NAMES.search(parts[-1]) else None

    def by_content(self, data: bytes) -> tuple[str, str | None]:
        """The text of a file, and why it is left out, or None."""
        if len(data) > self.max_bytes:
            return "", "too large"
        if b"\0" in data:
            return "", "binary"
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return "", "not UTF-8"
        text = text.replace("\r\n", "\n")
        if not text.strip():
            return text, "empty"
        if _GENERATED_TEXT.search("\n".join(text.split("\n", _GENERATED_LINES)[:_GENERATED_LINES])):
            return text, "generated"
        lines = text.splitlines()
        if max(map(len, lines)) > self.max_line or sum(map(len, lines)) > self.max_mean_line * len(lines):
            return text, "lines too long"
        visible = sum(not character.isspace() for character in text)
        if sum(map(str.isalnum, text)) < self.min_letters * visible:
            return text, "few letters"
        return text, None


def language_of(path: str) -> str | None:
    """Programming language by the name of a file, or None."""
    name = PurePosixPath(path.lower())
    return LANGUAGES.get(name.name) or LANGUAGES.get(name.suffix)
