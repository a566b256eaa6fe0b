"""What stands around the routes: tokens with names, rates, content rules, audit log, usage, CORS, a
proxy's prefix; each by itself, and through the routes of a tiny model.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import threading
import tomllib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_gemma.conversation.stream import Chunk, Usage
from edge_gemma.errors import PlanRefused, UsageError
from edge_gemma.messages import FunctionCall, Image, Message
from edge_gemma.serve.answer import GenerationRequest

testclient = pytest.importorskip("starlette.testclient")
regex = pytest.importorskip("regex")

from edge_gemma.serve.guard import BearerTokens, Limits, shield  # noqa: E402
from edge_gemma.serve.guard.audit import AuditLog  # noqa: E402
from edge_gemma.serve.guard.content import (  # noqa: E402
    AnswerScreen,
    ContentRules,
    ModelRule,
    pattern_rule,
)
from edge_gemma.serve.guard.rates import Rate, RateLimits  # noqa: E402
from edge_gemma.serve.guard.settings import Guarding, GuardSettings, GuardTable  # noqa: E402
from edge_gemma.serve.guard.tokens import add_token, read_tokens, remove_token  # noqa: E402
from edge_gemma.serve.guard.usage import UsageBook, read_usage  # noqa: E402
from edge_gemma.serve.http import make_app  # noqa: E402
from edge_gemma.serve.refusals import Refusal  # noqa: E402
from edge_gemma.serve.service import Service  # noqa: E402
from edge_gemma.serve.visit import Visit  # noqa: E402

HELLO = [{"role": "user", "content": "Hello"}]


@contextlib.contextmanager
def opened(model, guarding, **options):
    """A client of ``model``'s routes behind ``guarding``."""
    limits = guarding.limits
    service = Service(
        model,
        max_context=limits.context_tokens,
        observers=guarding.observers,
        rules=guarding.rules,
    )
    app = make_app(service, guarding=guarding, **options)
    with testclient.TestClient(
        app, base_url="http://127.0.0.1:11434", raise_server_exceptions=False
    ) as client:
        yield client
    assert asyncio.run(service.close(5))
    guarding.close()


def chat(client, model, **body):
    defaults = {"model": model.bundle.manifest.name, "messages": HELLO, "max_tokens": 8}
    return client.post("/v1/chat/completions", json=defaults | {"temperature": 0} | body)


# --- tokens ---


def test_a_token_is_shown_once_and_kept_as_a_salted_hash(tmp_path):
    file = tmp_path / "tokens"
    kitchen, hall = add_token(file, "kitchen"), add_token(file, "hall")
    text = file.read_text()
    assert kitchen not in text and hall not in text and file.stat().st_mode & 0o777 == 0o600
    tokens = BearerTokens.read(file)
    assert tokens.name_of(f"Bearer {kitchen}") == "kitchen"
    assert tokens.name_of(f"bearer {hall}") == "hall"
    assert tokens.name_of(f"Basic {hall}") is None
    for wrong in (kitchen[:-1], kitchen + "a", "", text.splitlines()[0], "\udc80\udcff"):
        assert tokens.name_of(f"Bearer {wrong}") is None
    remove_token(file, "kitchen")
    tokens.reload()
    assert tokens.name_of(f"Bearer {kitchen}") is None and tokens.allow(f"Bearer {hall}")
    with pytest.raises(UsageError, match="already"):
        add_token(file, "hall")
    with pytest.raises(UsageError, match="no token called garden"):
        remove_token(file, "garden")
    for name in ("", "a b", "a:b", "-x", "ä", "x" * 65, "a\n"):
        with pytest.raises(UsageError, match="expected at most 64"):
            add_token(file, name)


def test_two_files_with_one_token_have_other_hashes(tmp_path):
    lines = set()
    for name in ("a", "b"):
        add_token(tmp_path / name, "same")
        lines.add((tmp_path / name).read_text().split(":")[2])
    assert len(lines) == 2


