"""Write the prose of Python's standard library, its docstrings, as one text: a second domain beside Shakespeare.

python studies/finetuning/library_prose.py data/library.txt
"""

import ast
import sys
import sysconfig
from pathlib import Path

SHORTEST = 200  # characters of a docstring that counts as prose


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        text for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and (text := ast.get_docstring(node))
    ]


def main(out: str) -> None:
    """Write the docstrings in the order of the files' names, each once, a blank line between them."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in folder.rglob("*.py") if not {"test", "tests", "site-packages"} & set(p.parts))
    found: dict[str, None] = {}
    for file in files:
        try:
            found |= dict.fromkeys(docstrings(file.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("\n\n".join(text for text in found if len(text) >= SHORTEST) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
