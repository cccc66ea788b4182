"""The demo's Parlant server: a process of its own, whose stores are in the PocketBase that the environment names.

An agent, a tag and a variable are defined at each start, as scripts do; conversations and customers are not.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

PORT = "PB_CACHED_DEMO_PORT"
TOOL_PORT = "PB_CACHED_DEMO_TOOL_PORT"

AGENT, TAG, VARIABLE = "Robin", "vip", "plan"


async def serve() -> None:
    import parlant.sdk as p

    from pb_cached import open_stores
    from pb_cached.cli.demo.nlp import DeterministicNLP

    async with (
        open_stores() as stores,
        p.Server(
            host="127.0.0.1",
            port=int(os.environ[PORT]),
            tool_service_port=int(os.environ[TOOL_PORT]),
            nlp_service=lambda _: DeterministicNLP(),
            **stores.server_args(),
        ) as server,
    ):
        await server.create_tag(TAG)
        agent = await server.create_agent(
            AGENT,
            "An agent that remembers every word.",
            perceived_performance_policy=p.NullPerceivedPerformancePolicy(),
        )
        await agent.create_variable(VARIABLE, "What the customer has booked.")


def end_with_parent() -> None:
    """The demo holds the other end of our input: when it dies, however it dies, the input ends and so do we."""
    while sys.stdin.buffer.read(4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the demo, which ends us in order
    threading.Thread(target=end_with_parent, daemon=True).start()
    asyncio.run(serve())
