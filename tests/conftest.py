"""What tests share because it is slow to make, or of many files: a Prefect server, a model, a plan."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stages.identity import Identity
    from tests.finished import FinishedJob
    from tests.linked import Net

TINY_CONTEXT = 100
"""Positions of the tiny model; no multiple of a KV block's tokens."""


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The API of one server for all tests, whatever server the user has configured.

    What runs in this process speaks to it too, from the first use on.
    """
    # Imported here: tests of one room should not wait for another room's libraries.
    from prefect.settings import (  # noqa: PLC0415
        PREFECT_API_URL,
        get_current_settings,
        temporary_settings,
    )

    from flows.embedded import control_plane  # noqa: PLC0415

    with temporary_settings(restore_defaults={PREFECT_API_URL}), control_plane():
        yield str(get_current_settings().api.url)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random Llama of 4 layers, a token for each byte, a chat template that balks.

    The template raises for a conversation that opens with an empty message.
    """
    from tests.models import CHAT_TEMPLATE, write_random_model  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_random_model(folder, "llama", seed=1, max_position_embeddings=TINY_CONTEXT)
    balks = "{% if not messages[0]['content'] %}{{ raise_exception('say something') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(balks + CHAT_TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without a tokenizer whose weights are large beside a process: 411 MB."""
    from tests.models import write_big_model  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("big")
    write_big_model(folder)
    return folder


@pytest.fixture(scope="session")
def finished_job(
    tiny_model: Path, prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> "FinishedJob":
    """A job of prompts with faults and limits among them, answered by two stages."""
    from tests.finished import answer_prompts  # noqa: PLC0415

    return answer_prompts(tiny_model, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def link_keys(tmp_path_factory: pytest.TempPathFactory) -> "dict[str, Identity]":
    """Key pairs of three members and of a stranger."""
    from stages.identity import make_identity  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("keys")
    return {name: make_identity(name, folder) for name in ("a", "b", "c", "stranger")}


@pytest.fixture
def net(link_keys: "dict[str, Identity]") -> "Iterator[Net]":
    """A plan of three members, whose connections end with the test."""
    from stages.identity import Member  # noqa: PLC0415
    from tests.linked import Net  # noqa: PLC0415

    net = Net(link_keys, [Member(name, link_keys[name].certificate_pem) for name in "abc"])
    yield net
    for close in reversed(net.closing):
        close()
