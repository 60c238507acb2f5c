"""The embedded server: one that is busy is waited for, one that is gone is not."""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from prefect.client.base import PrefectHttpxAsyncClient
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.embedded import CLIENT_RETRIES, patient

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


def answering(statuses: Iterator[int]) -> "ASGIApp":
    async def app(_scope: "Scope", _receive: "Receive", send: "Send") -> None:
        await send({"type": "http.response.start", "status": next(statuses), "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    return app


async def asked(app: "ASGIApp") -> int:
    """How a client of a run that has its own server is answered in the end."""
    transport = httpx.ASGITransport(app)
    async with PrefectHttpxAsyncClient(transport=transport, base_url="http://own") as client:
        return (await client.get("/")).status_code


def test_a_server_that_is_busy_is_asked_again_and_again() -> None:
    busy = [503] * (CLIENT_RETRIES + 2)
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: CLIENT_RETRIES}):
        assert asyncio.run(asked(patient(answering(iter([*busy, 200]))))) == 200


def test_another_error_is_told_at_once() -> None:
    with pytest.raises(httpx.HTTPStatusError, match="500"):
        asyncio.run(asked(patient(answering(iter([500, 200])))))
