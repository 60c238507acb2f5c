"""Text to token ids and back, as the model's own tokenizer and chat template do it; without torch.

A message is text: a control token typed inside one never becomes one. Knows nothing of rows, of
lengths that fit, or of sampling.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
from transformers import PreTrainedTokenizerFast

from stages.errors import PromptError
from stages.generation import end_ids
from stages.tokenizer import load_tokenizer, tokenizer_digest, written_tokens

SpecialTokens = Literal["parse", "text"]

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_MARKERS = re.compile("[\U000f0000\U000f0001]")
"""transformers marks typed control tokens with these, and would drop them from the text."""
_VERBATIM = "{{ messages[0]['content'] }}"
"""A template that adds nothing."""
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template's own expressions can raise."""


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """A model folder's tokenizer and template; one thread at a time may use it."""

    end_ids: frozenset[int]
    """Any of them ends an answer."""
    tokenizer_sha256: str
    """Digest of what decides ids, text and where an answer ends."""
    template_sha256: str
    """Digest of the chat template, or of none."""
    _special_tokens: SpecialTokens
    _tokenizer: PreTrainedTokenizerFast
    _written: re.Pattern[str]
    """Finds tokens that are not special, yet only for the template to write."""
    _control: re.Pattern[str]
    """Finds those and special tokens."""
    _silent_ids: frozenset[int]
    """Special tokens: they leave no text."""

    @classmethod
    def load(cls, model_folder: Path, special_tokens: SpecialTokens) -> "PromptEncoder":
        """Read a folder; `special_tokens` says whether a plain prompt's typed ones count as such.

        Raises CheckpointError if a file of the tokenizer or of the configs is missing or broken.
        """
        tokenizer = load_tokenizer(model_folder)
        special = {id: str(t) for id, t in tokenizer.added_tokens_decoder.items() if t.special}
        written = written_tokens(tokenizer)
        tokenizer.chat_control_tokens = written
        ends = end_ids(model_folder, tokenizer)
        template = json.dumps(tokenizer.chat_template, sort_keys=True)
        return cls(
            end_ids=ends,
            tokenizer_sha256=tokenizer_digest(model_folder, ends),
            template_sha256=hashlib.sha256(template.encode()).hexdigest(),
            _special_tokens=special_tokens,
            _tokenizer=tokenizer,
            _written=_any_of(written),
            _control=_any_of([*special.values(), *written]),
            _silent_ids=frozenset(special),
        )

    @property
    def has_template(self) -> bool:
        """Whether messages can be encoded at all."""
        return bool(self._tokenizer.chat_template)

    def encode(self, prompt: str) -> list[int]:
        """The ids of a plain prompt, with what the tokenizer puts around one by default.

        Raises PromptError (`invalid_text`, `empty_prompt`).
        """
        _require_unicode(prompt)
        if self._special_tokens == "parse":
            ids = self._tokenizer.encode(prompt, verbose=False)
        elif self._written.search(prompt) is None:
            ids = self._tokenizer.encode(prompt, split_special_tokens=True, verbose=False)
        else:  # the tokenizer takes these for tokens in any text; only its chats know better
            before, after = self._around()
            typed = [{"role": "user", "content": prompt}]
            ids = [*before, *self._apply_template(typed, _VERBATIM), *after]
        return _some(ids)

    def encode_messages(self, messages: Sequence[Mapping[str, str | None]]) -> list[int]:
        """The ids of a chat under the model's template, ready for the answer.

        Raises PromptError (`bad_messages`, `invalid_text`, `template_error`, `empty_prompt`).
        """
        return _some(self._apply_template(_checked(messages), None))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer; special tokens leave none."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stop_scanner(self, stops: Sequence[str]) -> "StopScanner":
        """A scanner for one sequence's stop strings; none of them may be empty."""
        return StopScanner(self, stops)

    def is_silent(self, token: int) -> bool:
        """Whether a token leaves no text."""
        return token in self._silent_ids

    def _apply_template(self, chat: list[dict[str, str]], template: str | None) -> list[int]:
        contents = [message["content"] for message in chat]
        typed = any(self._control.search(content) for content in contents)
        if typed and any(_MARKERS.search(content) for content in contents):
            raise PromptError(
                "invalid_text",
                "a control token is typed beside U+F0000 or U+F0001; take either out",
            )
        if template is None and self._tokenizer.chat_template is None:
            raise PromptError("template_error", "the model has no chat template; use plain prompts")
        try:
            ids = self._tokenizer.apply_chat_template(
                chat,
                chat_template=template,
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=typed,
                tokenizer_kwargs={"verbose": False},
            )
        except _TEMPLATE_FAULTS as fault:
            raise PromptError("template_error", f"the chat template failed: {fault}") from fault
        return list(ids)

    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a plain prompt by default."""
        bare = self._tokenizer.encode("a", add_special_tokens=False)
        whole = self._tokenizer.encode("a")
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]


class StopScanner:
    """Looks for stop strings in one sequence's output, token by token.

    Mutable; its sequence's owner feeds it. Each token costs a look at a short window of the
    newest ones, never at the whole output.
    """

    def __init__(self, encoder: PromptEncoder, stops: Sequence[str]) -> None:
        assert stops and all(stops), "a stop string must not be empty"
        self._encoder = encoder
        self._stops = tuple(stops)
        # Every token that speaks gives a byte or more; some decoders alter their first ones.
        self._reach_tokens = max(len(stop.encode()) for stop in stops) + 4
        self._ids: list[int] = []
        self._window_start = 0
        self._cut: str | None = None

    def feed(self, token: int) -> bool:
        """Take the next token; whether it completes a stop string. Never called after that."""
        assert self._cut is None
        if self._encoder.is_silent(token):
            return False
        self._ids.append(token)
        window = self._encoder.decode(self._ids[self._window_start :])
        # The end of the window may be half a character, which reads as U+FFFD until it is whole.
        said = window.rstrip("\ufffd")
        if any(stop in said for stop in self._stops):
            self._cut = self._text_before_stop()
        elif len(self._ids) - self._window_start >= 2 * self._reach_tokens:
            self._shorten(window)
        return self._cut is not None

    def text(self) -> str:
        """The output so far, cut before its first stop string."""
        return self._encoder.decode(self._ids) if self._cut is None else self._cut

    def _text_before_stop(self) -> str | None:
        text = self._encoder.decode(self._ids)
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        return text[: min(starts)] if starts else None

    def _shorten(self, window: str) -> None:
        """Let the window begin later, where no character is torn; amid mere noise, anywhere."""
        newest = len(self._ids) - self._reach_tokens
        for start in range(newest, newest - 4, -1):
            rest = self._encoder.decode(self._ids[start:])
            if "\ufffd" not in rest and window.endswith(rest):
                self._window_start = start
                return
        if newest - self._window_start > 16 * self._reach_tokens:
            self._window_start = newest


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")  # (?!) finds nothing


def _checked(messages: Sequence[Mapping[str, str | None]]) -> list[dict[str, str]]:
    if not messages:
        raise PromptError("bad_messages", "there is no message")
    return [_checked_message(number, message) for number, message in enumerate(messages, 1)]


def _checked_message(number: int, message: Mapping[str, str | None]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or _ROLE.fullmatch(role) is None:
        raise PromptError("bad_messages", f"message {number}: its role is {role!r}, not a word")
    if not isinstance(content, str):
        raise PromptError("bad_messages", f"message {number}: its content is {content!r}, not text")
    others = [k for k in message if k not in ("role", "content") and message[k] is not None]
    if others:
        raise PromptError("bad_messages", f"message {number}: {others[0]!r} is not supported")
    _require_unicode(content)
    return {"role": role, "content": content}


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as broken:
        raise PromptError("invalid_text", f"half a character: {broken}") from broken


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise PromptError("empty_prompt", "the prompt has no tokens")
    return ids
