"""Read items to evaluate, and keep the answers given so far, so that an interrupted evaluation resumes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.errors import UserError


def read_text(path: str) -> str:
    """Return a file's text; raise UserError where it cannot be read or is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read --data {path!r}: {error.strerror}; give a file") from None
    except UnicodeDecodeError:
        raise UserError(f"--data {path!r} is not UTF-8; convert it by iconv") from None
    if not text.strip():
        raise UserError(f"--data {path!r} is empty; give a file with at least one item")
    return text


def read_items(path: str, keys: dict[str, type]) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file.

    Args:
        keys: the keys that each object must have, with the types of their values.

    Raises:
        UserError: a line that is no object, or lacks a key.
    """
    items = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"--data {path!r}, line {number} is not JSON: {error}") from None
        wrong = [k for k, kind in keys.items() if not isinstance(item, dict) or not isinstance(item.get(k), kind)]
        if wrong:
            wanted = ", ".join(f"{key} ({kind.__name__})" for key, kind in keys.items())
            raise UserError(f"--data {path!r}, line {number} lacks {', '.join(wrong)}; each line needs {wanted}")
        items.append(item)
    return items


def read_pairs(path: str) -> list[tuple[str, str]]:
    """Return the two columns of a TSV file; raise UserError for a line that has not exactly two."""
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line:
            continue
        columns = line.rstrip("\r").split("\t")
        if len(columns) != 2:
            raise UserError(f"--data {path!r}, line {number} has {len(columns)} columns; give source TAB target")
        pairs.append((columns[0], columns[1]))
    return pairs


class Answers:
    """The answers given so far, one JSON object a line in a file, or in memory only.

    Args:
        path: the file; None for none.
        about: what the answers depend on; a file with other values is refused.

    Raises:
        UserError: the file holds answers to something else, or cannot be written.
    """

    def __init__(self, path: str | None, about: dict[str, Any]):
        self.path, self.rows = path, {}
        if path is None:
            return
        lines = []
        if Path(path).exists():
            lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]  # without a line that was cut
        if not lines:
            self._write(json.dumps(about) + "\n", "w")
            return
        if json.loads(lines[0]) != about:
            raise UserError(
                f"--out {path!r} holds answers of another evaluation ({lines[0][:200]}); give another file"
            )
        for row in map(json.loads, lines[1:]):
            self.rows[row["item"]] = row
        self._write("".join(line + "\n" for line in lines), "w")

    def missing(self, n: int) -> list[int]:
        """Return which of n items have no answer yet."""
        return [i for i in range(n) if i not in self.rows]

    def add(self, item: int, answer: dict[str, Any]) -> None:
        """Keep an item's answer."""
        self.rows[item] = {"item": item, **answer}
        if self.path is not None:
            self._write(json.dumps(self.rows[item], ensure_ascii=False) + "\n", "a")

    def in_order(self) -> Iterator[dict[str, Any]]:
        """Yield the answers in the items' order."""
        return (self.rows[i] for i in sorted(self.rows))

    def _write(self, text: str, mode: str) -> None:
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"cannot write --out {self.path!r}: {error.strerror}; give another file") from None


def digest(path: str) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
