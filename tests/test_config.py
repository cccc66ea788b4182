"""Settings come from one TOML file, addresses and secrets from the strongest source that has them. Whatever is
wrong is said with the file, the key and what was expected; no secret is ever shown."""

from __future__ import annotations

import re
import tomllib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import msgspec
import pytest
import structlog

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer, open_stores
from pb_cached.cache.rules import rule_for
from pb_cached.config import (
    Address,
    CacheSettings,
    CoherenceSettings,
    CollectionSettings,
    Credentials,
    PocketBaseSettings,
    Secret,
    StoreSettings,
    WriteSettings,
    checked_config,
    find_address,
    find_url,
)
from pb_cached.errors import AuthenticationFailed, ConfigError

PRESETS = Path(__file__).parents[1] / "config"
HERE = "http://127.0.0.1:8090"
SECRETS = ("s3cret-token", "s3cret-password")

TomlWriter = Callable[[str], Path]


@pytest.fixture
def toml(folder: Path) -> TomlWriter:
    """Writes a configuration file and returns its path."""

    def write(text: str) -> Path:
        file = folder / "settings.toml"
        file.write_text(text, "utf-8")
        return file

    return write


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets `POCKETBASE_*` variables: `environment(url=..., admin_email=...)`."""

    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"POCKETBASE_{name.upper()}", value)

    return put


def refusal(file: Path) -> str:
    """What `Config.load` says about a file; always with the file's name."""
    with pytest.raises(ConfigError) as caught:
        Config.load(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


# --- the files that we ship -------------------------------------------------------------------------------


def fields_of_config() -> dict[str, Mapping[str, Any]]:
    return {
        section.name: {field.name: field.default for field in msgspec.structs.fields(section.type)}
        for section in msgspec.structs.fields(Config)
        if section.name != "collections"
    }


@pytest.fixture
def everything_switched_on() -> str:
    """The shipped default, with its `#name = value` and `#[table]` lines uncommented."""
    return re.sub(r"^#(?=\w+ = |\[)", "", (PRESETS / "default.toml").read_text("utf-8"), flags=re.MULTILINE)


def test_the_shipped_default_says_what_is_so_without_a_file() -> None:
    assert Config.load(PRESETS / "default.toml") == Config()


def test_the_shipped_default_names_every_setting_with_its_default(everything_switched_on: str) -> None:
    shown = tomllib.loads(everything_switched_on)
    for section, defaults in fields_of_config().items():
        assert shown[section].keys() == defaults.keys()
        for name, default in defaults.items():
            if default is not None:
                value = shown[section][name]
                assert (tuple(value) if isinstance(value, list) else value) == default, f"{section}.{name}"
    assert shown["collections"]["events"].keys() == {f.name for f in msgspec.structs.fields(CollectionSettings)}


def test_the_shipped_default_shows_how_events_are_cached(toml: TomlWriter, everything_switched_on: str) -> None:
    shown = Config.load(toml(everything_switched_on)).collections["events"]
    fields = ["id", "session_id", "offset"]
    assert rule_for("events", fields, shown) == rule_for("events", fields, None)


def test_every_setting_of_the_shipped_default_can_be_switched_on(
    toml: TomlWriter, everything_switched_on: str
) -> None:
    assert Config.load(toml(everything_switched_on)).pocketbase.url == HERE


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.toml")), ids=lambda path: str(path.name))
def test_every_preset_loads_and_explains_itself(preset: Path) -> None:
    Config.load(preset)
    assert preset.read_text("utf-8").startswith("# ")


def test_the_embedded_preset_keeps_its_data_beside_itself() -> None:
    config = Config.load(PRESETS / "embedded.toml")
    assert find_url(config) is None
    assert Path(config.pocketbase.data_dir) == PRESETS / "pocketbase-data"


def test_the_remote_preset_needs_only_a_password(environment: Callable[..., None]) -> None:
    environment(admin_password=SECRETS[1])
    found = find_address(Config.load(PRESETS / "remote.toml"))
    assert found.url.startswith("https://")
    assert found.credentials == Credentials(email="parlant@example.com", password=Secret(SECRETS[1]))


@pytest.mark.parametrize(
    ("text", "key", "name", "hint"),
    [
        ('[cache]\nwarm = ["sessions", "evnets"]', "cache.warm", "evnets", " (did you mean 'events'?)"),
        ("[collections.Events]\nunique_ids = true", "collections.Events", "Events", " (did you mean 'events'?)"),
        ("[collections.notes]", "collections.notes", "notes", ""),
    ],
)
async def test_a_setting_for_a_collection_that_no_store_has_is_refused_by_name(
    toml: TomlWriter, monkeypatch: pytest.MonkeyPatch, text: str, key: str, name: str, hint: str
) -> None:
    file = toml(text)
    known = "expected some of sessions, events, customers, customer_tag_associations, variables, "
    complaint = f"{key}: none of Parlant's three stores has a collection '{name}'{hint}; {known}"
    monkeypatch.setenv("PB_CACHED_CONFIG", str(file))
    for config, source in ((file, str(file)), (None, str(file)), (Config.load(file), "Config")):
        with pytest.raises(ConfigError, match="^" + re.escape(f"{source}: {complaint}")):
            async with open_stores(config, connection_params=PARAMS):
                pass


# --- the file ---------------------------------------------------------------------------------------------


def test_the_environment_names_the_file_when_the_caller_does_not(
    toml: TomlWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Config.load() == Config()
    monkeypatch.setenv("PB_CACHED_CONFIG", str(toml("[writes]\ndeadline = 7")))
    assert Config.load().writes.deadline == 7.0


def test_a_file_that_the_caller_names_comes_before_that_of_the_environment(
    toml: TomlWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PB_CACHED_CONFIG", "nowhere.toml")
    assert Config.load(toml("[writes]\ndeadline = 7")).writes.deadline == 7.0


def test_relative_paths_are_taken_from_the_files_own_folder(
    toml: TomlWriter, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = toml('[pocketbase]\ndata_dir = "data"\nadmin_token_file = "secrets/token"\nadmin_password_file = "/p"')
    monkeypatch.chdir(file.parent)
    found = Config.load(file.name).pocketbase
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert Path(found.data_dir) == file.parent / "data"
    assert found.admin_token_file == str(file.parent / "secrets/token")
    assert found.admin_password_file == "/p"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[pocketbase]\nmax_conections = 3", "'pocketbase.max_conections' (did you mean 'max_connections'?)"),
        ("[pocketbse]", "unknown key 'pocketbse' (did you mean 'pocketbase'?); expected some of pocketbase"),
        ("[stores]\nxyzzy = 1", "unknown key 'stores.xyzzy'; expected some of session_prefix"),
        ("pocketbase = 3", "pocketbase: expected a table, got 'int'"),
        ('[pocketbase]\nmax_connections = "8"', "pocketbase.max_connections: expected 'int', got 'str'"),
        ("[pocketbase]\nmax_connections = true", "pocketbase.max_connections: expected 'int', got 'bool'"),
        ("[pocketbase]\nmax_connections = 0", "pocketbase.max_connections: expected 'int' >= 1"),
        ("[pocketbase]\nretry_for = -1", "pocketbase.retry_for: expected 'float' > 0"),
        ("[pocketbase]\nretry_for = nan", "pocketbase.retry_for: expected 'float' > 0"),
        ("[pocketbase]\nretry_for = inf", "pocketbase.retry_for: expected 'float' <= 86400"),
        ("[pocketbase]\nconnect_timeout = 0", "pocketbase.connect_timeout: expected 'float' > 0"),
        ('[pocketbase]\ndata_dir = ""', "pocketbase.data_dir: expected 'str' of length >= 1"),
        ('[pocketbase]\nurl = "localhost"', "pocketbase.url: expected a URL such as http://127.0.0.1:8090"),
        ("[stores]\nmigrate = 1", "stores.migrate: expected 'bool', got 'int'"),
        ('[stores]\nsession_prefix = "a-b"', "stores.session_prefix: expected 'str' matching regex"),
        ('[stores]\nsession_prefix = "Parlant_Customers"', "customer_prefix and variable_prefix must differ"),
        ('[stores]\ncustomer_ids = "mine"', "stores.customer_ids: invalid enum value 'mine'; expected one of"),
        ("[cache]\nmax_bytes = -1", "cache.max_bytes: expected 'int' >= 0"),
        ('[cache]\nwarm = "sessions"', "cache.warm: expected a list, got 'str'"),
        ('[coherence]\nmode = "on"', "coherence.mode: invalid enum value 'on'; expected one of realtime"),
        ("[collections]\nevents = 3", "collections.events: expected a table, got 'int'"),
        ("[collections.events]\nmax = 1", "unknown key 'collections.events.max'"),
        ("[collections.x]\n[collections.y]\nsequence = 1", "collections.y.sequence: expected 'str"),
        ("[collections.x]\nmax_partition_documents = 0", "collections.x.max_partition_documents: expected 'int'"),
        ("[writes]\nmax_commit_records = 5001", "writes.max_commit_records: expected 'int' <= 5000"),
        ("[writes]\nmax_document_bytes = 0", "writes.max_document_bytes: expected 'int' >= 1024"),
        ("[writes]\nlog_retention = 1", "writes.log_retention: expected 'float' >= 60"),
        ('[logging]\nlevel = "loud"', "logging.level: invalid enum value 'loud'; expected one of debug, info"),
        ("[writes\n", "is not valid TOML: "),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_name(toml: TomlWriter, text: str, complaint: str) -> None:
    assert complaint in refusal(toml(text))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (Config(pocketbase=PocketBaseSettings(max_connections=0)), "pocketbase.max_connections: expected 'int'"),
        (Config(pocketbase=PocketBaseSettings(retry_for=float("nan"))), "pocketbase.retry_for: expected 'float'"),
        (Config(pocketbase=PocketBaseSettings(url="localhost")), "pocketbase.url: expected a URL such as http://"),
        (Config(pocketbase=cast(Any, WriteSettings())), "unknown key 'pocketbase.max_commit_records'"),
        (Config(cache=cast(Any, None)), "cache: expected a table, got nothing"),
        (Config(collections={"x": CollectionSettings(max_partition_documents=0)}), "collections.x.max_partition"),
        (Config(coherence=CoherenceSettings(mode=cast(Any, "on"))), "expected one of realtime, exclusive, off"),
        (Config(stores=StoreSettings(session_prefix=cast(Any, 5))), "stores.session_prefix: expected 'str'"),
        (cast(Any, "settings.toml"), "expected a Config, not str; Config.load(path) makes one of a file"),
    ],
)  # fmt: skip
async def test_a_setting_that_cannot_be_is_refused_also_where_it_was_built_in_code(
    config: Config, complaint: str
) -> None:
    with pytest.raises(ConfigError, match="^Config: .*" + re.escape(complaint)):
        PocketBaseDocumentDatabase(None, PARAMS, config=config)
    if isinstance(config, Config):  # to the stores, a string names a file
        with pytest.raises(ConfigError, match="^Config: .*" + re.escape(complaint)):
            async with open_stores(config, connection_params=PARAMS):
                pass


def test_a_config_that_was_built_in_code_is_taken_as_it_is() -> None:
    built = Config(
        pocketbase=PocketBaseSettings(url=HERE, retry_for=5),
        collections=MappingProxyType({"events": CollectionSettings(partition_by=("session_id", "kind"))}),
        cache=CacheSettings(warm=("events",)),
    )
    assert checked_config(built) == built


def test_a_file_that_is_not_there_is_an_error_that_says_who_named_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = folder / "missing.toml"
    assert "there is no such file" in refusal(missing)
    monkeypatch.setenv("PB_CACHED_CONFIG", str(missing))
    with pytest.raises(ConfigError, match=r"missing\.toml \(named by PB_CACHED_CONFIG\): there is no such file"):
        Config.load()


def test_a_file_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "latin.toml").write_bytes("# Größe\n".encode("latin-1"))
    assert "cannot be read as UTF-8 text" in refusal(folder / "latin.toml")
    assert "cannot be read as UTF-8 text" in refusal(folder)


def test_a_file_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    """As Windows' editors write it."""
    (folder / "marked.toml").write_text("[cache]\nmax_bytes = 7", "utf-8-sig")
    assert Config.load(folder / "marked.toml").cache.max_bytes == 7
    (folder / "wide.toml").write_text("[cache]\nmax_bytes = 7", "utf-16")
    assert "cannot be read as UTF-8 text" in refusal(folder / "wide.toml")


def test_a_secrets_file_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    (folder / "token").write_text(SECRETS[0], "utf-8-sig")
    settings = PocketBaseSettings(url=HERE, admin_token_file=str(folder / "token"))
    assert find_address(Config(pocketbase=settings)).credentials == Credentials(token=Secret(SECRETS[0]))


def test_what_is_no_path_is_refused_as_a_configuration() -> None:
    with pytest.raises(ConfigError, match="expected the path of a TOML file, not int"):
        Config.load(cast(Any, 5))


@pytest.mark.parametrize("port", ["99999", "-1", "x"])
def test_a_port_that_cannot_be_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match=f"expected a URL such as .*, got 'http://127.0.0.1:{port}'"):
        find_url(Config(), {"url": f"http://127.0.0.1:{port}"})


