"""A conversation with a chat model in the terminal, or through standard input: one message a line.

    python -m qwen_jax.chat --checkpoint exports/chat
    printf 'Hello!\\nAnd in French?\\n' | python -m qwen_jax.chat --checkpoint exports/chat --temperature 0
    python -m qwen_jax.chat --checkpoint exports/vl_chat --image a.png --image b.png

Commands: /image FILE shows a picture with the next message, /tags TEXT is a message with boxes, /reset forgets the
conversation, /system TEXT sets the system message, /save FILE writes the conversation as JSON, /help, /exit. A line
that ends in a backslash goes on in the next; // at the beginning is a / of the message. Boxes of an answer are drawn
on the last picture, in a file.
"""

import argparse
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.command_line import add_mesh, path_argument, quick_imports, run
from qwen_jax.data.chatml import DEFAULT_SYSTEM, encode_prompt, stop_ids
from qwen_jax.data.content import (
    NUM_QUERIES,
    PICTURE_LABEL,
    Content,
    Picture,
    decode,
    parse_tags,
    pictures,
    to_json,
    with_labels,
    written,
)

with quick_imports():
    from qwen_jax.compilation_cache import programs_kept
    from qwen_jax.conversion.huggingface import GENERATION_FILE, read_json
    from qwen_jax.generate import load_engine
    from qwen_jax.inference import Engine, Request, SamplingConfig
    from qwen_jax.pictures import Loaded, check_files, draw_reply, load_picture, vision_of

# generation_config.json of the released chat models (7B and 14B); temperature is what transformers has without one.
RELEASED = {
    "temperature": 1.0,
    "top_p": 0.8,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.1,
    "max_new_tokens": 512,
}
HELP = """/image FILE   show a picture with the next message
/tags TEXT    a message in which <ref>, <box> and <quad> are tags, as in: What is in <box>(10,20),(500,600)</box>?
/reset        forget the conversation, keep the system message
/system TEXT  set the system message, from the next message on
/save FILE    write the conversation as JSON
/help         this
/exit         end (so does Ctrl-D)
A line that ends in \\ goes on in the next one. // at the beginning is a / of the message. Ctrl-C stops an answer."""
FULL_AT = 0.8  # share of the context; beyond it, a notice gives the tokens in use


def _count(messages) -> int:
    """Number of pictures."""
    return sum(len(pictures(message["content"])) for message in messages)


def valid_text(text: str) -> str:
    """The text with U+FFFD in the place of lone surrogates, which no file in UTF-8 can hold.

    Python reads a byte that is not UTF-8, of a terminal or an argument, as such a character.
    """
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