def test_plain_tokens_still_work_and_are_warned_about(tmp_path, caplog):
    file = tmp_path / "tokens"
    file.write_text("# mine\n\na-plain-token\n")
    token = add_token(file, "hall")
    with caplog.at_level(logging.WARNING):
        tokens = BearerTokens.read(file)
    assert "1 tokens as they are (token-1)" in caplog.text and "a-plain-token" not in caplog.text
    assert tokens.name_of("Bearer a-plain-token") == "token-1"
    assert tokens.name_of(f"Bearer {token}") == "hall"
    assert [known.plain for known in read_tokens(file)] == [True, False]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "holds no token"),
        (b"short\n", "shorter"),
        (b"\xff\xfe", "cannot be read"),
        (b"a:sha256:" + b"0" * 32 + b":" + b"0" * 64 + b"\n", ""),
    ],
)
def test_a_bad_file_keeps_the_tokens_as_they_were(tmp_path, caplog, text, word):
    file = tmp_path / "tokens"
    token = add_token(file, "hall")
    tokens = BearerTokens.read(file)
    file.write_bytes(text)
    tokens.reload()
    assert tokens.allow(f"Bearer {token}") == bool(word)
    assert word in caplog.text
    if word:
        with pytest.raises(UsageError, match=word):
            BearerTokens.read(file)


# --- rates ---


def test_rates_by_requests_and_tokens_with_openais_headers(tiny_model):
    now = [1000.0]
    by_name = {"token-1": Rate(requests=2), "token-2": Rate(tokens=8)}
    known = BearerTokens(["hall-token", "attic-token", "free-token"])
    rates = RateLimits(Rate(), by_name, clock=lambda: now[0])
    with opened(tiny_model, Guarding(rates=rates), tokens=known) as client:

        def ask(token):
            client.headers["authorization"] = f"Bearer {token}"
            return chat(client, tiny_model)

        first = ask("hall-token")
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "1m1s"
        assert "x-ratelimit-limit-tokens" not in first.headers
        now[0] += 30
        assert ask("hall-token").headers["x-ratelimit-remaining-requests"] == "0"
        refused = ask("hall-token")
        assert refused.status_code == 429 and 30 <= int(refused.headers["retry-after"]) <= 31
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert client.get("/v1/models").status_code == 200  # looking costs nothing
        now[0] += 31
        assert ask("hall-token").status_code == 200
        assert ask("hall-token").status_code == 429  # the one at 30 s still counts
        assert ask("attic-token").headers["x-ratelimit-remaining-tokens"] == "8"
        assert ask("attic-token").status_code == 429
        assert "x-ratelimit-limit-requests" not in ask("free-token").headers


def test_a_rate_for_nobody_is_said(caplog):
    guarding = Guarding(rates=RateLimits(by_name={"kitchen": Rate(), "hall": Rate()}))
    guarding.warn_unknown({"hall", "attic"})
    assert "no token is called kitchen" in caplog.text and "hall" not in caplog.text


def test_ollama_clients_read_the_same_status():
    rates = RateLimits(Rate(requests=1))
    rates.admit("a")
    with pytest.raises(Refusal, match="1 requests within 60 s; 1 are allowed") as refused:
        rates.admit("a")
    assert refused.value.status == 429 and refused.value.retry_after_s >= 59
    rates.admit("b")


# --- content ---

CARDS = pattern_rule("cards", "no card numbers", pattern=r"\b\d{4}-\d{4}\b")
PETS = pattern_rule("pets", "no pets", words=["cat", "guinea pig"])


