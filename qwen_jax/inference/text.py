"""Text of token ids as they come: in whole characters, without stop strings."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of one continuation, token by token, into text that is final.

    A character that is split over tokens comes with the last of them; bytes that are not UTF-8 become U+FFFD. Text that
    may be the beginning of a stop string is held back until it is known whether it is one.

    Attributes:
      text: all text so far.
      stopped: whether a stop string came. It is not part of the text.
    """

    def __init__(self, stop_strings: Sequence[str] = ()):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """The text that `data`, the bytes of the next token, makes certain; nothing after a stop string."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data)
        found = [at for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found), drop=True)
        return self._give(len(self._held) - self._beginning())

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        return self._give(len(self._held))

    def _beginning(self) -> int:
        """Number of characters at the end that may begin a stop string."""
        longest = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _give(self, length: int, drop: bool = False) -> str:
        given = self._held[:length]
        self._held = "" if drop else self._held[length:]
        self.text += given
        return given


def token_bytes(tokenizer, token: int) -> bytes:
    """Bytes of a token; those of U+FFFD for an id that only a padded vocabulary has.

    Args:
      tokenizer: with `decode_bytes` and `vocab_size`, and `vision_vocab_size` if it has tags of pictures after them.
    """
    size = getattr(tokenizer, "vision_vocab_size", tokenizer.vocab_size)
    return tokenizer.decode_bytes([token]) if token < size else "\ufffd".encode()