class Chat:
    """A conversation with a model.

    Attributes:
      messages: all messages, oldest first, without the system message. The content is text, or texts, pictures by their
        paths, and regions.
      system: the system message.
      notices: remarks of the last call for the user, apart from the answer.
    """

    def __init__(
        self,
        engine: Engine,
        system: str = DEFAULT_SYSTEM,
        sampling: SamplingConfig = SamplingConfig(),
        max_new_tokens: int = 512,
        seed: int = 0,
        image_label: str = PICTURE_LABEL,
    ):
        """`engine` must have a tokenizer; seed + n is the seed for sampling answer n.

        Args:
          image_label: text before each picture, see `with_labels`.

        Raises:
          ValueError: max_new_tokens leaves no room for a message.
        """
        if not 1 <= max_new_tokens < engine.context_length:
            raise ValueError(
                f"max_new_tokens must be from 1 to {engine.context_length - 1}, below the context of "
                f"{engine.context_length} tokens, found {max_new_tokens}"
            )
        assert engine.tokenizer is not None  # as the docstring asks; `load_engine` gives one
        self.engine, self.system, self.sampling = engine, valid_text(system), sampling
        self._tokenizer = engine.tokenizer
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.image_label = image_label
        self.messages: list[dict[str, Any]] = []
        self.notices: list[str] = []
        self._shown: list[Loaded] = []  # the pictures of `messages`
        self._attached: list[Loaded] = []  # those of the next one
        self._first = 0  # the oldest message that the model still sees
        self._answers = 0

    def reset(self) -> None:
        """Forgets the conversation, and the pictures for the next message."""
        self.messages, self._shown, self._attached, self._first = [], [], [], 0

    def attach(self, path: str | Path) -> None:
        """Shows a picture with the next message, before its text.

        Raises:
          ValueError, OSError: the model has no image encoder, or see `load_picture`.
        """
        self._attached.append(load_picture(path, vision_of(self.engine)))

    def answer(self, said: Content) -> Generator[str]:
        """Yields the assistant's answer to `said`, in pieces. Closed early, the answer is the pieces so far.

        When message and answer may not fit, the oldest turns are left out, for good, and a notice says so.

        Raises:
          ValueError: the system message and `said` alone leave no room for an answer. The conversation is as before.
        """
        self.notices = []
        content: Content = valid_text(said) if isinstance(said, str) else said
        if self._attached:
            parts = [content] if isinstance(content, str) else content
            content = (*(Picture(str(picture.path)) for picture in self._attached), *parts)
        messages = [*self.messages, {"role": "user", "content": content}]
        first, prompt = self._fit(messages)
        if first > self._first:
            many = (first - self._first) // 2
            self.notices.append(
                f"the context of {self.engine.context_length} tokens is full: the oldest {many} question(s) and their "
                "answers are left out from now on"
            )
        shown = [*self._shown, *self._attached]
        used = len(prompt) + self.max_new_tokens
        if first == self._first and used > FULL_AT * self.engine.context_length:
            self.notices.append(
                f"the conversation takes {len(prompt)} of {self.engine.context_length} tokens; before it does not fit "
                "any more, its oldest turns are left out (/reset starts anew)"
            )
        request = Request(
            prompt,
            self.max_new_tokens,
            self.sampling,
            stop_ids(self._tokenizer),
            seed=(self.seed + self._answers) % 2**32,
            images=[picture.pixels for picture in shown[_count(messages[:first]) :]],
        )
        pieces = self.engine.stream(request)
        return self._speak(messages, first, shown, pieces)

    def _fit(self, messages) -> tuple[int, list[int]]:
        room = self.engine.context_length - self.max_new_tokens
        vision = self.engine.model.config.vision
        queries = vision.num_queries if vision is not None else NUM_QUERIES
        # The numbers of pictures stay when the oldest are left out.
        contents = with_labels([message["content"] for message in messages], self.image_label)
        labelled = [{**one, "content": content} for one, content in zip(messages, contents, strict=True)]
        for first in range(self._first, len(messages), 2):
            system = {"role": "system", "content": self.system}
            prompt = encode_prompt(self._tokenizer, [system, *labelled[first:]], num_queries=queries)
            if len(prompt) <= room:
                return first, prompt
        many = len(pictures(messages[-1]["content"]))
        of_pictures = f" ({many * (queries + 2)} for {many} picture(s), which /reset takes away)" * (many > 0)
        raise ValueError(
            f"this message and the system message take {len(prompt)} tokens{of_pictures}, and {self.max_new_tokens} "
            f"are kept for the answer: the context has {self.engine.context_length}; shorten it, or lower "
            "--max_new_tokens"
        )

    def _speak(self, messages, first, shown, pieces) -> Generator[str]:
        said = []
        tokens: list[int] = []
        ends = stop_ids(self._tokenizer)
        try:
            for piece in pieces:
                said.append(piece.text)
                tokens += (token for token in piece.tokens if token not in ends)
                if piece.text:
                    yield piece.text
                if piece.finish_reason == "length":
                    self.notices.append(f"stopped after {self.max_new_tokens} tokens (--max_new_tokens)")
        finally:
            pieces.close()
            # Where the model has put tags of regions, they are control tokens of the next prompt, too.
            content = decode(self._tokenizer, tokens) if self.engine.model.config.vision is not None else "".join(said)
            self.messages = [*messages, {"role": "assistant", "content": content}]
            self._shown, self._attached, self._first = shown, [], first
            self._answers += 1

    @property
    def attached(self) -> int:
        """Number of pictures for the next message."""
        return len(self._attached)

    def draw(self, folder: str | Path) -> list[str]:
        """Draws the boxes of the last answer on the last picture of the conversation; see `draw_reply`."""
        text = written(self.messages[-1]["content"])
        return draw_reply(text, self._shown[-1].path if self._shown else None, folder)

    def save(self, path: str | Path) -> None:
        """Writes {"messages": [...]}, the system message first; the file appears whole or not at all.

        Pictures are written as in rows of training data, by their paths from the folder of the file.

        Raises:
          OSError: the file cannot be written.
        """
        path = files.as_path(path, "/save")
        messages = [{**one, "content": to_json(one["content"], path.parent)} for one in self.messages]
        content = {"messages": [{"role": "system", "content": self.system}, *messages]}
        if not path.parent.is_dir():
            # More likely a slip of the hand than a wish for a new folder.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        files.write_json(path, content)


