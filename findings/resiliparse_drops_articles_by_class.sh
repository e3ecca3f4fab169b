#!/usr/bin/env bash
# resiliparse: extract_plain_text(main_content=True, comments=False) drops articles and lists that are the main content.
#
# One expects: an <article> is main content whatever its class says about comments, and <ul> is treated as <ol>.
# What happens: class "comments-open" or "no-comments" (WordPress), an <aside> or a "modal" around it leave no text; every
#   <ul> less than three levels below <body> is gone, inside <main> and <article> too, while <ol> stays. So is what is
#   invisible until a script runs (WeChat), and with alt_texts=False all text of a <figure>: captions, callouts of Notion.
# Who suffers: corpora of web pages: blogs vanish whole, lists and recipes lose their items, in silence.
# qwen_jax: takes such words out of class attributes, puts three <div> around each <ul>, and extracts again without names
#   where little is left, and renames figures (qwen_jax/curation/html.py); benchmarks/extraction.py measures it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet resiliparse==2.0.1 fastwarc==2.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata, sys
from resiliparse.extract.html2text import extract_plain_text

print("python", sys.version.split()[0], "resiliparse", importlib.metadata.version("resiliparse"))
text = "The library opens at nine and closes at eight. Readers may borrow ten books for four weeks."
cases = {
    f"<article class='post'><p>{text}</p></article>": True,
    f"<article class='post comments-open'><p>{text}</p></article>": False,
    f"<article class='post no-comments'><p>{text}</p></article>": False,
    f"<aside><article><p>{text}</p></article></aside>": False,
    f"<div class='modal'><article><p>{text}</p></article></div>": False,
    f"<main><article><ul><li>{text}</li></ul></article></main>": False,
    f"<main><p>{text}</p></main>": True,
    f"<main><div style='visibility: hidden'><p>{text}</p></div></main>": False,
    f"<main><div style='opacity: 0'><p>{text}</p></div></main>": True,
    f"<main><article><ol><li>{text}</li></ol></article></main>": True,
    f"<main><article><div><ul><li>{text}</li></ul></div></article></main>": True,
}
same = True
for body, kept in cases.items():
    found = extract_plain_text(f"<html><body>{body}</body></html>", main_content=True, comments=False)
    print("kept   " if text in found else "dropped", body.replace(text, "…"))
    same &= (text in found) == kept
figure = f"<html><body><main><p>{text[:44]}</p><figure><figcaption>{text}</figcaption></figure></main></body></html>"
for alt_texts in (True, False):
    found = extract_plain_text(figure, main_content=True, alt_texts=alt_texts)
    print("kept   " if text in found else "dropped", f"<figure><figcaption>…</figcaption></figure>, alt_texts={alt_texts}")
    same &= (text in found) == alt_texts
sys.exit(0 if same else "changed: other pages are dropped now")
PYTHON
