"""Settings: one TOML file into frozen structs, and where PocketBase is and who we are to it.

Precedence, from strongest to weakest: what the caller passes, the environment, the TOML file, the defaults.
The URL, the secret and the email are looked up one by one. A token and a password are one secret here, so that a
token in the environment never overrules the password that a caller passed.

Knows nothing of HTTP or Parlant. Secrets live in `Secret` only: they have no readable `repr` and are never
part of a message.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from pb_cached.errors import ConfigError

CONFIG_VARIABLE: Final = "PB_CACHED_CONFIG"
URL_VARIABLE: Final = "POCKETBASE_URL"
TOKEN_VARIABLE: Final = "POCKETBASE_ADMIN_TOKEN"
EMAIL_VARIABLE: Final = "POCKETBASE_ADMIN_EMAIL"
PASSWORD_VARIABLE: Final = "POCKETBASE_ADMIN_PASSWORD"

MIB: Final = 1024 * 1024
STREAMING_INTERVAL: Final = 0.25
"""Seconds. As often as Parlant's own listener looks for events."""

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Prefix = Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,99}$")]
Text = Annotated[str, Meta(min_length=1)]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the TOML file."""


class PocketBaseSettings(Section, frozen=True):
    """`[pocketbase]`: where it is, how to sign in, how to talk to it."""

    url: Text | None = None
    """Such as `http://127.0.0.1:8090`. Without one, anywhere, `open_stores` starts the embedded server."""
    admin_email: Text | None = None
    admin_password_file: Text | None = None
    """A file that holds the password and nothing else."""
    admin_token_file: Text | None = None
    """A file that holds a superuser's token and nothing else."""
    data_dir: Text = "pocketbase-data"
    """Where the embedded server keeps its data."""
    manage_settings: bool = True
    """May we switch PocketBase's batch API on where it is off?"""
    max_connections: Annotated[int, Meta(ge=1, le=1000)] = 8
    """httpx gets slower, not faster, with more of them: its pool is scanned for every request."""
    transport: Literal["auto", "httpx", "aiohttp"] = "auto"
    """What connections are made of where the caller passes no client. `auto`: aiohttp where it is installed, which
    takes less CPU."""
    commit: Literal["auto", "log", "batch"] = "auto"
    """How commits are made. `log`: by triggers, three times as fast, and updates compare revisions (PocketBase
    0.39 and later). `batch`: by `/api/batch`. `auto`: by `log` where that can be."""
    native_events: bool = False
    """Must PocketBase's own hooks and realtime events tell of every record? Then commits are made by `batch`."""
    connect_timeout: Seconds = 5.0
    request_timeout: Seconds = 30.0
    retry_for: Seconds = 30.0
    """How long a request that is safe to repeat is repeated."""


class StoreSettings(Section, frozen=True):
    """`[stores]`: Parlant's three stores."""

    session_prefix: Prefix = "parlant_sessions"
    customer_prefix: Prefix = "parlant_customers"
    variable_prefix: Prefix = "parlant_context_variables"
    customer_ids: Literal["unique", "stable"] = "unique"
    """`stable`: Parlant's own, derived from the content, which repeat after a restart."""
    streaming_interval: Annotated[float, Meta(ge=0, le=60)] = STREAMING_INTERVAL
    """Seconds that the chunks of a streamed message may be acknowledged before they are written; 0 writes each."""
    migrate: bool = False
    """May opening a store bring documents of older Parlant versions up to date?"""

    def __post_init__(self) -> None:
        prefixes = (self.session_prefix, self.customer_prefix, self.variable_prefix)
        if len({str(prefix).lower() for prefix in prefixes}) < len(prefixes):
            raise ValueError(
                "session_prefix, customer_prefix and variable_prefix must differ, in more than case: "
                "each of the stores has a collection called 'metadata'"
            )


class WriteSettings(Section, frozen=True):
    """`[writes]`: group commit."""

    max_commit_records: Annotated[int, Meta(ge=1, le=5000)] = 200
    """Above about 200, throughput stays the same and only latency grows."""
    max_commit_bytes: Annotated[int, Meta(ge=1024, le=64 * MIB)] = 4 * MIB
    """A commit blocks all other writers of the PocketBase while it runs."""
    max_commit_seconds: Seconds = 0.25
    """While it takes longer, commits hold fewer records, down to one write each."""
    max_queued_records: Annotated[int, Meta(ge=1)] = 10_000
    max_queued_bytes: Annotated[int, Meta(ge=1024)] = 64 * MIB
    """Beyond either, callers wait until their write can be queued, up to the deadline."""
    max_document_bytes: Annotated[int, Meta(ge=1024, le=20 * MIB)] = 16 * MIB
    """A document beyond it is refused before anything is sent. PocketBase's own bound for one request
    inside a batch lies between 24 and 28 MiB."""
    deadline: Seconds = 30.0
    """How long a write is tried before its caller gets an error."""
    close_timeout: Seconds = 30.0
    """How long closing waits for writes that are queued."""
    log_retention: Annotated[float, Meta(ge=60, le=30 * 86_400)] = 3600.0
    """Seconds that the record of a commit is kept, the proof that it happened."""
    log_max_bytes: Annotated[int, Meta(ge=65_536)] = 256 * MIB
    """Of what commits hold that each log keeps for servers that were away; the oldest lose theirs first."""


