"""The client signs in once for all, repeats what is safe to repeat and nothing else, and says what went wrong
without giving a secret away (design: sections 3 and 9, rule 12)."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from pb_cached import Config, PocketBaseServer
from pb_cached.config import Address, Credentials, PocketBaseSettings, Secret
from pb_cached.connection import connection_to
from pb_cached.errors import (
    AuthenticationFailed,
    CollectionNotFound,
    PBCachedError,
    PocketBaseUnavailable,
    RecordNotFound,
    RequestRejected,
    UniqueViolation,
)
from pb_cached.pocketbase.client import PocketBaseClient, Unreached
from pb_cached.pocketbase.http import Http, http_client, own_client
from pb_cached.telemetry import log_through
from tests.conftest import DatabaseMaker
from tests.faults import (
    EVERY,
    Exchange,
    Fault,
    FaultProxy,
    Gate,
    answer,
    cut_after,
    cut_before,
    cut_in_response,
)

SIGN_IN = "/api/collections/_superusers/auth-with-password"
OLDER_SIGN_IN = "/api/admins/auth-with-password"
ACCOUNTS = "/api/collections/_superusers/records"
PASSWORD = "correct horse battery staple"

SOMEBODY = Credentials(email="somebody@example.org", password=Secret(PASSWORD))
"""For tests in which the proxy answers in the place of PocketBase."""

LOG = log_through(logging.getLogger("test"))


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(verify=False) as opened:  # loading certificates takes longer than most tests
        yield opened


@pytest.fixture
def token(pocketbase: PocketBaseServer) -> str:
    return pocketbase.connection_params["admin_token"]


class Account:
    """A superuser of one test's own, whose tokens can be killed without harm to other tests."""

    def __init__(self, http: httpx.AsyncClient, url: str, token: str, email: str) -> None:
        self.email = email
        self.credentials = Credentials(email=email, password=Secret(PASSWORD))
        self._http = http
        self._records = url + ACCOUNTS
        self._headers = {"Authorization": token}
        self._id = ""

    async def create(self) -> None:
        body = {"email": self.email, "password": PASSWORD, "passwordConfirm": PASSWORD}
        self._id = (await self._http.post(self._records, json=body, headers=self._headers)).json()["id"]

    async def kill_tokens(self) -> None:
        """As setting a password does, the same one too."""
        body = {"password": PASSWORD, "passwordConfirm": PASSWORD}
        await self._http.patch(f"{self._records}/{self._id}", json=body, headers=self._headers)


@pytest_asyncio.fixture
async def account(http: httpx.AsyncClient, pocketbase: PocketBaseServer, token: str, prefix: str) -> Account:
    made = Account(http, pocketbase.url, token, f"{prefix}@example.org")
    await made.create()
    return made


ClientMaker = Callable[..., PocketBaseClient]


@pytest_asyncio.fixture(params=["a caller's", "aiohttp"])
async def any_http(request: pytest.FixtureRequest, http: httpx.AsyncClient) -> AsyncIterator[Http]:
    """A caller's client, and one of ours. What makes no difference to ours, `test_http` shows."""
    if request.param == "a caller's":
        yield http
        return
    own = own_client(PocketBaseSettings(transport=request.param), "http://127.0.0.1")
    assert not isinstance(own, httpx.AsyncClient)
    yield own
    await own.aclose()


@pytest.fixture
def make_client(any_http: Http, proxy: FaultProxy, token: str) -> ClientMaker:
    """Makes clients that speak through the proxy, by default with the token that is right."""

    right = Credentials(token=Secret(token))

    def make(credentials: Credentials = right, *, url: str = "", retry_for: float = 20.0) -> PocketBaseClient:
        address = Address(url or proxy.url, credentials)
        return PocketBaseClient(any_http, address, PocketBaseSettings(retry_for=retry_for), LOG)

    return make


def signed_in(token: str) -> Fault:
    return answer(200, msgspec.json.encode({"token": token}))


def unused_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# signing in