def stated(checkpoint: files.PathLike) -> dict[str, Any]:
    """The generation settings, numbers by name, that a folder's generation_config.json has; none without the file.

    Raises:
      ValueError: a setting in the file is no number.
    """
    path = files.as_path(checkpoint) / GENERATION_FILE
    found = read_json(path) if path.is_file() else {}
    settings = {name: found[name] for name in RELEASED if found.get(name) is not None}
    if wrong := [name for name, value in settings.items() if type(value) not in (int, float)]:
        raise ValueError(f"{path}: {wrong[0]} is {settings[wrong[0]]!r}, expected a number")
    if found.get("do_sample") is False:
        # Filters mean nothing without sampling, and such files have top_p 0.
        settings |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return settings


def defaults(checkpoint: files.PathLike) -> dict[str, Any]:
    """The settings of a chat: those that a folder states, see `stated`, and the others as released."""
    return {**RELEASED, **stated(checkpoint)}


def command(chat: Chat, line: str) -> str | None:
    """Runs the command of a line that begins with /.

    Returns:
      The reply to the user; None ends the conversation.

    Raises:
      ValueError, OSError: the command is unknown, or fails.
    """
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/exit":
        return None
    if name == "/help":
        return HELP
    if name == "/reset":
        chat.reset()
        return "the conversation is forgotten"
    if name == "/image":
        if not argument:
            raise ValueError("/image needs a file: /image a.png")
        chat.attach(argument)
        return f"{argument} is shown with the next message"
    if name == "/system":
        if not argument:
            return f"the system message is: {chat.system}"
        chat.system = valid_text(argument)
        return "the system message is set"
    if name == "/tags":
        raise ValueError("/tags needs a message: /tags What is in <box>(10,20),(500,600)</box>?")
    if name == "/save":
        if not argument:
            raise ValueError("/save needs a file: /save conversation.json")
        chat.save(argument)
        return f"saved {len(chat.messages)} messages to {argument}"
    raise ValueError(f"there is no command {name}: /help lists them (// at the beginning is a / of the message)")


def messages_from(stream, interactive: bool) -> Iterator[str]:
    """Messages and commands of a text stream, one a line; a backslash joins lines, and empty messages are dropped."""
    parts: list[str] = []
    while True:
        if interactive:
            try:
                line = input("... " if parts else "> ")
            except EOFError:
                print()
                line = None
        else:
            line = stream.readline()
            line = line.rstrip("\r\n") if line else None
        if line is not None and line.endswith("\\"):
            parts.append(line[:-1])
            continue
        text = "\n".join([*parts, *([line] if line is not None else [])]).strip()
        parts = []
        if text:
            yield text
        if line is None:
            return


