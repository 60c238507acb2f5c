"""What a prompt's ids are, and where an answer's text ends."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig

from stages.errors import CheckpointError, PromptError
from stages.prompt import PromptEncoder, StopScanner
from tests.chat_styles import CHATML, GEMMA, LLAMA3, STYLES, ChatStyle, save

PIECES = ["a", " ", "\n", "\n\n", "def f(x):", "é", "🙂", "<", "|", ">", "[", "]", "im_end", "</"]
Chat = list[dict[str, str]]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each style, by the style's name."""
    return {style.name: save(style, tmp_path_factory.mktemp(style.name)) for style in STYLES}


@pytest.fixture(scope="session", params=STYLES, ids=lambda style: style.name)
def style(request: pytest.FixtureRequest) -> ChatStyle:
    """Each style in turn."""
    chosen: ChatStyle = request.param
    return chosen


def chats(pieces: list[str]) -> st.SearchStrategy[Chat]:
    """A user's turn, or three turns; every content a string of the pieces."""
    content = st.lists(st.sampled_from(pieces), max_size=8).map("".join)
    turns = st.sampled_from([1, 3]).flatmap(lambda n: st.lists(content, min_size=n, max_size=n))
    return turns.map(
        lambda said: [
            {"role": "assistant" if turn % 2 else "user", "content": content}
            for turn, content in enumerate(said)
        ]
    )


@pytest.fixture(scope="session")
def reference(folders: dict[str, Path]) -> dict[str, Any]:
    """The tokenizers as transformers opens them, by style."""
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def encoders(folders: dict[str, Path]) -> dict[str, PromptEncoder]:
    """Encoders that parse special tokens in plain prompts, by style."""
    return {name: PromptEncoder.load(folder, "parse") for name, folder in folders.items()}


def test_the_driver_encodes_without_torch(folders: dict[str, Path]) -> None:
    script = (
        "import sys; from pathlib import Path; from stages.prompt import PromptEncoder\n"
        "encoder = PromptEncoder.load(Path(sys.argv[1]), 'text')\n"
        "ids = encoder.encode('a <|im_end|>')\n"
        "ids += encoder.encode_messages([{'role': 'user', 'content': '<|im_end|>'}])\n"
        "encoder.stop_scanner(['x']).feed(ids[0]); encoder.decode(ids)\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(folders["chatml"])]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "False\n"


@settings(deadline=None)
@given(chat=chats(PIECES))
def test_ordinary_messages_have_the_ids_of_apply_chat_template(
    encoders: dict[str, PromptEncoder], reference: dict[str, Any], chat: Chat
) -> None:
    for name, encoder in encoders.items():
        expected = reference[name].apply_chat_template(
            chat, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert encoder.encode_messages(chat) == expected, name


@settings(deadline=None)
@given(data=st.data())
def test_a_control_token_typed_in_a_message_stays_text(
    style: ChatStyle, encoders: dict[str, PromptEncoder], reference: dict[str, Any], data: Any
) -> None:
    chat = data.draw(chats([*PIECES, *style.control]))
    control_ids = set(reference[style.name].convert_tokens_to_ids(style.control))
    harmless = [{**message, "content": "x"} for message in chat]

    def control_of(ids: list[int]) -> list[int]:
        return [token for token in ids if token in control_ids]

    ids = encoders[style.name].encode_messages(chat)
    assert control_of(ids) == control_of(encoders[style.name].encode_messages(harmless))
    text = encoders[style.name].decode(ids)
    typed = [token for token in style.control for said in chat if token in said["content"]]
    assert all(token in text for token in typed)


@settings(deadline=None)
@given(prompt=st.lists(st.sampled_from([*PIECES, "<|eot_id|>", "<end_of_turn>"])).map("".join))
def test_a_plain_prompt_has_the_tokenizer_s_default_ids(
    encoders: dict[str, PromptEncoder], reference: dict[str, Any], prompt: str
) -> None:
    for name, encoder in encoders.items():
        expected = reference[name](prompt).input_ids
        if expected:
            assert encoder.encode(prompt) == expected, name


def test_a_control_token_in_a_plain_prompt_is_text_if_the_job_says_so(
    style: ChatStyle, folders: dict[str, Path], reference: dict[str, Any]
) -> None:
    encoder = PromptEncoder.load(folders[style.name], "text")
    control_ids = set(reference[style.name].convert_tokens_to_ids(style.control))
    bos = reference[style.name]("").input_ids
    for token in style.control:
        ids = encoder.encode(f"a {token} b")
        assert ids[: len(bos)] == bos
        assert not control_ids.intersection(ids[len(bos) :])
        assert encoder.decode(ids) == f"a {token} b"


def test_a_template_that_writes_bos_itself_gets_no_second(
    encoders: dict[str, PromptEncoder], reference: dict[str, Any]
) -> None:
    ids = encoders["llama3"].encode_messages([{"role": "user", "content": "hello"}])
    assert ids.count(reference["llama3"].bos_token_id) == 1


def test_what_a_template_looks_for_in_a_message_is_the_message_s_to_hold(
    encoders: dict[str, PromptEncoder],
) -> None:
    answers = ["four", "2 + 2</think>four"]
    chats = [
        [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]
    short, thought = (encoders["thinker"].encode_messages(chat) for chat in chats)
    assert short == thought


USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ([], "bad_messages"),
        ([{"role": "user"}], "bad_messages"),
        ([{"role": "user", "content": None}], "bad_messages"),
        ([{"role": "user", "content": ["parts"]}], "bad_messages"),
        ([{"content": "hello"}], "bad_messages"),
        ([{"role": "<eos>", "content": "hello"}], "bad_messages"),
        ([{**USER, "tool_calls": "f()"}], "bad_messages"),
        ([{**USER, "content": "\ud800"}], "invalid_text"),
        ([{**USER, "content": "<eos>\U000f0000"}], "invalid_text"),
        ([{"role": "system", "content": "be brief"}, USER], "template_error"),
    ],
)
def test_a_row_s_fault_names_its_kind(
    encoders: dict[str, PromptEncoder], messages: Any, kind: str
) -> None:
    with pytest.raises(PromptError) as raised:
        encoders["gemma"].encode_messages(messages)
    assert raised.value.kind == kind


def test_a_prompt_without_tokens_is_its_row_s_fault(encoders: dict[str, PromptEncoder]) -> None:
    with pytest.raises(PromptError) as raised:
        encoders["chatml"].encode("")
    assert raised.value.kind == "empty_prompt"


def test_messages_for_a_model_without_a_template_are_their_row_s_fault(tmp_path: Path) -> None:
    folder = save(CHATML, tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(PromptError, match="no chat template") as raised:
        PromptEncoder.load(folder, "parse").encode_messages([USER])
    assert raised.value.kind == "template_error"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", '{"model"'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}'),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "{"),
        ("generation_config.json", '{"eos_token_id": "</s>"}'),
    ],
)
def test_a_broken_folder_is_refused_by_name(tmp_path: Path, file: str, content: str | None) -> None:
    folder = save(CHATML, tmp_path)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=folder.name):
        PromptEncoder.load(folder, "parse")


