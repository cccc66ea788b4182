"""The REST client: signs in, sends, repeats what may be repeated, and turns refusals into our errors.

The one place that signs in and the one place that retries. Bodies go out and come back as bytes. It knows
nothing of collections or documents.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Any, Final

import httpx
import msgspec
import tenacity
from msgspec import Meta, Struct

from pb_cached.config import Address, PocketBaseSettings, Secret
from pb_cached.errors import (
    AuthenticationFailed,
    CollectionNotFound,
    PBCachedError,
    PocketBaseUnavailable,
    RecordNotFound,
    RequestRejected,
    UniqueViolation,
)
from pb_cached.pocketbase.http import Http, Response, Streamed, reading_first, unhooked
from pb_cached.telemetry import Log

LASTING_SECONDS: Final = 10.0
"""From when on it is said a second time that PocketBase does not answer."""

_SUPERUSERS: Final = "/api/collections/_superusers/auth-with-password"
_ADMINS: Final = "/api/admins/auth-with-password"  # before 0.23


class Answer(Struct, frozen=True):
    """What PocketBase answered."""

    status: int
    content: bytes
    in_doubt: bool = False
    """An earlier attempt at the same request was sent, and nobody knows what became of it."""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


class Verdict(Enum):
    """What an answer means for the request that it answers."""

    FINAL = auto()
    AGAIN = auto()
    """Nothing was applied, and the cause passes: send it again."""
    DOUBT = auto()
    """It may have been applied, or not: send it again where that does no harm."""
    SIGN_IN = auto()
    """Refused for who we are: sign in, then send it again."""


class Problem(Struct, frozen=True):
    """What is wrong with a part of a request."""

    code: str
    message: str = ""


class Refusal(Struct):
    """The body of a refusal. Before 0.23 the status is called `code`."""

    message: str = ""
    data: dict[str, Any] = {}

    @property
    def problems(self) -> dict[str, Problem]:
        """By the path of the part, as a field of a collection is a part of a part: `fields.1.name`."""
        return dict(_problems(self.data, ""))


def _problems(parts: dict[str, Any], path: str) -> Iterator[tuple[str, Problem]]:
    for name, part in parts.items():
        if not isinstance(part, dict):
            continue
        if isinstance(code := part.get("code"), str):
            # PocketBase quotes its database over several lines.
            yield path + name, Problem(code, " ".join(str(part.get("message", "")).split()))
        else:
            yield from _problems(part, f"{path}{name}.")


_GATEWAY: Final = frozenset({502, 503, 504})
"""PocketBase itself says none of these; whoever stands before it does, also when an answer was lost."""
_NO_COLLECTION: Final = frozenset({"Missing collection context.", "Missing or invalid collection context."})
"""What it says, from 0.23 on, where the collection of a record is not there."""
_NEVER_SENT: Final = (httpx.ConnectError, httpx.PoolTimeout)
_CUT: Final = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)
_TIMEOUTS: Final[Mapping[type[httpx.RequestError], str]] = {
    httpx.ConnectTimeout: "timed out connecting",
    httpx.ReadTimeout: "timed out waiting for the answer",
    httpx.WriteTimeout: "timed out sending",
    httpx.PoolTimeout: "timed out waiting for a connection of the HTTP client's pool",
}
_TOKEN: Final = r"\A[ -~]*\Z"
"""What a header can carry."""

_refusal = msgspec.json.Decoder(Refusal)


def by_status(answer: Answer) -> Verdict:
    """The verdict for ordinary requests."""
    if answer.status == 429:
        return Verdict.AGAIN
    if answer.status in _GATEWAY:
        return Verdict.DOUBT
    # A dead token is 401 on some endpoints and 403 on the others (facts: pocketbase, section 1).
    return Verdict.SIGN_IN if answer.status in (401, 403) else Verdict.FINAL


class PocketBaseClient:
    """Speaks with one PocketBase.

    Mutable state: `_token`, replaced by `_sign_in` alone, and `_signing_in`, the sign-in that is under way, which
    every request that needs one joins; `_outage`.
    """

    def __init__(self, http: Http, address: Address, settings: PocketBaseSettings, log: Log) -> None:
        self.url = address.url
        self._http = http
        self._sender = reading_first(http)
        self._streamer = unhooked(http)
        self._credentials = address.credentials
        self._settings = settings
        self.log = log
        self._token = address.credentials.token
        self._signing_in: asyncio.Task[Secret] | None = None
        self._outage = Outage(address.url, log)
        if self._token is not None and not re.match(_TOKEN, self._token.reveal()):
            raise AuthenticationFailed(
                f"the token for PocketBase at {self.url} holds characters that no token has, such as a line "
                "break; look at where it comes from"
            )

    async def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        body: bytes | None = None,
        repeatable: bool | None = None,
        verdict: Callable[[Answer], Verdict] = by_status,
        deadline: float | None = None,
        connection_within: float | None = None,
        repeated: Callable[[], None] | None = None,
    ) -> Answer:
        """Send a request and return its answer, whatever its status.

        Args:
            path: from the root of PocketBase, such as `/api/health`.
            repeatable: may it be sent again where it is unknown whether it arrived? By default, what reads may.
            verdict: tells answers that must not be taken as such.
            deadline: seconds until it ends, answered or not; `retry_for` by default.
            connection_within: seconds that it may wait for a connection; by default the HTTP client's own, and
                then it is tried again.
            repeated: is told of each time that it is sent again.

        Raises:
            NoConnection: none was free for `connection_within` seconds.
            Unreached: no answer until the deadline, or to a request that must not be repeated. Its `unanswered`
                tells whether an attempt may have arrived.
            AuthenticationFailed: the credentials are refused.
        """
        what = f"{method} {path}"
        may_repeat = method in ("GET", "HEAD") if repeatable is None else repeatable
        headers = {"Content-Type": "application/json"} if body is not None else {}
        options = {} if connection_within is None else {"timeout": self._timeout(pool=connection_within)}
        known = _Known()

        async def attempt() -> Answer:
            token = await self._current_token(known.refused_token)
            # Said beforehand, as the deadline may end the attempt at any moment.
            in_doubt, known.in_doubt = known.in_doubt, True
            known.attempts += 1
            if known.attempts > 1 and repeated is not None:
                repeated()

            async def trace(event: str, _: Mapping[str, Any]) -> None:
                """What httpx's own transport tells. Of any other it is not known how far it has come."""
                if event == "connection.connect_tcp.started":
                    known.in_doubt = in_doubt
                elif event.endswith(".send_request_headers.started"):
                    known.in_doubt = True

            try:
                response = await self._request(
                    method,
                    path,
                    params=params,
                    content=body,
                    headers={**headers, "Authorization": token.reveal()},
                    extensions={"trace": trace},
                    **options,
                )
            except httpx.RequestError as error:
                known.trouble = self._outage.met(error)
                if isinstance(error, httpx.PoolTimeout) and connection_within is not None:
                    known.in_doubt = in_doubt
                    raise _no_connection(what, connection_within) from error
                # Some transports call it a timeout of connecting, too, when a connection in use is cut. Those that
                # trace have told whether anything was sent.
                never_sent = isinstance(error, httpx.ConnectTimeout) and known.in_doubt == in_doubt
                if never_sent or isinstance(error, _NEVER_SENT):
                    known.in_doubt = in_doubt
                    raise _Passing from error
                raise (_Passing if may_repeat else _Final) from error
            except PBCachedError:
                known.in_doubt = in_doubt
                raise
            answer = Answer(response.status_code, response.content, in_doubt)
            meaning = verdict(answer)
            known.in_doubt = in_doubt or meaning is Verdict.DOUBT
            if meaning is Verdict.SIGN_IN and known.refused_token is None and self._credentials.token is None:
                known.refused_token = token
                return await attempt()
            if meaning is Verdict.AGAIN or (meaning is Verdict.DOUBT and may_repeat):
                known.trouble = f"status {answer.status}: {_message(answer)}"
                raise _Passing
            return answer

        limit = self._settings.retry_for if deadline is None else deadline
        try:
            return await self._repeated(attempt, what, known, limit, first_wait=0.02)
        except PBCachedError as error:
            if not known.in_doubt or (isinstance(error, Unreached) and error.unanswered):
                raise
            # The sign-in failed; that an attempt had been sent before matters more.
            raise Unreached(f"{what}: was sent and not answered, and then: {error}", unanswered=True) from error

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        body: bytes | None = None,
        repeatable: bool | None = None,
    ) -> bytes:
        """`send`, but only success returns.

        Raises:
            RequestRejected: or the subclass that fits.
            CollectionNotFound: it was about records of a collection that is not there.
        """
        answer = await self.send(method, path, params=params, body=body, repeatable=repeatable)
        if not answer.ok:
            raise await self.rejection(answer, f"{method} {path}", path)
        if answer.content[:1] not in (b"{", b"[", b""):
            raise _foreign(answer, f"{method} {path}")
        return answer.content

    async def rejection(
        self, answer: Answer, what: str, path: str = ""
    ) -> RequestRejected | CollectionNotFound | AuthenticationFailed:
        """The error for a refused request. The arguments are those of `refused`."""
        if answer.status in (401, 403) and not await self.is_superuser():
            return AuthenticationFailed(
                f"{what}: PocketBase at {self.url} does not accept the token as a superuser's; "
                "it may have expired or its password may have been changed"
            )
        return refused(answer, what, path)

    async def is_superuser(self, deadline: float | None = None) -> bool:
        """Ask the endpoint that says 401 to a dead token rather than 403 (facts: pocketbase, section 1).

        Where we can sign in, this replaces a token that is dead.
        """
        params = {"perPage": 1, "skipTotal": 1}
        answer = await self.send("GET", "/api/collections", params=params, deadline=deadline)
        return answer.status not in (401, 403)

    @asynccontextmanager
    async def stream(self, path: str, *, read: float, connection_within: float) -> AsyncIterator[Streamed]:
        """GET a body that goes on and on, and leave it to the caller to read it. Without authorization; sent once.

        Args:
            read: seconds that it may be silent.
            connection_within: seconds that it may wait for a connection, which it then keeps.

        Raises:
            NoConnection, PocketBaseUnavailable: also out of reading it.
        """
        self._refuse_if_closed()
        what = f"GET {path}"
        try:
            async with self._streamer.stream(
                "GET",
                self.url + path,
                headers={
                    "Accept": "text/event-stream",
                    "Accept-Encoding": "identity",
                    "Cache-Control": "no-store",
                },
                timeout=self._timeout(read=read, pool=connection_within),
            ) as response:
                yield response
        except httpx.PoolTimeout as error:
            raise _no_connection(what, connection_within) from error
        except httpx.RequestError as error:
            raise PocketBaseUnavailable(f"{what} at {self.url}: {reason_of(error)}") from error

    def _timeout(self, *, pool: float, read: float | None = None) -> httpx.Timeout:
        """The HTTP client's own, but for what is given."""
        own = self._http.timeout
        return httpx.Timeout(
            connect=own.connect, read=own.read if read is None else read, write=own.write, pool=pool
        )

    async def _current_token(self, refused_token: Secret | None) -> Secret:
        if self._token is not None and self._token != refused_token:
            return self._token
        if self._signing_in is None:
            self._signing_in = asyncio.create_task(self._sign_in())
            self._signing_in.add_done_callback(self._signed_in)
        # Shielded: the caller who happened to start it may be cancelled, the others still need it.
        return await asyncio.shield(self._signing_in)

    def _signed_in(self, task: asyncio.Task[Secret]) -> None:
        self._signing_in = None
        if not task.cancelled():
            task.exception()  # whoever waits has it; nobody waiting is no reason for a warning

    async def _sign_in(self) -> Secret:
        email, password = self._credentials.email, self._credentials.password
        assert email is not None and password is not None, "a token is never signed in"
        body = msgspec.json.encode({"identity": email, "password": password.reveal()})
        known = _Known()

        async def attempt() -> Answer:
            for path in (_SUPERUSERS, _ADMINS):
                try:
                    response = await self._request(
                        "POST", path, content=body, headers={"Content-Type": "application/json"}
                    )
                except httpx.RequestError as error:
                    known.trouble = self._outage.met(error)
                    raise _Passing from error
                if response.status_code != 404:
                    break
            answer = Answer(response.status_code, response.content)
            if by_status(answer) in (Verdict.AGAIN, Verdict.DOUBT):
                known.trouble = f"status {answer.status}: {_message(answer)}"
                raise _Passing
            return answer

        what = f"sign-in at {self.url}"
        # At most two sign-ins in three seconds are allowed to a guest (facts: pocketbase, section 8).
        answer = await self._repeated(attempt, what, known, self._settings.retry_for, first_wait=0.1)
        if answer.status == 404:
            raise RequestRejected(f"{what}: there is no PocketBase sign-in endpoint; check the URL", status=404)
        if answer.status in (400, 401, 403):
            raise AuthenticationFailed(
                f"PocketBase at {self.url} refused the email and password of '{email}' "
                f"(status {answer.status}: {_message(answer)})"
            )
        if not answer.ok:
            raise refused(answer, what)
        try:
            self._token = Secret(msgspec.json.decode(answer.content, type=_SignedIn).token)
        except msgspec.DecodeError as error:
            raise _foreign(answer, what) from error
        self.log.debug("signed in", url=self.url)
        return self._token

    async def _request(self, method: str, path: str, **content: Any) -> Response:
        """Send it once. The caller's client is no worse for having hooks, and it may be closed at any time."""
        self._refuse_if_closed()
        try:
            response: Response = await self._sender.request(method, self.url + path, **content)
        except httpx.HTTPStatusError as error:  # by a hook of the caller's
            response = error.response
        if response.status_code in _GATEWAY:
            self._outage.goes_on(f"status {response.status_code}")
        else:
            self._outage.ends()
        return response

    def _refuse_if_closed(self) -> None:
        if self._http.is_closed:
            raise PBCachedError(
                "the http_client that the database was given is closed: keep it open for longer than the database"
            )

    async def _repeated(
        self, attempt: Callable[[], Awaitable[Answer]], what: str, known: _Known, limit: float, first_wait: float
    ) -> Answer:
        """The outcome of the first attempt whose trouble does not pass; `limit` seconds at most."""
        try:
            async with asyncio.timeout(limit):
                with contextlib.suppress(_Passing):
                    return (
                        await attempt()
                    )  # mostly the last one, too: making trials takes as long as all the rest of it
                trials = tenacity.AsyncRetrying(
                    retry=tenacity.retry_if_exception_type(_Passing),
                    wait=tenacity.wait_random_exponential(multiplier=first_wait, max=1.0),
                )
                async for trial in trials:
                    with trial:
                        if trial.retry_state.attempt_number == 1:
                            raise _Passing
                        return await attempt()
        except (TimeoutError, _Final) as error:
            within = f" within {limit:g} s" if isinstance(error, TimeoutError) else ""
            raise Unreached(
                f"{what}: PocketBase at {self.url} gave no usable answer{within} "
                f"({known.trouble or self._outage.reason or 'no answer'}). "
                "Is it running, and is the URL right?",
                unanswered=known.in_doubt,
            ) from error
        raise AssertionError("unreachable")  # pragma: no cover - trials end by returning or raising