class CacheSettings(Section, frozen=True):
    """`[cache]`: what is kept in memory."""

    max_bytes: Annotated[int, Meta(ge=0)] = 256 * MIB
    """For all collections together, overhead included; per PocketBase and event loop. 0 keeps nothing."""
    warm: tuple[Text, ...] = ()
    """Collections that are read into the cache as soon as they are opened, in the background."""


class CollectionSettings(Section, frozen=True):
    """`[collections.NAME]`: how one collection is cached and written. What is left out is as `cache.rules` and
    `writes.logs` have it."""

    partition_by: str | tuple[Text, ...] | None = None
    """The field, or fields, whose values the documents of a partition share; `id` for document by document; empty
    for the whole collection in one partition."""
    sequence: str | None = None
    """The field that numbers the documents of a partition: 0, 1, 2 and so on. Empty: none does."""
    unique_ids: bool | None = None
    """Do no two documents have the same `id`? Then an `id` tells the partition."""
    max_partition_documents: Annotated[int, Meta(ge=1)] | None = None
    """A partition beyond it is not kept but read through."""
    log: bool | None = None
    """Has it a log of its own? All servers must say the same."""


class CoherenceSettings(Section, frozen=True):
    """`[coherence]`: who else writes, and what the cache must do about it."""

    mode: Literal["realtime", "exclusive", "off"] | None = None
    """`realtime`: the cache follows what others commit. `exclusive`: nobody but this process writes, so the
    cache is never stale. `off`: every read goes to PocketBase. Unset: `exclusive` where `open_stores` starts a
    PocketBase of its own, else `realtime`."""
    max_staleness: Seconds = 5.0
    """No answer from the cache is older, while PocketBase can be reached."""
    heartbeat: Seconds = 1.0
    """How often is proven that nothing is missing."""
    audit_interval: Annotated[float, Meta(ge=0, le=86_400)] = 10.0
    """How often a partition is compared with what PocketBase holds; 0: never."""

    def __post_init__(self) -> None:
        if self.heartbeat > self.max_staleness / 2:
            raise ValueError(
                f"coherence.heartbeat ({self.heartbeat:g}) must be at most half of max_staleness "
                f"({self.max_staleness:g})"
            )


class LoggingSettings(Section, frozen=True):
    """`[logging]`: used where the caller passes no logger."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class Config(Section, frozen=True):
    """Everything that can be set. `Config()` is the default; `Config.load()` reads a TOML file."""

    pocketbase: PocketBaseSettings = PocketBaseSettings()
    stores: StoreSettings = StoreSettings()
    cache: CacheSettings = CacheSettings()
    collections: Mapping[str, CollectionSettings] = {}
    """By the name that Parlant gives the collection."""
    writes: WriteSettings = WriteSettings()
    coherence: CoherenceSettings = CoherenceSettings()
    logging: LoggingSettings = LoggingSettings()

    @property
    def mode(self) -> Literal["realtime", "exclusive", "off"]:
        """Of coherence, as it is where nobody knows better."""
        return self.coherence.mode or "realtime"

    @property
    def caches(self) -> bool:
        """Is anything kept in memory at all?"""
        return self.mode != "off" and self.cache.max_bytes > 0

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Config:
        """Read `path`, or the file that `PB_CACHED_CONFIG` names, or return the defaults.

        Relative paths inside the file are taken from the file's own folder.

        Raises:
            ConfigError: the file is missing, is not TOML, or holds an unknown key, a wrong type or an
                impossible value.
        """
        source = path if path is not None else os.environ.get(CONFIG_VARIABLE) or None
        if source is None:
            return cls()
        if not isinstance(source, str | os.PathLike):
            raise ConfigError(f"the configuration: expected the path of a TOML file, not {type(source).__name__}")
        file = Path(source)
        try:
            table = tomllib.loads(file.read_text("utf-8-sig"))  # some editors begin a file with a mark
        except FileNotFoundError:
            asked = "" if path is not None else f" (named by {CONFIG_VARIABLE})"
            raise ConfigError(f"{file}{asked}: there is no such file; expected a TOML configuration") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read as UTF-8 text: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{file}: is not valid TOML: {error}") from error
        _refuse_secrets(table, file)
        config = _converted(table, str(file))
        return msgspec.structs.replace(config, pocketbase=_anchored(config.pocketbase, file, table))


def checked_config(config: Config) -> Config:
    """One that was built in code, of which msgspec has checked nothing.

    Raises:
        ConfigError: a wrong type or an impossible value, said as for a file.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"Config: expected a Config, not {type(config).__name__}; Config.load(path) makes one of a file"
        )
    return _converted(_plain(config), "Config")


