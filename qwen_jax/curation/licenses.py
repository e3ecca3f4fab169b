"""Licenses of source code, as SPDX names: which one a repository has, and whether it is in a list."""

import json
import re
import tomllib
from collections.abc import Collection, Mapping

# Licenses that allow use in any work against naming the authors, or without a condition.
PERMISSIVE = frozenset(
    ("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-0", "PSF-2.0")
    + ("Python-2.0", "Unlicense", "Zlib")
)
_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([^\n*]+)")
# A longer expression is none that a person wrote.
_LONGEST_EXPRESSION = 1000
_OR = re.compile(r"\s+or\s+|\s*/\s*", re.IGNORECASE)
_INNERMOST = re.compile(r"\(([^()]*)\)")
_NOT_ALLOWED = "no license of the list"
# Title of the license, found at the beginning of its text alone: the text of one names others.
_TITLES = (
    (r"gnu affero general public license version 3", "AGPL-3.0"),
    (r"gnu lesser general public license version 3", "LGPL-3.0"),
    (r"gnu lesser general public license version 2\.1", "LGPL-2.1"),
    (r"gnu library general public license version 2", "LGPL-2.0"),
    (r"gnu general public license version 3", "GPL-3.0"),
    (r"gnu general public license version 2", "GPL-2.0"),
    (r"apache license version 2\.0", "Apache-2.0"),
    (r"mozilla public license,? version 2\.0", "MPL-2.0"),
    (r"eclipse public license - v ?2\.0", "EPL-2.0"),
    (r"boost software license - version 1\.0", "BSL-1.0"),
    (r"cc0 1\.0 universal", "CC0-1.0"),
    (r"python software foundation license version 2", "PSF-2.0"),
)
# A sentence that only this license has, of those that have no title as a rule; the first that fits.
_SENTENCES = (
    (r"free and unencumbered software released into the public domain", "Unlicense"),
    (r"permission is hereby granted, free of charge, to any person obtaining a copy.*"
     r"the above copyright notice and this permission notice", "MIT"),
    (r"permission is hereby granted, free of charge, to any person obtaining a copy", "MIT-0"),
    (r"permission to use, copy, modify, and(/or)? distribute this software for any purpose with or without fee is "
     r"hereby granted, provided that the above copyright notice", "ISC"),
    (r"permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby "
     r"granted", "0BSD"),
    (r"redistribution and use in source and binary forms.*(neither the name|names? of (its|the) contributors)",
     "BSD-3-Clause"),
    (r"redistribution and use in source and binary forms", "BSD-2-Clause"),
    (r"provided 'as-is', without any express or implied warranty.*altered source versions", "Zlib"),
)  # fmt: skip
_TITLE_CHARACTERS = 1000


def of_text(text: str) -> str | None:
    """SPDX name of the license whose text this is, or None: it is none that is known.

    An SPDX tag in it counts first, then the title, then a sentence that only this license has.
    """
    if found := tag(text):
        return found
    flat = " ".join(text.replace("’", "'").split()).lower()
    head = flat[:_TITLE_CHARACTERS].replace(",", "")
    for pattern, name in _TITLES:
        if re.search(pattern.replace(",?", ""), head):
            return name
    return next((name for pattern, name in _SENTENCES if re.search(pattern, flat)), None)


def tag(text: str) -> str | None:
    """The expression after `SPDX-License-Identifier:`, or None."""
    found = _SPDX.search(text)
    return found[1].strip().removesuffix("-->").strip() or None if found else None


def of_repository(root_files: Mapping[str, str]) -> str | None:
    """SPDX expression of a repository, or None where it says nothing that is understood.

    The field of pyproject.toml, Cargo.toml or package.json counts first. Else the files named LICENSE, COPYING or
    UNLICENSE, with any ending; where several differ, all of them hold (AND), the strict reading.

    Args:
        root_files: text of the files at its root by name; others than these are ignored.
    """
    for name, field in (("pyproject.toml", _pyproject), ("Cargo.toml", _cargo), ("package.json", _package)):
        if name in root_files:
            try:
                value = field(root_files[name])
            except (ValueError, AttributeError, TypeError, RecursionError):
                continue  # the file of a build tool is broken: that is no license
            if isinstance(value, str) and value.strip():
                return value.strip()
    texts = [root_files[name] for name in sorted(root_files) if is_license_file(name)]
    found = sorted({of_text(text) or "unknown" for text in texts})
    if len(found) > 1:  # a tag in one of them may name alternatives
        found = [f"({one})" if _OR.search(one) else one for one in found]
    return " AND ".join(found) if found and found != ["unknown"] else None


def is_license_file(name: str) -> bool:
    """Whether a file of this name at the root of a repository holds its license."""
    return re.fullmatch(r"(licen[cs]e|copying|unlicense)([-._].*)?", name.lower()) is not None


def is_read(name: str) -> bool:
    """Whether `of_repository` reads a file of this name."""
    return name in ("pyproject.toml", "Cargo.toml", "package.json") or is_license_file(name)


def _pyproject(text: str):
    license_ = tomllib.loads(text).get("project", {}).get("license")
    return license_.get("text") if isinstance(license_, dict) and len(license_.get("text", "")) < 40 else license_


def _cargo(text: str):
    return tomllib.loads(text).get("package", {}).get("license")


def _package(text: str):
    return json.loads(text).get("license")


def is_allowed(expression: str | None, allowed: Collection[str]) -> bool:
    """Whether the license is in a list: one side of each OR, and both of each AND, must be; AND binds more closely.

    Args:
        expression: such as "MIT", "(MIT OR GPL-2.0) AND ISC", or None: unknown.
        allowed: SPDX names, compared without regard to case and to the endings -only and -or-later.
    """
    names = {_plain(name) for name in allowed}
    if expression is None or len(expression) > _LONGEST_EXPRESSION or not names:
        return False
    one_allowed = next(iter(names))
    # Innermost parentheses first: what stands in them is as good as a license that is in the list, or as none is.
    inside = 1
    while inside:
        expression, inside = _INNERMOST.subn(
            lambda found: f" {one_allowed if _is_flat_allowed(found[1], names) else _NOT_ALLOWED} ", expression
        )
    return _is_flat_allowed(expression, names)


def _is_flat_allowed(expression: str, names: Collection[str]) -> bool:
    """As `is_allowed`, without parentheses; `names` as `_plain` gives them."""
    return any(
        all(_plain(name) in names for name in re.split(r"\s+and\s+", one, flags=re.IGNORECASE))
        for one in _OR.split(expression)
    )


def _plain(name: str) -> str:
    name = re.sub(r"\s+with\s.*", "", name.strip(), flags=re.IGNORECASE).lower()
    return re.sub(r"(-only|-or-later|\+)$", "", name)