def screened(texts, *rules, models=()):
    """What a reader gets of an answer in these pieces: the texts, and the finish reason."""
    visit = Visit("1", "POST", "/")
    screen = AnswerScreen(rules, models, visit)
    usage = Usage(1, 0, len(texts), 0)
    chunks = [Chunk(text, (n,)) for n, text in enumerate(texts)]
    chunks.append(Chunk("", finish_reason="stop", usage=usage))

    async def read():
        return [await screen.passed(chunk) for chunk in chunks]

    passed = [chunk for chunk in asyncio.run(read()) if chunk is not None]
    assert passed[-1].usage is usage
    ids = [token for chunk in passed for token in chunk.token_ids]
    assert ids == list(range(len(ids)))
    return "".join(chunk.text for chunk in passed), passed[-1].finish_reason, visit.verdicts


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(
    ("text", "expected", "rule"),
    [
        ("call 1234-5678 now", "call ", "cards"),
        ("call 1234-56789 now", None, None),  # no boundary behind it
        ("A Category of a concat", None, None),
        ("my CAT sleeps", "my ", "pets"),
        ("my guinea Pig", "my ", "pets"),
        ("my guinea fowl", None, None),
        ("1234-", None, None),
        ("x 1111-2222", "x ", "cards"),
        ("cat", "", "pets"),
    ],
)
def test_a_match_is_caught_across_pieces_of_any_size(text, size, expected, rule):
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    got, reason, verdicts = screened(pieces, CARDS, PETS)
    if rule is None:
        assert (got, reason, verdicts) == (text, "stop", [])
    else:
        assert (got, reason, verdicts) == (expected, "content_filter", [rule])


def test_text_is_held_back_only_while_a_match_may_begin():
    screen = AnswerScreen([PETS], [], None)

    async def passed(text):
        chunk = await screen.passed(Chunk(text))
        return None if chunk is None else chunk.text

    async def read():
        return [await passed(text) for text in ("a ", "dog", " guin", "ea", " fowl")]

    # the space before "guin" is held with it: a chunk passes whole or not at all
    assert asyncio.run(read()) == ["a ", "dog", None, None, " guinea fowl"]


def test_a_rule_that_only_notes():
    flag = pattern_rule("cats", "counted", words=["cat"], verdict="flag")
    assert screened(["a ca", "t"], flag) == ("a cat", "stop", ["cats"])


def test_a_model_judges_the_whole_answer():
    judge = ModelRule("shield", "bad", judge=lambda text: 0.9 if "bad" in text else 0.1)
    assert screened(["a ba", "d one"], models=[judge]) == ("", "content_filter", ["shield"])
    assert screened(["a go", "od one"], models=[judge]) == ("a good one", "stop", [])


def test_what_a_request_says_is_all_looked_at():
    rules = ContentRules([PETS])
    rules.check(GenerationRequest([Message("user", "A concatenation")]))
    for message in (
        Message("system", "about a cat"),
        Message("user", ["my c", "at"]),
        Message("assistant", [FunctionCall("feed", {"who": "cat"})]),
    ):
        with pytest.raises(Refusal, match="rule pets: no pets") as refused:
            rules.check(GenerationRequest([message, Message("user", "hi")]))
        assert refused.value.code == "content_filter"
    with pytest.raises(Refusal):
        rules.check(GenerationRequest(prompt=["a c", "at"]))


def test_bad_rules():
    with pytest.raises(UsageError, match="no pattern"):
        pattern_rule("x", "y", pattern="(")
    with pytest.raises(UsageError, match="empty text"):
        pattern_rule("x", "y", pattern="a*")
    with pytest.raises(UsageError, match="not both"):
        pattern_rule("x", "y")


def test_a_pattern_that_takes_forever_refuses(monkeypatch):
    monkeypatch.setattr("edge_gemma.serve.guard.content._SEARCH_S", 0.01)
    slow = pattern_rule("slow", "too slow", pattern=r"(?:x+x+)+y")
    assert slow.find("x" * 5000) == (0, True)


def test_content_rules_through_the_routes(tiny_model):
    with opened(tiny_model, Guarding()) as client:
        plain = chat(client, tiny_model).json()["choices"][0]["message"]["content"]
    word = plain[3:6]
    rules = (
        pattern_rule("asked", "not asked here", words=["forbidden"], on=["input"]),
        pattern_rule("said", "not said here", pattern=regex.escape(word)),
    )
    with opened(tiny_model, Guarding(content=rules)) as client:
        talk = [{"role": "user", "content": "a Forbidden thing"}]
        refused = chat(client, tiny_model, messages=talk)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "content_filter"
        choice = chat(client, tiny_model).json()["choices"][0]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["content"] == plain[: plain.index(word)]
        streamed = chat(client, tiny_model, stream=True, logprobs=True).text
        pieces = [json.loads(line[6:]) for line in streamed.split("\n\n")[:-2]]
        text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces)
        assert text == plain[: plain.index(word)]
        assert pieces[-1]["choices"][0]["finish_reason"] == "content_filter"
        name = tiny_model.bundle.manifest.name
        body = {"model": name, "prompt": "Hello", "options": {"temperature": 0, "num_predict": 8}}
        lines = client.post("/api/generate", json=body).text.splitlines()
        assert json.loads(lines[-1])["done_reason"] == "content_filter"


