"""One HTML file with all that a study says: it needs no other file, and no network."""

import base64
import html
from pathlib import Path

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{background:#f4f4f4;padding:1em;\
overflow-x:auto;font-size:12px}img{max-width:49%}"
)


def make_report(title: str, sections: dict[str, list[str]], pictures: list[Path]) -> str:
    """The page.

    Args:
        sections: lines of text by heading.
        pictures: PNG files, embedded.
    """
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"]
    parts.append(f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>")
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">')
    for heading, lines in sections.items():
        parts.append(f"<h2>{html.escape(heading)}</h2><pre>{html.escape(chr(10).join(lines))}</pre>")
    return "\n".join([*parts, "</html>\n"])