def tagged(text: str) -> Content:
    """The content of a message whose author asks for tags of regions to be read.

    Raises:
      ValueError: a tag without its other half, a region that is none, or a picture.
    """
    content = parse_tags(valid_text(text), "/tags")
    if pictures(content):
        raise ValueError("/tags reads <ref>, <box> and <quad>; a picture is shown with /image FILE")
    return content


def converse(chat: Chat, interactive: bool, boxes: str | Path) -> None:
    """Answers the messages of standard input until it ends. Notices and errors go to standard error.

    Args:
      boxes: folder for pictures with the boxes of answers.

    Raises:
      ValueError, OSError: a message or command failed, and the conversation is not interactive. An interactive one
        prints the error and goes on.
    """
    for text in messages_from(sys.stdin, interactive):
        try:
            if text.startswith("/tags "):
                _answer(chat, tagged(text.removeprefix("/tags ")), boxes)
                continue
            if text.startswith("/") and not text.startswith("//"):
                told = command(chat, text)
                if told is None:
                    break
                print(told, file=sys.stdout if interactive else sys.stderr)
                continue
            _answer(chat, text[1:] if text.startswith("//") else text, boxes)
        except (ValueError, OSError) as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
    if chat.attached:
        print(f"note: {chat.attached} picture(s) were not shown, as no message followed", file=sys.stderr)


def _answer(chat: Chat, said: Content, boxes: str | Path) -> None:
    pieces = chat.answer(said)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()
        chat.notices.append("stopped")
    print(flush=True)
    if chat.engine.model.config.vision is not None:
        chat.notices += chat.draw(boxes)
    for notice in chat.notices:
        print(f"note: {notice}", file=sys.stderr, flush=True)


@programs_kept()
def main(argv=None) -> None:
    """Command line of `python -m qwen_jax.chat`."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_jax.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=path_argument, required=True, help="run folder, or converted folder (qwen or qwen2)"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        dest="images",
        type=path_argument,
        metavar="FILE",
        help="a picture that is shown with the first message; may be repeated",
    )
    parser.add_argument(
        "--image_label",
        default=PICTURE_LABEL,
        metavar="TEXT",
        help=f"text before each picture, with a line end after it; {{number}} is its number; default: "
        f"{PICTURE_LABEL!r}, as released; '' for none",
    )
    parser.add_argument(
        "--boxes",
        type=path_argument,
        default=Path("boxes"),
        metavar="FOLDER",
        help="folder for pictures with the boxes of an answer; default: boxes",
    )
    parser.add_argument("--system", default=DEFAULT_SYSTEM, help=f"system message; default: {DEFAULT_SYSTEM!r}")
    for name, kind in (
        ("temperature", float),
        ("top_p", float),
        ("top_k", int),
        ("min_p", float),
        ("repetition_penalty", float),
        ("max_new_tokens", int),
    ):
        text = f"default: the checkpoint's generation_config.json, else {RELEASED[name]}"
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling; default: 0")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    add_mesh(parser)
    parser.add_argument("--verbose", action="store_true", help="log each compiled program")
    args = parser.parse_args(argv)
    if not args.verbose:
        logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    check_files(args.images)
    engine = load_engine(args.checkpoint, args.dtype, slots=1, mesh=args.mesh)
    settings = defaults(args.checkpoint)
    settings |= {name: value for name in RELEASED if (value := getattr(args, name)) is not None}
    new = int(settings.pop("max_new_tokens"))
    if args.max_new_tokens is None:
        new = min(new, engine.context_length // 2)  # a small model must have room for the question, too
    chat = Chat(engine, args.system, SamplingConfig(**settings), new, args.seed, args.image_label)
    for path in args.images:
        chat.attach(path)
    interactive = sys.stdin.isatty()
    # A byte that is not UTF-8 becomes U+FFFD instead of an error that would end the conversation.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if interactive:
        try:
            import readline  # noqa: F401  line editing and history in input()
        except ImportError:
            pass
        print(f"context of {engine.context_length} tokens; /help lists the commands, Ctrl-D ends")
    try:
        converse(chat, interactive, args.boxes)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    run(main)
