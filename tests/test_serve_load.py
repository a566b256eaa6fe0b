"""Many clients at once, some of which go away: nobody else notices, and nothing grows."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random, random

import pytest
from serving import Served, serving

from edge_gemma.units import MiB

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


# --- real 270M, 200 clients, minutes ---

LOAD_S = float(os.environ.get("EDGE_GEMMA_LOAD_S", 600))
N_LOAD, MAX_LOAD_REQUESTS = 200, 100_000
WORDS = "a board in the kitchen listens and answers without any network at all, day and night"


def pss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        [line] = [line for line in file if line.startswith("Pss:")]
    return int(line.split()[1]) * 1024


@dataclass
class Tally:
    """What the clients saw; ``closing`` once the server was told to stop."""

    ends: Counter = field(default_factory=Counter)
    n_sent: int = 0
    pss: list[int] = field(default_factory=list)
    closing: bool = False


def a_request(name: str, random: Random) -> dict[str, object]:
    prompt = " ".join(random.choices(WORDS.split(), k=random.choice((8, 8, 8, 40, 200))))
    n = random.choice((4, 8, 16, 32))
    return {"model": name, "prompt": prompt, "max_tokens": n, "stream": True, "temperature": 0}


async def ask(http: httpx.AsyncClient, url: str, body: dict, tally: Tally) -> None:
    tally.n_sent += 1
    async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
        text = "".join([piece async for piece in response.aiter_text()])
        if response.status_code == 429:
            assert "retry-after" in response.headers
            tally.ends["429"] += 1
            await asyncio.sleep(float(response.headers["retry-after"]) * (0.5 + random()))
        elif response.status_code == 200 and text.endswith("data: [DONE]\n\n"):
            tally.ends["200"] += 1
        else:
            end = "closing" if tally.closing else f"{response.status_code}: {text[-300:]}"
            tally.ends[end] += 1


async def one_of_many(url: str, name: str, number: int, tally: Tally, end_s: float) -> None:
    dice = Random(number)
    async with httpx.AsyncClient(timeout=300) as http:
        while time.monotonic() < end_s and tally.n_sent < MAX_LOAD_REQUESTS:
            try:
                await ask(http, url, a_request(name, dice), tally)
            except httpx.HTTPError as error:
                tally.ends["closing" if tally.closing else repr(error)] += 1
                if tally.closing:
                    return


async def killed_every_second(clients: list[asyncio.Task], tally: Tally, start) -> None:
    """One client is torn off in whatever it does, and another one comes."""
    dice = Random(0)
    while True:
        await asyncio.sleep(1)
        victim = dice.randrange(len(clients))
        clients[victim].cancel()
        tally.ends["killed"] += 1
        clients[victim] = start(N_LOAD + tally.ends["killed"])


async def minutes_of_load(server: Served, tally: Tally, end_s: float) -> dict:
    def start(number: int) -> asyncio.Task:
        return asyncio.create_task(one_of_many(server.url, server.name, number, tally, end_s))

    clients = [start(number) for number in range(N_LOAD)]
    killer = asyncio.create_task(killed_every_second(clients, tally, start))
    stats: dict = {}
    async with httpx.AsyncClient(timeout=60) as http:
        while time.monotonic() < end_s - 5:
            await asyncio.sleep(5)
            tally.pss.append(pss_bytes(server.process.pid))
        stats["stats"] = (await http.get(f"{server.url}/stats")).json()
        stats["health"] = (await http.get(f"{server.url}/health")).json()
        stats["planned"] = (await http.get(f"{server.url}/api/ps")).json()["models"][0]["size"]
    tally.closing = True  # in the middle of what runs and waits
    server.process.send_signal(signal.SIGTERM)
    killer.cancel()
    stats["exit"] = await asyncio.to_thread(server.process.wait, 60)
    results = await asyncio.gather(*clients, killer, return_exceptions=True)
    failed = [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)]
    assert not failed, failed[:3]
    return stats


@pytest.mark.timeout(LOAD_S + 300)
def test_200_clients_for_ten_minutes_on_real_270m(sample_gguf, tmp_path, capsys):
    """``EDGE_GEMMA_LOAD_S`` says how long; figures are printed (``-s``)."""
    from edge_gemma.store.importer import import_gguf

    bundle = import_gguf(sample_gguf, tmp_path / "bundle").folder
    tally = Tally()
    with serving(bundle, "--parallel", "4", "--queue", "64") as server:
        before = pss_bytes(server.process.pid)
        end_s = time.monotonic() + LOAD_S
        stats = asyncio.run(minutes_of_load(server, tally, end_s))
    health, queue = stats["health"], stats["stats"]["queue_s"]
    figures = {
        "seconds": LOAD_S,
        "sent": tally.n_sent,
        "ends": dict(tally.ends),
        "queue_s": queue,
        "pss_mib": [before >> 20, tally.pss[0] >> 20, max(tally.pss) >> 20, tally.pss[-1] >> 20],
        "planned_mib": stats["planned"] >> 20,
        "completion_tokens": health["completion_tokens"],
    }
    with capsys.disabled():
        print(json.dumps(figures))
    assert set(tally.ends) <= {"200", "429", "killed", "closing"}, tally.ends
    assert tally.ends["200"] > 10 and tally.ends["429"] > 10
    assert health["n_failed"] == 0 and stats["exit"] == 0
    # no growth: the last quarter is no larger than the second, within what an allocator keeps
    quarter = max(1, len(tally.pss) // 4)
    second, last = tally.pss[quarter : 2 * quarter], tally.pss[-quarter:]
    assert max(last) < max(second or last) + 16 * MiB, figures
    assert max(tally.pss) <= stats["planned"], figures
    assert queue["p95"] is not None
