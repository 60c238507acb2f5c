"""What a prompt row may hold; pure: raw values in, a validated row or an InputError out.

Every fault of the input names the file, the row and the column. An empty prompt is no fault of
the input (it becomes that row's own error later), nor is an empty data set (a job of zero rows,
finished at once).
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple, NoReturn

import xxhash

from storage.errors import InputError
from storage.files import shown

MAX_ID_CHARACTERS = 512
PREFIX_CHARACTERS = 64  # about one KV block of tokens: what is shorter is not worth sharing
MAX_LINE_BYTES = 64 * 2**20  # above any model's context; a longer line is a file without line ends
TEXT_SAMPLING = "stop"  # the one sampling parameter whose values are text

TYPE_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    bytes: "binary",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Where the prompts lie: Parquet, JSONL, CSV or OpenAI-batch JSONL at any fsspec URI.

    Without `id_column` a row's id is its input_hash and occurrence. One of `prompt_column` and
    `messages_column` is needed, except for OpenAI-batch lines (`custom_id` and `body`), which name
    everything themselves. `sampling_columns` maps a sampling parameter to the column that overrides
    it; a null there means the job's own value.
    """

    uri: str
    id_column: str | None = None
    prompt_column: str | None = None
    messages_column: str | None = None
    sampling_columns: dict[str, str] = field(default_factory=dict)

    @property
    def content_column(self) -> str:
        """The column that holds what is asked; empty where none is named."""
        return self.prompt_column or self.messages_column or ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that the source names."""
        named = (self.id_column, self.prompt_column, self.messages_column)
        return (*(name for name in named if name), *self.sampling_columns.values())

    def require_columns(self, present: list[str]) -> None:
        """InputError unless each named column is there, once."""
        for name in self.columns:
            if name not in present:
                there = ", ".join(present) or "none"
                raise self.fault(f"there is no such column; there are: {there}", name)
            if present.count(name) > 1:
                raise self.fault("there are several columns of this name", name)

    def fault(self, reason: str, column: str | None = None) -> InputError:
        """An InputError about the file as a whole."""
        return InputError(shown(self.uri), reason, column=column)


class RawRow(NamedTuple):
    """One row as its file has it; `content` is a list of messages if `chat`, else a prompt."""

    row: int
    line: int | None
    custom_id: object
    chat: bool
    content: object
    sampling: dict[str, object]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One validated row. Exactly one of `prompt` and `messages` is set."""

    row_id: int
    """Position in the input, from 0."""
    custom_id: str
    """Empty for as long as the id is to be made from content and occurrence."""
    input_hash: str
    """Hash of all that is the row's own: prompt or messages, and sampling."""
    prompt: str | None
    messages: list[dict[str, str]] | None
    sampling: dict[str, int | float | list[str]]
    prefix_hash: str
    """Hash of the first characters: equal for rows that may share a computed prefix."""
    length: int
    """Characters."""
    line: int | None = field(default=None, compare=False)
    """Where it begins in its file, from 1; None where the file has no lines."""

    def named(self, custom_id: str) -> "PromptRow":
        """The row under its final id."""
        return replace(self, custom_id=custom_id)


@dataclass(frozen=True, slots=True)
class FieldNames:
    """What the file calls each field, so that an error speaks the file's language."""

    custom_id: str
    prompt: str
    messages: str
    sampling: dict[str, str]