class Outage:
    """Tells in the log that PocketBase does not answer: when that begins, once more when it lasts, and when it is
    over. Not each time, as there may be hundreds of requests that try again and again.

    Mutable state: `reason`, of the last failure, empty while PocketBase answers; `_since`, when the first one was
    (of the monotonic clock); `_told`, how often that was said.
    """

    def __init__(self, url: str, log: Log) -> None:
        self.reason = ""
        self._url = url
        self._log = log
        self._since = 0.0
        self._told = 0

    def met(self, error: httpx.RequestError) -> str:
        """An attempt has failed so. Returns the reason in words."""
        reason = reason_of(error)
        # An idle connection may be closed at any time: only the next attempt tells. A pool is our own affair.
        if not isinstance(error, httpx.PoolTimeout):
            self.goes_on(reason, certain=not isinstance(error, _CUT))
        return reason

    def goes_on(self, reason: str, *, certain: bool = True) -> None:
        """There was no answer, or one that says so. If that is not `certain`, it is told the next time."""
        certain = certain or self.reason != ""
        if not self.reason:
            self._since = time.monotonic()
        self.reason = reason
        seconds = time.monotonic() - self._since
        if self._told == 0 and certain:
            self._told = 1
            self._log.warning("PocketBase does not answer", url=self._url, reason=reason)
        elif self._told == 1 and seconds >= LASTING_SECONDS:
            self._told = 2
            self._log.warning(
                "PocketBase still does not answer", url=self._url, reason=reason, seconds=round(seconds)
            )

    def ends(self) -> None:
        """There was an answer."""
        if self._told:
            seconds = round(time.monotonic() - self._since, 1)
            self._log.info("PocketBase answers again", url=self._url, seconds=seconds)
        self.reason, self._told = "", 0


