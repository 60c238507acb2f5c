"""Text that every Python carries: the standard library's sources, and what they define.

Knows files and syntax trees; knows nothing of tokens, models or prompts.
"""

import ast
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPLIT_SEED = 2026
HELD_OUT_ONE_IN = 8
SKIPPED_FOLDERS = frozenset(  # other people's packages, tests, tables, and optional parts
    [
        *["site-packages", "dist-packages", "_bundled", "ensurepip", "__pycache__"],
        *["test", "tests", "idle_test", "encodings", "pydoc_data"],
        *["idlelib", "lib2to3", "turtledemo"],
    ]
)


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the library; `name` is its path below the library's folder, with slashes."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training; a hash of its name decides."""
        digest = hashlib.sha256(f"{SPLIT_SEED}:{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, slots=True)
class Definition:
    """One function or class, dedented."""

    line: int
    """Where the signature begins in its file, from 1."""
    name: str
    is_class: bool
    signature: str
    """From `def` or `class` to the colon, over as many lines as it takes."""
    source: str
    """The whole definition, without decorators."""
    paragraph: str
    """The docstring's first paragraph, cleaned of indentation; "" without a docstring."""

    @property
    def sentence(self) -> str:
        """The docstring's first sentence on one line, or all of its first paragraph."""
        words = " ".join(self.paragraph.split())
        return words.split(". ")[0].rstrip(".") + "." if words else ""


def standard_library() -> list[Source]:
    """Every source of this Python's library that the split may use, sorted by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    kept = (name for name in names if not SKIPPED_FOLDERS.intersection(name.split("/")))
    return [Source(name, _read(folder / name)) for name in kept]


def definitions(source: Source) -> list[Definition]:
    """The functions and classes of a file that stand on lines of their own, in order."""
    lines = source.text.splitlines()
    nodes = sorted(_nodes(ast.parse(source.text)), key=lambda node: node.lineno)
    return [found for node in nodes if (found := _definition(node, lines)) is not None]


def sha256(sources: list[Source]) -> str:
    """A digest of names and texts: two runs with the same digest read the same library."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\0{source.text}\0".encode())
    return digest.hexdigest()


def _read(path: Path) -> str:
    with tokenize.open(path) as file:  # honours a file's coding line
        return file.read()


_Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _nodes(tree: ast.Module) -> Iterator[_Node]:
    return (node for node in ast.walk(tree) if isinstance(node, _Node))


def _definition(node: _Node, lines: list[str]) -> Definition | None:
    """None where the body begins on the signature's own line: there is nothing to cut."""
    head = _dedented(lines[node.lineno - 1 : node.body[0].lineno - 1], node.col_offset)
    if not head.endswith(":"):
        return None
    docstring = ast.get_docstring(node) or ""
    return Definition(
        line=node.lineno,
        name=node.name,
        is_class=isinstance(node, ast.ClassDef),
        signature=head,
        source=_dedented(lines[node.lineno - 1 : node.end_lineno], node.col_offset),
        paragraph=docstring.strip().split("\n\n")[0],
    )


def _dedented(lines: list[str], columns: int) -> str:
    """Unlike textwrap.dedent, a line inside a string that stands further left moves no other."""
    cut = (line if line[:columns].strip() else line[columns:] for line in lines)
    return "\n".join(cut).rstrip()