@pytest.mark.parametrize("key", ["admin_token", "admin_password"])
def test_a_secret_in_the_file_is_refused_and_told_where_it_belongs(toml: TomlWriter, key: str) -> None:
    said = refusal(toml(f'[pocketbase]\n{key} = "{SECRETS[0]}"'))
    assert f"use POCKETBASE_{key.upper()} or name a file with {key}_file" in said
    assert SECRETS[0] not in said


# --- where PocketBase is, and who we are ------------------------------------------------------------------

PARAMS = {"url": "http://params", "admin_email": "params@x", "admin_password": "params password"}
ENVIRONMENT = {
    "url": "http://environment",
    "admin_email": "environment@x",
    "admin_password": "environment password",
}


@pytest.fixture
def settings(toml: TomlWriter, folder: Path) -> Config:
    """A file that names everything."""
    (folder / "password").write_text("file password\n")
    return Config.load(
        toml('[pocketbase]\nurl = "http://file/"\nadmin_email = "file@x"\nadmin_password_file = "password"')
    )


def account(url: str, email: str, password: str) -> Address:
    return Address(url, Credentials(email=email, password=Secret(password)))


def test_what_the_caller_passes_comes_before_the_environment_and_that_before_the_file(
    settings: Config, environment: Callable[..., None]
) -> None:
    assert find_address(settings) == account("http://file", "file@x", "file password")
    environment(**ENVIRONMENT)
    assert find_address(settings) == account("http://environment", "environment@x", "environment password")
    assert find_address(settings, PARAMS) == account("http://params", "params@x", "params password")