def reason_of(error: httpx.RequestError) -> str:
    """Why there was no answer. What the operating system said stands behind what two libraries made of it."""
    name = type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return f"{name}: {_TIMEOUTS.get(type(error), 'timed out')}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):  # one for each address of the host
            cause = cause.exceptions[0]
        if isinstance(cause, socket.gaierror):
            return f"{name}: the host name was not found"
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and cause.errno:
            return f"{name}: {os.strerror(cause.errno).lower()}"
        cause = cause.__cause__ or cause.__context__
    return f"{name}: {error}".rstrip(": ")


class Unreached(PocketBaseUnavailable):
    """No usable answer. `unanswered`: an attempt was sent and may have been applied."""

    def __init__(self, message: str, *, unanswered: bool) -> None:
        super().__init__(message)
        self.unanswered = unanswered


class NoConnection(PocketBaseUnavailable):
    """All connections that the HTTP client may have were in use. Nothing was sent."""


def _no_connection(what: str, seconds: float) -> NoConnection:
    return NoConnection(f"{what}: no connection of the HTTP client was free for {seconds:g} s")


def refused(answer: Answer, what: str, path: str = "") -> RequestRejected | CollectionNotFound:
    """PocketBase's refusal as an error of ours.

    Args:
        path: of the request. Before 0.23 it alone tells whether a collection or a record was not found.
    """
    try:
        refusal = _refusal.decode(answer.content)
    except msgspec.DecodeError:
        return _foreign(answer, what)
    if answer.status == 404 and (refusal.message in _NO_COLLECTION or path.endswith("/records")):
        return missing_collection(what)
    problems = refusal.problems
    codes = {name: problem.code for name, problem in problems.items()}
    detail = "".join(f"; {name}: {problem.code} {problem.message}".rstrip() for name, problem in problems.items())
    message = f"{what}: PocketBase answered {answer.status}: {refusal.message}{detail}"
    kind: type[RequestRejected] = RequestRejected
    if answer.status == 404:
        kind = RecordNotFound
    elif "validation_not_unique" in codes.values():
        kind = UniqueViolation
        codes = {name: code for name, code in codes.items() if code == "validation_not_unique"}
    return kind(message, status=answer.status, codes=codes)


def missing_collection(what: str) -> CollectionNotFound:
    return CollectionNotFound(
        f"{what}: PocketBase does not have the collection (any more). If it was deleted on purpose, tell the "
        "database, by delete_collection or by closing it, and open the collection again to have it created"
    )


def _foreign(answer: Answer, what: str) -> RequestRejected:
    return RequestRejected(
        f"{what}: status {answer.status} from something that does not answer like PocketBase; check the URL",
        status=answer.status,
    )


class _SignedIn(Struct):
    token: Annotated[str, Meta(pattern=_TOKEN)]


class _Passing(Exception):
    """An attempt failed for a cause that passes."""


class _Final(Exception):
    """An attempt failed, and must not be repeated."""


@dataclass
class _Known:
    """What the attempts at one request have shown so far."""

    trouble: str = ""
    attempts: int = 0
    in_doubt: bool = False
    """One of them was sent, and nobody said what became of it."""
    refused_token: Secret | None = None
    """Set where we have signed in anew for this request."""


def _message(answer: Answer) -> str:
    try:
        return _refusal.decode(answer.content).message
    except msgspec.DecodeError:
        return "no PocketBase answer"
