"""A YAML or JSON file that a user wrote, as a mapping; every fault is one line that names its place."""

import re
from pathlib import Path
from typing import Any

import yaml

from flows.errors import JobError

NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", re.ASCII)
"""YAML 1.2's, and so JSON's: 1e-1 is a number, which YAML 1.1 takes for text."""
FLOAT = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """YAML where a key given twice is an error, not the last one's silent victory."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):  # any other is refused when it is constructed
                if (key.tag, key.value) in seen:
                    raise _fault(key, f"key {key.value!r} is given twice")
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and not _is_plain(node.value):
            raise _fault(node, "holds a NUL character, or half of a surrogate pair")
        try:
            return super().construct_object(node, deep)
        # What PyYAML's constructors do where a scalar is not what it, or its tag, claims to be.
        except (ValueError, LookupError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _fault(node, f"{node.value!r:.40} is no {kind} ({error})") from error


# Behind YAML's own: what they know to be a whole number stays one.
_Loader.add_implicit_resolver(FLOAT, re.compile(f"({NUMBER.pattern})$"), list("-+.0123456789"))


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file's top-level mapping; JobError if it is none."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise JobError(f"{path}: there is no such file") from error
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise JobError(f"{path}: is not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise JobError(f"{path}: {_sentence(error)}") from error
    except RecursionError as error:
        raise JobError(f"{path}: is nested too deeply") from error
    if not isinstance(document, dict):
        raise JobError(f"{path}: must be a mapping of settings, found {type(document).__name__}")
    return document


def _is_plain(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _fault(node: yaml.Node, reason: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


def _sentence(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line; PyYAML draws several."""
    words, mark = str(error), None
    if isinstance(error, yaml.MarkedYAMLError):
        words, mark = error.problem or error.context or words, error.problem_mark
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"no valid YAML or JSON{place}: {' '.join(words.split())}"
