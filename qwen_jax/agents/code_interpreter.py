"""The code interpreter as a tool that a model calls (report 3.4).

As in the released prompts, the model encloses code in triple backticks; a JSON object with `code`, and bare code, are
read as well. Figures are kept as files and stand in the result as Markdown images.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.agents.interpreter import Execution, Interpreter

NAME = "code_interpreter"
DEFINITION: dict[str, Any] = {
    "name": NAME,
    "name_for_human": "Code Interpreter",
    "description": "Runs Python code and returns what it prints, the value of its last line, and its figures. "
    "Variables stay for the next call. For calculation, data analysis, figures and files.",
    "parameters": {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "Python code"}},
        "required": ["code"],
        "additionalProperties": False,
    },
    "args_format": "code",
}
_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)|```(.+?)```", re.DOTALL)
_NOTHING = "The code ran and printed nothing."


def code_of(text: str) -> str:
    """The code in the input of an action: the first fenced block, the `code` of a JSON object, or all of the text."""
    if found := _FENCED.search(text):
        return found[1] if found[1] is not None else found[2]
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return text
    return value["code"] if isinstance(value, dict) and isinstance(value.get("code"), str) else text


def observation(done: Execution, show: Callable[[bytes], str], longest: int = 4000) -> str:
    """What the model reads: outputs in their order, the last line of an error, and what was left out or lost.

    Args:
      done: a snippet.
      show: keeps an image and returns the text that stands for it.
      longest: characters of output; the middle of longer output is left out.
    """
    parts: list[str] = []
    for output in done.outputs:
        if output.image is not None:
            parts.append(f"{show(output.image)}\n")
        elif output.kind in ("result", "display"):
            parts.append(f"{output.text}\n")
        elif output.kind != "error":
            parts.append(output.text)
        if output.kind not in ("stdout", "stderr") and len(parts) > 1 and not parts[-2].endswith("\n"):
            parts[-2] += "\n"
    text = "".join(parts).strip("\n")
    if len(text) > longest:
        left_out = len(text) - longest
        text = f"{text[: longest // 2]}\n… {left_out:,} characters are left out …\n{text[-(longest // 2) :]}"
    remarks = [_REMARKS[done.status]] if done.status in _REMARKS else []
    if done.status not in ("timeout", "interrupted", "output") and done.error:
        remarks.append(f"error: {done.error}")
    if done.cut:
        remarks.append(f"({done.cut} of output are left out)")
    if done.state_lost:
        remarks.append("The interpreter was started anew: variables and files are gone.")
    return "\n".join(part for part in (text, *remarks) if part) or _NOTHING


_REMARKS = {
    "timeout": "error: the code took too long and was interrupted.",
    "interrupted": "error: the code was interrupted.",
    "output": "error: the code printed without end and was interrupted.",
    "memory": "error: the code used too much memory.",
    "died": "error: the code ended the interpreter.",
}


class CodeInterpreter:
    """A tool: called with code, it returns text. Close it, or use it in `with`.

    Attributes:
      name, description, parameters, definition: for the prompt.
      executions: what the calls did, oldest first.
    """

    name: str = NAME
    description: str = DEFINITION["description"]
    parameters: dict[str, Any] = DEFINITION["parameters"]
    definition: dict[str, Any] = DEFINITION

    def __init__(
        self, interpreter: Interpreter | None = None, *, folder: str | Path | None = None, longest: int = 4000
    ):
        """Prepares the tool; the kernel starts with the first call.

        Args:
          interpreter: runs the code; closed with the tool.
          folder: where figures are kept as `fig-001.png` and so on; None: they are kept in `executions` only.
          longest: characters of a result.
        """
        self.interpreter = interpreter or Interpreter()
        self.executions: list[Execution] = []
        self._folder = None if folder is None else Path(folder)
        self._longest = longest
        self._figures = 0

    def __call__(self, code: str) -> str:
        """Runs code, which may be enclosed in backticks, and returns the result for the model."""
        done = self.interpreter.execute(code_of(code))
        self.executions.append(done)
        return observation(done, self._show, self._longest)

    def _show(self, image: bytes) -> str:
        self._figures += 1
        name = f"fig-{self._figures:03d}.png"
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with files.new_file(self._folder / name) as temporary:
                temporary.write_bytes(image)
        return f"![fig-{self._figures:03d}]({name})"

    def close(self) -> None:
        """Ends the kernel."""
        self.interpreter.close()

    def __enter__(self) -> "CodeInterpreter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