def test_the_url_may_come_from_elsewhere_than_the_credentials(
    settings: Config, environment: Callable[..., None]
) -> None:
    environment(url="http://environment")
    assert find_address(settings) == account("http://environment", "file@x", "file password")
    params = {"url": "http://params"}
    assert find_address(settings, params) == account("http://params", "file@x", "file password")


def test_a_weaker_sources_token_never_overrules_a_stronger_ones_password(
    settings: Config, environment: Callable[..., None]
) -> None:
    environment(admin_token="environment token")
    assert find_address(settings).credentials == Credentials(token=Secret("environment token"))
    assert find_address(settings, PARAMS) == account("http://params", "params@x", "params password")


def test_within_one_source_the_token_counts(settings: Config) -> None:
    found = find_address(settings, PARAMS | {"admin_token": "params token"})
    assert found.credentials == Credentials(token=Secret("params token"))


def test_the_file_may_name_the_email_and_the_environment_hold_the_password(
    settings: Config, environment: Callable[..., None]
) -> None:
    environment(admin_password="environment password")
    assert find_address(settings) == account("http://file", "file@x", "environment password")


def test_the_email_that_a_caller_names_is_never_replaced_by_a_weaker_sources(
    settings: Config, environment: Callable[..., None]
) -> None:
    environment(**ENVIRONMENT)
    found = find_address(settings, {"admin_email": "params@x"})
    assert found == account("http://environment", "params@x", "environment password")


