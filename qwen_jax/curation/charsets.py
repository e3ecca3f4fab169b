"""Character encodings as browsers read them (WHATWG Encoding Standard), on top of Python's codecs.

A name in a header stands for more than its standard: gb2312 for GB 18030, shift_jis for Windows-31J, iso-8859-1 for
Windows-1252. The differences are the characters that Windows and Hong Kong added, which pages use.
"""

import codecs
import re

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

# Names of `map_encoding_to_html5` whose Python codec of the same name knows fewer characters than browsers do.
_CODECS = {
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "gbk": "gb18030",
    "iso8859-11": "cp874",
}
# Labels that `map_encoding_to_html5` does not know.
_MORE_LABELS = {"x-mac-cyrillic": "mac_cyrillic", "x-mac-ukrainian": "mac_cyrillic"}
_MULTIBYTE = frozenset({"big5hkscs", "cp932", "cp949", "gb18030", "euc_jp"})
# Where Python's tables have the characters of the standard, and browsers those of Windows or KOI8-RU.
_TRANSLATED = {
    "cp932": str.maketrans(dict.fromkeys("\uf8f0\uf8f1\uf8f2\uf8f3", "\ufffd")),
    "euc_jp": str.maketrans("\u301c\u2016\u2212\u00a2\u00a3\u00ac", "\uff5e\u2225\uff0d\uffe0\uffe1\uffe2"),
    "koi8-u": str.maketrans("\u255d\u256c", "\u045e\u040e"),
}
_ESCAPE = re.compile(rb"\x1b(\$[@B]|\$\(D|\([BJI])")
_HIGH = bytes(byte | 0x80 if 0x21 <= byte < 0x7F else byte for byte in range(256))
# Browsers look for a declaration in the first 1,024 bytes.
_META = re.compile(rb"<meta\b[^>]*?\bcharset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_META_BYTES = 1024
_JAPANESE_ESCAPES = re.compile(rb"\x1b\$[@B](?:[\x21-\x7e]{2})+\x1b\([BJ]")
_HANGUL = re.compile("[가-힣]")
_IDEOGRAPH = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_FREQUENT_HANGUL = re.compile("[이다는을의에가고하한지로기사은도를있인시어자나리여]")
_ERRORS = "qwen_jax.browser"


def _browser_error(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    byte = error.object[error.start]
    if error.encoding == "gb18030" and byte == 0x80:
        return "€", error.start + 1
    pair = error.object[error.start : error.start + 2]
    try:
        if error.encoding == "big5hkscs":
            return pair.decode("cp950"), error.start + len(pair)
        if error.encoding == "euc_jp" and len(pair) == 2:
            return _shifted(pair).decode("cp932"), error.start + 2
    except UnicodeDecodeError:
        pass
    # Bytes that Windows code pages leave open are control characters.
    if error.encoding == "charmap" and 0x80 <= byte < 0xA0:
        return chr(byte), error.start + 1
    end = error.end
    if error.encoding in _MULTIBYTE and end > error.start + 1 and error.object[end - 1] < 0x80:
        end -= 1  # a lead byte does not swallow the ASCII character behind it
    return "\ufffd", end


codecs.register_error(_ERRORS, _browser_error)


def _shifted(pair: bytes) -> bytes:
    """A character of EUC-JP in Shift_JIS, whose Windows table has the rows that NEC and IBM added."""
    row, cell = pair[0] - 0xA1, pair[1] - 0xA1
    if not (0 <= row < 94 and 0 <= cell < 94):
        return b"\xff"
    lead = row // 2 + (0x81 if row < 62 else 0xC1)
    place = cell + 94 * (row % 2)
    return bytes([lead, place + (0x40 if place < 63 else 0x41)])


def to_text(data: bytes, codec: str) -> str:
    """`data` decoded by the codec, with U+FFFD for undefined bytes."""
    if codec == "iso2022_jp":
        return _iso2022_jp(data)
    text = data.decode(codec, _ERRORS)
    return text.translate(_TRANSLATED[codec]) if codec in _TRANSLATED else text


def _iso2022_jp(data: bytes) -> str:
    first, *parts = _ESCAPE.split(data)
    texts = [first.decode("ascii", "replace")]
    for escape, part in zip(parts[::2], parts[1::2], strict=True):
        if escape in (b"$@", b"$B"):
            texts.append(to_text(part.translate(_HIGH), "euc_jp"))
        elif escape == b"$(D":
            pairs = re.sub(rb"([\xa1-\xfe]{2})", b"\x8f\\1", part.translate(_HIGH))
            texts.append(to_text(pairs, "euc_jp"))
        elif escape == b"(I":
            texts.append("".join(chr(byte + 0xFF40) if 0x21 <= byte < 0x60 else chr(byte) for byte in part))
        else:
            text = part.decode("ascii", "replace")
            texts.append(text.translate({0x5C: "¥", 0x7E: "‾"}) if escape == b"(J" else text)
    return "".join(texts)


def codec_of(label: str | None) -> str | None:
    """Python's codec for a label of a header or page, or None for a label that browsers do not know."""
    if not label:
        return None
    label = label.strip().strip("\"'").strip().lower()
    name = map_encoding_to_html5(label, False) or _MORE_LABELS.get(label)
    return _CODECS.get(name, name)


def declared_in_page(data: bytes) -> str | None:
    """The codec that a page declares in `<meta>`; a page that could be read so far is not in UTF-16."""
    found = _META.search(data, 0, _META_BYTES)
    codec = codec_of(found[1].decode("ascii", "replace")) if found else None
    return "utf-8" if codec is not None and codec.startswith("utf-16") else codec


def is_stateful(codec: str | None, data: bytes) -> bool:
    """Whether bytes that are valid ASCII or UTF-8 still have to be read in `codec`."""
    return codec is not None and ((codec.startswith("iso2022") and b"\x1b" in data) or codec.startswith("utf-16"))


def is_iso2022_jp(data: bytes) -> bool:
    """Whether the bytes, which are ASCII, switch to Japanese characters and back."""
    return b"\x1b$" in data and _JAPANESE_ESCAPES.search(data) is not None


def detect(data: bytes) -> str | None:
    """The codec that bytes without a declaration seem to be in, or None."""
    if is_iso2022_jp(data):
        return "iso2022_jp"
    if _is_korean(data):
        return "cp949"
    name = detect_encoding(data, from_html_meta=False)
    return _CODECS.get(name, name)


def _is_korean(data: bytes) -> bool:
    """Whether the bytes are Korean in cp949, where Chinese and Japanese give ideographs or rare syllables."""
    text = data[:20_000].decode("cp949", "ignore")
    hangul = len(_HANGUL.findall(text))
    return (
        hangul >= 4
        and hangul > 9 * len(_IDEOGRAPH.findall(text))
        and len(_FREQUENT_HANGUL.findall(text)) > 0.15 * hangul
    )
