"""The demo's Parlant server: a process of its own, whose stores are in the PocketBase that the environment names.

An agent, a tag and a variable are defined at each start, as scripts do; conversations and customers are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from pathlib import Path

import msgspec

from pb_cached.cli.demo.terms import AGENT, CACHE_REPORT, PORT, TAG, TOOL_PORT, VARIABLE


async def serve() -> None:
    import parlant.sdk as p

    from pb_cached import Config, open_stores
    from pb_cached.cli.demo.nlp import DeterministicNLP
    from pb_cached.config import CoherenceSettings

    # The demo started this PocketBase for us alone. A configuration that is passed is also the only one: no file
    # that somebody uses for something else decides where the demo's records go.
    config = Config(coherence=CoherenceSettings(mode="exclusive"))
    async with open_stores(config) as stores:
        try:
            async with p.Server(
                host="127.0.0.1",
                port=int(os.environ[PORT]),
                tool_service_port=int(os.environ[TOOL_PORT]),
                nlp_service=lambda _: DeterministicNLP(),
                **stores.server_args(),
            ) as server:
                await server.create_tag(TAG)
                agent = await server.create_agent(
                    AGENT,
                    "An agent that remembers every word.",
                    perceived_performance_policy=p.NullPerceivedPerformancePolicy(),
                )
                await agent.create_variable(VARIABLE, "What the customer has booked.")
        finally:
            Path(os.environ[CACHE_REPORT]).write_bytes(msgspec.json.encode(stores.stats()))


def end_with_parent() -> None:
    """The demo holds the other end of our input: when it dies, however it dies, the input ends and so do we.

    Not through `sys.stdin`, whose lock a thread that reads keeps for ever: Python could not end in order then.
    """
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # how the demo ends us
        asyncio.run(serve())
