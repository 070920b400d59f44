"""What the gateway promises, by example.

Each test talks real HTTP over loopback to a gateway, and behind the gateway is one scripted upstream. Nothing
inside the gateway is replaced; a few constants are made small so that no test waits long. The tests are about
what arrives, in which order, and who was asked, and hardly ever about the words of a message. A comment such
as `# case 12` says that a real upstream or client did this, and that it went wrong once.
"""

import asyncio
import base64
import contextlib
import gc
import gzip
import importlib
import inspect
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import yaml
from aiohttp import web

import mom_gateway

HERE = Path(__file__).parent
CHAT = "/v1/chat/completions"
JSON = "application/json"
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path":"x"}'}}
SIGNED = {**CALL, "extra_content": {"google": {"thought_signature": "SIGNATURE" * 1000}}}
THOUGHT = {"role": "assistant", "content": None, "tool_calls": [SIGNED], "reasoning_details": [{"data": "x"}]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "the text of x"}
TOOL_TURN = [*QUESTION, THOUGHT, RESULT]
TOOLS = [{"type": "function", "function": {"name": "read"}}]
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
WITH_USAGE = {"stream_options": {"include_usage": True}}
ALL = ("a", "b", "c", "critic")


def cases(names, *rows):
    """Runs a test once for each row. The first item of a row says what kind of input it is."""
    return pytest.mark.parametrize(names.split(", "), [row[1:] for row in rows], ids=[row[0] for row in rows])


async def eventually(condition, seconds=10.0):
    """Waits until the condition holds. The limit is generous, because the machine may be busy."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)


# --- The upstream behind the gateway, and what it can reply ---
@pytest.fixture
async def upstream(aiohttp_server):
    """Gives each model its reply, or those of a list in turn. Without one, model a says "answer of a"."""
    self = SimpleNamespace(replies={}, requests=[], headers=[], running=0)

    async def handle(request):
        body = await request.json()
        self.requests.append(body)
        self.headers.append(request.headers)
        reply = self.replies.get(body["model"], says(f"answer of {body['model']}"))
        if isinstance(reply, list):
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        self.running += 1
        try:
            return await reply(request)
        finally:
            self.running -= 1

    app = web.Application(client_max_size=2**30)
    app.router.add_post(CHAT, handle)
    self.url = str((await aiohttp_server(app)).make_url("/v1"))
    self.requests_to = lambda model: [body for body in self.requests if body["model"] == model]
    self.prompt = lambda: self.requests_to("critic")[-1]["messages"][-1]["content"]
    return self


def says(message, finish_reason="stop", usage=USAGE):
    """A good answer with a text or a message: as JSON, or as a stream with a delta for each word."""
    message = {"content": message} if isinstance(message, str) else message
    words = [delta(content=word) for word in re.findall(r"\S+\s*", message.get("content") or "")]
    frames = [delta(**{**message, "content": None}), *words, delta(finish_reason)]
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}

    async def reply(request):
        if (await request.json()).get("stream"):
            return await sends(*frames, {"choices": [], "usage": usage}, DONE)(request)
        return await sends_json({"choices": [choice], "usage": usage})(request)

    return reply


def sends(*parts, status=200, headers=None, reason=None):
    """Sends bytes, and dicts as events, each as a packet of its own. A number is a pause."""

    async def reply(request):
        response = web.StreamResponse(status=status, headers=headers, reason=reason)
        await response.prepare(request)
        for part in parts:
            if callable(part):
                await part(request)
            elif not isinstance(part, float):
                await response.write(event(part) if isinstance(part, dict) else part)
            await asyncio.sleep(part if isinstance(part, float) else 0.001)
        return response

    return reply


def sends_json(body, status=200, headers=None):
    return sends(json.dumps(body).encode(), status=status, headers=headers)


def refuses(status, message="no", wait=None, **fields):
    headers = {"Retry-After": wait} if wait else None
    return sends_json({"error": {"message": message, **fields}}, status, headers)


def event(frame):
    return b"data: " + json.dumps(frame).encode() + b"\n\n"


def delta(finish_reason=None, **fields):
    """A frame of a stream, such as delta(content="Hel") or delta("stop")."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


async def hangs(request):
    """Says nothing, as a whole reply or from some point of a stream on."""
    await asyncio.Event().wait()


async def breaks_off(request):
    request.transport.close()
    await hangs(request)


WHOLE = b'{"choices":[{"message":{"content":"na\xc3\xafve"},"finish_reason":"stop"}]}'
HELLO = b'data: {"choices":[{"delta":{"content":"na\xc3\xafve"}}]}\n\n'
ROLE = delta(role="assistant", content="")
THINKS = delta(role="assistant", reasoning_content="hm")
END = event(delta("stop"))
DONE = b"data: [DONE]\n\n"


