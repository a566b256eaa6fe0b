"""What a server tells about itself: metrics, percentiles, alerts, samples of quality, health."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from serving import serving
from typer.testing import CliRunner

from edge_gemma.cli.app import app
from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.machine.heat import temperatures, throttle_count, throttling
from edge_gemma.messages import Audio, Message
from edge_gemma.options import Logprob, Sampling
from edge_gemma.serve.answer import GenerationRequest

testclient = pytest.importorskip("starlette.testclient")
parser = pytest.importorskip("prometheus_client.parser")

from edge_gemma.serve.guard import BearerTokens  # noqa: E402
from edge_gemma.serve.http import make_app  # noqa: E402
from edge_gemma.serve.service import Service  # noqa: E402
from edge_gemma.serve.visit import Visit  # noqa: E402
from edge_gemma.serve.watch.alerts import FIGURES, AlertRule, Alerts  # noqa: E402
from edge_gemma.serve.watch.quality import Quality, read_references, repetition  # noqa: E402
from edge_gemma.serve.watch.recent import Recent  # noqa: E402
from edge_gemma.serve.watch.settings import Watch  # noqa: E402

HELLO = [{"role": "user", "content": "Hello"}]
DASHBOARD = Path(__file__).parent.parent / "packaging/grafana/edge-gemma.json"


@contextlib.contextmanager
def opened(model, watch=None, **options):
    """A client of ``model``'s routes, and the watch around them."""
    watch = watch or Watch()
    service = Service(model, observers=watch.observers)
    app = make_app(service, watch=watch, **options)
    with testclient.TestClient(
        app, base_url="http://127.0.0.1:11434", raise_server_exceptions=False
    ) as client:
        yield client, watch, service
    assert asyncio.run(service.close(5))


def chat(client, model, **body):
    defaults = {"model": model.bundle.manifest.name, "messages": HELLO, "max_tokens": 8}
    return client.post("/v1/chat/completions", json=defaults | {"temperature": 0} | body)


