"""The README's examples, run as they stand there."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from pb_cached import PocketBaseServer

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
SERVERS = [example for example in EXAMPLES if "p.Server(" in example]
SECONDS = 60.0

OFFLINE = """
import runpy, sys
import parlant.sdk as p
from pb_cached.cli.demo.nlp import DeterministicNLP

real = p.Server.__init__

def offline(self, **options):
    port, tool_port = map(int, sys.argv[2:])
    real(self, nlp_service=lambda _: DeterministicNLP(), port=port, tool_service_port=tool_port, **options)

p.Server.__init__ = offline
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""Runs an example whose server would otherwise ask for a language model's key."""


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PARLANT_HOME": str(folder / "parlant"), "PYTHONPATH": str(ROOT), **more}


def test_the_examples_are_found() -> None:
    assert len(EXAMPLES) == 4
    assert len(SERVERS) == 2


@pytest.mark.parametrize("example", [example for example in EXAMPLES if example not in SERVERS])
def test_an_example_prints_what_the_readme_says(
    example: str, pocketbase: PocketBaseServer, tmp_path: Path
) -> None:
    params = pocketbase.connection_params
    result = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment(tmp_path, POCKETBASE_URL=params["url"], POCKETBASE_ADMIN_TOKEN=params["admin_token"]),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    printed = result.stdout.strip()
    assert printed, result.stderr
    assert f"`{printed}`" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("example", SERVERS, ids=["server_args", "configure_container"])
def test_the_server_example_serves_from_an_embedded_pocketbase(example: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(example, "utf-8")
    port = free_port()
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", OFFLINE, "example.py", str(port), str(free_port())],
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        agent = wait_for_agent(port, process, tmp_path / "output")
        session = httpx.post(f"http://127.0.0.1:{port}/sessions", json={"agent_id": agent}).raise_for_status()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)
    assert session.json()["id"]
    assert (tmp_path / "pocketbase-data").is_dir()


def wait_for_agent(port: int, process: subprocess.Popen[bytes], output: Path) -> str:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, output.read_text("utf-8", "replace")[-3000:]
        try:
            agents = httpx.get(f"http://127.0.0.1:{port}/agents").json()
        except httpx.TransportError:
            agents = []
        for agent in agents:
            if agent["name"] == "Robin":
                return str(agent["id"])
        time.sleep(0.1)
    pytest.fail("the server did not come up")