class RowReader:
    """Validates the raw rows of one file."""

    def __init__(self, source: PromptSource, names: FieldNames, *, with_ids: bool) -> None:
        self._file = shown(source.uri)
        self._names = names
        self._with_ids = with_ids
        self._encode = json.JSONEncoder(
            ensure_ascii=False, sort_keys=True, separators=(",", ":")
        ).encode

    @classmethod
    def of(cls, source: PromptSource) -> "RowReader":
        """A reader for a file whose columns the source names."""
        if (source.prompt_column is None) == (source.messages_column is None):
            raise source.fault("name one of prompt_column and messages_column")
        names = FieldNames(
            source.id_column or "",
            source.prompt_column or "",
            source.messages_column or "",
            source.sampling_columns,
        )
        return cls(source, names, with_ids=source.id_column is not None)

    def row(self, raw: RawRow) -> PromptRow:
        """The validated row; InputError naming row and column otherwise."""
        custom_id = self._id(raw) if self._with_ids else ""
        sampling = self._sampling(raw) if raw.sampling else {}
        if raw.chat:
            messages = self._messages(raw)
            prompt = None
            head = "\0".join(f"{turn['role']}\0{turn['content']}" for turn in messages)
            length = sum(len(turn["content"]) for turn in messages)
            content = f"messages\0{self._encode(messages)}"
        else:
            messages = None
            head = prompt = self._text(raw, raw.content, self._names.prompt)
            length = len(prompt)
            content = f"prompt\0{prompt}"
        if sampling:  # no text holds a NUL, so different rows spell different contents
            content = f"{content}\0{self._encode(sampling)}"
        return PromptRow(
            raw.row,
            custom_id,
            blake2b(content.encode(), digest_size=16).hexdigest(),
            prompt,
            messages,
            sampling,
            xxhash.xxh3_64_hexdigest(head[:PREFIX_CHARACTERS].encode()),
            length,
            raw.line,
        )

    def _id(self, raw: RawRow) -> str:
        value, column = raw.custom_id, self._names.custom_id
        if value is None or value == "":
            self._refuse(raw, column, "has no id; every row needs one")
        whole_number = isinstance(value, int) and not isinstance(value, bool)
        text = str(value) if whole_number else self._text(raw, value, column)
        if not text.strip():
            self._refuse(raw, column, "has no id, only white space")
        if len(text) > MAX_ID_CHARACTERS:
            self._refuse(
                raw, column, f"has an id of {len(text)} characters; at most {MAX_ID_CHARACTERS}"
            )
        return text

    def _text(self, raw: RawRow, value: object, column: str) -> str:
        if not isinstance(value, str):
            held = "nothing (null)" if value is None else TYPE_NAMES.get(type(value), "no text")
            self._refuse(raw, column, f"holds {held}; text is needed")
        if "\0" in value:
            self._refuse(raw, column, f"holds a NUL character at position {value.index(chr(0))}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                self._refuse(raw, column, f"holds a lone surrogate at position {error.start}")
        return value

    def _messages(self, raw: RawRow) -> list[dict[str, str]]:
        turns, column = raw.content, self._names.messages
        if isinstance(turns, str):
            turns = self._parsed(raw, turns)
        if not isinstance(turns, list):
            self._refuse(raw, column, "holds no list of messages")
        return [self._turn(raw, number, turn) for number, turn in enumerate(turns)]

    def _parsed(self, raw: RawRow, text: str) -> object:
        try:
            return parse_json(text)
        except ValueError as error:
            self._refuse(raw, self._names.messages, f"holds no valid JSON: {error}")

    def _turn(self, raw: RawRow, number: int, turn: object) -> dict[str, str]:
        place = f"{self._names.messages}[{number}]"
        if not isinstance(turn, dict):
            self._refuse(raw, place, "is no object with role and content")
        for key in ("role", "content"):
            self._text(raw, turn.get(key), f"{place}.{key}")
        return {
            self._text(raw, key, place): self._text(raw, value, f"{place}.{key}")
            for key, value in turn.items()
            if value is not None
        }

    def _sampling(self, raw: RawRow) -> dict[str, int | float | list[str]]:
        given = {name: value for name, value in raw.sampling.items() if value is not None}
        return {
            name: self._stops(raw, value)
            if name == TEXT_SAMPLING
            else self._number(raw, name, value)
            for name, value in given.items()
        }

    def _stops(self, raw: RawRow, value: object) -> list[str]:
        column = self._names.sampling[TEXT_SAMPLING]
        texts = value if isinstance(value, list) else [value]
        return [self._text(raw, text, column) for text in texts]

    def _number(self, raw: RawRow, name: str, value: object) -> int | float:
        column = self._names.sampling[name]
        if not isinstance(value, int | float) or isinstance(value, bool):
            held = TYPE_NAMES.get(type(value), "no number")
            self._refuse(raw, column, f"holds {held}; {name} needs a number")
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(raw, column, f"holds {value}; {name} needs a finite number")
        return value

    def _refuse(self, raw: RawRow, column: str, reason: str) -> NoReturn:
        raise InputError(self._file, reason, row=raw.row, line=raw.line, column=column)


def parse_json(text: str) -> object:
    """Strict where Python is lax: ValueError for a key given twice or nesting beyond all sense."""
    try:
        return _decoder.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {counts.most_common(1)[0][0]!r} is there twice")
    return keys


_decoder = json.JSONDecoder(object_pairs_hook=_unique)
