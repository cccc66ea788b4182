"""A real Parlant server whose conversations live in PocketBase: every way of wiring it, stopped and resumed."""

# The container's keys are Parlant's abstract classes.
# mypy: disable-error-code="type-abstract"

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from lagom import Container
from parlant.core.agents import AgentStore
from parlant.core.common import IdGenerator
from parlant.core.context_variables import ContextVariableDocumentStore, ContextVariableStore
from parlant.core.customers import CustomerDocumentStore, CustomerStore
from parlant.core.emission.event_publisher import EventPublisherFactory
from parlant.core.emissions import EventEmitterFactory
from parlant.core.loggers import Logger
from parlant.core.sessions import SessionDocumentStore, SessionStore
from parlant.core.tools import ToolContext, ToolResult

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer, open_stores
from pb_cached.config import StoreSettings
from pb_cached.stores import (
    PocketBaseContextVariableStore,
    PocketBaseCustomerStore,
    PocketBaseSessionStore,
)
from tests.conftest import EXCLUSIVE
from tests.parlant_server import RunningServer, Talk, parlant_server, sdk

if TYPE_CHECKING:
    import parlant.sdk as p

pytestmark = pytest.mark.slow

Wiring = Callable[[PocketBaseServer, str], AbstractAsyncContextManager[dict[str, Any]]]
"""From a PocketBase and a prefix to the arguments of `p.Server`."""


def opened(
    pocketbase: PocketBaseServer, prefix: str, http_client: httpx.AsyncClient | None = None, **sections: Any
) -> Any:
    settings = StoreSettings(
        session_prefix=f"{prefix}_sessions",
        customer_prefix=f"{prefix}_customers",
        variable_prefix=f"{prefix}_variables",
    )
    return open_stores(
        Config(stores=settings, **sections),
        connection_params=pocketbase.connection_params,
        http_client=http_client,
    )


