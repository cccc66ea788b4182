"""Each fault of the tests' own proxy does what it says, so that what other tests conclude from it is true."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from pb_cached import PocketBaseServer
from tests.faults import (
    EVERY,
    Buffer,
    Fault,
    FaultProxy,
    Gate,
    Valve,
    again_later,
    answer,
    cut_after,
    cut_at_piece,
    cut_before,
    cut_in_request,
    cut_in_response,
    delay,
    doubled,
    lagging,
    lost_by_gateway,
    scrambled,
    twice,
)

RECORDS = "/api/collections/_superusers/records"
BATCH = "/api/batch"
REALTIME = "/api/realtime"


@pytest_asyncio.fixture
async def http(proxy: FaultProxy, pocketbase: PocketBaseServer) -> AsyncIterator[httpx.AsyncClient]:
    token = pocketbase.connection_params["admin_token"]
    async with httpx.AsyncClient(base_url=proxy.url, headers={"Authorization": token}, timeout=20) as client:
        yield client


@pytest.fixture
def account(prefix: str) -> dict[str, str]:
    """The body that creates a superuser: a write with an effect that can be seen."""
    return {"email": f"{prefix}@example.org", "password": "long-enough", "passwordConfirm": "long-enough"}


async def number_of(http: httpx.AsyncClient, account: dict[str, str]) -> int:
    found = await http.get(RECORDS, params={"filter": f"email = '{account['email']}'"})
    return int(found.json()["totalItems"])


async def test_what_no_plan_speaks_of_passes_and_is_recorded(proxy: FaultProxy, http: httpx.AsyncClient) -> None:
    for _ in range(3):
        assert (await http.get("/api/health")).json()["code"] == 200
    assert (await http.head("/api/health")).content == b""
    assert (await http.get("/api/nothing")).status_code == 404
    assert [(e.method, e.path, e.status) for e in proxy.exchanges] == [
        *[("GET", "/api/health", 200)] * 3,
        ("HEAD", "/api/health", 200),
        ("GET", "/api/nothing", 404),
    ]


async def test_chunked_requests_and_large_responses_arrive_whole(http: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        for piece in (b'{"query":', b'"SELECT hex(zeroblob(', b'500000)) AS x"}'):
            yield piece

    headers = {"Content-Type": "application/json"}
    through = await http.post("/api/sql", content=body(), headers=headers)
    assert through.status_code == 200 and len(through.content) > 1_000_000
    assert (await http.get("/api/health")).status_code == 200


@pytest.mark.parametrize(
    ("fault", "applied", "status"),
    [(cut_before, 0, None), (cut_in_request, 0, None), (cut_after, 1, 200), (cut_in_response, 1, 200)],
)
async def test_a_cut_shows_the_client_no_answer(
    proxy: FaultProxy,
    http: httpx.AsyncClient,
    account: dict[str, str],
    fault: Fault,
    applied: int,
    status: int | None,
) -> None:
    proxy.plan("POST", RECORDS, fault)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await http.post(RECORDS, json=account)
    assert proxy.exchanges[-1].status == status
    assert await number_of(http, account) == applied


async def test_a_request_delivered_twice_gets_the_second_answer(
    proxy: FaultProxy, http: httpx.AsyncClient, account: dict[str, str]
) -> None:
    proxy.plan("POST", RECORDS, twice)
    assert (await http.post(RECORDS, json=account)).status_code == 400
    assert await number_of(http, account) == 1
    assert proxy.count("POST", RECORDS) == 1


async def test_a_request_that_comes_again_later_gets_the_first_answer(
    proxy: FaultProxy, http: httpx.AsyncClient, account: dict[str, str]
) -> None:
    proxy.plan("POST", RECORDS, again_later(0.05))
    assert (await http.post(RECORDS, json=account)).status_code == 200
    assert await number_of(http, account) == 1
    await proxy.exchanges[0].finished.wait()
    assert proxy.exchanges[0].status == 400


async def test_a_gateway_can_lose_an_answer(
    proxy: FaultProxy, http: httpx.AsyncClient, account: dict[str, str]
) -> None:
    proxy.plan("POST", RECORDS, lost_by_gateway)
    assert (await http.post(RECORDS, json=account)).status_code == 502
    assert await number_of(http, account) == 1


async def test_a_plan_counts_what_it_matches(proxy: FaultProxy, http: httpx.AsyncClient) -> None:
    proxy.plan("GET", "/api/health", answer(503, b"{}"), at=(2, 3))
    proxy.plan("GET", "/api/h", answer(429, b"{}"), at=(3, 4))
    answers = [(await http.get("/api/health")).status_code for _ in range(5)]
    assert answers == [200, 503, 503, 429, 200]
    proxy.plan("GET", "/api/health", answer(500, b"{}"), at=EVERY)
    assert (await http.get("/api/health")).status_code == 500
    proxy.forget_plans()
    assert (await http.get("/api/health")).status_code == 200


async def test_a_delay_passes_before_the_request_does(proxy: FaultProxy, http: httpx.AsyncClient) -> None:
    proxy.plan("GET", "/api/health", delay(0.1))
    before = time.monotonic()
    assert (await http.get("/api/health")).status_code == 200
    assert time.monotonic() - before >= 0.1


async def test_a_held_request_is_applied_after_its_client_has_left(
    proxy: FaultProxy, http: httpx.AsyncClient, account: dict[str, str]
) -> None:
    gate = Gate()
    proxy.plan("POST", RECORDS, gate)
    request = asyncio.create_task(http.post(RECORDS, json=account))
    await gate.reached.wait()
    request.cancel()
    await asyncio.wait([request])
    assert await number_of(http, account) == 0
    gate.open()
    await proxy.exchanges[0].finished.wait()
    assert await number_of(http, account) == 1


async def test_nothing_listens_where_the_proxy_is_down(proxy: FaultProxy, http: httpx.AsyncClient) -> None:
    assert (await http.get("/api/health")).status_code == 200
    async with proxy.down():
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):  # the connection that was open
            await http.get("/api/health")
        with pytest.raises(httpx.ConnectError):
            await http.get("/api/health")
    assert (await http.get("/api/health")).status_code == 200


async def greeting(http: httpx.AsyncClient, count: int = 1) -> bytes:
    """The first events of a stream, which is then left."""
    arrived = b""
    async with http.stream("GET", REALTIME) as response:
        async for piece in response.aiter_bytes():
            arrived += piece
            if arrived.count(b"\n\n") == count:
                return arrived
    raise AssertionError("the stream ended")


async def test_a_stream_that_its_client_leaves_is_left_by_the_proxy_too(
    proxy: FaultProxy, http: httpx.AsyncClient
) -> None:
    assert b"PB_CONNECT" in await greeting(http)
    await proxy.exchanges[0].finished.wait()


async def test_a_doubled_stream_says_everything_twice(proxy: FaultProxy, http: httpx.AsyncClient) -> None:
    proxy.plan("GET", REALTIME, doubled)
    first, second, _ = (await greeting(http, count=2)).split(b"\n\n")
    assert b"PB_CONNECT" in first and first == second


async def test_a_lagging_stream_is_late_with_every_piece(proxy: FaultProxy, http: httpx.AsyncClient) -> None:
    proxy.plan("GET", REALTIME, lagging(0.1))
    before = time.monotonic()
    assert b"PB_CONNECT" in await greeting(http)
    assert time.monotonic() - before >= 0.2


async def test_a_scrambled_stream_greets_first_and_brings_everything_at_least_once(
    proxy: FaultProxy, http: httpx.AsyncClient, account: dict[str, str]
) -> None:
    proxy.plan("GET", REALTIME, scrambled(1, most=1.5))
    ids = []
    async with http.stream("GET", REALTIME) as response:
        arrived = b""
        async for piece in response.aiter_bytes():
            if not arrived:
                client = piece.partition(b"id:")[2].partition(b"\n")[0].decode()
                topics = {"clientId": client, "subscriptions": ["_superusers/*"]}
                assert (await http.post(REALTIME, json=topics)).status_code == 204
                for number in range(8):
                    made = await http.post(RECORDS, json={**account, "email": f"{number}.{account['email']}"})
                    ids.append(made.json()["id"].encode())
            arrived += piece
            if all(id_ in arrived for id_ in ids):
                break
    assert sorted(ids, key=arrived.index) != ids


async def test_a_valve_that_is_shut_loses_what_comes(proxy: FaultProxy, http: httpx.AsyncClient) -> None:
    valve = Valve()
    proxy.plan("GET", "/api/health", valve, at=EVERY)
    assert (await http.get("/api/health")).status_code == 200
    valve.is_shut = True
    with pytest.raises(httpx.ReadTimeout):
        await http.get("/api/health", timeout=0.2)


async def test_a_stream_is_cut_in_the_middle_of_a_piece(proxy: FaultProxy, http: httpx.AsyncClient) -> None:
    proxy.plan("GET", REALTIME, cut_at_piece(1))
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await greeting(http)


async def test_a_buffer_keeps_what_it_does_not_pass_until_it_is_opened(
    proxy: FaultProxy, http: httpx.AsyncClient
) -> None:
    buffer = Buffer(passed=1)
    proxy.plan("GET", REALTIME, buffer)
    asking = asyncio.create_task(greeting(http))
    await buffer.keeps.wait()
    done, _ = await asyncio.wait([asking], timeout=0.1)
    assert not done
    buffer.open()
    assert b"PB_CONNECT" in await asking