def samples(client):
    """Every sample of /metrics by its name and labels."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in parser.text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(tiny_model):
    with opened(tiny_model) as (client, _, _):
        usage = chat(client, tiny_model).json()["usage"]
        chat(client, tiny_model, stream=True)
        chat(client, tiny_model, temperature=-1)
        client.get("/v1/models/nothing")
        found = samples(client)
    assert found["edge_gemma_tokens_predicted_total",] == 2 * usage["completion_tokens"]
    assert found["edge_gemma_prompt_tokens_total",] == 2 * usage["prompt_tokens"]
    for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert found[f"gen_ai_server_{name}_seconds_count",] == 2
        assert found[f"gen_ai_server_{name}_seconds_sum",] > 0
    assert found["edge_gemma_queue_seconds_count",] == 2
    assert found["edge_gemma_http_requests_total", "/v1/chat/completions", "200"] == 2
    assert found["edge_gemma_http_requests_total", "/v1/chat/completions", "400"] == 1
    assert found["edge_gemma_http_requests_total", "404", "other"] == 1
    assert found["edge_gemma_errors_total", "bad_request"] == 1
    assert found["edge_gemma_errors_total", "server"] == 0
    assert found["edge_gemma_requests_processing",] == found["edge_gemma_requests_deferred",] == 0
    assert 0 < found["edge_gemma_kv_cache_usage_ratio",] < 1
    assert found["edge_gemma_memory_planned_bytes",] == tiny_model.plan.total_bytes
    assert found["edge_gemma_memory_bytes", "anonymous"] > 1 << 20


def test_labels_do_not_grow_with_what_clients_ask_for(tiny_model):
    with opened(tiny_model) as (client, _, _):
        for n in range(20):
            client.get(f"/{n}")
            client.request(f"X{n}", "/v1/models")
        routes = [key for key in samples(client) if key[0] == "edge_gemma_http_requests_total"]
    assert len(routes) == 2


def test_health_and_slots(tiny_model):
    with opened(tiny_model) as (client, _, service):
        assert client.get("/health/live").json() == {"live": True}
        assert client.get("/health/ready").json() == {"ready": True}
        assert client.get("/slots").json() == []
        assert asyncio.run(service.close(5))
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 503
        assert samples(client)["edge_gemma_ready",] == 0


def test_everything_wants_a_token(tiny_model):
    with opened(tiny_model, tokens=BearerTokens(["a-token"])) as (client, watch, _):
        for route in watch.routes():
            assert client.get(route.path).status_code == 401
        good = {"authorization": "Bearer a-token"}
        assert client.get("/metrics", headers=good).status_code == 200


def test_stats(tiny_model):
    with opened(tiny_model) as (client, _, _):
        assert client.get("/stats").json()["success_rate"] is None
        for _ in range(3):
            chat(client, tiny_model)
        chat(client, tiny_model, temperature=-1)
        found = client.get("/stats?answers").json()
    assert found["requests"] == 4 and found["client_error"] == 1 and found["success_rate"] == 1
    assert found["answers"] == 3 and len(found["last_answers"]) == 3
    assert 0 < found["ttft_s"]["p50"] <= found["ttft_s"]["p99"]
    assert found["memory"]["planned_bytes"] == tiny_model.plan.total_bytes


def test_the_success_rate_counts_the_servers_faults():
    recent = Recent(5)
    for status in (200, 200, 404, 429, 500, 200, None):
        recent.visited(Visit("", "POST", "/", status=status))
    recent.visited(Visit("", "POST", "/", status=200, finish_reasons=["failed"]))
    recent.visited(Visit("", "GET", "/", status=500))
    found = recent.summary()  # of the last five: 429, 500, 200, left, a stream that failed
    assert (found["busy"], found["failed"], found["ok"], found["left"]) == (1, 2, 1, 1)
    assert found["success_rate"] == 0.25


def test_an_answer_nobody_waits_for_is_counted_as_cancelled(tiny_model):
    watch = Watch()

    async def ask():
        service = Service(tiny_model, max_waiting=2, observers=watch.observers)
        sampling = Sampling(max_tokens=400, temperature=0)
        request = GenerationRequest([Message("user", "Hi")], sampling=sampling)
        answers = [service.submit(request) for _ in range(2)]
        for answer in answers:
            answer.cancel()
        return await service.close(5)

    assert asyncio.run(ask())
    assert watch.recent.summary()["outcomes"] == {"cancelled": 2}


# --- alerts ---


def test_an_alert_begins_after_a_while_and_ends(caplog):
    now = [0.0]
    rule = AlertRule("slow", "ttft_s_p95", above=2.0, for_s=30)
    alerts = Alerts([rule], clock=lambda: now[0])
    caplog.set_level("INFO")

    def check(value, at):
        now[0] = at
        return [event["state"] for event in alerts.check({"ttft_s_p95": value})]

    assert check(3, 0) == check(3, 29) == []
    assert check(1, 29.5) == check(3, 30) == check(3, 59) == []  # it began anew
    assert check(3, 60) == ["firing"] and alerts.firing == ["slow"]
    assert check(None, 61) == check(9, 62) == []
    assert check(2, 63) == ["resolved"] and alerts.firing == []
    assert caplog.text.count("alert slow firing: ttft_s_p95 is 3") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"figure": "speed", "above": 1}, "no figure 'speed'"),
        ({"figure": "n_waiting"}, "above or below"),
        ({"figure": "n_waiting", "above": 1, "below": 2}, "above or below"),
        *(
            ({"figure": "n_waiting", "above": 1, "webhook": address}, "on this machine")
            for address in (
                "http://example.org:80/",
                "https://127.0.0.1:9000/",
                "http://127.0.0.1/",
                "http://127.0.0.1.example.org:80/",
                "http://127.0.0.1:9000@example.org/",
                "file:///etc/passwd",
                "http://[::1",
                "",
            )
        ),
    ],
)
def test_bad_alerts(options, words):
    with pytest.raises(UsageError, match=words):
        AlertRule("a", **options)


@pytest.fixture
def webhook():
    """The address of a program that keeps what it is told; /redirect points elsewhere."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            data = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, json.loads(data)))
            self.send_response(307 if self.path == "/redirect" else 200)
            self.send_header("location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", got
        server.shutdown()
        thread.join()


def test_a_webhook_is_told(webhook, monkeypatch, caplog):
    address, got = webhook
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:9")
    rules = [
        AlertRule("full", "memory_bytes", above=5, webhook=f"{address}/hook"),
        AlertRule("moved", "memory_bytes", above=5, webhook=f"{address}/redirect"),
        AlertRule("nobody", "memory_bytes", above=5, webhook="http://127.0.0.1:9/"),
    ]
    Alerts(rules).check({"memory_bytes": 7})
    expected = {"alert": "full", "state": "firing", "figure": "memory_bytes", "value": 7}
    assert got[0] == ("/hook", expected | {"limit": 5, "side": "above"})
    assert [path for path, _ in got] == ["/hook", "/redirect"]
    assert "alert nobody: its webhook did not take it" in caplog.text
    assert "alert moved: its webhook did not take it" in caplog.text


def test_every_figure_of_an_alert_is_there(tiny_model):
    """So that no rule waits for a figure that never comes."""
    quality = Quality(1)
    with opened(tiny_model, Watch(quality=quality)) as (client, watch, _):
        chat(client, tiny_model)
        figures = watch.figures()
    unknown = {name for name in FIGURES if name not in figures}
    # of speech, which was not there, and temperature, which this machine may not tell
    assert unknown == {"real_time_factor_p95"} and "temperature_celsius" in figures
    assert figures["memory_bytes"] > 0 and figures["success_rate"] == 1


# --- quality ---


def test_every_second_answer_is_scored_by_the_model_itself(tiny_model):
    quality = Quality(2, {"Hello": "a reference"})
    with opened(tiny_model, Watch(quality=quality)) as (client, watch, service):
        plain = [chat(client, tiny_model).json() for _ in range(2)]
        first, second = (answer["choices"][0] for answer in plain)
        assert first == second  # the sampled one is the same to its reader
        asked = chat(client, tiny_model, logprobs=True).json()["choices"][0]["logprobs"]["content"]
        with_logprobs = [entry["logprob"] for entry in asked]

        async def score():
            return await quality.score_one(service), await quality.score_one(service)

        scores, nothing = asyncio.run(score())
        assert nothing is None
        assert scores.mean_logprob == pytest.approx(sum(with_logprobs) / len(with_logprobs))
        assert 0 <= scores.reference_f1 <= 1
        stats = client.get("/stats").json()
        assert stats["answers"] == 3  # its own questions are counted nowhere
        assert stats["quality"]["scored"] == 1
        assert samples(client)["edge_gemma_quality_samples_total",] == 1
        assert samples(client)["edge_gemma_quality_mean_logprob",] == scores.mean_logprob


def test_the_models_own_yes_and_no(tiny_model, monkeypatch):
    """The odds of its first token, as ``classify`` has them."""
    yes, no = (tiny_model.tokenize(word)[0] for word in ("Yes", "No"))
    quality = Quality(1)

    async def ask():
        service = Service(tiny_model)
        monkeypatch.setattr(service, "submit", lambda request: Fake(request))
        sample = type("Sample", (), {"question": "q {x}", "text": "a"})
        found = await quality._yes(service, "{question} {answer}", sample)
        await service.close(5)
        return found

    class Fake:
        def __init__(self, request):
            assert request.scoring and "q {x} a" in request.messages[0].content

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        async def __aiter__(self):
            yield Chunk("", (yes,), (Logprob(yes, -0.2, ((yes, -0.2), (no, -1.2))),))

    assert asyncio.run(ask()) == pytest.approx(0.7310586)


def test_no_score_while_others_wait_and_none_for_what_failed(tiny_model):
    quality = Quality(1)
    with opened(tiny_model, Watch(quality=quality)) as (_, _, service):
        answer = type("Answer", (), {"outcome": "failed", "request": GenerationRequest(prompt="a")})
        answer.with_hidden_logprobs = lambda: None
        quality.submitted(answer)
        quality.ended(answer)
        assert asyncio.run(quality.score_one(service)) is None
    assert quality.means() == dict.fromkeys(quality.means())
    assert repetition("too short") is None


def test_references(tmp_path):
    file = tmp_path / "references.jsonl"
    file.write_text('{"prompt": " a ", "answer": "b"}\n\n')
    assert read_references(file) == {"a": "b"}
    for text in ("{", "[]", '{"prompt": 1}', "3"):
        file.write_text(f'{{"prompt": "a", "answer": "b"}}\n{text}')
        with pytest.raises(UsageError, match="line 2"):
            read_references(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_references(tmp_path / "none")


# --- settings, heat, the command, the dashboard ---

WHOLE = """
every_seconds = 5
keep = 100

[[alert]]
name = "slow"
figure = "ttft_s_p95"
above = 2.0
for_seconds = 60
webhook = "http://127.0.0.1:9000/alert"

[quality]
every = 20
"""


def test_a_whole_file(tmp_path):
    file = tmp_path / "watch.toml"
    file.write_text(WHOLE)
    watch = Watch.read(file)
    assert watch.alerts.rules[0].for_s == 60 and watch.quality is not None
    for text, words in (
        ("[[alerts]]\n", "alerts"),
        ("every_seconds = 0\n", "more than 0"),
        ("[quality]\nevery = 0\n", "1 or more"),
        ("[quality]\nevery = 1\nreferences = 'none'\n", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            Watch.read(file)


def test_the_watch_goes_on_after_a_fault(tiny_model, monkeypatch, caplog):
    watch = Watch(alerts=[AlertRule("a", "n_waiting", above=5)], every_s=0.01)
    n = []

    def figures():
        n.append(1)
        if len(n) == 1:
            raise RuntimeFailure("a fault")
        return {"n_waiting": 9.0}

    monkeypatch.setattr(watch, "figures", figures)

    async def run():
        task = asyncio.create_task(watch.run())
        while not watch.alerts.firing:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert "the watch failed; it goes on" in caplog.text


def test_heat(tmp_path):
    assert temperatures(tmp_path) == {} and throttling(tmp_path) is None
    assert throttle_count(tmp_path) is None
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("48250\n")
    (zone / "type").write_text("cpu-thermal\n")
    flags = tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled"
    flags.parent.mkdir(parents=True)
    flags.write_text("50004\n")
    core = tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle"
    core.mkdir(parents=True)
    (core / "core_throttle_count").write_text("7\n")
    assert temperatures(tmp_path) == {"thermal_zone0 cpu-thermal": 48.25}
    now = throttling(tmp_path)
    assert [reason for reason, on in now.items() if on] == ["throttled"]
    assert throttle_count(tmp_path) == 7
    flags.write_text("nonsense")
    (zone / "temp").write_text("hot")
    assert throttling(tmp_path) is None and temperatures(tmp_path) == {}


def test_every_expression_of_the_dashboard_names_a_metric_that_exists(tiny_model):
    with opened(tiny_model, Watch(quality=Quality(1))) as (client, _, _):
        text = client.get("/metrics").text
    names = set()
    for line in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M):
        endings = ("_bucket", "_sum", "_count") if line[1] == "histogram" else ("",)
        names |= {line[0] + ending for ending in endings}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    assert len(expressions) >= 15
    used = set()
    for expression in expressions:
        found = re.findall(r"\b(?:edge_gemma|gen_ai|process)_\w+", expression)
        assert found and set(found) <= names, (expression, set(found) - names)
        used |= set(found)
    # what was thought worth counting is worth seeing
    missing = {name for name in names if name.startswith(("edge_gemma", "gen_ai"))} - used
    assert not {name for name in missing if not name.endswith(("_count", "_sum", "_created"))}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_file_in_the_docs_is_one(tmp_path):
    page = (Path(__file__).parent.parent / "docs/serve.md").read_text()
    [text] = [each for each in re.findall(r"```toml\n(.*?)```", page, re.S) if "[[alert]]" in each]
    file = tmp_path / "watch.toml"
    file.write_text(text)
    watch = Watch.read(file)
    assert len(watch.alerts.rules) == 2 and watch.quality is not None


def test_stats_on_the_command_line(tiny_bundle):
    def run(*arguments):
        return CliRunner().invoke(app, ["stats", *arguments])

    with serving(tiny_bundle) as server:
        shown = run(server.url)
        assert shown.exit_code == 0, shown.output
        assert shown.stdout.startswith("success unknown: 0 ok") and "planned" in shown.stdout
        assert json.loads(run(server.url, "--json", "--answers").stdout)["last_answers"] == []
    for address in (server.url, "file:///etc/passwd", "http://127.0.0.1:1", "http://[::1"):
        assert isinstance(run(address).exception, RuntimeFailure | UsageError)


def test_speech_is_timed_from_its_end_and_what_got_no_answer_is_counted(hearing_model):
    watch = Watch()
    second = np.zeros(16000, np.float32)
    sampling = Sampling(max_tokens=2, temperature=0)

    def turn(audio):
        return GenerationRequest([Message("user", ["Write it down:", audio])], sampling=sampling)

    async def speak():
        service = Service(hearing_model, observers=watch.observers)
        async with service.listen(turn(Audio())) as answer:
            await answer.push(second)
            await answer.push(second)
            await answer.finish()
            assert [chunk async for chunk in answer]
        async with service.submit(turn(Audio(second))) as answer:
            assert [chunk async for chunk in answer]
        async with service.listen(turn(Audio())) as answer:
            await answer.push(second)
        assert await service.close(10)

    asyncio.run(speak())
    spoken, clip, left = watch.recent.figures()
    assert spoken["audio_s"] == 2 and spoken["real_time_factor"] is None
    assert 0 <= spoken["ttft_s"] <= spoken["duration_s"]
    assert clip["audio_s"] == 1 and clip["real_time_factor"] > 0
    assert left["outcome"] == "cancelled"
    text = watch.metrics.text().decode()
    assert "\nedge_gemma_speech_seconds_total 4.0\n" in text
    assert "\nedge_gemma_audio_dropped_seconds_total 1.0\n" in text
    assert "\nedge_gemma_speech_real_time_factor_count 1.0\n" in text
