"""Bytes of pages, and the text that Chromium shows for them.

The values were taken once from a headless Chromium (Debian 12) with `--dump-dom` on files of
`<meta charset="LABEL"><p>BYTES`, for the last table without the declaration.
"""

import pytest

from qwen_jax.curation import charsets, html


@pytest.mark.parametrize(
    ("label", "data", "shown"),
    [
        ("big5", b"\xad\xbb\xb4\xe4\x8bR\x87@\xf9\xd6\xa3\xe1", "香港苄䏰碁€"),
        ("big5-hkscs", b"\xad\xbb\xb4\xe4\x9da", "香港犏"),
        ("shift_jis", b"\x87@\x87T\xed@\xfa\xb1\x8b\xe0\\~", "①Ⅰ纊﨑金\\~"),
        ("euc-jp", b"\xad\xa1\xad\xb5\xb6\xe2\x8f\xb0\xa1\x8e\xb1", "①Ⅰ金丂ｱ"),
        ("euc-jp", b"\xf9\xa1\xfc\xfc\xb6\xe2\xa1\xc1\xa1\xc0", "纊￤金～＼"),
        ("shift_jis", b"\x81`\x81|\x81_\x81a\x81\x91", "～－＼∥￠"),
        ("iso-2022-jp", b"\x1b$B-!6b\x1b(B ok \x1b(I12\x1b(B \x1b(J\\~\x1b(B", "①金 ok ｱｲ ¥‾"),
        ("ks_c_5601-1987", b"\x8cc\xb9\xe6\xb0\xa2\xc7\xcf \xbc\x84\xbd\xc3\xc4\xdd\xb6\xf3", "똠방각하 펲시콜라"),
        ("gbk", b"\x80 \xa2\xe3 \x810\x810 \xb9\xfa \xa8\xbf", "€ € \x80 国 ǹ"),
        ("gb2312", b"\xd6\xec\xe9F\xbb\xf9 \x87\xf8 \xa2\xe3", "朱镕基 國 €"),
        ("gb18030", b"\x952\x826\x819\xee9\x87\xf8", "𠀀㐀國"),
        ("iso-8859-11", b"\xcb\xe9\xcd\xa7\xca\xc1\xd8\xb4 \x80\x85\x93\x94", "ห้องสมุด €…“”"),
        ("tis-620", b"\xcb\xe9\xcd\xa7\x85\x96", "ห้อง…–"),
        ("iso-8859-1", b"\x93quote\x94 \x80 caf\xe9 \x81\x8d", "“quote” € café \x81\x8d"),
        ("us-ascii", b"\x93quote\x94 \xe9", "“quote” é"),
        ("iso-8859-9", b"\x80 \xfd\xf0\xfe \x93", "€ ığş “"),
        ("windows-1252", b"a\x81b\x8dc\x8fd\x90e\x9df", "a\x81b\x8dc\x8fd\x90e\x9df"),
        ("windows-1251", b"\xc1\xe8\xe1 \x98", "Биб \x98"),
        ("windows-1253", b"\xea\xe1\xeb\xe7 \xaa\xd2\xff\x81", "καλη ���\x81"),
        ("windows-1255", b"\xf9\xec\xe5\xed\xd9\xff \xfb", "שלום�� �"),
        ("windows-1257", b"\xfe\xa1\xa5\x81", "ž��\x81"),
        ("koi8-r", b"\xe2\xc9\xc2", "Биб"),
        ("koi8-u", b"\xae\xbe \xa4\xb4 \xc0", "ўЎ єЄ ю"),
        ("x-mac-cyrillic", b"\x8f\xf0\xe8\xff\xa2\xb6", "При€Ґґ"),
        ("macintosh", b"caf\x8e \xdb", "café €"),
        ("ibm866", b"\xaf\xe0\xa8\xa2\xa5\xe2", "привет"),
        ("iso-8859-8-i", b"\xf9\xec\xe5\xed", "שלום"),
        ("iso-8859-2", b"\xb1\xe6\xea \x80\x99", "ąćę \x80\x99"),
        ("iso-8859-15", b"\xa4 \xbc\xbd\xbe \x93", "€ ŒœŸ \x93"),
        ("utf-16", b"na\xc3\xafve", "naïve"),
        (
            "x-gbk",
            b"\xcd\xbc\xca\xe9\xb9\xdd\xb4\xd3\xd4\xe7\xc9\xcf\xbe\xc5\xb5\xe3\xbf\xaa\xb5\xbd\xcd\xed\xc9\xcf\xb0\xcb\xb5\xe3\xa3\xac\xbb\xb6\xd3\xad\xca\xd0\xc3\xf1\xc7\xb0\xc0\xb4\xbd\xe8\xd4\xc4\xa1\xa3",
            "图书馆从早上九点开到晚上八点，欢迎市民前来借阅。",
        ),
        ("windows-31j", b"\x87@", "①"),
        ("windows-949", b"\x8cc", "똠"),
        ("big5", b"\xa4\xa4\xff\xa4\xe5\x80x", "中�文�x"),
        ("shift_jis", b"\x8b\xe0\x81 x\xa0\xfd", "金� x��"),
        ("euc-kr", b"\xb0\xa1\xc9 x\xff", "가� x�"),
        ("gbk", b"\xb9\xfa\xff\xb9 x", "国�� x"),
        ("utf-8", b"caf\xe9 ok \xe2\x82 x \xf0\x9f\x98", "caf� ok � x �"),
    ],
)
def test_declared_encodings_are_read_as_browsers_read_them(label, data, shown):
    codec = charsets.declared_in_page(b'<meta charset="' + label.encode() + b'">')
    assert charsets.to_text(data, codec) == shown
    assert charsets.codec_of(f'"{label.upper()}" ') in (codec, "utf-16-le")