def test_what_is_only_read_aloud_is_looked_at_too(tiny_model):
    with opened(tiny_model, Guarding(content=(PETS,))) as client:
        body = {"model": "x", "input": "Hello cat", "voice": "alloy"}
        refused = client.post("/v1/audio/speech", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "content_filter"


def test_a_bundle_as_a_rule(tiny_model, tiny_bundle, tmp_path):
    file = tmp_path / "guard.toml"
    file.write_text(
        f"[[content]]\nname = 'shield'\nreason = 'a policy'\nmodel = '{tiny_bundle}'\n"
        "policy = 'No pets.'\nthreshold = 0.000001\non = ['input']\n"
    )
    settings = GuardSettings.read(file)
    [(_, plan)] = plans = shield.plan_shields(settings.models, "auto", 1)
    assert 0 < shield.shield_bytes(plans) < plan.total_bytes
    request = shield.beside(tiny_request(), plans, "auto")
    assert request.budget_bytes is not None
    with pytest.raises(PlanRefused, match="content rules take"):
        shield.beside(tiny_request(budget_bytes=1 << 20), plans, "auto")
    with shield.opened_shields(settings.models, "auto", 1) as rules:
        guarding = settings.open().with_rules(rules)
        with opened(tiny_model, guarding) as client:
            refused = chat(client, tiny_model)
            assert refused.status_code == 400 and "shield" in refused.json()["error"]["message"]


def test_a_bundle_that_sees_judges_pictures(looking_bundle, tmp_path):
    policy = "No cats."
    file = tmp_path / "guard.toml"
    file.write_text(
        f"[[content]]\nname = 'shield'\nreason = 'a policy'\nmodel = '{looking_bundle.folder}'\n"
        f"policy = '{policy}'\n"
    )
    settings = GuardSettings.read(file)
    with shield.opened_shields(settings.models, "auto", 1) as [rule]:
        assert rule.pictures and not rule.texts
        odds = [rule.judge(Image(np.full((40, 60, 3), shade, np.uint8))) for shade in (0, 200)]
        assert 0 < odds[0] < 1 and odds[0] != odds[1]
        request = GenerationRequest([Message("user", [Image(np.zeros((9, 9, 3), np.uint8)), "?"])])
        for threshold, refused in ((1e-9, True), (1 - 1e-9, False)):
            rules = ContentRules([dataclasses.replace(rule, threshold=threshold)])
            with pytest.raises(Refusal) if refused else contextlib.nullcontext():
                rules.judge(request)
            rules.judge(GenerationRequest(prompt="only text"))


def tiny_request(**options):
    from edge_gemma import PlanRequest

    return PlanRequest(n_threads=1, **options)


# --- audit, usage ---


def test_the_audit_log_has_who_and_when_and_no_word(tiny_model, tmp_path):
    file = tmp_path / "audit.jsonl"
    known = BearerTokens(["hall-token"])
    for _ in range(2):  # a restart goes on in the same file with the same salt
        guarding = Guarding(audit=AuditLog(file))
        with opened(tiny_model, guarding, tokens=known) as client:
            assert client.get("/v1/models").status_code == 401
            client.headers["authorization"] = "Bearer hall-token"
            assert chat(client, tiny_model, stream=True).status_code == 200
            assert chat(client, tiny_model, messages=[]).status_code == 400
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["status"] for line in lines] == [401, 200, 400] * 2
    assert [line["caller"] for line in lines[:3]] == ["anyone", "token-1", "token-1"]
    answered = lines[1]
    assert answered["completion_tokens"] > 0 and answered["prompt_tokens"] > 0
    assert answered["finish_reasons"][0] in ("length", "stop")
    assert answered["prompt_hash"] == lines[4]["prompt_hash"] != answered["answer_hash"]
    assert "Hello" not in file.read_text() and "hall-token" not in file.read_text()
    salt = tmp_path / "audit.jsonl.salt"
    assert salt.stat().st_mode & 0o777 == 0o600


