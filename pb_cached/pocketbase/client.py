"""The REST client: signs in, sends, repeats what may be repeated, and turns refusals into our errors.

The one place that signs in and the one place that retries. Bodies go out and come back as bytes. It knows
nothing of collections or documents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Final

import httpx
import msgspec
import tenacity
from msgspec import Struct

from pb_cached.config import Address, PocketBaseSettings
from pb_cached.errors import (
    AuthenticationFailed,
    PocketBaseUnavailable,
    RecordNotFound,
    RequestRejected,
    UniqueViolation,
)
from pb_cached.telemetry import Log

KEEPALIVE_SECONDS: Final = 90.0
"""Below the 180 seconds after which the least patient PocketBase closes an idle connection."""

_SUPERUSERS: Final = "/api/collections/_superusers/auth-with-password"
_ADMINS: Final = "/api/admins/auth-with-password"  # before 0.23


class Answer(Struct, frozen=True):
    """What PocketBase answered."""

    status: int
    content: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


class Verdict(Enum):
    """What an answer means for the request that it answers."""

    FINAL = auto()
    AGAIN = auto()
    """Nothing was applied, and the cause passes: send it again."""
    SIGN_IN = auto()
    """Refused for who we are: sign in, then send it again."""


class FieldProblem(Struct):
    code: str = ""
    message: str = ""


class Refusal(Struct):
    """The body of a refusal. Before 0.23 the status is called `code`."""

    message: str = ""
    data: dict[str, msgspec.Raw] = {}

    @property
    def codes(self) -> dict[str, str]:
        found = {}
        for name, raw in self.data.items():
            try:
                found[name] = msgspec.json.decode(raw, type=FieldProblem).code
            except msgspec.DecodeError:
                continue
        return found


_AGAIN: Final = frozenset({429, 502, 503, 504})
_NEVER_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)

_refusal = msgspec.json.Decoder(Refusal)


def by_status(answer: Answer) -> Verdict:
    """The verdict for ordinary requests."""
    if answer.status in _AGAIN:
        return Verdict.AGAIN
    # A dead token is 401 on some endpoints and 403 on the others (facts: pocketbase, section 1).
    return Verdict.SIGN_IN if answer.status in (401, 403) else Verdict.FINAL


class PocketBaseClient:
    """Speaks with one PocketBase over an `httpx.AsyncClient`.

    Mutable state: `_token`, replaced by `_sign_in` alone, and `_signing_in`, the sign-in that is under way, which
    every request that needs one joins.
    """

    def __init__(self, http: httpx.AsyncClient, address: Address, settings: PocketBaseSettings, log: Log) -> None:
        self.url = address.url
        self._http = http
        self._credentials = address.credentials
        self._settings = settings
        self._log = log
        token = address.credentials.token
        self._token: str | None = token.reveal() if token else None
        self._signing_in: asyncio.Task[str] | None = None

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
    ) -> Answer:
        """Send a request and return its answer, whatever its status.

        Args:
            path: from the root of PocketBase, such as `/api/health`.
            repeatable: may it be sent again where it is unknown whether it arrived? By default, what reads may.
            verdict: tells answers that must not be taken as such.
            deadline: seconds until repeating ends; `retry_for` by default.

        Raises:
            PocketBaseUnavailable: no answer until the deadline. Its `unanswered` tells whether an attempt may
                have arrived.
            AuthenticationFailed: the credentials are refused.
        """
        may_repeat = method in ("GET", "HEAD") if repeatable is None else repeatable
        headers = {"Content-Type": "application/json"} if body is not None else {}
        unanswered = False
        refused_token: str | None = None
        last = "no answer"

        async def attempt() -> Answer:
            nonlocal unanswered, refused_token, last
            token = await self._current_token(refused_token)
            try:
                response = await self._http.request(
                    method,
                    self.url + path,
                    params=params,
                    content=body,
                    headers={**headers, "Authorization": token},
                )
            except httpx.TransportError as error:
                last = f"{type(error).__name__}: {error}".rstrip(": ")
                if isinstance(error, _NEVER_SENT):
                    raise _Passing from error
                unanswered = True
                if may_repeat:
                    raise _Passing from error
                raise
            answer = Answer(response.status_code, response.content)
            meaning = verdict(answer)
            if meaning is Verdict.SIGN_IN and token != refused_token and self._credentials.token is None:
                refused_token = token
                return await attempt()
            if meaning is Verdict.AGAIN and (may_repeat or answer.status == 429):
                last = f"status {answer.status}: {_message(answer)}"
                raise _Passing
            return answer

        limit = self._settings.retry_for if deadline is None else deadline
        try:
            async for trial in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(_Passing),
                wait=tenacity.wait_random_exponential(multiplier=0.02, max=1.0),
                stop=tenacity.stop_after_delay(max(0.0, limit)),
                reraise=True,
            ):
                with trial:
                    return await attempt()
        except (_Passing, httpx.TransportError) as error:
            raise Unreached(
                f"{method} {path}: PocketBase at {self.url} gave no usable answer within {limit:g} s ({last}). "
                "Is it running, and is the URL right?",
                unanswered=unanswered,
            ) from error
        raise AssertionError("unreachable")  # pragma: no cover - AsyncRetrying returns or raises

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
        """
        answer = await self.send(method, path, params=params, body=body, repeatable=repeatable)
        if not answer.ok:
            raise await self.rejection(answer, f"{method} {path}")
        return answer.content

    async def rejection(self, answer: Answer, what: str) -> RequestRejected | AuthenticationFailed:
        """The error for a refused request."""
        if answer.status in (401, 403) and not await self._is_superuser():
            return AuthenticationFailed(
                f"{what}: PocketBase at {self.url} does not accept the token as a superuser's; "
                "it may have expired or its password may have been changed"
            )
        return refused(answer, what)

    async def is_token_refused(self) -> bool:
        """Does PocketBase deny that the current token is a superuser's?"""
        return not await self._is_superuser()

    async def _is_superuser(self) -> bool:
        """Ask the endpoint that says 401 to a dead token rather than 403 (facts: pocketbase, section 1)."""
        answer = await self.send("GET", "/api/collections", params={"perPage": 1, "skipTotal": 1})
        return answer.status not in (401, 403)

    async def _current_token(self, refused_token: str | None) -> str:
        if self._token is not None and self._token != refused_token:
            return self._token
        if self._signing_in is None:
            self._signing_in = asyncio.create_task(self._sign_in())
            self._signing_in.add_done_callback(self._signed_in)
        # Shielded: the caller who happened to start it may be cancelled, the others still need it.
        return await asyncio.shield(self._signing_in)

    def _signed_in(self, task: asyncio.Task[str]) -> None:
        self._signing_in = None
        if not task.cancelled():
            task.exception()  # whoever waits has it; nobody waiting is no reason for a warning

    async def _sign_in(self) -> str:
        email, password = self._credentials.email, self._credentials.password
        assert email is not None and password is not None, "a token is never signed in"
        body = msgspec.json.encode({"identity": email, "password": password.reveal()})
        last = "no answer"
        try:
            async for trial in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(_Passing),
                # At most two sign-ins in three seconds are allowed to a guest (facts: pocketbase, section 8).
                wait=tenacity.wait_random_exponential(multiplier=0.1, max=3.0),
                stop=tenacity.stop_after_delay(self._settings.retry_for),
                reraise=True,
            ):
                with trial:
                    for path in (_SUPERUSERS, _ADMINS):
                        try:
                            response = await self._http.post(
                                self.url + path, content=body, headers={"Content-Type": "application/json"}
                            )
                        except httpx.TransportError as error:
                            last = f"{type(error).__name__}: {error}".rstrip(": ")
                            raise _Passing from error
                        if response.status_code != 404:
                            break
                    answer = Answer(response.status_code, response.content)
                    if answer.status in _AGAIN:
                        last = f"status {answer.status}: {_message(answer)}"
                        raise _Passing
        except _Passing as error:
            raise Unreached(
                f"sign-in: PocketBase at {self.url} gave no usable answer within "
                f"{self._settings.retry_for:g} s ({last}). Is it running, and is the URL right?",
                unanswered=False,
            ) from error
        if answer.status == 404:
            raise RequestRejected(
                f"sign-in: {self.url} answers, but has no PocketBase sign-in endpoint; check the URL",
                status=404,
            )
        if not answer.ok:
            raise AuthenticationFailed(
                f"PocketBase at {self.url} refused the email and password of '{email}' "
                f"(status {answer.status}: {_message(answer)})"
            )
        self._token = msgspec.json.decode(answer.content, type=_SignedIn).token
        self._log.debug("signed in", url=self.url)
        return self._token