def _converted(table: Mapping[str, Any], source: str) -> Config:
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explained(str(error), table)}") from error
    if config.pocketbase.url is not None:
        _checked_url(config.pocketbase.url, f"{source}: pocketbase.url")
    return config


def _plain(value: Any) -> Any:
    """Structs as the tables that they would be in a file."""
    if isinstance(value, Struct):
        return {field: _plain(getattr(value, field)) for field in value.__struct_fields__}
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


class Secret:
    """A string that must not be seen. `reveal()` gives it to the one place that sends it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class Credentials(Struct, frozen=True):
    """How to sign in: a token, or an email and a password."""

    token: Secret | None = None
    email: str | None = None
    password: Secret | None = None


class Address(Struct, frozen=True):
    """A PocketBase, and who we are to it."""

    url: str
    credentials: Credentials


def find_url(config: Config, params: Mapping[str, Any] | None = None) -> str | None:
    """The configured URL without its trailing slash, or None where no source names one."""
    _check_params(params)
    for source, url in (
        ("connection_params['url']", (params or {}).get("url")),
        (URL_VARIABLE, os.environ.get(URL_VARIABLE)),
        ("pocketbase.url", config.pocketbase.url),
    ):
        if url:
            return _checked_url(str(url), source)
    return None


def environment_is_silent() -> bool:
    """True where no `POCKETBASE_*` variable of ours is set: the embedded server may be started."""
    return not any(
        os.environ.get(name) for name in (URL_VARIABLE, TOKEN_VARIABLE, EMAIL_VARIABLE, PASSWORD_VARIABLE)
    )


def exclusive(config: Config) -> Config:
    """The same, for a PocketBase that nobody else writes to."""
    return msgspec.structs.replace(config, coherence=msgspec.structs.replace(config.coherence, mode="exclusive"))


def find_address(config: Config, params: Mapping[str, Any] | None = None) -> Address:
    """Where PocketBase is and how to sign in.

    The secret is that of the strongest source that has one; in each, a token counts before a password. The email
    that goes with a password is no secret: the strongest source that names one decides.

    Raises:
        ConfigError: no source names a URL, or none holds complete credentials.
    """
    url = find_url(config, params)
    if url is None:
        half = next(
            (name for name in (TOKEN_VARIABLE, EMAIL_VARIABLE, PASSWORD_VARIABLE) if os.environ.get(name)), ""
        )
        raise ConfigError(
            f"no PocketBase URL{half and f', though {half} is set'}: pass connection_params={{'url': ...}}, "
            f"or set {URL_VARIABLE}, or set url under [pocketbase] in the configuration file"
        )
    sources = (
        _Source("connection_params", "admin_token", "admin_email", "admin_password", (params or {}).get),
        _Source("the environment", TOKEN_VARIABLE, EMAIL_VARIABLE, PASSWORD_VARIABLE, os.environ.get),
        _Source(
            "[pocketbase]", "admin_token_file", "admin_email", "admin_password_file", _from_file(config.pocketbase)
        ),
    )
    email = next((found for source in sources if (found := source.get(source.email))), None)
    for source in sources:
        if token := source.get(source.token):
            return Address(url, Credentials(token=Secret(token)))
        if password := source.get(source.password):
            if not email:
                raise ConfigError(f"{source.name} holds {source.password} but no email: set {source.email} too")
            return Address(url, Credentials(email=email, password=Secret(password)))
    if email:
        raise ConfigError(
            f"an admin email is configured but no password: set {PASSWORD_VARIABLE}, "
            "or admin_password_file under [pocketbase]"
        )
    raise ConfigError(
        f"no credentials for PocketBase at {url}: set {TOKEN_VARIABLE}, or {EMAIL_VARIABLE} and "
        f"{PASSWORD_VARIABLE}, or pass them in connection_params"
    )


class _Source(NamedTuple):
    """Somewhere that credentials may come from: what it is called, its three keys, and how to ask it for one."""

    name: str
    token: str
    email: str
    password: str
    get: Callable[[str], str | None]


def _from_file(settings: PocketBaseSettings) -> Callable[[str], str | None]:
    """Asks the configuration file. A secret's file is read only when no stronger source has a secret."""

    def get(key: str) -> str | None:
        value: str | None = getattr(settings, key)
        return _secret_file(value, key) if value and key.endswith("_file") else value

    return get