def test_the_audit_log_is_rotated(tmp_path):
    audit = AuditLog(tmp_path / "audit.jsonl", max_bytes=2000, n_kept=2)
    for n in range(40):
        audit.visited(Visit(str(n), "GET", "/"))
    audit.close()
    sizes = [path.stat().st_size for path in tmp_path.glob("audit.jsonl*")]
    assert len(sizes) == 4 and max(sizes) <= 2000  # the log, two older ones, the salt


def test_a_full_disk_stops_no_answer_and_is_said(tiny_model, tmp_path, caplog):
    (tmp_path / "audit.jsonl").symlink_to("/dev/full")
    guarding = Guarding(audit=AuditLog(tmp_path / "audit.jsonl", max_bytes=0))
    with opened(tiny_model, guarding) as client:
        for _ in range(2):
            assert chat(client, tiny_model).status_code == 200
    assert caplog.text.count("audit log cannot be written") == 1
    assert "No space left" in caplog.text


def test_usage_is_kept_over_restarts(tiny_model, tmp_path):
    file = tmp_path / "usage.json"
    known = BearerTokens(["hall-token", "attic-token"])
    for n in (1, 2):
        with opened(tiny_model, Guarding(usage=UsageBook(file)), tokens=known) as client:
            assert client.get("/v1/usage").status_code == 401
            client.headers["authorization"] = "Bearer hall-token"
            used = chat(client, tiny_model).json()["usage"]
            mine = client.get("/v1/usage").json()
            assert mine["name"] == "token-1" and mine["requests"] == 2 * n - 1
            assert mine["completion_tokens"] == n * used["completion_tokens"]
            client.headers["authorization"] = "Bearer attic-token"
            assert client.get("/v1/usage").json()["completion_tokens"] == 0
    kept = read_usage(file)
    assert kept["token-1"].requests == 4 and kept["token-1"].first <= kept["token-1"].last
    file.write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        UsageBook(file)


def test_usage_is_written_now_and_then_beside_the_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_gemma.serve.guard.usage._SAVE_EVERY_S", -1)
    book = UsageBook(tmp_path / "usage.json")
    for _ in range(20):
        book.visited(Visit("1", "GET", "/"))
    for thread in threading.enumerate():
        if thread.name == "edge-gemma-usage":
            thread.join()
    book.save()
    assert read_usage(tmp_path / "usage.json")["anyone"].requests == 20
    assert [path.name for path in tmp_path.iterdir()] == ["usage.json"]


def test_usage_that_cannot_be_written_is_said_once(tmp_path, caplog):
    book = UsageBook(tmp_path / "gone" / "usage.json")
    for _ in range(2):
        book.visited(Visit("1", "GET", "/"))
        book.save()
    assert caplog.text.count("usage is not kept for now") == 1
    assert book.of("anyone").requests == 2


# --- CORS, a proxy's prefix ---