@asynccontextmanager
async def server_args(pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[dict[str, Any]]:
    async with opened(pocketbase, prefix) as stores:
        yield stores.server_args()


@asynccontextmanager
async def configure_container(pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[dict[str, Any]]:
    async with opened(pocketbase, prefix) as stores:
        yield {"configure_container": stores.configure_container}


def by_hand(ours: bool) -> Wiring:
    """What users wrote before there was `open_stores`: one database for each store, everything bound anew."""

    @asynccontextmanager
    async def wire(pocketbase: PocketBaseServer, prefix: str) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:

            async def configure(container: Container) -> Container:
                async def database(name: str) -> PocketBaseDocumentDatabase:
                    return await stack.enter_async_context(
                        PocketBaseDocumentDatabase(
                            container[Logger], pocketbase.connection_params, collection_prefix=f"{prefix}_{name}"
                        )
                    )

                sessions, customers, variables = [
                    await database(name) for name in ("sessions", "customers", "variables")
                ]
                ids = container[IdGenerator]
                container[SessionStore] = await stack.enter_async_context(
                    PocketBaseSessionStore(sessions) if ours else SessionDocumentStore(sessions)
                )
                container[CustomerStore] = await stack.enter_async_context(
                    PocketBaseCustomerStore(customers) if ours else CustomerDocumentStore(ids, customers)
                )
                container[ContextVariableStore] = await stack.enter_async_context(
                    PocketBaseContextVariableStore(variables)
                    if ours
                    else ContextVariableDocumentStore(ids, variables)
                )
                container[EventEmitterFactory] = EventPublisherFactory(
                    container[AgentStore], container[SessionStore]
                )
                return container

            yield {"configure_container": configure}

    return wire


EVERY_WIRING = [
    pytest.param(server_args, id="server_args"),
    pytest.param(configure_container, id="stores.configure_container"),
    pytest.param(by_hand(ours=True), id="our stores by hand"),
    pytest.param(by_hand(ours=False), id="Parlant's stores by hand"),
]


async def an_agent(server: p.Server, **options: Any) -> p.Agent:
    return await server.create_agent(
        "Robin",
        "Remembers every word.",
        perceived_performance_policy=sdk().NullPerceivedPerformancePolicy(),
        **options,
    )


def tool(function: Callable[[ToolContext], Awaitable[ToolResult]]) -> Any:
    """Parlant looks at the types themselves, not at what `from __future__ import annotations` makes of them."""
    function.__annotations__ |= {"context": ToolContext, "return": ToolResult}
    return sdk().tool(function)


async def with_a_tag(server: p.Server) -> None:
    await an_agent(server)
    await server.create_tag("vip")


async def begin(server: RunningServer, **customer: Any) -> Talk:
    (agent,) = [agent for agent in await server.get("/agents") if agent["name"] == "Robin"]
    ida = await server.send("POST", "/customers", {"name": "Ida", "metadata": {"city": "Lindau"}, **customer})
    session = await server.send(
        "POST", "/sessions", {"agent_id": agent["id"], "customer_id": ida["id"], "title": "A lost umbrella"}
    )
    return Talk(server, session["id"])


async def whole(server: RunningServer, talk: Talk) -> dict[str, Any]:
    """All that the API tells about what is stored."""
    variables = await server.get("/context-variables")
    return {
        "sessions": await server.get("/sessions"),
        "events": await talk.events(),
        "customers": [customer for customer in await server.get("/customers") if customer["id"] != "guest"],
        "variables": [
            await server.get(f"/context-variables/{variable['id']}", include_values=True) for variable in variables
        ],
    }


async def settled(server: RunningServer, talk: Talk) -> dict[str, Any]:
    """The same, once the agent has written down its state, which it does after a turn is completed."""
    last: dict[str, Any] = {}
    while (now := await whole(server, talk)) != last or not now["sessions"]:
        last = now
        await asyncio.sleep(0.1)
    return last


async def dense(talk: Talk) -> bool:
    offsets = [event["offset"] for event in await talk.events()]
    return offsets == list(range(len(offsets)))


@pytest.mark.parametrize("wiring", EVERY_WIRING)
async def test_a_second_server_resumes_the_conversation(
    pocketbase: PocketBaseServer, prefix: str, wiring: Wiring
) -> None:
    async with wiring(pocketbase, prefix) as arguments, parlant_server(with_a_tag, **arguments) as server:
        (vip,) = [tag for tag in await server.get("/tags") if tag["name"] == "vip"]
        variable = await server.send("POST", "/context-variables", {"name": "plan", "tags": [vip["id"]]})
        talk = await begin(server, tags=[vip["id"]])
        values = f"/context-variables/{variable['id']}"
        await server.send("PUT", f"{values}/DEFAULT", {"data": {"seat": 61, "price": 19.0}})
        first = await talk.ask("I lost my umbrella.")
        await talk.ask("It is green 🌂.")
        before = await settled(server, talk)
    assert "Turn 1." in first
    assert len(before["events"]) > 2 * 4
    assert before["customers"][0]["tags"] == [vip["id"]]
    assert before["variables"][0]["key_value_pairs"]["DEFAULT"]["data"] == {"seat": 61, "price": 19.0}

    async with wiring(pocketbase, prefix) as arguments, parlant_server(with_a_tag, **arguments) as server:
        talk = Talk(server, talk.session)
        assert await whole(server, talk) == before
        reply = await talk.ask("Did somebody find it?")
        assert "Turn 3." in reply
        assert "I lost my umbrella." in reply, "the agent has read the whole history"
        assert await dense(talk)


async def test_a_warm_turn_of_conversation_reads_nothing_from_pocketbase(
    pocketbase: PocketBaseServer, prefix: str
) -> None:
    """Every read of an engine's turn, with five variables of which two have no value, is answered from memory."""
    read: list[str] = []

    async def note(request: httpx.Request) -> None:
        if request.method == "GET" and "/records" in request.url.path:
            read.append(str(request.url))

    async with (
        httpx.AsyncClient(event_hooks={"request": [note]}) as http,
        opened(pocketbase, prefix, http_client=http, coherence=EXCLUSIVE) as stores,
        parlant_server(with_a_tag, **stores.server_args()) as server,
    ):
        (vip,) = [tag for tag in await server.get("/tags") if tag["name"] == "vip"]
        for number in range(5):
            variable = await server.send(
                "POST", "/context-variables", {"name": f"plan {number}", "tags": [vip["id"]]}
            )
            if number < 3:
                path = f"/context-variables/{variable['id']}/DEFAULT"
                await server.send("PUT", path, {"data": {"seat": number}})
        talk = await begin(server, tags=[vip["id"]])
        await talk.ask("I lost my umbrella.")
        await settled(server, talk)
        cold = len(read)
        assert cold > 0
        reply = await talk.ask("It is green.")
        await talk.events(kinds="message,tool", min_offset=2)
        await server.send("PATCH", f"/sessions/{talk.session}", {"title": "A green umbrella"})
        assert "Turn 2." in reply
        assert read[cold:] == []
        assert await dense(talk)


@pytest.mark.parametrize("wiring", [EVERY_WIRING[0], EVERY_WIRING[1]])
async def test_what_a_tool_emits_is_stored(pocketbase: PocketBaseServer, prefix: str, wiring: Wiring) -> None:
    """Tools emit through the service registry, which p.Server has made before the container is configured."""

    async def look_up(context: ToolContext) -> ToolResult:
        await context.emit_status("processing", {"step": "looking"})
        await context.emit_custom({"found": ["a green one", "🌂"]})
        await context.emit_message("One moment, I am looking.")
        return ToolResult({"umbrellas": 1})

    async def script(server: p.Server) -> None:
        agent = await an_agent(server)
        await agent.create_variable("found", tool=tool(look_up))

    async with wiring(pocketbase, prefix) as arguments, parlant_server(script, **arguments) as server:
        talk = await begin(server)
        await talk.ask("I lost my umbrella.", containing="Turn 1.")
        await settled(server, talk)
    async with opened(pocketbase, prefix) as stores:
        events = await stores.session_store.list_events(talk.session)
        (variable,) = await stores.variable_store.list_variables()
        ((_, value),) = await stores.variable_store.list_values(variable.id)
    assert [event.offset for event in events] == list(range(len(events)))
    data = [event.data for event in events]
    assert {"found": ["a green one", "🌂"]} in data
    assert {"status": "processing", "data": {"step": "looking"}} in data
    assert any(isinstance(of, Mapping) and of.get("message") == "One moment, I am looking." for of in data)
    assert value.data == {"umbrellas": 1}


async def test_a_customer_who_writes_again_cancels_the_turn_and_loses_nothing(
    pocketbase: PocketBaseServer, prefix: str
) -> None:
    interrupted, goes_on = asyncio.Event(), asyncio.Event()

    async def think(context: ToolContext) -> ToolResult:
        await context.emit_status("processing", None)
        interrupted.set()
        await goes_on.wait()
        return ToolResult("thought")

    async def script(server: p.Server) -> None:
        agent = await an_agent(server)
        await agent.create_variable("thought", tool=tool(think))

    async with server_args(pocketbase, prefix) as arguments, parlant_server(script, **arguments) as server:
        talk = await begin(server)
        await talk.say("I lost my umbrella.")
        await interrupted.wait()
        await talk.say("On the 8:15 to Lindau.")
        goes_on.set()
        assert "I lost my umbrella." in await talk.reply(containing="Turn 2.")
        events = await talk.events()
        assert await dense(talk)
    assert "cancelled" in [event["data"].get("status") for event in events]
    assert [e["data"]["message"] for e in events if e["source"] == "customer"] == [
        "I lost my umbrella.",
        "On the 8:15 to Lindau.",
    ]


@pytest.mark.soak
async def test_turns_cancelled_at_any_moment_leave_offsets_dense(
    pocketbase: PocketBaseServer, prefix: str
) -> None:
    chance = random.Random(7)
    async with server_args(pocketbase, prefix) as arguments, parlant_server(an_agent, **arguments) as server:
        talk = await begin(server)
        said = [f"{number} umbrellas" for number in range(20)]
        for message in said:
            await talk.say(message)
            await asyncio.sleep(chance.random() * 0.05)
        await talk.ask("That was all.", containing="Turn 21.")
        assert await dense(talk)
        messages = [e["data"]["message"] for e in await talk.events() if e["source"] == "customer"]
        assert messages == [*said, "That was all."]
