"""Many clients at once, some of which go away: nobody else notices, and nothing grows."""

from __future__ import annotations

import asyncio

import pytest
from serving import serving

httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.slow
N_CLIENTS, N_EACH = 50, 6


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


async def client(url: str, name: str, number: int, statuses: list[int]) -> None:
    """Requests one after the other; every third one is left in the middle."""
    body = {"model": name, "prompt": f"{number}", "max_tokens": 30, "stream": True}
    async with httpx.AsyncClient(timeout=120) as http:
        for n in range(N_EACH):
            async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
                statuses.append(response.status_code)
                if response.status_code == 429:
                    assert int(response.headers["retry-after"]) >= 1
                    await asyncio.sleep(0.05)
                    continue
                text = ""
                async for piece in response.aiter_text():
                    text += piece
                    if (number + n) % 3 == 0:
                        break  # the connection is closed
                else:
                    assert text.endswith("data: [DONE]\n\n") and '"error"' not in text


async def storm(url: str, name: str) -> list[int]:
    statuses: list[int] = []
    clients = [client(url, name, number, statuses) for number in range(N_CLIENTS)]
    await asyncio.gather(*clients)
    return statuses


def test_a_storm_of_clients(tiny_bundle):
    with serving(tiny_bundle, "--parallel", "4", "--queue", "16") as server:
        storms, rss = [], []
        for _ in range(3):
            storms.append(asyncio.run(storm(server.url, server.name)))
            rss.append(rss_bytes(server.process.pid))
        for statuses in storms:
            assert len(statuses) == N_CLIENTS * N_EACH
            assert set(statuses) <= {200, 429} and statuses.count(200) > 50
        assert rss[2] - rss[0] < 16 * 2**20, rss
        health = httpx.get(f"{server.url}/health").json()
        assert health["n_failed"] == 0 and health["n_waiting"] == 0
        assert health["n_cancelled"] > 10 and health["n_refused"] > 10