def test_a_variable_that_is_set_to_nothing_is_not_set(settings: Config, environment: Callable[..., None]) -> None:
    environment(url="", admin_token="", admin_email="", admin_password="")
    assert find_address(settings) == account("http://file", "file@x", "file password")


def test_a_secrets_file_is_read_only_when_it_is_needed(
    settings: Config, folder: Path, environment: Callable[..., None]
) -> None:
    (folder / "password").unlink()
    assert find_address(settings, PARAMS) == account("http://params", "params@x", "params password")
    environment(admin_token="environment token")
    assert find_address(settings).credentials.token == Secret("environment token")


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({}, "no PocketBase URL: pass connection_params={'url': ...}, or set POCKETBASE_URL, or set url under"),
        ({"url": HERE}, "no credentials for PocketBase at http://127.0.0.1:8090: set POCKETBASE_ADMIN_"),
        ({"url": HERE, "admin_email": "a@x"}, "an admin email is configured but no password: set POCKETBASE_"),
        ({"url": HERE, "admin_password": "p"}, "connection_params holds admin_password but no email: set admin_"),
        ({"url": HERE, "admin_tokn": "t"}, "unknown key 'admin_tokn' (did you mean 'admin_token'?); expected"),
        ({"url": 8090}, "connection_params: 'url' must be a string, not int"),
        ({"url": "ftp://x"}, "connection_params['url']: expected a URL such as http://127.0.0.1:8090, got 'ftp://x'"),
        ({"url": "http://x:port"}, "connection_params['url']: expected a URL"),
        ({"url": "http://[::1"}, "connection_params['url']: expected a URL"),
        ({"url": "http://x:0"}, "connection_params['url']: expected a URL"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_with_the_address_is_said(params: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        find_address(Config(), params)


@pytest.mark.parametrize("params", [f"http://{SECRETS[0]}@x", 5, [("url", HERE)]])
def test_parameters_that_are_no_mapping_are_refused_and_not_repeated(params: Any) -> None:
    with pytest.raises(ConfigError, match=r"connection_params: expected a mapping such as {'url': ") as caught:
        PocketBaseDocumentDatabase(None, params)
    assert SECRETS[0] not in str(caught.value)


def test_a_variable_without_a_url_is_named(environment: Callable[..., None]) -> None:
    environment(admin_token=SECRETS[0])
    with pytest.raises(ConfigError, match="no PocketBase URL, though POCKETBASE_ADMIN_TOKEN is set: "):
        find_address(Config())


def test_a_password_in_the_environment_needs_an_email(environment: Callable[..., None]) -> None:
    environment(url=HERE, admin_password=SECRETS[1])
    with pytest.raises(
        ConfigError,
        match="the environment holds POCKETBASE_ADMIN_PASSWORD but no email: set POCKETBASE_ADMIN_EMAIL",
    ):
        find_address(Config())


def test_a_secrets_file_without_a_secret_is_refused(settings: Config, folder: Path) -> None:
    (folder / "password").write_text(" \n")
    with pytest.raises(
        ConfigError, match=r"pocketbase\.admin_password_file: .*password is empty; expected the secret"
    ):
        find_address(settings)
    (folder / "password").unlink()
    with pytest.raises(
        ConfigError, match=r"pocketbase\.admin_password_file: .*password cannot be read: FileNotFound"
    ):
        find_address(settings)


# --- secrets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"http://admin:{SECRETS[1]}@127.0.0.1:8090",
        f"admin:{SECRETS[1]}@127.0.0.1:8090",
        f"http:/admin:{SECRETS[1]}@127.0.0.1",
        f"http://127.0.0.1/?token={SECRETS[0]}",
        f"http://127.0.0.1/#{SECRETS[0]}",
    ],
)
def test_a_url_with_a_secret_in_it_is_refused_and_not_repeated(
    url: str, toml: TomlWriter, environment: Callable[..., None]
) -> None:
    environment(url=url)
    with pytest.raises(ConfigError, match="POCKETBASE_URL: must hold no user name, password") as caught:
        find_url(Config())
    said = str(caught.value) + refusal(toml(f"[pocketbase]\nurl = '{url}'"))
    assert not any(secret in said for secret in SECRETS)