async def test_a_hundred_requests_share_one_sign_in(
    make_client: ClientMaker, proxy: FaultProxy, account: Account
) -> None:
    client = make_client(account.credentials)
    await asyncio.gather(*(client.call("GET", "/api/settings") for _ in range(100)))
    assert proxy.count("POST", SIGN_IN) == 1


@pytest.mark.parametrize(
    ("path", "refusal"),
    [("/api/settings", 401), (ACCOUNTS, 403)],
)
async def test_a_token_that_died_is_replaced_once_for_all_who_wait(
    make_client: ClientMaker, proxy: FaultProxy, account: Account, path: str, refusal: int
) -> None:
    client = make_client(account.credentials)
    await client.call("GET", path)
    await account.kill_tokens()
    await asyncio.gather(*(client.call("GET", path) for _ in range(30)))
    assert refusal in {exchange.status for exchange in proxy.matching("GET", path)}
    assert proxy.count("POST", SIGN_IN) == 2


async def test_a_refusal_that_a_new_token_does_not_change_is_final(
    make_client: ClientMaker, proxy: FaultProxy
) -> None:
    """PocketBase says 403 for other reasons too, such as a batch API that is off."""
    numbers = count()

    async def ever_new_token(exchange: Exchange) -> None:
        await signed_in(f"token{next(numbers)}")(exchange)

    proxy.plan("POST", SIGN_IN, ever_new_token, at=EVERY)
    proxy.plan("GET", "/api/settings", answer(403), at=range(1, 10))
    client = make_client(SOMEBODY)
    assert (await client.send("GET", "/api/settings")).status == 403
    assert proxy.count("POST", SIGN_IN) == 2
    assert proxy.count("GET", "/api/settings") == 2


async def test_the_caller_who_started_a_sign_in_may_leave(
    make_client: ClientMaker, proxy: FaultProxy, account: Account
) -> None:
    gate = Gate()
    proxy.plan("POST", SIGN_IN, gate)
    client = make_client(account.credentials)
    first = asyncio.create_task(client.call("GET", "/api/settings"))
    await gate.reached.wait()
    others = [asyncio.create_task(client.call("GET", "/api/settings")) for _ in range(3)]
    first.cancel()
    await asyncio.wait([first])
    gate.open()
    await asyncio.gather(*others)
    assert first.cancelled()
    assert proxy.count("POST", SIGN_IN) == 1


async def test_a_wrong_password_is_told_with_the_email_and_the_url(
    make_client: ClientMaker, proxy: FaultProxy, account: Account
) -> None:
    client = make_client(Credentials(email=account.email, password=Secret("not the password")))
    with pytest.raises(AuthenticationFailed) as refusal:
        await client.call("GET", "/api/settings")
    assert account.email in str(refusal.value) and proxy.url in str(refusal.value)
    assert "not the password" not in str(refusal.value)
    assert proxy.count("POST", SIGN_IN) == 1


async def test_a_sign_in_that_fails_is_not_remembered(
    make_client: ClientMaker, proxy: FaultProxy, token: str
) -> None:
    proxy.plan("POST", SIGN_IN, answer(400))
    proxy.plan("POST", SIGN_IN, signed_in(token), at=(2,))
    client = make_client(SOMEBODY)
    with pytest.raises(AuthenticationFailed):
        await client.call("GET", "/api/settings")
    await client.call("GET", "/api/settings")


@pytest.mark.parametrize("fault", [cut_before, cut_after, answer(429), answer(503)])
async def test_a_sign_in_that_gets_no_usable_answer_is_repeated(
    make_client: ClientMaker, proxy: FaultProxy, token: str, fault: Fault
) -> None:
    proxy.plan("POST", SIGN_IN, fault)
    proxy.plan("POST", SIGN_IN, signed_in(token), at=(2,))
    await make_client(SOMEBODY).call("GET", "/api/settings")
    assert proxy.count("POST", SIGN_IN) == 2