_PARAMS: Final = ("url", "admin_token", "admin_email", "admin_password")


def _check_params(params: Mapping[str, Any] | None) -> None:
    if params is not None and not isinstance(params, Mapping):
        # It may be a URL with a password in it, so it is not repeated.
        raise ConfigError(
            f"connection_params: expected a mapping such as {{'url': ...}} with some of {', '.join(_PARAMS)}, "
            f"not {type(params).__name__}"
        )
    for name, value in (params or {}).items():
        if name not in _PARAMS:
            raise ConfigError(
                f"connection_params: unknown key '{name}'{near(str(name), _PARAMS)}; "
                f"expected some of {', '.join(_PARAMS)}"
            )
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"connection_params: '{name}' must be a string, not {type(value).__name__}")


def _checked_url(url: str, source: str) -> str:
    if any(mark in url for mark in "@?#"):  # what is behind them may be a secret, so the URL is not repeated
        raise ConfigError(f"{source}: must hold no user name, password, query or fragment")
    try:
        parts = urlsplit(url.strip())
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        sound = False
    if not sound:
        raise ConfigError(f"{source}: expected a URL such as http://127.0.0.1:8090, got '{url}'")
    return url.strip().rstrip("/")


def _secret_file(path: str, key: str) -> str:
    try:
        secret = Path(path).read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"pocketbase.{key}: {path} cannot be read: {type(error).__name__}") from error
    if not secret:
        raise ConfigError(f"pocketbase.{key}: {path} is empty; expected the secret and nothing else")
    return secret


def _refuse_secrets(table: Mapping[str, Any], file: Path) -> None:
    """A secret in the TOML file gets a message of its own, which says where it belongs."""
    section = table.get("pocketbase")
    for key in ("admin_token", "admin_password"):
        if isinstance(section, dict) and key in section:
            raise ConfigError(
                f"{file}: pocketbase.{key}: secrets do not belong in this file; "
                f"use POCKETBASE_{key.upper()} or name a file with {key}_file"
            )


def _anchored(settings: PocketBaseSettings, file: Path, table: Mapping[str, Any]) -> PocketBaseSettings:
    written = table.get("pocketbase", {})
    paths = ("data_dir", "admin_password_file", "admin_token_file")
    return msgspec.structs.replace(
        settings,
        **{key: str(file.absolute().parent / Path(written[key]).expanduser()) for key in paths if key in written},
    )


def _explained(problem: str, table: Mapping[str, Any]) -> str:
    """msgspec's `... - at `$.a.b`` turned around: the key first, then what is wrong with it."""
    text, _, place = problem.partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    if key.startswith(_ANY_NAME):  # of a mapping's keys msgspec says no more than that it was one of them
        name, (text, key) = _culprit(table["collections"])
        key = f"collections.{name}{key}"
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text):
        known = tuple(field.name for field in msgspec.structs.fields(_section(key)))
        name = f"{key}.{unknown[1]}" if key else unknown[1]
        return f"unknown key '{name}'{near(unknown[1], known)}; expected some of {', '.join(known)}"
    if text.startswith("Invalid enum value"):
        text = f"{text}; expected one of {', '.join(_choices(key))}"
    text = text[:1].lower() + text[1:].replace("`object`", "a table").replace("`array`", "a list").replace(
        "`null`", "nothing"
    ).replace("`", "'")
    return f"{key}: {text}" if key else text


_ANY_NAME: Final = "collections[...]"


def _culprit(tables: Mapping[str, Any]) -> tuple[str, tuple[str, str]]:
    """The collection whose settings are wrong, and msgspec's complaint: what, and where in them."""
    for name, settings in tables.items():
        try:
            msgspec.convert(settings, CollectionSettings)
        except msgspec.ValidationError as error:
            text, _, place = str(error).partition(" - at `$")
            return name, (text, place.rstrip("`"))
    raise AssertionError("unreachable")  # pragma: no cover - one of them was refused before


def _section(path: str) -> type[Struct]:
    """The struct of the table at this path."""
    if path.startswith("collections."):
        return CollectionSettings
    fields = {field.name: field.type for field in msgspec.structs.fields(Config)}
    return fields[path] if path else Config


def _choices(key: str) -> tuple[str, ...]:
    section, _, name = key.rpartition(".")
    type_ = next(f.type for f in msgspec.structs.fields(_section(section)) if f.name == name)
    literals = [of for of in (type_, *get_args(type_)) if get_origin(of) is Literal]
    return get_args(literals[0])


def near(name: str, known: Sequence[str]) -> str:
    """A question after the known name that is most like this one, if any is."""
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""