def test_no_secret_can_be_seen(folder: Path, environment: Callable[..., None]) -> None:
    (folder / "token").write_text(SECRETS[0])
    environment(url=HERE, admin_email="a@x", admin_password=SECRETS[1])
    config = Config(pocketbase=PocketBaseSettings(admin_token_file=str(folder / "token")))
    with_password = find_address(config)
    with_token = find_address(config, {"admin_token": SECRETS[0]})
    for thing in (
        *(config, with_password, with_token, with_password.credentials, with_token.credentials),
        *(with_password.credentials.password, with_token.credentials.token),
        PocketBaseDocumentDatabase(config=config),
        PocketBaseDocumentDatabase(config=config, connection_params={"url": HERE, "admin_token": SECRETS[0]}),
    ):
        seen = f"{thing!r} {thing!s} {vars(thing) if hasattr(thing, '__dict__') else ''}"
        assert not any(secret in seen for secret in SECRETS), type(thing)


async def test_a_refused_sign_in_shows_no_password(pocketbase: PocketBaseServer) -> None:
    params = {"url": pocketbase.url, "admin_email": "nobody@example.com", "admin_password": SECRETS[1]}
    with structlog.testing.capture_logs() as logged:
        database = PocketBaseDocumentDatabase(structlog.get_logger(), params, config=Config())
        with pytest.raises(AuthenticationFailed, match=r"nobody@example\.com") as caught:
            await database.__aenter__()
    assert SECRETS[1] not in "".join(traceback.format_exception(caught.value)) + str(logged)


def test_secrets_are_equal_by_value_and_so_share_a_connection() -> None:
    one, same, other = Secret("a"), Secret("a"), Secret("b")
    assert one == same != other
    assert len({one, same, other}) == 2