# --- The client before the gateway, and the fixtures ---
class Answer:
    """What a client has in the end. The frames of a stream are put together as OpenAI's client does it."""

    def __init__(self, response, data):
        self.status = response.status
        self.headers = response.headers
        self.data = data
        self.frames = []
        if response.content_type == "text/event-stream":
            lines = [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
            assert lines.pop() == "[DONE]"
            self.frames = [json.loads(line) for line in lines]
        self.body = {} if self.frames else json.loads(data)
        parts = self.frames or [self.body]
        self.choices = [choice for part in parts for choice in part.get("choices", [])]
        name = "delta" if self.frames else "message"
        self.messages = [choice.get(name) or {} for choice in self.choices]
        self.finish_reasons = [each["finish_reason"] for each in self.choices if each.get("finish_reason")]
        self.text = "".join(message.get("content") or "" for message in self.messages)
        self.reasoning = "".join(message.get("reasoning_content") or "" for message in self.messages)
        self.error = parts[-1].get("error")
        self.usage = parts[-1].get("usage")
        self.mixture = next((part["mixture"] for part in parts if "mixture" in part), None)

    def calls(self, name):
        """One field of all calls in `mixture`."""
        return [call[name] for call in self.mixture["calls"]]

    def tool_calls(self):
        """[[id, name, arguments], …]"""
        calls = {}
        for message in self.messages:
            for number, piece in enumerate(message.get("tool_calls") or []):
                call = calls.setdefault(piece.get("index", number), [piece.get("id"), "", ""])
                call[1] += piece["function"].get("name") or ""
                call[2] += piece["function"].get("arguments") or ""
        return list(calls.values())


class Gateway:
    """A running gateway, as its clients see it."""

    def __init__(self, session, upstream):
        self.session = session
        self.upstream = upstream

    async def request(self, method, path, **options):
        async with self.session.request(method, path, **options) as response:
            return Answer(response, await response.read())

    async def ask(self, messages=QUESTION, headers=None, path=CHAT, **fields):
        """Asks the first mixture, unless the fields name a `model`."""
        return await self.request("POST", path, json={"messages": messages, **fields}, headers=headers)

    async def abandon(self, **fields):
        """Leaves once the upstream is at work, which must end within a second (three on a busy machine)."""
        request = asyncio.create_task(self.ask(**fields))
        await eventually(lambda: self.upstream.running)
        request.cancel()
        await eventually(lambda: self.upstream.running == 0, seconds=3)


@pytest.fixture(autouse=True)
def own_folder_and_environment(tmp_path, monkeypatch, caplog):
    """Every test works in an empty folder, without the proxies and keys of the person who runs it."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.lower().endswith(("_proxy", "_api_key")):
            monkeypatch.delenv(name)
    caplog.set_level(logging.INFO)


@pytest.fixture(params=[False, True], ids=["JSON", "stream"])
def stream(request):
    """Runs a test twice: once asking for JSON, and once for a stream."""
    return request.param


@pytest.fixture
def start_gateway(upstream, aiohttp_client, monkeypatch):
    """Starts a gateway with the mixture mom of a, b and c, and changes it: `models={"a": {"timeout": 1}}`."""

    async def start(replies=None, mixture=None, models=None, every_model=None, server=None, traces=None):
        upstream.replies = replies or {}
        monkeypatch.setattr(mom_gateway, "FIRST_BACKOFF", 0.001)
        common = {"base_url": upstream.url, **(every_model or {})}
        upstreams = [{"name": name, **common, **(models or {}).get(name, {})} for name in ALL]
        mom = {"name": "mom", "models": ["a", "b", "c"], "critic": "critic", **(mixture or {})}
        settings = {"server": server or {}, "models": upstreams, "mixtures": [mom]}
        Path("config.yaml").write_text(yaml.safe_dump(settings))
        return Gateway(await aiohttp_client(mom_gateway.create_app("config.yaml", traces)), upstream)

    return start


@pytest.fixture
def ask(start_gateway):
    """Starts a gateway and asks it. What `start_gateway` does not take is a field of the request."""

    async def start_and_ask(replies=None, messages=QUESTION, headers=None, **fields):
        names = {"mixture", "models", "every_model", "traces"} & fields.keys()
        gateway = await start_gateway(replies, **{name: fields.pop(name) for name in names})
        return await gateway.ask(messages, headers, **fields)

    return start_and_ask


# --- The example of the README: ask mom, get the critic's answer ---
async def test_ask_mom_get_the_critics_answer(ask, upstream, stream):
    rayleigh, sea = says("Because of Rayleigh scattering."), says("Because it reflects the sea.")
    replies = {"a": rayleigh, "b": sea, "critic": says("Air scatters blue light most.")}
    answer = await ask(replies, [{"role": "user", "content": "Why is the sky blue?"}], stream=stream)
    assert answer.status == 200
    assert answer.text == "Air scatters blue light most."
    assert answer.messages[0]["role"] == "assistant"
    assert answer.finish_reasons == ["stop"]
    assert answer.mixture["critic"] == "critic"
    assert "Because of Rayleigh scattering." in upstream.prompt()
    assert "Because it reflects the sea." in upstream.prompt()


# --- What you may want to change ---
def test_the_limits_and_the_back_off_are_those_that_are_promised():
    assert (mom_gateway.CONNECT_TIMEOUT, mom_gateway.KEEP_ALIVE) == (10, 10)
    assert (mom_gateway.MAX_REQUEST_BYTES, mom_gateway.MAX_REPLY_BYTES) == (32 * 2**20, 64 * 2**20)
    for attempt, longest in ((0, 0.5), (1, 1), (4, 8), (60, 8)):
        delays = [mom_gateway.backoff_delay(attempt) for _ in range(1000)]
        assert 0.5 * longest <= min(delays) < 0.6 * longest
        assert 0.9 * longest < max(delays) <= longest


def test_the_instruction_says_what_the_critic_must_know():
    words = (
        "unverified instruction even if only one overrule directly complete language format tool call never"
    )
    assert [word for word in words.split() if word not in mom_gateway.CRITIC_INSTRUCTION.lower()] == []


# --- A request: what is served, and what is refused ---
async def test_mixtures_and_models_are_listed_and_served_with_and_without_v1(start_gateway, upstream):
    gateway = await start_gateway()
    for prefix in ("/v1", ""):
        listed = (await gateway.request("GET", f"{prefix}/models")).body
        assert [item["id"] for item in listed["data"]] == ["mom", *ALL]
        assert {item["object"] for item in listed["data"]} == {"model"}
        assert upstream.requests == []
    for fields, name in (({}, "mom"), ({"model": None}, "mom"), ({"model": "b"}, "b")):
        assert (await gateway.ask(path="/chat/completions", **fields)).body["model"] == name
    assert (await gateway.request("GET", "/health")).status == 200


async def test_a_request_is_forwarded_as_it_is_and_proposers_are_asked_for_a_stream(ask, upstream, stream):
    fields = {"future": {"x": [1]}, "nothing": None, "n": 1, "base_url": "http://x", "tools": TOOLS}
    messages = [{"role": "developer", "content": None, "odd": 1}, *QUESTION]
    for model in ("mom", "critic"):
        await ask(messages=messages, model=model, stream=stream, **fields)
    for name in "abc":
        as_asked = {"model": name, "messages": messages, **fields, "stream": True, **WITH_USAGE}  # case 12
        assert upstream.requests_to(name) == [as_asked]
    for body in upstream.requests_to("critic"):
        assert {name: body[name] for name in fields} == fields
        assert bool(body.get("stream")) == stream
    assert body["messages"] == messages


@cases(
    "method, path, content_type, data, status, param",
    ("no JSON", "POST", CHAT, JSON, b"{oops", 400, None),
    ("deep nesting", "POST", CHAT, JSON, b"[" * 90_000 + b"]" * 90_000, 400, None),
    ("a list", "POST", CHAT, JSON, b"[]", 400, None),
    ("no messages", "POST", CHAT, JSON, b"{}", 400, "messages"),
    ("empty messages", "POST", CHAT, JSON, b'{"messages":[]}', 400, "messages"),
    ("a model that is a number", "POST", CHAT, JSON, b'{"messages":[{}],"model":5}', 400, "model"),
    ("a message that is a text", "POST", CHAT, JSON, b'{"messages":["hi"]}', 400, "messages"),
    ("two answers at once", "POST", CHAT, JSON, b'{"messages":[{}],"n":2}', 400, "n"),
    ("a stream that is a number", "POST", CHAT, JSON, b'{"messages":[{}],"stream":1}', 400, "stream"),
    ("an unknown model", "POST", CHAT, JSON, b'{"messages":[{}],"model":"gtp"}', 404, "model"),
    ("another dialect", "POST", "/v1/responses", JSON, b"{}", 404, None),
    ("a wrong method", "GET", CHAT, JSON, b"", 405, None),
    ("a form", "POST", CHAT, "text/plain", b"{}", 415, None),
    ("a large body", "POST", CHAT, JSON, b" " * 200_000, 413, None),
)
async def test_a_refused_request_gets_openais_error_and_is_logged(
    start_gateway, upstream, monkeypatch, caplog, method, path, content_type, data, status, param
):
    monkeypatch.setattr(mom_gateway, "MAX_REQUEST_BYTES", 190_000)
    headers = {"Content-Type": content_type}
    answer = await (await start_gateway()).request(method, path, data=data, headers=headers)
    assert (answer.status, answer.error["param"]) == (status, param)
    assert answer.headers["Content-Type"].startswith(JSON)
    assert answer.headers["x-should-retry"] == "false"
    assert (list(answer.body), sorted(answer.error)) == (["error"], ["code", "message", "param", "type"])
    assert (answer.error["code"] == "model_not_found") == (param == "model" and status == 404)
    assert status != 404 or (CHAT if param is None else "mom, a, b, c, critic") in answer.error["message"]
    assert re.search(rf"{method}.*{path}.*127\.0\.0\.1:\d+", caplog.text)
    assert upstream.requests == []


async def test_a_mistake_of_the_gateway_is_an_error_500(start_gateway, monkeypatch, caplog, stream):
    gateway = await start_gateway({"a": sends(THINKS, breaks_off)})
    monkeypatch.setattr(mom_gateway, "FIRST_BACKOFF", "no number")  # This stands for a mistake (case 19).
    answer = await gateway.ask(model="a", stream=stream)
    assert answer.status == (200 if stream else 500)
    assert sorted(answer.error) == ["code", "message", "param", "type"]
    assert "Traceback" in caplog.text


# --- The mixture: who is asked, and who writes the answer ---
TWO_CRITICS = {"models": ["a", "b"], "critic": ["critic", "c"], "deadline": 0.8}
REASONS = says({"content": "", "reasoning": "hm"}, "length")
SLOW = sends(*[part for letter in "answer of critic" for part in (delta(content=letter), 0.04)], END)
WAITS = refuses(503, wait="30")
LATE = sends(0.6, delta(content="answer of critic"), END)


@cases(
    "names, reply, mixture, writer, ok, asked, word",
    ("a silent proposer", "b", hangs, {"grace": 0.1}, "critic", [1, 0, 1, 1], 1, "quorum"),
    ("a proposer that must wait", "b", WAITS, {"grace": 0.1}, "critic", [1, 0, 1, 1], 1, "quorum"),
    ("one that has ended", "b", sends(HELLO, END, hangs), {"grace": 0.1}, "critic", [1, 1, 1, 1], 1, ""),
    ("no quorum", "b", hangs, {"quorum": 3, "deadline": 0.6}, "critic", [1, 0, 1, 1], 1, "deadline"),
    ("no candidates", "a b c", refuses(400), {}, "critic", [0, 0, 0, 1], 1, "400"),  # case 10
    ("a slow critic", "critic", SLOW, {"deadline": 0.5}, "critic", [1, 1, 1, 1], 1, ""),  # case 13
    ("a critic that fails", "critic", refuses(500), TWO_CRITICS, "c", [1, 1, 0, 1], 3, "500"),
    ("one that reasons", "critic", REASONS, TWO_CRITICS, "c", [1, 1, 0, 1], 1, "length"),  # case 1
    ("one that breaks", "critic", sends(THINKS, breaks_off), TWO_CRITICS, "c", [1, 1, 0, 1], 3, ""),  # case 2
    ("a slow last critic", "critic", LATE, {"deadline": 0.9}, "critic", [1, 1, 1, 1], 1, ""),
    ("a silent critic", "critic", hangs, TWO_CRITICS, "c", [1, 1, 0, 1], 1, "deadline"),  # case 14
    ("no critic", "a critic", refuses(500), {}, "b", [0, 1, 1, 0], 3, "500"),
    ("no critic in time", "critic", hangs, {"deadline": 0.6}, "a", [1, 1, 1, 0], 1, "deadline"),
    ("a critic that must wait", "critic", WAITS, {"deadline": 20}, "a", [1, 1, 1, 0], 1, "503"),
)
async def test_who_answers(ask, upstream, names, reply, mixture, writer, ok, asked, word, stream):
    began = time.monotonic()
    answer = await ask(dict.fromkeys(names.split(), reply), mixture=mixture, stream=stream, traces="traces")
    assert (answer.text, answer.error, answer.calls("ok")) == (f"answer of {writer}", None, ok)
    critic, fallback = (writer, None) if ok[-1] else (None, writer)
    assert (answer.mixture["critic"], answer.mixture["fallback"]) == (critic, fallback)
    assert len(upstream.requests_to("critic")) == asked
    assert [word in error for error in answer.calls("error") if error] == [True] * ok.count(0)
    await eventually(lambda: upstream.running == 0, seconds=3)
    assert (await trace_of())["outcome"] == ("ok" if ok[-1] else "fallback")
    assert time.monotonic() - began < 8


@cases("messages", ("a result", TOOL_TURN), ("a note behind it", [*TOOL_TURN, *QUESTION]))  # case 11
@cases("critic, asked", ("good", says("x"), ["critic"]), ("bad", refuses(402), ["critic", "a"]))
async def test_a_tool_result_goes_to_a_critic_alone(ask, upstream, messages, critic, asked, stream):
    answer = await ask({"critic": critic, "a": says("x")}, messages, stream=stream)
    assert (answer.text, answer.mixture["critic"]) == ("x", asked[-1])
    assert [request["model"] for request in upstream.requests] == asked
    first, *others = [request["messages"] for request in upstream.requests]
    unsigned = {"role": "assistant", "content": None, "tool_calls": [CALL]}  # a did not sign it
    assert (first, others) == (messages, [[messages[0], unsigned, *messages[2:]]] * len(others))


async def test_proposers_get_of_earlier_answers_what_any_model_takes_and_critics_get_all(ask, upstream):
    said = {**THOUGHT, "name": "me", "refusal": None, "reasoning_content": "hm"}  # case 9
    answer = {"role": "assistant", "content": "It is 5."}
    await ask(messages=[*QUESTION, said, RESULT, {**answer, "reasoning_details": [{"data": "x"}]}, *QUESTION])
    short = {"role": "assistant", "content": None, "name": "me", "tool_calls": [CALL]}
    assert upstream.requests_to("a")[0]["messages"] == [*QUESTION, short, RESULT, answer, *QUESTION]
    assert upstream.requests_to("critic")[0]["messages"][:3] == [*QUESTION, said, RESULT]
    await ask(messages=[*QUESTION, said, RESULT, *QUESTION], model="a")
    assert upstream.requests_to("a")[-1]["messages"] == [*QUESTION, said, RESULT, *QUESTION]


# --- The mixture: what the critic gets ---
async def test_the_critic_gets_the_conversation_and_one_block_with_all_candidates_in_order(ask, upstream):
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:x"}}]
    rule = {"role": "system", "content": "Be brief."}
    late = sends(0.1, delta(content="word " * 20_000 + "end"), END)
    for last in (*QUESTION, {"role": "user", "content": parts}, rule):
        await ask({"a": late, "secret": says("short")}, [rule, last], models={"b": {"model": "secret"}})
    [_, text], [_, of_parts], [*others, own] = [each["messages"] for each in upstream.requests_to("critic")]
    assert text["content"].startswith(QUESTION[0]["content"] + "\n\n" + mom_gateway.CRITIC_INSTRUCTION)
    assert (of_parts["content"][:2], others, own["role"]) == (parts, [rule, rule], "user")
    fences = set()
    for block in (text["content"], of_parts["content"][2]["text"], own["content"]):
        fences.add(re.search(r"(?s)\n(word ){20000}end\n(.+?)\n.*\nshort\n", block)[2])
        assert "secret" not in block
    assert len(fences) == 3  # A candidate cannot guess them.
    assert min(map(len, fences)) > 20


@cases(
    "message, reason, shown, hidden",
    ("a tool call", {"content": None, "tool_calls": [CALL]}, "tool_calls", "read.*path", "None|incomplete"),
    ("a signed one", {"content": "I", "tool_calls": [SIGNED]}, "stop", "I.*read.*path", "SIGN"),  # case 22
    ("reasoning", {"content": "yes", "reasoning_content": "a thought"}, "stop", "yes", "a thought"),
    ("a leading think block", {"content": "<think>a thought</think>yes"}, "stop", "yes", "a thought"),
    ("one further down", {"content": "a <think>x</think> b"}, "stop", "a <think>x</think> b", "None"),
    ("a refusal", {"content": None, "refusal": "I will not."}, "stop", "I will not", "None"),
    ("text that was cut", {"content": "half"}, "length", "incomplete.*half", "None"),
    ("one that was filtered", {"content": "half"}, "content_filter", "incomplete.*half", "None"),
)
async def test_a_candidate_is_its_text_and_its_tool_calls(ask, upstream, message, reason, shown, hidden):
    await ask({"a": says(message, reason)}, mixture={"prompt": "Choose."})
    candidate = upstream.prompt().partition("Choose.")[2].partition("answer of b")[0]
    assert re.search(shown, candidate, re.DOTALL)
    assert not re.search(hidden, candidate)


# --- The mixture: when nobody answers ---
QUOTA = refuses(429, code="insufficient_quota")
TOO_LONG = refuses(400, code="context_length_exceeded")


@cases(
    "replies, status, code",
    ("all are limited", [refuses(429, wait="75"), refuses(429, wait="65"), refuses(429)], 429, None),
    ("all refuse with 400", [TOO_LONG, refuses(400), refuses(400)], 400, "context_length_exceeded"),
    ("all refuse with 413", [refuses(413)] * 3, 413, None),
    ("all refuse with 422", [refuses(422)] * 3, 422, None),
    ("wrong keys", [refuses(401)] * 3, 400, "upstream_refused"),
    ("different refusals", [QUOTA, refuses(404), refuses(413)], 400, "upstream_refused"),
    ("one without a quota", [refuses(429), QUOTA, refuses(429)], 502, None),
    ("one that may be retried", [refuses(401), refuses(401), refuses(409)], 502, None),
    ("all are silent", [hangs] * 3, 504, None),
    ("all are broken", [refuses(500), breaks_off, hangs], 502, None),
    ("a model that refuses", [TOO_LONG], 400, "context_length_exceeded"),
    ("a model that refuses late", [sends(ROLE, {"error": {"message": "no", "code": 400}})], 400, None),
)
async def test_if_no_upstream_answers_the_status_says_why(ask, upstream, replies, status, code, stream):
    names = ["a", "b", "critic"][: len(replies)]
    settings = {"mixture": {"models": ["a", "b"], "deadline": 0.7}, "models": {"a": {"timeout": 0.1}}}
    settings |= {"every_model": {"retries": 0}, "model": "a" if len(names) == 1 else "mom"}
    answer = await ask(dict(zip(names, replies, strict=True)), **settings, stream=stream)
    assert answer.status == status
    assert code is None or answer.error["code"] == code
    assert [name for name in names if not re.search(rf"\b{name}\b", answer.error["message"])] == []
    assert answer.headers.get("x-should-retry") == (None if status == 429 else "false")
    assert answer.headers.get("Retry-After") == ("65" if status == 429 else None)
    assert sorted(request["model"] for request in upstream.requests) == names  # Each is asked once.


# --- The mixture: what the client is told about it ---
def counts(*numbers):
    return dict(zip(USAGE, numbers, strict=True))


async def test_a_mixture_reports_every_call_and_the_total_and_usage_is_what_the_client_sees(ask, stream):
    used = {"a": {**counts(10, 40, 50), "cost": 0.25}, "c": {**counts(30, 40, 70), "cost": 0.5}}
    used |= {"critic": counts(90, 7, 97)}
    replies = {name: says("x", usage=usage) for name, usage in used.items()}
    replies |= {"b": refuses(400, "too long"), "c": [refuses(503), replies["c"]]}
    answer = await ask(replies, stream=stream, **WITH_USAGE)
    names = ("model", "role", "ok", "attempts", "finish_reason", "error", "usage")
    assert list(zip(*map(answer.calls, names), strict=True)) == [
        ("a", "proposer", True, 1, "stop", None, used["a"]),
        ("b", "proposer", False, 1, None, "400: too long", None),
        ("c", "proposer", True, 2, "stop", None, used["c"]),
        ("critic", "critic", True, 1, "stop", None, used["critic"]),
    ]
    assert answer.mixture["calls"][0].keys() == {*names, "seconds"}
    assert answer.mixture.keys() == {"critic", "fallback", "calls", "usage"}
    assert answer.mixture["usage"] == {**counts(130, 87, 217), "cost": 0.75}
    assert answer.usage == counts(30, 7, 37)
    holders = [frame for frame in answer.frames if "mixture" in frame]
    assert [frame["choices"][0]["finish_reason"] for frame in holders] == ["stop"] * stream


@cases(
    "usage, seen",
    ("counts and details", {**USAGE, "details": {"x": 2}}, {**USAGE, "details": {"x": 2}}),
    ("none", None, counts(0, 0, 0)),
    ("texts and fractions", {"prompt_tokens": "7", "completion_tokens": 2.5}, counts(0, 0, 0)),
    ("a negative number", {**USAGE, "prompt_tokens": -3}, counts(0, 5, 15)),
)
async def test_a_passthrough_has_the_upstreams_usage_and_what_is_no_count_is_0(ask, usage, seen, stream):
    answer = await ask({"a": says("fine", usage=usage)}, model="a", stream=stream, **WITH_USAGE)
    assert (answer.text, answer.usage, answer.mixture) == ("fine", seen, None)
    assert all(type(answer.usage[name]) is int for name in USAGE)


# --- Calling an upstream: what is sent ---
async def test_an_upstream_gets_its_own_key_headers_and_model_not_the_clients(ask, upstream):
    models = {"a": {"api_key": "sk-upstream", "headers": {"X-Title": "mom"}, "model": "vendor/a-1"}}
    headers = {"Authorization": "Bearer sk-client", "X-Own": "1", "Cookie": "me=1"}
    for name in "ab":
        await ask(models=models, headers=headers, model=name, api_key="sk-other")
    assert upstream.requests[0]["model"] == "vendor/a-1"
    assert upstream.headers[0]["Authorization"] == "Bearer sk-upstream"
    assert upstream.headers[0]["X-Title"] == "mom"
    assert upstream.headers[1].keys().isdisjoint(headers)


@cases(
    "params, fields, sent",
    ("params win", {"top_p": 0.7, "seed": 1}, {"top_p": 0.5}, {"top_p": 0.7, "seed": 1}),
    ("null removes", {"top_p": None}, {"top_p": 0.5, "x": 1}, {"x": 1}),
    ("a limit has two names", {"max_tokens": 8}, {"max_completion_tokens": 9}, {"max_tokens": 8}),
    ("its other name", {"max_completion_tokens": 8}, {"max_tokens": 9}, {"max_completion_tokens": 8}),
    ("null is no value", {"max_tokens": None}, {"max_completion_tokens": 9}, {"max_completion_tokens": 9}),
    ("a stream without options", {"stream_options": None}, {"stream": True}, {"stream": True}),
    ("no stream", {"stream": False}, {"stream": True}, {"stream": False}),
)
async def test_params_win_over_the_request(ask, upstream, params, fields, sent):
    answer = await ask(models={"a": {"params": params}}, model="a", **fields)
    assert answer.text == "answer of a"
    assert upstream.requests == [{"model": "a", "messages": QUESTION, **sent}]


# --- Calling an upstream: what is tried again ---
PAGE = b"<html><head><style>" + b"x{}" * 1000 + b"</style><title>Bad gateway</title></head><p>502</p></html>"
ERROR = {"error": {"message": "the cause", "code": 500}}
HIDDEN = {"error": {"message": "Provider returned error", "metadata": {"raw": "the cause"}}}
IN_A_CHOICE = {"choices": [{"message": {"content": "half"}, "error": {"code": 502, "message": "the cause"}}]}


@cases(
    "reply, attempts, words",
    *[(f"status {n}", refuses(n), 3, f": {n}: no$") for n in (408, 409, 425, 429, 500, 503, 504, 520, 599)],
    *[(f"status {n}", refuses(n), 1, f": {n}: no$") for n in (400, 413, 418, 422)],
    ("a quota that is used up", QUOTA, 1, "429: no"),
    *[(f"status {n}", refuses(n), 1, f"{n}: no.*api_key") for n in (401, 403)],
    ("no credit", refuses(402), 1, "402: no.*account"),
    ("a wrong address", refuses(404), 1, "404: no.*base_url.*model"),
    ("a redirect", sends(status=307, headers={"Location": CHAT}), 1, "307.*base_url"),
    ("a wait of over a minute", refuses(503, wait="61"), 1, "503: no"),
    ("a dropped connection", breaks_off, 3, r": \w+"),
    ("nothing at all", sends(), 3, r": \w+"),
    ("not JSON", sends(b"<html>the cause</html>"), 3, "the cause"),
    ("white space", says(" \n"), 3, "stop"),
    ("reasoning alone, cut by a filter", says({"reasoning": "hm"}, "content_filter"), 1, "content_filter"),
    ("no choices", sends_json({"detail": "no such model"}), 3, "no such model"),
    ("thoughts without an end", sends(delta(reasoning="half"), DONE), 3, "no answer"),
    ("an error in a 200", sends_json({"error": {"message": "gone", "code": 404}}), 1, "(?<=a): gone"),
    ("an error in a choice", sends_json(IN_A_CHOICE), 3, "(?<=a): the cause$"),
    ("JSON after text", sends(HELLO, b'{"error":{"message":"no","code":429}}'), 3, "(?<=a): no$"),  # case 5
    ("a stream without an end", sends(delta(content="half")), 3, r": \w+"),
    ("OpenRouter's error", sends_json(HIDDEN, 400), 1, "the cause"),
    ("a wrong key as 400", refuses(400, "API key not valid"), 1, "400: API key not valid$"),  # case 23
    ("an error sent as an event", sends(ERROR, status=429), 3, "429: .*the cause"),
    ("a web page", sends(PAGE, status=502), 3, "502: Bad gateway$"),  # case 6
    ("no body and no reason", sends(status=520, reason=""), 3, r"520: \w+"),  # case 7
    ("control characters", refuses(400, "bad\x1b[31m \x00\n\u202e" + "x" * 9000), 1, "400: bad.*xxx$"),
)
async def test_a_failure_says_why_and_is_tried_again_if_that_may_help(ask, upstream, reply, attempts, words):
    answer = await ask({"a": reply}, model="a")
    assert answer.status >= 400
    assert re.match(f"a.*?{words}", answer.error["message"])
    assert answer.error["message"].isprintable()
    assert len(answer.error["message"]) < 650
    assert "half" not in answer.error["message"]  # Errors are logged, and text of answers is not.
    assert len(upstream.requests) == attempts


@cases(
    "first, seconds",
    ("an empty answer", says(""), 0),  # case 3
    ("status 520", sends(status=520), 0),  # case 8
    ("a role", sends(ROLE, breaks_off), 0),
    ("reasoning", sends(THINKS, breaks_off), 0),
    ("a wait", refuses(503, wait="1"), 1),
    ("a wait that makes no sense", refuses(503, wait="nan"), 0),
    ("a date", refuses(503, wait="Wed, 21 Oct 2115 07:28:00 GMT"), 0),
)
async def test_a_critics_stream_is_tried_again_until_its_first_text(ask, first, seconds):
    answer = await ask({"critic": [first, says("second attempt")]}, stream=True)
    assert (answer.text, answer.calls("attempts")) == ("second attempt", [1, 1, 1, 2])
    assert seconds <= answer.calls("seconds")[3] < seconds + 3
    assert ["role" in message for message in answer.messages].count(True) == 1
    assert answer.reasoning in ("", "hm")


async def garbles(request):
    """Sends text, and then bytes that are no chunk. aiohttp stops reading, and waits for ever."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    request.transport.write(head + b"%x\r\n%s\r\n" % (len(HELLO), HELLO))
    await asyncio.sleep(0.2)
    request.transport.write(b"oops\r\n")
    await hangs(request)


@cases(
    "reply, status",
    ("silence", hangs, 504),
    ("bytes that are no chunk", garbles, 504),
    ("silence after a while", sends(THINKS, hangs), 504),
    ("a slow document", sends(*[b" ", 0.1] * 6, WHOLE), 200),
    ("a slow stream", sends(*[b": wait\n\n", 0.1] * 6, HELLO, END), 200),
)
async def test_the_timeout_is_the_time_without_a_byte_and_final(ask, upstream, monkeypatch, reply, status):
    monkeypatch.setattr(mom_gateway, "CONNECT_TIMEOUT", 0.1)
    answer = await ask({"a": reply}, models={"a": {"timeout": 0.4}}, model="a")
    assert answer.status == status
    assert len(upstream.requests) == 1  # The upstream may still be working, and is paid for.
    await eventually(lambda: upstream.running == 0, seconds=3)


@pytest.mark.skipif(sys.platform != "linux", reason="relies on how Linux treats a full backlog")
async def test_a_connection_that_is_not_made_in_time_is_tried_again(ask, monkeypatch):
    monkeypatch.setattr(mom_gateway, "CONNECT_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first:
        first.connect(full.getsockname())  # takes the only place in the backlog
        answer = await ask(models={"a": {"base_url": f"http://127.0.0.1:{full.getsockname()[1]}/v1"}})
    assert answer.calls("attempts") == [3, 1, 1, 1]


KEY = "MC4CAQAwBQYDK2VwBCIEICJK/wAHkSTppXT71MuIWxwxF97s0tSdBxxgMdgKUBfg"  # It protects nothing.
CERTIFICATE = """MIHuMIGhoAMCAQICFBqSSSGTAochWY/DOGNKm6v4g/c7MAUGAytlcDAMMQowCAYDVQQDDAF4MCAXDTI2MTEyOTIw
NTE0OFoYDzIxMjYxMTA1MjA1MTQ4WjAMMQowCAYDVQQDDAF4MCowBQYDK2VwAyEAsS5QBZjhg+Rz7zUGi2JvGovdC47pvF8R83CRvrhHvGSj
EzARMA8GA1UdEQQIMAaHBH8AAAEwBQYDK2VwA0EAofF3CZfg8XR0pcxUkDKK6mXtMlVRnpK4ls8XXpNsHf89VjQOHeUAMGcuwHSbEZyoqmke
tiyv6uFYSoLUSN8eCg=="""


async def test_an_untrusted_certificate_is_a_connection_error_with_its_reason(ask, aiohttp_server):
    key = f"-----BEGIN PRIVATE KEY-----\n{KEY}\n-----END PRIVATE KEY-----\n"
    Path("both.pem").write_text(key + ssl.DER_cert_to_PEM_cert(base64.b64decode(CERTIFICATE)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("both.pem")
    server = await aiohttp_server(web.Application(), ssl=context)
    answer = await ask(models={"a": {"base_url": str(server.make_url("/v1"))}}, model="a")
    assert answer.status == 502  # case 18
    assert "certificate" in answer.error["message"]


async def test_a_proxy_is_used_except_for_loopback_and_for_hosts_in_no_proxy(ask, upstream, monkeypatch):
    local = upstream.url.replace("127.0.0.1", "localhost")
    urls = {"a": "http://upstream.test/v1", "b": "http://direct.invalid/v1", "c": local}
    models = {name: {"base_url": url} for name, url in urls.items()}
    monkeypatch.setenv("HTTP_PROXY", upstream.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "direct.invalid")
    assert (await ask(models=models, model="a")).text == "answer of a"
    assert (await ask(models=models, model="b")).status == 502
    assert [headers["Host"] for headers in upstream.headers] == ["upstream.test"]
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # Nobody listens there.
    assert (await ask(models=models, model="c")).text == "answer of c"
    assert (await ask(models=models, model="critic")).text == "answer of critic"  # case 15


# --- Reading a reply: the shape decides ---
DEEP = json.loads('{"a":' * 500 + "1" + "}" * 500)


@cases(
    "parts",
    ("no space after the colon", [(HELLO + END + DONE).replace(b": {", b":{")]),
    ("carriage returns", [(HELLO + END + DONE).replace(b"\n", b"\r\n")]),
    ("comments and odd frames", [b': x\n\nevent: message\ndata: {"choices":[]}\n\n', HELLO, END, DONE]),
    ("split after every byte", [bytes([byte]) for byte in HELLO + END + DONE]),
    ("no finish_reason", [HELLO, DONE]),  # case 4
    ("things after [DONE]", [delta("stop", content="naïve"), DONE, HELLO, b"data: {oops\n\n"]),
    ("open after [DONE]", [HELLO, DONE, hangs]),
    ("silence after the finish_reason", [HELLO, END, hangs]),
    ("a break after it", [HELLO, END, breaks_off]),
    ("a break after [DONE]", [HELLO, DONE, breaks_off]),
    ("comments without end", [HELLO, END, *[b": ping\n\n", 0.1] * 120]),
    ("deep nesting", [HELLO, *[event(delta(odd=DEEP))] * 2, END]),
    ("a huge cost", [HELLO, END, b'data: {"choices":[],"usage":{"cost":1%s}}\n\n' % (b"0" * 400), DONE]),
    ("the whole message in the end", [HELLO, b"data: " + WHOLE, b"\n\n", DONE]),
    ("an error after it", [HELLO + END + event({"error": {"message": "no", "code": 500}})]),
    ("a document with line breaks", [WHOLE.replace(b",", b",\n\n")]),
    ("a document with an empty delta", [WHOLE.replace(b'{"mess', b'{"delta":{"content":""},"mess')]),
    ("a document and [DONE]", [WHOLE + b"\n\n" + DONE]),  # case 25
)
async def test_the_shape_of_a_reply_decides_and_not_its_type(ask, upstream, monkeypatch, parts, stream):
    monkeypatch.setattr(mom_gateway, "CONNECT_TIMEOUT", 0.3)
    began = time.monotonic()
    reply = sends(*parts, headers={"Content-Type": "text/plain"})
    answer = await ask({"a": reply}, models={"a": {"timeout": 0.2}}, model="a", stream=stream)
    assert (answer.text, answer.finish_reasons, answer.error) == ("naïve", ["stop"], None)
    assert len(upstream.requests) == 1
    assert time.monotonic() - began < 10


CALLS = [{**CALL, "id": f"c{number}", "index": number} for number in range(10_000)]
LONG = sends(delta("stop", content="x" * 2**22), headers={"X-Long": "x" * 60_000})
BOMB = sends(gzip.compress(b" " * 10**7 + WHOLE), headers={"Content-Encoding": "gzip"})


@cases(
    "reply",
    ("10,000 tool calls", says({"tool_calls": CALLS})),
    ("10,000 in a stream", sends(b"".join(event(delta(tool_calls=[call])) for call in CALLS), END)),
    ("20,000 pieces", sends(event(delta(tool_calls=CALLS[:1])) * 20_000, END)),
    ("a line of 4 MiB and a header of 60 KB", LONG),
)
async def test_a_large_reply_is_read_and_costs_in_proportion_to_its_size(ask, reply):
    began = time.process_time()  # of this process alone, so other work on the machine does not count
    assert (await ask({"a": reply}, model="a")).status == 200
    assert time.process_time() - began < 4


@cases("reply", ("a stream", sends(HELLO * 9000, END)), ("gzip that unpacks to more", BOMB))
async def test_a_reply_over_the_limit_is_a_failure(ask, monkeypatch, reply):
    monkeypatch.setattr(mom_gateway, "MAX_REPLY_BYTES", 100_000)
    assert (await ask({"a": reply}, model="a")).status == 502


# --- The answer: as the upstream wrote it ---
LOGPROBS = {"content": [{"token": "yes", "logprob": -0.1, "top_logprobs": []}], "refusal": None}
MESSAGE = {"role": "assistant", "content": "yes", "odd": [None], "tool_calls": [SIGNED, CALL]}
CHOICE = {"index": 0, "message": MESSAGE, "logprobs": LOGPROBS, "finish_reason": "eos", "stop_reason": 7}
DOCUMENT = {"id": "x", "object": "y", "choices": [CHOICE, {**CHOICE, "index": 1}], "citations": [1]}


async def test_a_document_stays_as_it_is_but_for_its_head_or_becomes_one_delta_of_a_stream(ask):
    reply = {"a": sends_json({**DOCUMENT, "usage": USAGE})}
    body = (await ask(reply, model="a")).body  # case 20
    own = {"id": body["id"], "object": "chat.completion", "created": body["created"], "model": "a"}
    assert body == {**DOCUMENT, **own, "usage": USAGE}
    assert body["id"] != "x"
    first, last = (await ask(reply, model="a", stream=True)).frames
    choice = first["choices"][0]
    assert choice["delta"] == {**MESSAGE, "tool_calls": [{**SIGNED, "index": 0}, {**CALL, "index": 1}]}
    assert (choice["logprobs"], choice["stop_reason"], first["citations"]) == (LOGPROBS, 7, [1])
    assert last["choices"][0]["finish_reason"] == "eos"


async def test_the_frames_of_a_stream_pass_as_they_came(ask):
    first = {"index": 0, "delta": {"role": "assistant", "content": "yes", "odd": [1]}, "logprobs": LOGPROBS}
    second = {"index": 0, "delta": {"reasoning": "hm", "reasoning_details": [{"index": 0, "data": "S"}]}}
    third = {"index": 1, "delta": {"content": "no"}, "stop_reason": 7}
    frames = [{"choices": [choice], "citations": [1], "odd": None} for choice in (first, second, third)]
    answer = await ask({"a": sends(*frames, END, DONE)}, model="a", stream=True)  # case 20
    for frame, sent in zip(answer.frames[:3], frames, strict=True):
        frame["choices"][0].pop("finish_reason", None)
        assert frame | sent == frame


async def test_a_stream_becomes_one_message(ask):
    first = {**delta(role="assistant", content="na", reasoning_content="h"), "citations": [1]}
    first["choices"][0]["logprobs"] = LOGPROBS
    calls = [{**SIGNED, "index": 0}, {"index": 0, "function": {"arguments": " "}}]
    frames = [delta(content="ïve", reasoning_content="m"), *[delta(tool_calls=[call]) for call in calls]]
    answer = await ask({"a": sends(first, *frames, END, DONE)}, model="a")
    [message] = answer.messages
    assert (message["role"], answer.text, answer.reasoning) == ("assistant", "naïve", "hm")
    assert answer.tool_calls() == [["call_1", "read", '{"path":"x"} ']]
    assert message["tool_calls"][0]["extra_content"] == SIGNED["extra_content"]
    assert answer.choices[0]["logprobs"]["content"] == LOGPROBS["content"]
    assert answer.body["citations"] == [1]


def piece(arguments, name="", **fields):
    return {**fields, "function": {"name": name or None, "arguments": arguments}}


@cases(
    "pieces",
    ("OpenAI's", [piece("", "f", index=0, id="1"), piece("{}", index=0), piece("{}", "f", index=1, id="2")]),
    ("without an index", [piece("", "f", id="1"), piece("{"), piece("}"), piece("{}", "f", id="2")]),
    ("whole, without an index", [piece("{}", "f", id="1"), piece("{}", "f", id="2")]),  # case 21
    ("mixed", [piece("{", "f", index=0, id="1"), piece("{}", "f", index=1, id="2"), piece("}", index=0)]),
)
@cases("reason, right", ("stop", "stop", "tool_calls"), ("cut", "length", "length"), ("own", "eos", "eos"))
async def test_tool_calls_are_put_together_and_stop_does_not_hide_them(ask, pieces, reason, right, stream):
    reply = sends(*[delta(tool_calls=[piece]) for piece in pieces], delta(reason), DONE)
    answer = await ask({"a": reply}, model="a", stream=stream)
    assert answer.tool_calls() == [["1", "f", "{}"], ["2", "f", "{}"]]
    assert answer.finish_reasons == [right]


# --- The answer: as a stream ---
@pytest.mark.parametrize("wanted", [True, False])
async def test_a_stream_has_text_finish_usage_and_done_in_that_order(ask, wanted):
    answer = await ask(stream=True, stream_options={"include_usage": wanted})
    heads = [(frame["object"], frame["id"], frame["created"], frame["model"]) for frame in answer.frames]
    assert set(heads) == {("chat.completion.chunk", *heads[0][1:3], "mom")}
    *frames, last = [frame for frame in answer.frames if frame["choices"]]
    assert ["role" in message for message in answer.messages] == [True] + [False] * len(frames)
    assert not any(frame["choices"][0].get("finish_reason") for frame in frames)
    assert (answer.text, last["choices"][0]["finish_reason"]) == ("answer of critic", "stop")
    assert ["usage" in frame for frame in answer.frames] == [False] * (len(frames) + 1) + [True] * wanted
    assert answer.data.endswith(b"\n\ndata: [DONE]\n\n")
    assert (answer.headers["Cache-Control"], answer.headers["X-Accel-Buffering"]) == ("no-cache", "no")


async def test_no_frame_waits_for_a_later_one_and_silence_is_filled_with_comments(start_gateway, monkeypatch):
    monkeypatch.setattr(mom_gateway, "KEEP_ALIVE", 0.05)
    client_has_text = asyncio.Event()
    gateway = await start_gateway({"a": sends(0.3, HELLO, lambda _: client_has_text.wait(), 0.3, END, DONE)})
    body = {"model": "a", "messages": QUESTION, "stream": True}
    async with gateway.session.post(CHAT, json=body) as response:
        before = await response.content.readuntil(b"data: ")
        assert b"na\\u00efve" in await response.content.readline()
        client_has_text.set()
        after = await response.read()
    assert before.startswith(b": keep-alive\n\n")
    assert b"\n: keep-alive\n\n" in after
    assert after.endswith(b"\n\ndata: [DONE]\n\n")


@cases(
    "reply, words, arrived",
    ("after a comment", sends(0.3, {"error": {"message": "the cause", "code": 400}}), "the cause", None),
    ("after text", sends(HELLO, ERROR), "the cause", "naïve"),  # case 26
    ("after a tool call", sends(delta(tool_calls=[CALL]), ERROR), "the cause", None),
    ("a break after text", sends(HELLO, breaks_off), "critic", "naïve"),
    ("no finish_reason", sends(HELLO), "critic", "naïve"),
)
async def test_a_failure_after_the_status_line_is_a_frame_and_final(ask, monkeypatch, reply, words, arrived):
    monkeypatch.setattr(mom_gateway, "KEEP_ALIVE", 0.05)
    replies = {"critic": reply, "c": refuses(404)}
    answer = await ask(replies, TOOL_TURN, mixture={"models": ["c"]}, stream=True, traces="traces")
    assert (answer.status, answer.finish_reasons, answer.frames[-1]) == (200, [], {"error": answer.error})
    assert sorted(answer.error) == ["code", "message", "param", "type"]
    assert answer.error["type"] == "upstream_error"
    assert words in answer.error["message"]
    assert not re.search("50[0-9]", answer.error["message"])
    trace = await trace_of()
    assert (trace["error"], trace["answer"]) == (answer.error["message"], None)
    assert trace["outcome"] in (400, 502)
    assert trace["calls"][0]["attempts"] == 1
    assert (trace["calls"][0]["message"] or {}).get("content") == arrived


async def test_frames_have_the_gateways_head_one_role_and_no_usage_and_no_second_critic(ask, upstream):
    frame = {**delta(role="assistant", content="x"), "id": "x", "object": "y", "model": "z", "usage": USAGE}
    mixture = {"critic": ["critic", "c"]}
    answer = await ask({"critic": sends(frame, frame, breaks_off)}, mixture=mixture, stream=True)
    first, second, error = answer.frames
    assert (first["object"], first["model"], "usage" in first) == ("chat.completion.chunk", "mom", False)
    assert (first["id"], "role" in second["choices"][0]["delta"]) == (second["id"], False)
    assert (answer.text, len(upstream.requests_to("c")), list(error)) == ("xx", 1, ["error"])


async def test_show_candidates_streams_each_as_reasoning(ask):
    replies = {"a": sends(0.3, delta(content="late"), END, DONE), "b": refuses(400), "critic": says("done")}
    # The failure of b does not count towards the quorum of 2, so the grace does not end the wait for a.
    answer = await ask(replies, mixture={"show_candidates": True, "grace": 0.05}, stream=True)
    assert re.fullmatch(r"(?s)c\b.*\d\.\d.*answer of c\s.*a\b.*\d\.\d.*late\s*", answer.reasoning)
    assert (answer.text, answer.messages[0]["role"]) == ("done", "assistant")


# --- Configuration: what config.yaml holds, and what is wrong with it ---
ONE = "models: [{name: a, base_url: 'http://x/v1'}]\n"
TWO = "models: [{name: a, base_url: 'http://x/v1'}, {name: b, base_url: 'http://x/v1'}]\n"
A_WITH = ONE.replace("}", ", %s}")
MIXTURE_WITH = TWO + "mixtures: [{name: m, models: [a, b], %s}]"


def load(text):
    Path("config.yaml").write_text(text, encoding="utf-8")
    return mom_gateway.load_config(Path("config.yaml"))


def problems(text):
    with pytest.raises(mom_gateway.ConfigError) as caught:
        load(text)
    return str(caught.value).splitlines()


def test_a_name_and_a_base_url_are_a_whole_configuration():
    config = load(TWO.replace("/v1", "/v1/chat/completions/", 1))
    model, mom = config.models["a"], config.mixtures["mom"]
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8000)
    assert (model.base_url, model.model, model.timeout, model.retries) == ("http://x/v1", "a", 300, 2)
    assert (list(mom.models), list(mom.critic), mom.quorum) == (["a", "b"], ["a"], 1)
    assert (mom.grace, mom.deadline, mom.show_candidates) == (30, 600, False)
    assert mom.prompt == mom_gateway.CRITIC_INSTRUCTION
    assert load(ONE.replace("/v1", "/")).models["a"].base_url == "http://x"
    assert load(ONE).mixtures["mom"].quorum == 1


def test_variables_are_replaced_after_the_yaml_is_parsed_and_only_once(monkeypatch):
    values = {"KEY": "k: [1, 2]", "EMPTY": "", "NESTED": "${KEY}", "PORT": "8001", "SHOW": "true"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    more = "api_key: '${KEY}', model: '${EMPTY:-x}', params: {user: '${NESTED}'}, timeout: '${UNSET:-1.5}'"
    config = load("server: {port: '${PORT:-8000}'}\n" + A_WITH % more)
    model = config.models["a"]
    assert (model.api_key, model.model, model.params) == ("k: [1, 2]", "x", {"user": "${KEY}"})
    assert (model.timeout, config.server.port) == (1.5, 8001)
    assert load(MIXTURE_WITH % "show_candidates: '${SHOW}'").mixtures["m"].show_candidates is True


def test_every_entry_with_a_mistake_is_reported_at_once_with_its_place_and_what_is_right():
    text = """
    server: {port: eighty}
    models: [{name: gpt, base_url: 'http://x/v1'}, {name: claude, base_url: 'http://x/v1', timeot: 3}]
    mixtures: [{name: mom, models: [gpt, claude], critic: gtp, quorum: 9}]
    """
    port, timeout, critic = problems(text)
    assert port.startswith("config.yaml: server.port: ")
    assert re.match(r"config\.yaml: models\[1\]\.timeot: .*timeout", timeout)
    assert critic == "config.yaml: mixtures[0].critic: 'gtp' is not a model; known: gpt, claude"


@cases(
    "text, place",
    ("a model without a URL", "models: [{name: a, api_key: sk-secret}]", "models[0].base_url"),
    ("no model", "models: []", "models"),
    ("a URL that is not of HTTP", ONE.replace("http", "ftp"), "models[0].base_url"),
    ("a URL with a password", ONE.replace("//", "//me:sk-secret@"), "models[0].base_url"),
    ("a list for a text", A_WITH % "api_key: [sk-secret]", "models[0].api_key"),
    ("a negative number", A_WITH % "timeout: -1", "models[0].timeout"),
    ("a number without end", A_WITH % "timeout: .inf", "models[0].timeout"),
    ("a boolean for a number", A_WITH % "retries: true", "models[0].retries"),
    ("a slip in a key", A_WITH % "'api_key:sk-secret': ", "models[0].api_key"),
    ("a mixture of itself", TWO + "mixtures: [{name: m, models: m}]", "mixtures[0].models"),
    ("a name in use", TWO + "mixtures: [{name: a, models: b}]", "mixtures[0].name"),
    ("mixtures that are no list", TWO + "mixtures: 3", "mixtures: "),
    ("a quorum of 0", MIXTURE_WITH % "quorum: 0", "mixtures[0].quorum"),
    ("a quorum that is too high", MIXTURE_WITH % "quorum: 3", "mixtures[0].quorum"),
    ("an unknown key", "sever: {x: sk-secret}\n" + ONE, "sever"),
    ("YAML that breaks off", "models:\n- name: a\n  sk-secret\n", "line 4: could not find expected ':'"),
    ("a tag", "models:\n- api_key: !sk-secret x", "line 2"),
    ("an alias", "models:\n- api_key: *sk-secret", "line 2"),
    ("a variable without braces", A_WITH % "api_key: $KEY", "models[0].api_key"),
)
def test_a_mistake_is_one_line_that_begins_with_its_place_and_shows_no_value(text, place):
    lines = problems(text)
    assert any(line.startswith(f"config.yaml: {place}") for line in lines)
    assert "sk-secret" not in str(lines)


def test_the_shipped_configuration_works_and_shows_every_key_in_less_than_60_lines(monkeypatch):
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or")
    text = (HERE / "config.yaml").read_text(encoding="utf-8")
    assert {model.api_key for model in load(text).models.values()} == {"sk-or"}
    assert len(text.splitlines()) < 60
    keys = "server host port api_key allowed_hosts models name base_url model params headers timeout retries"
    keys += " mixtures critic quorum grace deadline show_candidates prompt"
    assert [key for key in keys.split() if not re.search(rf"^[ #-]*{key}:", text, re.MULTILINE)] == []


# --- Access: who may ask ---
@cases(
    "headers, status",
    ("loopback by name", {"Host": "LOCALHOST"}, 200),
    ("a name of this machine", {"Host": "mom.localhost:8000"}, 200),
    ("loopback in IPv6", {"Host": "[::1]:8000"}, 200),
    ("a host that looks like localhost", {"Host": "localhost.evil.example"}, 403),
    ("an allowed host", {"Host": "box.LAN:81"}, 200),
    ("the bound address", {"Host": "[::]:8000"}, 200),
    ("a foreign host", {"Host": "10.1.2.3:8000"}, 403),
    ("a page of this machine", {"Origin": "http://localhost:3000"}, 200),
    ("VS Code", {"Origin": "vscode-webview://x"}, 200),  # case 17
    ("Obsidian", {"Origin": "app://obsidian.md", "Sec-Fetch-Site": "cross-site"}, 200),  # case 17
    ("a page of another site", {"Origin": "http://evil.example"}, 403),
    ("a site that looks like localhost", {"Origin": "https://localhost.evil.example"}, 403),
    ("a sandboxed page", {"Origin": "null"}, 403),  # case 17
    ("a cross-site request", {"Sec-Fetch-Site": "cross-site"}, 403),
    ("a wrong key", {"Authorization": "Bearer sk-mine2"}, 401),  # case 27
    ("a key of other letters", {"Authorization": "Bearer sk-möne"}, 401),
    ("a key without Bearer", {"Authorization": "sk-mine"}, 401),
)
async def test_programs_of_this_machine_with_the_key_are_served(start_gateway, upstream, headers, status):
    server = {"host": "::", "api_key": "sk-mine", "allowed_hosts": ["Box.lan"]}
    gateway = await start_gateway(server=server)
    headers = {"Authorization": "Bearer sk-mine", **headers}
    answer = await gateway.ask(model="a", headers=headers)
    assert answer.status == (await gateway.request("GET", "/v1/models", headers=headers)).status == status
    assert (await gateway.request("GET", "/health", headers=headers)).status == 200  # case 16
    assert status != 401 or answer.error["code"] == "invalid_api_key"
    assert answer.headers.get("x-should-retry") == (None if status == 200 else "false")
    assert not any(name.lower().startswith("access-control") for name in answer.headers)
    assert len(upstream.requests) == (1 if status == 200 else 0)


# --- The log, the traces, and what must not be in them ---
async def trace_of(count=1):
    """Waits for so many traces, which are written a moment after the answer. Returns one of them."""
    folder = Path("traces")
    await eventually(lambda: len([path for path in folder.iterdir() if path.stat().st_size]) == count)
    return yaml.safe_load(max(folder.iterdir()).read_text("utf-8"))


async def test_the_log_and_a_trace_tell_the_whole_story(ask, caplog):
    secret = says("secret\nanswer", usage={"total_tokens": 1234, "cost": 0.5})
    replies = {"a": secret, "b": refuses(400, "bad\x1b[31m \nforged"), "c": [refuses(503, "busy"), says("x")]}
    odd = {"role": "system", "content": " \tsecret space \n\r\n: - # 'x' \x07 \u2028 \U0001f600\n\n"}
    answer = await ask(replies, [odd, *QUESTION], traces="traces", user="me")
    trace = await trace_of()
    assert " ".join(trace) == "mixture outcome seconds usage answer error calls prompt request"
    assert (trace["mixture"], trace["outcome"], trace["error"]) == ("mom", "ok", None)
    assert (type(trace["seconds"]), trace["usage"]) == (float, answer.mixture["usage"])
    assert trace["request"] == {"messages": [odd, *QUESTION], "user": "me"}
    assert trace["prompt"].startswith(mom_gateway.CRITIC_INSTRUCTION)
    assert trace["answer"]["content"] == "answer of critic"
    assert [call.pop("message") for call in trace["calls"]][0]["content"] == "secret\nanswer"
    assert trace["calls"] == answer.mixture["calls"]
    [path] = Path("traces").iterdir()
    assert "      secret\n      answer\n" in path.read_text()  # as a block, which is easy to read
    assert re.fullmatch(r"\d{8}T\d{6}[\d.]*Z-\w{16}\.yaml", path.name)
    assert answer.body["id"].removeprefix("chatcmpl-") in path.name
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)] == [0o600, 0o700]
    lines = [record.getMessage() for record in caplog.records if record.name == "mom_gateway"]
    assert len(lines) == 7
    assert re.fullmatch(r"\w{16} mom\b.*\ba, b, c, critic", lines[0])
    for pattern in (r"\bc\b.*\d s.*503: busy", r"proposer a\b.*\d s.*1,234", "proposer b.*400: bad.*forged"):
        assert len([line for line in lines if re.search(pattern, line)]) == 1
    total = r"\w{16} mom: ok, 2 of 3 candidates, critic critic, 1,264 tokens, cost 0\.5000, \d\.\d s"
    assert re.fullmatch(total, lines[-1])
    assert len({line.split()[0] for line in lines}) == 1
    assert "".join(lines).isprintable()
    assert "secret" not in caplog.text


async def test_no_key_appears_even_if_an_upstream_repeats_it(start_gateway, caplog, stream):
    caplog.set_level(logging.CRITICAL, "aiohttp.access")  # which the server switches off
    caplog.set_level(logging.DEBUG)  # comes last, because it sets the level of caplog's handler, too
    secrets = {"X-Api-Key": "sk-header-22", "Cookie": "session sk-other-333"}
    keys = {"api_key": "sk-it's-1", "headers": secrets}  # case 24
    # An error is cut after 500 characters, and aiohttp quotes the first 100 of a header that is too long.
    echo = "x" * 459 + ": sk-it's-1 sk-header-22 sk-other-333 sk-server-4444"  # YAML quotes it.
    long = sends(headers={"X": "x" * 90 + "sk-it's-1" + "x" * 70_000})
    replies = {"a": refuses(400, echo, code=echo, param=echo), "b": sends(b"x sk-it's-1"), "c": long}
    gateway = await start_gateway(replies, None, None, keys, {"api_key": "sk-server-4444"}, "traces")
    bearer = {"Authorization": "Bearer sk-server-4444", "Host": "localhost"}
    models = ("a", "b", "c", "mom", "sk-it's-1")
    answers = [await gateway.ask(model=name, stream=stream, headers=bearer, user=echo) for name in models]
    answers.append(await gateway.request("GET", "/sk-server-4444", headers={"Host": "sk-server-4444"}))
    await trace_of(4)
    assert [answer.status for answer in answers] == [400, 502, 502, 200, 404, 403]
    everything = b" ".join(answer.data for answer in answers).decode() + caplog.text
    everything += "".join(path.read_text() for path in Path("traces").iterdir()).replace("''", "'")
    everything += repr(mom_gateway.load_config(Path("config.yaml")))
    assert re.findall(".*sk-(?:it|header|other|server).*", everything) == []


# --- The application: imported, mounted, and under other servers ---
def test_importing_has_no_side_effects_and_the_file_says_what_it_needs(tmp_path):
    show = "print(gc.get_threshold(), logging.root.handlers, signal.getsignal(2), threading.active_count())"
    code = f"import aiohttp, gc, logging, signal, threading; {show}; import mom_gateway; {show}"
    command = [sys.executable, "-B", "-W", "error", "-c", code]
    environ = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    before, after = done.stdout.splitlines()
    assert (after, done.stderr, list(tmp_path.iterdir())) == (before, "", [])
    script = re.match(r"# /// script\n((# .*\n)+?)# ///\n", (HERE / "mom_gateway.py").read_text("utf-8"))[1]
    needed = (HERE / "requirements.txt").read_text().splitlines()[:2]
    assert tomllib.loads(script.replace("# ", ""))["dependencies"] == needed
    assert "**" not in str(inspect.signature(mom_gateway.create_app))


async def test_a_copy_can_be_mounted_and_asked_and_served_by_gunicorn(
    upstream, tmp_path, monkeypatch, aiohttp_client
):
    shutil.copy(HERE / "mom_gateway.py", tmp_path / "copied_gateway.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MOM_CONFIG", "own.yaml")
    Path("own.yaml").write_text(ONE.replace("http://x/v1", upstream.url))
    copy = importlib.import_module("copied_gateway")
    program = web.Application()
    program.add_subapp("/ai", copy.create_app("own.yaml"))
    answer = await Gateway(await aiohttp_client(program), upstream).ask(path="/ai" + CHAT)
    assert (answer.text, answer.body["model"]) == ("answer of a", "mom")
    gateway = copy.load_config(Path("own.yaml"))
    async with aiohttp.ClientSession() as gateway.session:  # without HTTP
        chat = copy.Chat(gateway, gateway.mixtures["mom"], {"messages": QUESTION})
        assert (await copy.run_mixture(chat, None)).message["content"] == "answer of a"
    upstream.replies = {"a": hangs}
    runner = await copy.create_runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
        await Gateway(session, upstream).abandon()
    await runner.cleanup()


# --- The command line: the demo and the server, as processes ---
@pytest.fixture
def start():
    """Starts `python mom_gateway.py …` as a process."""
    started = []

    def run(*arguments, **environ):
        command = [sys.executable, str(HERE / "mom_gateway.py"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **environ}, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


async def start_text(process):
    """Returns what is printed, up to the line with curl, which is the last, and the address in it."""
    text = ""
    while "curl" not in text:
        line = await asyncio.to_thread(process.stdout.readline)
        assert line, process.stderr.read()
        text += line
    return text, re.search(r"http://127\.0\.0\.1:\d+", text)[0]


async def test_the_demo_answers_the_printed_curl_line_from_three_candidates(start):
    demo = start("--demo", "--port", "0", "--debug-requests")
    text, address = await start_text(demo)
    assert re.search("mom.*\n(.*\n)*.*debug-requests", text)
    line = text.splitlines()[-1]
    asked = re.search('"content": "(.+?)"', line)[1]
    body = json.loads(await asyncio.to_thread(subprocess.check_output, line, shell=True))
    content, calls = body["choices"][0]["message"]["content"], body["mixture"]["calls"]
    assert re.search(f"(?s)scripted.*{re.escape(asked)}.*3", content)
    assert sorted(call["attempts"] for call in calls) == [1, 1, 1, 2]
    assert sum(call["seconds"] >= 1 for call in calls) == 2
    async with aiohttp.ClientSession(address) as session:
        answer = await Gateway(session, None).ask(model=calls[0]["model"], stream=True)
    assert QUESTION[0]["content"] in answer.text
    assert len(answer.frames) > 10  # It arrives word by word.
    demo.send_signal(signal.SIGINT)
    assert "Traceback" not in (await asyncio.to_thread(demo.communicate, timeout=30))[1]
    assert demo.returncode == 0
    assert len(list(Path("debug-requests").iterdir())) == 2


@cases(
    "arguments, words",
    ("a missing file", "--config no.yaml", "no.yaml.*--demo"),
    ("an unset variable", "", "export KEY.*--demo"),
    ("an unknown host", "--demo --host bogus.invalid", "bogus.invalid"),
    ("an open address", "--demo --host 0.0.0.0 --port 0", "api_key"),
    ("a busy port", "--demo --port BUSY", "BUSY"),
    ("a port that is none", "--demo --port 99999", "port"),
    ("no trace folder", "--demo --port 0 --debug-requests config.yaml", "config.yaml"),
)
def test_what_keeps_the_server_from_starting_is_one_line_and_exit_code_2(start, arguments, words):
    Path("config.yaml").write_text(A_WITH % "api_key: '${KEY}', model: '${KEY}'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = start(*arguments.replace("BUSY", port).split())
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(f".*{words.replace('BUSY', port)}.*\n", err)


@cases("number", ("Ctrl-C", signal.SIGINT), ("SIGTERM", signal.SIGTERM), ("a second Ctrl-C", 0))
async def test_a_server_says_what_it_serves_and_ends_after_its_last_request(start, upstream, number):
    config = "server: {port: 1, api_key: '${MOM_API_KEY}'}\n" + TWO.replace("http://x/v1", upstream.url)
    config += "mixtures: [{name: смесь, models: [a, b], critic: [b, a]}]"  # case 28
    Path("own.yaml").write_text(config, "utf-8")
    arguments = ("--config", "own.yaml", "--host", "127.0.0.1", "--port", "0")
    server = start(*arguments, MOM_API_KEY="sk-mine-1", PYTHONIOENCODING="cp1252")
    text, address = await start_text(server)
    assert f"{address}/v1\n" in text
    assert re.search(r"a, b\b.*\bb, a\n(.*\n)*curl.*\$MOM_API_KEY", text)
    assert "sk-mine-1" not in text
    release = asyncio.Event()
    upstream.replies = {"a": [hangs, sends(lambda _: release.wait(), HELLO, END, DONE)]}
    async with aiohttp.ClientSession(address, headers={"Authorization": "Bearer sk-mine-1"}) as session:
        gateway = Gateway(session, upstream)
        await gateway.abandon(model="a")
        running = asyncio.create_task(gateway.ask(model="a", stream=True))
        await eventually(lambda: upstream.running)
        server.send_signal(number or signal.SIGINT)
        with pytest.raises(aiohttp.ClientError):  # There are no new connections.
            while (await gateway.request("GET", "/health")).status == 200:
                await asyncio.sleep(0.01)
        if not number:
            server.send_signal(signal.SIGINT)
            await asyncio.to_thread(server.wait, 8)
            with pytest.raises(aiohttp.ClientError):
                await running
            return
        await asyncio.sleep(0.3)  # The request goes on, although the server is stopping.
        release.set()
        assert (await running).text == "naïve"
    assert "Traceback" not in (await asyncio.to_thread(server.communicate, timeout=30))[1]
    assert server.returncode == 0


# --- Clients that leave, and faults at random ---
@cases(
    "model, reply",
    ("in the fan-out", "a", hangs),
    ("in a back-off", "a", refuses(503, wait="60")),
    ("in the critic's call", "critic", hangs),
    ("in the answer", "critic", sends(HELLO, hangs)),
)
async def test_a_client_that_goes_away_ends_all_upstream_calls(start_gateway, upstream, model, reply, stream):
    gateway = await start_gateway({model: reply}, traces="traces")
    request = asyncio.create_task(gateway.ask(stream=stream))
    await eventually(lambda: upstream.requests_to(model))
    await asyncio.sleep(0.1)
    request.cancel()
    await eventually(lambda: upstream.running == 0 and list(Path("traces").iterdir()), seconds=3)
    assert (await trace_of())["outcome"] == "abandoned"
    assert len(upstream.requests_to(model)) == 1


async def test_a_request_that_has_ended_leaves_no_garbage(start_gateway, upstream, stream):
    gateway = await start_gateway(mixture={"grace": 0.05})
    fields = {"mark_of_a_request": [1], "stream": stream}

    def is_left(thing):  # a request as the gateway got it; what the upstream got has a model, too
        return type(thing) is dict and thing.keys() == {"messages", *fields}

    gc.collect()
    gc.disable()
    try:
        scripts = [{"b": hangs}, {"critic": sends(HELLO, breaks_off)}]  # b is cut off by the grace
        scripts += [dict.fromkeys(ALL, reply) for reply in (refuses(500), breaks_off, sends(b"data: {\n\n"))]
        for upstream.replies in scripts:
            await gateway.ask(**fields)
            await gateway.ask(TOOL_TURN, **fields)
        upstream.replies = {"c": hangs}
        if not aiohttp.__version__.startswith("3.10."):  # It keeps every cancelled handler itself.
            await gateway.abandon(**fields)
        upstream.requests.clear()
        await eventually(lambda: not any(map(is_left, gc.get_objects())))
    finally:
        gc.enable()


def random_reply(dice):
    good = [says("fine"), says({"content": None, "tool_calls": [CALL]}), sends(0.02, HELLO, END, DONE)]
    bad = [refuses(429, wait="0"), refuses(500), refuses(400), hangs, says(""), sends(b"data: {oops\n\n")]
    bad += [breaks_off, sends(HELLO, breaks_off), sends(b"\xff")]
    return dice.choice(good if dice.random() < 0.6 else bad)


async def test_with_random_faults_every_client_gets_one_well_formed_outcome(start_gateway, upstream, caplog):
    dice = random.Random(7)
    replies = {name: [random_reply(dice) for _ in range(1000)] for name in ALL}
    settings = {"mixture": {"grace": 0.02}, "every_model": {"timeout": 0.25, "retries": 1}}
    gateway = await start_gateway(replies, **settings)
    statuses = []

    async def visit():
        for _ in range(10):
            patience = 0.03 if dice.random() < 0.2 else 60
            with contextlib.suppress(TimeoutError):
                answer = await asyncio.wait_for(gateway.ask(stream=dice.random() < 0.5), patience)
                assert len(answer.finish_reasons) == (0 if answer.error else 1)
                statuses.append(answer.status)

    await asyncio.gather(*[visit() for _ in range(30)])
    await eventually(lambda: upstream.running == 0)
    # A task that was cancelled needs one more turn of the loop.
    await eventually(lambda: not [task for task in asyncio.all_tasks() if "/mom_gateway.py" in repr(task)])
    assert 150 < len(statuses) < 300  # The others have left.
    assert {200} <= set(statuses) <= {200, 400, 429, 502, 504}
    assert not any(record.exc_info for record in caplog.records if record.name == "mom_gateway")