def test_an_answer_ends_where_generate_ends_it(tmp_path: Path) -> None:
    folder = save(GEMMA, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos, end_of_turn = map(tokenizer.convert_tokens_to_ids, ["<eos>", "<end_of_turn>"])
    assert PromptEncoder.load(folder, "parse").end_ids == {eos, end_of_turn}
    (folder / "generation_config.json").unlink()
    assert PromptEncoder.load(folder, "parse").end_ids == {eos}
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 7}}')
    assert PromptEncoder.load(folder, "parse").end_ids == {7}


def test_another_template_or_another_end_has_another_digest(tmp_path: Path) -> None:
    folder = save(LLAMA3, tmp_path)
    first = PromptEncoder.load(folder, "parse")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    second = PromptEncoder.load(folder, "parse")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    third = PromptEncoder.load(folder, "parse")
    assert len({first.template_sha256, second.template_sha256, third.template_sha256}) == 2
    assert first.tokenizer_sha256 == second.tokenizer_sha256 != third.tokenizer_sha256


def test_an_old_llama_s_tokenizer_is_rebuilt_as_transformers_does(tmp_path: Path) -> None:
    folder = save(STYLES[3], tmp_path)
    LlamaConfig().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"})
    )
    encoder, reference = PromptEncoder.load(folder, "parse"), AutoTokenizer.from_pretrained(folder)
    assert type(reference).__name__ == "LlamaTokenizer"
    for prompt in ("a b", " a", "[INST] a", "[INST]a</s>b"):
        assert encoder.encode(prompt) == reference(prompt).input_ids


def naive_stop(encoder: PromptEncoder, ids: list[int], stops: list[str]) -> tuple[int, str] | None:
    """Tokens until a stop string is whole, and the text before it, reading everything each time."""
    for count in range(1, len(ids) + 1):
        text = encoder.decode(ids[:count])
        starts = [text.find(stop) for stop in stops if stop in text.rstrip("\ufffd")]
        if starts:
            return count, text[: min(starts)]
    return None


@settings(deadline=None)
@given(data=st.data())
def test_a_stop_string_ends_the_text_wherever_tokens_split_it(
    style: ChatStyle, encoders: dict[str, PromptEncoder], data: Any
) -> None:
    encoder = encoders[style.name]
    pieces = [*PIECES, "日本", "👩‍🚀", "return None\n    ", style.special[2]]
    said = "".join(data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=60)))
    start = data.draw(st.integers(0, len(said) - 1))
    stops = [said[start : start + data.draw(st.integers(1, 9))], "\u2028"]
    ids = encoder.encode(f"x{said}")
    expected = naive_stop(encoder, ids, stops)
    scanner = encoder.stop_scanner(stops)
    ended = next((count for count, token in enumerate(ids, 1) if scanner.feed(token)), None)
    assert (None if ended is None else (ended, scanner.text())) == expected
    if ended is None:
        assert scanner.text() == encoder.decode(ids)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_stop_string_is_found_amid_noise(encoders: dict[str, PromptEncoder], seed: int) -> None:
    rng = random.Random(seed)
    for name in ("chatml", "gemma"):
        encoder = encoders[name]
        ids = [rng.randrange(5, 400) for _ in range(80)]
        text = encoder.decode(ids)
        start = rng.randrange(len(text))
        stops = [text[start : start + rng.randrange(1, 6)]]
        scanner = encoder.stop_scanner(stops)
        ended = next((count for count, token in enumerate(ids, 1) if scanner.feed(token)), None)
        assert (None if ended is None else (ended, scanner.text())) == naive_stop(
            encoder, ids, stops
        )


def test_a_scanner_looks_at_few_tokens_however_long_the_output(
    encoders: dict[str, PromptEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, lengths = encoders["chatml"], []
    read = PromptEncoder.decode

    def counted(self: PromptEncoder, ids: list[int]) -> str:
        lengths.append(len(ids))
        return read(self, ids)

    monkeypatch.setattr(PromptEncoder, "decode", counted)
    scanner = StopScanner(encoder, ["\n\n\n"])
    for token in encoder.encode("a line of text, and 🙂\n" * 200):
        assert not scanner.feed(token)
    assert max(lengths) < 20