KOREAN = "도서관은 아침 아홉 시에 문을 열고 저녁 여덟 시에 닫습니다. 시민 여러분의 많은 이용을 바랍니다."
CHINESE = "图书馆从早上九点开到晚上八点，欢迎市民前来借阅。"
TAIWANESE = "圖書館從早上九點開到晚上八點，歡迎市民前來借閱。"
JAPANESE = "図書館は朝の九時から夜の八時まで開いています。市民の皆さまのご利用をお待ちしております。"
RUSSIAN = "Библиотека открыта с девяти утра до восьми вечера." * 3
FRENCH = "Le musée est fermé à Noël, été comme hiver."


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (KOREAN, "euc-kr"),
        (CHINESE, "gbk"),
        (TAIWANESE, "big5"),
        (JAPANESE, "cp932"),
        (JAPANESE, "euc_jp"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (FRENCH, "cp1252"),
    ],
)
@pytest.mark.parametrize("declared", ["", '<meta charset="no-such">'])
def test_encodings_without_a_declaration_are_detected(text, encoding, declared):
    page = f"<html><head>{declared}</head><body><p>".encode() + text.encode(encoding) + b"</p></body></html>"
    assert text in html.decode(page, None, is_html=True)[0]
    assert html.decode(text.encode(encoding))[0] == text


def test_japanese_of_seven_bits_needs_no_header():
    data = JAPANESE.encode("iso2022_jp")
    for page in (b'<meta http-equiv="Content-Type" content="text/html; charset=iso-2022-jp">' + data, data):
        text, encoding = html.decode(page, None, is_html=True)
        assert text.endswith(JAPANESE) and encoding == "iso2022_jp"
    # Supplementary characters and half-width ones, after a line end.
    assert charsets.to_text(b'\x1b$B$"\n$$\x1b$(D0!\x1b(I1\x1b(Ba', "iso2022_jp") == "あ\nい丂ｱa"


def test_one_bad_byte_does_not_change_the_encoding():
    for text, label, encoding in (
        (CHINESE, "gb2312", "gbk"),
        (JAPANESE, "shift_jis", "cp932"),
        (KOREAN, "euc-kr", "cp949"),
    ):
        data = (text * 3).encode(encoding) + b"\xff " + text.encode(encoding)
        found, _ = html.decode(data, label)
        assert found == f"{text * 3}\ufffd {text}"
    cut = (CHINESE * 3).encode()[:-1]
    for charset in (None, "iso-8859-1"):
        assert html.decode(cut, charset)[0] == (CHINESE * 3)[:-1] + "\ufffd"


def test_utf_16_is_read_where_the_server_says_so():
    assert html.decode("hello".encode("utf-16-be"), "utf-16be") == ("hello", "utf-16-be")
    assert html.decode("hello".encode("utf-16-le"), '"UTF-16"') == ("hello", "utf-16-le")