def test_pages_of_listed_origins_may_call(tiny_model):
    origin = {"origin": "https://home.example"}
    asked = origin | {"access-control-request-method": "POST"}
    known = BearerTokens(["hall-token"])
    with opened(tiny_model, Guarding(origins=("https://home.example",)), tokens=known) as client:
        allowed = client.options("/v1/chat/completions", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://home.example"
        assert client.get("/v1/models", headers=origin).status_code == 401
        good = origin | {"authorization": "Bearer hall-token"}
        answer = client.get("/v1/models", headers=good)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://home.example"
        evil = {"origin": "https://evil.example", "authorization": "Bearer hall-token"}
        assert client.get("/v1/models", headers=evil).status_code == 403
        assert client.options("/v1/models", headers=asked | evil).status_code == 400
    with opened(tiny_model, Guarding()) as client:  # closed by default
        closed = client.options("/v1/chat/completions", headers=asked)
        assert closed.status_code == 403
        assert "access-control-allow-origin" not in closed.headers


def test_a_proxy_may_leave_its_prefix_on_or_take_it_off(tiny_model):
    with opened(tiny_model, Guarding(), root_path="/gemma") as client:
        for path in ("/gemma/v1/models", "/v1/models"):
            assert client.get(path).status_code == 200
        assert client.get("/gemma").text == client.get("/gemma/").text == "Ollama is running"
        assert client.get("/gemmama/v1/models").status_code == 404
        error = client.post("/gemma/api/chat", content=b"{").json()["error"]
        assert isinstance(error, str)  # Ollama's shape behind the prefix, too


# --- settings ---

WHOLE = """
[limits]
body = "1MiB"
messages = 10
image_pixels = 1_000_000
audio_seconds = 60
context_tokens = 256
output_tokens = 4
header_seconds = 5

[rates]
requests = 100
[rates.by_name.hall]
tokens = 1000
window_seconds = 3600

[[content]]
name = "pets"
reason = "no pets"
words_file = "words"

[audit]
file = "audit.jsonl"

[usage]
file = "usage.json"

[cors]
origins = ["https://home.example"]
"""


def test_a_whole_file(tiny_model, tmp_path):
    file = tmp_path / "guard.toml"
    file.write_text(WHOLE)
    (tmp_path / "words").write_text("# pets\ncat\nguinea pig\n")
    guarding = GuardSettings.read(file).open()
    expected = Limits(1 << 20, 10, 1_000_000, 60, 256, 4, header_s=5)
    assert guarding.limits == expected and guarding.origins == ("https://home.example",)
    with opened(tiny_model, guarding) as client:
        answer = chat(client, tiny_model)
        assert answer.json()["usage"]["completion_tokens"] <= 4
        assert answer.headers["x-ratelimit-remaining-requests"] == "99"
        long = chat(client, tiny_model, messages=[{"role": "user", "content": "a " * 250}])
        assert long.json()["error"]["code"] == "context_length_exceeded"
        cat = chat(client, tiny_model, messages=[{"role": "user", "content": "cat"}])
        assert cat.status_code == 400
    assert (tmp_path / "audit.jsonl").exists() and (tmp_path / "usage.json").exists()


def test_prompt_and_answer_stay_inside_the_context_limit(tiny_model):
    guarding = Guarding(limits=Limits(context_tokens=40))
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "minLength": 99}}}
    with opened(tiny_model, guarding) as client:
        answer = chat(client, tiny_model, max_tokens=300, response_format=schema).json()
    assert answer["usage"]["total_tokens"] == 40
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[limit]\n", "limit"),
        ("[limits]\nmessages = 'x'\n", "messages"),
        ("[limits]\nmessages = 0\n", "more than 0"),
        ("[limits]\nbody = 'much'\n", "much"),
        ("[rates]\nrequests = -1\n", "above 0"),
        ("[[content]]\nname = 'a'\nreason = 'b'\n", "pattern or words"),
        ("[[content]]\nname = 'a'\nreason = 'b'\nmodel = 'x'\n", "a model and a policy"),
        ("[[content]]\nname = 'a'\nreason = 'b'\nwords_file = 'none'\n", "cannot be read"),
        ("[[content]]\nname = 'a'\nreason = 'b'\npattern = 'x'\non = ['here']\n", "here"),
        ("[audit]\n", "file"),
        ("= 1", "guard.toml"),
    ],
)
def test_bad_files(tmp_path, text, words):
    file = tmp_path / "guard.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        GuardSettings.read(file)


def test_the_file_in_the_docs_is_one():
    page = (Path(__file__).parent.parent / "docs/serve.md").read_text()
    [text] = [each for each in re.findall(r"```toml\n(.*?)```", page, re.S) if "[limits]" in each]
    table = msgspec.convert(tomllib.loads(text), GuardTable)
    assert table.limits.limits() == Limits(context_tokens=4096, output_tokens=512)
    assert all(getattr(table, name) for name in ("rates", "content", "audit", "usage", "cors"))
    cards = pattern_rule("cards", "", pattern=table.content[0].pattern)
    assert cards.find("it is 4111 1111 1111 1111.") and not cards.find("on 2026-11-26 at 18:00")