async def test_a_pocketbase_without_superusers_is_asked_for_its_admins(
    make_client: ClientMaker, proxy: FaultProxy, token: str
) -> None:
    proxy.plan("POST", SIGN_IN, answer(404), at=EVERY)
    proxy.plan("POST", OLDER_SIGN_IN, signed_in(token))
    await make_client(SOMEBODY).call("GET", "/api/settings")
    assert proxy.count("POST", OLDER_SIGN_IN) == 1


@pytest.mark.parametrize(
    "fault", [answer(404, b"<html>"), answer(200, b"<html>"), answer(200, b'{"token":1}'), answer(500, b"<html>")]
)
async def test_a_sign_in_to_something_else_says_to_check_the_url(
    make_client: ClientMaker, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.plan("POST", "/", fault, at=EVERY)
    with pytest.raises(RequestRejected, match=r"not answer like PocketBase|no PocketBase sign-in") as refusal:
        await make_client(SOMEBODY).call("GET", "/api/settings")
    assert proxy.url in str(refusal.value)


async def test_a_token_that_is_refused_is_an_authentication_failure(
    make_client: ClientMaker, proxy: FaultProxy
) -> None:
    client = make_client(Credentials(token=Secret("not.a.token")))
    for path in ("/api/settings", ACCOUNTS):
        with pytest.raises(AuthenticationFailed, match="does not accept the token"):
            await client.call("GET", path)
    assert proxy.count("POST", SIGN_IN) == 0


@pytest.mark.parametrize("token", ["two\nlines", "nul\x00", "tökén", "", "blank in it"])
async def test_a_token_that_no_header_can_carry_is_refused_unseen(make_client: ClientMaker, token: str) -> None:
    with pytest.raises(AuthenticationFailed) as refusal:
        await make_client(Credentials(token=Secret(token))).call("GET", "/api/settings")
    assert not token or token not in everything_told(refusal.value)


# repeating


@pytest.mark.parametrize(
    "fault",
    [cut_before, cut_after, cut_in_response, answer(429), answer(502), answer(503), answer(504, b"<html>")],
)
async def test_a_read_is_repeated_until_it_succeeds(
    make_client: ClientMaker, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.plan("GET", "/api/health", fault, at=(1, 2))
    assert b"API is healthy" in await make_client().call("GET", "/api/health")
    assert proxy.count("GET", "/api/health") == 3


@pytest.mark.parametrize("fault", [cut_before, cut_after, cut_in_response])
async def test_a_write_is_not_repeated_where_it_may_have_been_applied(
    make_client: ClientMaker, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.plan("POST", "/api/sql", fault)
    with pytest.raises(Unreached) as failure:
        await make_client().call("POST", "/api/sql", body=b'{"query":"SELECT 1"}')
    assert failure.value.unanswered
    assert proxy.count("POST", "/api/sql") == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_a_gateways_word_on_a_write_is_passed_on_as_it_is(
    make_client: ClientMaker, proxy: FaultProxy, status: int
) -> None:
    proxy.plan("POST", "/api/sql", answer(status, b"<html>"), at=EVERY)
    with pytest.raises(RequestRejected, match=f"status {status}"):
        await make_client().call("POST", "/api/sql", body=b"{}")
    assert proxy.count("POST", "/api/sql") == 1


async def test_a_write_that_surely_did_not_happen_is_repeated(make_client: ClientMaker, proxy: FaultProxy) -> None:
    proxy.plan("POST", "/api/sql", answer(429))
    assert (await make_client().send("POST", "/api/sql", body=b'{"query":"SELECT 1"}')).ok
    assert proxy.count("POST", "/api/sql") == 2


async def test_a_write_waits_for_a_pocketbase_that_is_down(token: str, proxy: FaultProxy) -> None:
    """With no connection open, nothing can have been sent."""
    async with http_client(PocketBaseSettings()) as http:
        client = PocketBaseClient(
            http, Address(proxy.url, Credentials(token=Secret(token))), PocketBaseSettings(), LOG
        )
        async with proxy.down():
            write = asyncio.create_task(client.send("POST", "/api/sql", body=b'{"query":"SELECT 1"}'))
            await asyncio.wait([write], timeout=0.1)
        assert (await write).ok


async def test_waiting_grows_between_attempts(make_client: ClientMaker, proxy: FaultProxy) -> None:
    """A PocketBase in trouble is not hammered: half a second of trying is a dozen requests, not a thousand."""
    proxy.plan("GET", "/api/health", answer(503), at=EVERY)
    with pytest.raises(PocketBaseUnavailable, match="503"):
        await make_client(retry_for=0.5).call("GET", "/api/health")
    assert 2 <= proxy.count("GET", "/api/health") <= 40


async def test_where_nothing_listens_the_error_names_the_url_in_time(make_client: ClientMaker) -> None:
    url = unused_url()
    before = time.monotonic()
    for credentials in (Credentials(token=Secret("token")), SOMEBODY):
        with pytest.raises(PocketBaseUnavailable, match=url) as failure:
            await make_client(credentials, url=url, retry_for=0.3).call("GET", "/api/health")
        assert not getattr(failure.value, "unanswered", None)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("credentials", [Credentials(token=Secret("token")), SOMEBODY], ids=["token", "password"])
async def test_the_error_tells_why_there_was_no_answer(make_client: ClientMaker, credentials: Credentials) -> None:
    url = unused_url()
    said = f"{url} gave no usable answer within 1.5 s (ConnectError: connection refused)"
    with pytest.raises(PocketBaseUnavailable, match=re.escape(said)):
        await make_client(credentials, url=url, retry_for=1.5).call("GET", "/api/health")


def caused_by(cause: BaseException) -> httpx.ConnectError:
    """As httpx has it: the reason stands behind two others."""
    error = httpx.ConnectError("All connection attempts failed")
    error.__cause__ = OSError("All connection attempts failed")
    error.__cause__.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (httpx.ConnectTimeout(""), "ConnectTimeout: timed out connecting"),
        (httpx.ReadTimeout(""), "ReadTimeout: timed out waiting for the answer"),
        (httpx.PoolTimeout(""), "PoolTimeout: timed out waiting for a connection of the HTTP client's pool"),
        (caused_by(socket.gaierror(-2, "Name or service not known")), "ConnectError: the host name was not found"),
        (
            caused_by(ExceptionGroup("", [OSError(errno.ENETUNREACH, ""), OSError(errno.ECONNREFUSED, "")])),
            "ConnectError: network is unreachable",
        ),
        (httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER]"), "ConnectError: [SSL: WRONG_VERSION_NUMBER]"),
    ],
)
async def test_the_error_tells_what_the_operating_system_said(
    token: str, error: httpx.RequestError, reason: str
) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    async with httpx.AsyncClient(transport=httpx.MockTransport(fail)) as http:
        address = Address("http://127.0.0.1:8090", Credentials(token=Secret(token)))
        client = PocketBaseClient(http, address, PocketBaseSettings(retry_for=0.1), LOG)
        with pytest.raises(PocketBaseUnavailable, match=re.escape(f"({reason})")):
            await client.call("GET", "/api/health")


async def test_an_opening_that_waits_says_so_at_once_and_once_more_and_when_it_is_over(
    proxy: FaultProxy, token: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pb_cached.pocketbase.client.LASTING_SECONDS", 0.3)
    caplog.set_level(logging.INFO)
    address = Address(proxy.url, Credentials(token=Secret(token)))
    told = asyncio.Event()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "still" in record.getMessage():
                told.set()

    async def open_one() -> None:
        async with connection_to(address, Config(), None, LOG):
            pass

    logging.getLogger("test").addHandler(listener := Told())
    try:
        async with proxy.down():
            opening = asyncio.create_task(open_one())
            await asyncio.wait_for(told.wait(), 20)
        await opening
    finally:
        logging.getLogger("test").removeHandler(listener)
    said = [message for message in caplog.messages if "answer" in message]
    assert len(said) == 3, said
    reason = f"(url={proxy.url} reason=ConnectError: connection refused"
    assert f"PocketBase does not answer {reason})" in said[0]
    assert f"PocketBase still does not answer {reason} seconds=" in said[1]
    assert f"PocketBase answers again (url={proxy.url}" in said[2]


async def test_hundreds_that_try_again_warn_once(token: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise caused_by(OSError(errno.ECONNREFUSED, ""))

    async with httpx.AsyncClient(transport=httpx.MockTransport(fail)) as http:
        address = Address("http://127.0.0.1:8090", Credentials(token=Secret(token)))
        client = PocketBaseClient(http, address, PocketBaseSettings(retry_for=0.5), LOG)
        await asyncio.gather(*(client.send("GET", "/api/health") for _ in range(200)), return_exceptions=True)
    assert [message for message in caplog.messages if "does not answer" in message] == [
        "pb_cached: PocketBase does not answer (url=http://127.0.0.1:8090 reason=ConnectError: connection refused)"
    ]


@pytest.mark.parametrize(("cuts", "warnings"), [((1,), 0), ((1, 2), 1)])
async def test_a_connection_that_is_cut_once_is_no_outage(
    make_client: ClientMaker,
    proxy: FaultProxy,
    caplog: pytest.LogCaptureFixture,
    cuts: tuple[int, ...],
    warnings: int,
) -> None:
    """An idle one may be closed at any time."""
    proxy.plan("GET", "/api/health", cut_before, at=cuts)
    await make_client().call("GET", "/api/health")
    assert caplog.text.count("does not answer") == warnings


async def test_a_gateway_that_says_that_pocketbase_is_away_is_an_outage(
    make_client: ClientMaker, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.plan("GET", "/api/health", answer(503), at=(1, 2, 3))
    await make_client().call("GET", "/api/health")
    assert caplog.text.count(f"does not answer (url={proxy.url} reason=status 503)") == 1


async def test_the_deadline_holds_where_pocketbase_accepts_and_then_says_nothing(
    make_client: ClientMaker, proxy: FaultProxy
) -> None:
    """The timeout of a user's own HTTP client may be longer, or none at all."""
    proxy.plan("POST", "/api/sql", Gate(), at=EVERY)
    before = time.monotonic()
    with pytest.raises(Unreached, match=r"0\.3 s") as failure:
        await make_client().send("POST", "/api/sql", body=b"{}", repeatable=True, deadline=0.3)
    assert failure.value.unanswered
    assert time.monotonic() - before < 5


async def test_trouble_with_the_sign_in_does_not_hide_that_a_request_may_have_arrived(
    make_client: ClientMaker, proxy: FaultProxy, token: str
) -> None:
    proxy.plan("POST", "/api/sql", cut_after)
    proxy.plan("POST", "/api/sql", answer(401), at=(2,))
    proxy.plan("POST", SIGN_IN, signed_in(token))
    proxy.plan("POST", SIGN_IN, answer(400), at=(2,))
    client = make_client(SOMEBODY)
    with pytest.raises(Unreached, match="refused the email and password") as failure:
        await client.send("POST", "/api/sql", body=b'{"query":"SELECT 1"}', repeatable=True)
    assert failure.value.unanswered


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_gateways_refusal_does_not_prove_that_nothing_arrived(
    make_client: ClientMaker, proxy: FaultProxy, status: int
) -> None:
    proxy.plan("POST", "/api/sql", answer(status), at=EVERY)
    with pytest.raises(Unreached) as failure:
        await make_client().send("POST", "/api/sql", body=b"{}", repeatable=True, deadline=0.5)
    assert failure.value.unanswered


# what is refused


async def test_a_missing_record_is_not_found(make_client: ClientMaker) -> None:
    with pytest.raises(RecordNotFound) as refusal:
        await make_client().call("GET", f"{ACCOUNTS}/aaaaaaaaaaaaaaa")
    assert refusal.value.status == 404


async def test_a_unique_index_is_named_by_its_fields(make_client: ClientMaker, account: Account) -> None:
    body = {"email": account.email, "password": PASSWORD, "passwordConfirm": PASSWORD}
    with pytest.raises(UniqueViolation) as refusal:
        await make_client().call("POST", ACCOUNTS, body=msgspec.json.encode(body))
    assert refusal.value.fields == ("email",)
    assert isinstance(refusal.value, RequestRejected)


async def test_other_refusals_tell_pocketbases_words_and_codes(make_client: ClientMaker) -> None:
    with pytest.raises(RequestRejected, match=r"Failed to create record.*email: validation_required") as refusal:
        await make_client().call("POST", ACCOUNTS, body=b'{"password":"12345678","passwordConfirm":"12345678"}')
    assert type(refusal.value) is RequestRejected
    assert refusal.value.status == 400 and refusal.value.codes == {"email": "validation_required"}


@pytest.mark.parametrize(
    ("collection", "reasons"),
    [
        (
            {"fields": [{"name": "x" * 101, "type": "text"}, {"name": "a", "type": "text", "id": "i" * 101}]},
            {
                "fields.1.name": "validation_length_out_of_range The length must be between 1 and 100.",
                "fields.2.id": "validation_length_out_of_range The length must be between 1 and 100.",
            },
        ),
        (
            {"indexes": ["CREATE INDEX `i` ON `refused` (`x`)"]},
            {"indexes.0": "validation_invalid_index_expression Failed to create index i - SQL logic error"},
        ),
    ],
)
async def test_a_reason_inside_a_part_is_told_with_the_path_of_the_part(
    make_client: ClientMaker, collection: dict[str, Any], reasons: dict[str, str]
) -> None:
    body = msgspec.json.encode({"name": "refused", "type": "base", **collection})
    with pytest.raises(RequestRejected) as refusal:
        await make_client().call("POST", "/api/collections", body=body)
    assert refusal.value.codes == {path: reason.split()[0] for path, reason in reasons.items()}
    for path, reason in reasons.items():
        assert f"; {path}: {reason}" in str(refusal.value)


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
async def test_a_missing_collection_is_not_taken_for_a_missing_record(
    make_client: ClientMaker, method: str
) -> None:
    records = "/api/collections/nowhere/records"
    path = records if method == "POST" else f"{records}/aaaaaaaaaaaaaaa"
    with pytest.raises(CollectionNotFound, match="delete_collection"):
        await make_client().call(method, path, body=None if method == "GET" else b"{}")


@pytest.mark.parametrize(
    "fault",
    [
        answer(400, b"<html>400</html>"),
        answer(404, b"[]"),
        answer(302, b""),
        answer(200, b"<html>Welcome</html>"),
        answer(400, b'{"data":[1],"message":7}'),
    ],
)
async def test_what_is_no_pocketbase_is_said_not_to_be_one(
    make_client: ClientMaker, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.plan("GET", "/api/settings", fault)
    with pytest.raises(RequestRejected, match="does not answer like PocketBase"):
        await make_client().call("GET", "/api/settings")


# the HTTP client


async def test_the_callers_http_client_is_used_as_it_is_and_never_closed(make_database: DatabaseMaker) -> None:
    seen: list[str] = []

    async def look(request: httpx.Request) -> None:
        seen.append(request.headers["X-Ours"])

    async with httpx.AsyncClient(headers={"X-Ours": "yes"}, event_hooks={"request": [look]}) as own:
        async with make_database(http_client=own) as database:
            await database.flush()
        assert seen and set(seen) == {"yes"}
        assert not own.is_closed


async def test_loopback_is_never_reached_through_a_proxy_of_the_environment(
    make_client: ClientMaker, proxy: FaultProxy, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", unused_url())
    monkeypatch.setenv("ALL_PROXY", unused_url())
    async with http_client(PocketBaseSettings()) as http:
        for url in (proxy.url, proxy.url.replace("127.0.0.1", "localhost")):
            assert (await http.get(f"{url}/api/health")).status_code == 200


# the connection that databases share


def address_of(proxy: FaultProxy, account: Account) -> dict[str, str]:
    return {"url": proxy.url, "admin_email": account.email, "admin_password": PASSWORD}


async def test_databases_of_one_loop_share_a_connection(
    make_database: DatabaseMaker, proxy: FaultProxy, account: Account, prefix: str
) -> None:
    params = address_of(proxy, account)
    databases = [
        make_database(connection_params=params, collection_prefix=f"{prefix}_{number}") for number in range(4)
    ]
    await asyncio.gather(*(database.__aenter__() for database in databases))
    assert proxy.count("POST", SIGN_IN) == 1
    assert proxy.count("GET", "/api/collections/_superusers/auth-methods") == 1
    await asyncio.gather(*(database.__aexit__(None, None, None) for database in databases))
    async with make_database(connection_params=params):
        assert proxy.count("POST", SIGN_IN) == 2


async def test_who_fails_or_leaves_while_opening_leaves_it_to_the_next(
    proxy: FaultProxy, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    proxy.plan("GET", "/api/collections?", gate, at=(1,))
    proxy.plan("GET", "/api/collections?", answer(400), at=(2,))
    address = Address(proxy.url, Credentials(token=Secret(token)))

    async def open_one() -> bytes:
        async with connection_to(address, Config(), None, LOG) as connection:
            return await connection.client.call("GET", "/api/settings")

    first, second, third = (asyncio.create_task(open_one()) for _ in range(3))
    await gate.reached.wait()
    first.cancel()
    outcomes = await asyncio.gather(first, second, third, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert isinstance(outcomes[1], RequestRejected)
    assert isinstance(outcomes[2], bytes)


async def test_a_connection_left_before_its_log_is_there_leaves_nothing_behind(
    make_database: DatabaseMaker, proxy: FaultProxy, token: str
) -> None:
    gate = Gate()
    proxy.plan("POST", "/api/collections", gate)
    database = make_database(connection_params={"url": proxy.url, "admin_token": token})
    before = asyncio.all_tasks()
    opening = asyncio.create_task(database.__aenter__())
    await gate.reached.wait()
    opening.cancel()
    await asyncio.wait([opening])
    assert not {task.get_name() for task in asyncio.all_tasks() - before if "Connection" in repr(task)}


# secrets


def everything_told(error: BaseException) -> str:
    """The error, its causes, and what a log makes of them."""
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize(
    "fault",
    [
        answer(400),
        answer(401),
        answer(403),
        answer(404),
        answer(500, b"<html>"),
        answer(503),
        answer(200, b"<html>"),
        cut_before,
        cut_in_response,
    ],
)
@pytest.mark.parametrize("by_token", [True, False], ids=["token", "password"])
async def test_no_error_and_no_log_line_tells_a_secret(
    make_client: ClientMaker,
    proxy: FaultProxy,
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
    by_token: bool,
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "s3cr3t-beyond-guessing"
    by_password = Credentials(email="somebody@example.org", password=Secret(secret))
    credentials = Credentials(token=Secret(secret)) if by_token else by_password
    proxy.plan("GET", "/", fault, at=EVERY)
    proxy.plan("POST", "/", fault, at=EVERY)
    client = make_client(credentials, retry_for=0.1)
    with pytest.raises(PBCachedError) as failure:
        await client.call("GET", "/api/settings")
    told = everything_told(failure.value) + repr(client) + repr(vars(client)) + caplog.text
    assert secret not in told


async def test_a_token_that_was_signed_in_for_stays_unseen(
    make_client: ClientMaker, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    proxy.plan("POST", SIGN_IN, signed_in("s3cr3t-beyond-guessing"))
    client = make_client(SOMEBODY)
    await client.send("GET", "/api/health")
    assert "signed in" in caplog.text
    assert "s3cr3t-beyond-guessing" not in repr(client) + repr(vars(client)) + caplog.text