class Unreached(PocketBaseUnavailable):
    """No usable answer. `unanswered`: an attempt was sent and may have been applied."""

    def __init__(self, message: str, *, unanswered: bool) -> None:
        super().__init__(message)
        self.unanswered = unanswered


def refused(answer: Answer, what: str) -> RequestRejected:
    """PocketBase's refusal as an error of ours."""
    try:
        refusal = _refusal.decode(answer.content)
    except msgspec.DecodeError:
        return RequestRejected(
            f"{what}: status {answer.status} from something that does not answer like PocketBase",
            status=answer.status,
        )
    codes = refusal.codes
    detail = "".join(f"; {name}: {code}" for name, code in codes.items())
    message = f"{what}: PocketBase answered {answer.status}: {refusal.message}{detail}"
    kind: type[RequestRejected] = RequestRejected
    if answer.status == 404:
        kind = RecordNotFound
    elif "validation_not_unique" in codes.values():
        kind = UniqueViolation
        codes = {name: code for name, code in codes.items() if code == "validation_not_unique"}
    return kind(message, status=answer.status, codes=codes)


def http_client(settings: PocketBaseSettings) -> httpx.AsyncClient:
    """The client used where the caller passes none."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(settings.request_timeout, connect=settings.connect_timeout),
        limits=httpx.Limits(
            max_connections=settings.max_connections,
            max_keepalive_connections=settings.max_connections,
            keepalive_expiry=KEEPALIVE_SECONDS,
        ),
    )


class _SignedIn(Struct):
    token: str


class _Passing(Exception):
    """An attempt failed for a cause that passes."""


def _message(answer: Answer) -> str:
    try:
        return _refusal.decode(answer.content).message
    except msgspec.DecodeError:
        return "no PocketBase answer"
