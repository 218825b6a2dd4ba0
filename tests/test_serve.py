"""The live page's server: who may ask, what is told while a model works, and that it survives what goes wrong."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
import torch
from starlette.testclient import TestClient
from typer.testing import CliRunner

from flashtrace_plugin import Attribution, FlashTrace, InputError, Recommended, reasoner
from flashtrace_plugin.cli.app import app as command_line
from flashtrace_plugin.serve import engine as engines
from flashtrace_plugin.serve.app import live_page
from flashtrace_plugin.serve.engine import Limits
from flashtrace_plugin.serve.guard import HEADERS, Address
from flashtrace_plugin.serve.jobs import Jobs
from flashtrace_plugin.serve.questions import FORMAT, prompt_of, read_question
from flashtrace_plugin.serve.run import serve

ORIGIN = {"origin": "http://localhost"}
PROMPT = "v55 v20 ; the grass is green . v7 84 ; v20 12 ; v3 9 ; ? v55 think"
GENERATION = "<think> v55 v20 ; v20 12 ; </think> 12"
TEXT = {"fields": [{"kind": "text", "text": PROMPT}], "generation": GENERATION}


@pytest.fixture(scope="module")
def loaded():
    return reasoner.load()


def client_of(loaded, limits=None, address=None):
    app = live_page(*loaded, address or Address("127.0.0.1"), limits)
    return TestClient(app, base_url="http://localhost", headers=ORIGIN)


@pytest.fixture(scope="module")
def client(loaded):
    with client_of(loaded) as made:
        yield made


def events(client, path, **data):
    answer = client.post(path, json=data)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def last(client, path, **data):
    return events(client, path, **data)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Who may ask
# ---------------------------------------------------------------------------------------------------------------------


def test_everything_is_served_from_here_and_forbidden_from_elsewhere(client):
    for path in ("/", "/page.js", "/stream.js", "/compose.js", "/text.js", "/page.css", "/colours.css", "/info"):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert "innerHTML" not in answer.text and "http" not in answer.text.replace("http-equiv", "")
    assert client.get("/nothing").status_code == 404
    assert client.get("/../engine.py").status_code == 404
    assert "default-src 'none'" in HEADERS["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "192.168.0.7"}, 421),
        ({"host": ""}, 421),
        ({"host": "localhost.evil.example"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "http://localhost:9"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-length": str(1 << 40)}, 413),
    ],
)
def test_requests_of_other_pages_are_refused(client, headers, status):
    answer = client.post("/open", content=b"{}", headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status
    assert answer.json()["error"] and "Content-Security-Policy" in answer.headers


def test_hosts():
    assert all(Address("127.0.0.1").knows(host) for host in ("localhost:80", "127.0.0.1", "[::1]:8321", "127.0.0.2"))
    assert not any(Address("localhost").knows(host) for host in ("10.0.0.1", "example.org", "", "0.0.0.0"))
    outside = Address.of("0.0.0.0")
    assert all(outside.knows(host) for host in ("10.0.0.1:8", "[fe80::1]", "localhost", "0.0.0.0"))
    assert not outside.knows("example.org")


def test_others_need_the_token(loaded):
    address = Address.of("0.0.0.0")
    assert len(address.token) >= 32 and Address.of("0.0.0.0").token != address.token
    assert Address.of("127.0.0.1").token == Address.of("::1").token == "" != Address.of("localhost", token=True).token
    client = client_of(loaded, address=address)
    for path in ("/", "/info", "/page.js", f"/{address.token}x/", f"/{address.token[:-1]}/", "/é/"):
        assert client.get(path).status_code == 403, path
    assert client.get(address.base).status_code == client.get(f"{address.base}info").status_code == 200
    assert client.post(f"{address.base}open", json={}, headers={"origin": "http://evil"}).status_code == 403


# ---------------------------------------------------------------------------------------------------------------------
# What it answers
# ---------------------------------------------------------------------------------------------------------------------


def test_the_model_writes_word_by_word_and_its_own_tokens_are_explained(client, loaded):
    told = events(client, "/write", **TEXT | {"new_tokens": 40})
    assert told[0]["event"] == "started" and told[-1]["event"] == "wrote"
    pieces = [event["text"] for event in told if event["event"] == "written"]
    assert len(pieces) > 5 and "".join(pieces).startswith(told[-1]["generation"].strip())
    assert told[-1]["generation"].strip() == reasoner.answer(*loaded, PROMPT) and not told[-1]["full"]
    exact = {"ids": told[-1]["ids"], "prompt_length": told[-1]["prompt_length"]}
    found = last(client, "/explain", **TEXT | exact)
    expected = Recommended(*loaded).attribute_ids(torch.tensor(exact["ids"]), prompt_length=exact["prompt_length"])
    assert found["target"] == [expected.target.start, expected.target.stop]
    shown = torch.tensor(found["values"][: exact["prompt_length"]])
    torch.testing.assert_close(shown, expected.scores_without_sinks, rtol=1e-2, atol=1e-4)
    assert events(client, "/write", **TEXT | {"new_tokens": 3})[-1]["full"]


def test_a_new_target_costs_no_pass(client):
    first = events(client, "/explain", **TEXT, method="flashtrace")
    assert [event["event"] for event in first] == ["started", "text", "found"]
    assert "".join(first[1]["tokens"][: first[1]["prompt_length"]]) == PROMPT
    again = last(client, "/explain", **TEXT, method="flashtrace", target=[24, 26])
    by_text = last(client, "/explain", **TEXT, method="flashtrace", target="12 ;")
    assert again["ms"]["passes"] == by_text["ms"]["passes"] == 0 and again["ms"]["pass"] == 0 < again["ms"]["hops"]
    assert by_text["target_text"] == "12 ;"
    other = last(client, "/explain", **TEXT, method="ifr")
    assert other["method"] == "ifr" and other["ms"]["passes"] == 0


def test_units_add_up_and_know_their_tokens(client, loaded):
    fields = [
        {"kind": "document", "text": "the grass is green . v7 84 ;"},
        {"kind": "text", "text": "v20 12 ; ? v20 think"},
    ]
    told = events(client, "/explain", fields=fields, generation="<think> v20 12 ; </think> 12", method="flashtrace")
    found, tokens = told[-1], told[1]["tokens"]
    for units in (found["units"]["sentence"], found["units"]["field"]):
        assert sum(unit["share"] for unit in units) == pytest.approx(1, abs=1e-5)
        for unit in units:
            assert "".join(tokens[slice(*unit["tokens"])]).strip().startswith(unit["text"][:5])
    assert [unit["name"] for unit in found["units"]["field"]] == ["Document 1", "Text 1"]
    assert found["units"]["step"] and last(client, "/explain", **TEXT)["units"]["field"] is None


def test_fields_become_messages_or_one_text():
    fields = [
        ("system", "Be brief."),
        ("document", "A."),
        ("document", "B."),
        ("user", "Q?"),
        ("assistant", ""),
        ("user", " "),
    ]
    data = {"fields": [{"kind": kind, "text": text} for kind, text in fields]}
    assert prompt_of(read_question(data)) == "Be brief.\n\nA.\n\nB.\n\nQ?"
    messages = prompt_of(read_question(data | {"chat": True}))
    assert messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A.\n\nB.\n\nQ?"}]
    assert list(read_question(data).named_fields) == ["System 1", "Document 1", "Document 2", "User 1"]


def test_chat_messages(client, loaded):
    fields = [{"kind": "document", "text": "v7 84 ; v20 12 ;"}, {"kind": "user", "text": "? v20"}]
    told = events(client, "/write", fields=fields, chat=True)
    assert told[-1]["event"] == "wrote"
    exact = {name: told[-1][name] for name in ("ids", "prompt_length")}
    found = last(client, "/explain", fields=fields, chat=True, generation=told[-1]["generation"], **exact)
    assert [unit["name"] for unit in found["units"]["field"]] == ["Document 1", "User 1"]


def test_saved_files_come_back(client, loaded):
    found = last(client, "/explain", **TEXT, method="flashtrace", target="12 ;", full=True)
    saved = Attribution.from_dict(found["attribution"])
    expected = FlashTrace(*loaded).attribute(PROMPT, GENERATION, target="12 ;")
    torch.testing.assert_close(saved.hop_scores, expected.hop_scores, rtol=1e-4, atol=1e-5)
    opened = client.post("/open", json=found["attribution"]).json()
    assert opened["found"]["values"] == found["values"] and opened["other_model"] is None
    again = last(
        client, "/explain", **{k: v for k, v in opened["sample"].items() if k != "method"}, method="flashtrace"
    )
    assert again["values"] == found["values"] and again["ms"]["passes"] == 0
    changed = found["attribution"] | {"settings": found["attribution"]["settings"] | {"model": "<b>other"}}
    assert client.post("/open", json=changed).json()["other_model"] == "<b>other"
    sample = {"format": FORMAT, **TEXT, "target": [24, 26], "method": "ifr"}
    assert client.post("/open", json=sample).json()["sample"]["target"] == [24, 26]


@pytest.mark.parametrize(
    ("path", "data", "told"),
    [
        ("/open", [], "neither"),
        ("/open", {"format": FORMAT}, "fields must be a list"),
        ("/open", {"format": "flashtrace-attribution/1"}, "lacks scores"),
        ("/explain", 7, "expected an object"),
        ("/explain", {"fields": ["x"]}, "field 0"),
        ("/explain", {"fields": [{"kind": "robot", "text": ""}]}, "must have a kind"),
        ("/explain", TEXT | {"target": [3]}, "target must be"),
        ("/explain", TEXT | {"target": [5, 2]}, "span 5:2"),
        ("/explain", TEXT | {"chat": "yes"}, "chat must be bool"),
        ("/explain", TEXT | {"ids": [1, -4]}, "ids must be a list"),
        ("/write", {"fields": {}}, "fields must be a list"),
    ],
)
def test_what_is_wrong_is_told(client, path, data, told):
    answer = client.post(path, json=data)
    assert answer.status_code == 400 and told in answer.json()["error"]


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [float("nan")] * 16},
        {"tokens": ["a"]},
        {"tokens": [7] * 26},
        {"token_ids": []},
        {"target": [400, 500]},
        {"target": [3, 2]},
        {"prompt": [4, 9]},
        {"hop_scores": {"shape": [1e12]}},
        {"settings": 5},
        {"closure_error": float("inf")},
        {"components": []},
    ],
)
def test_damaged_attributions(client, loaded, change):
    saved = FlashTrace(*loaded).attribute(PROMPT, GENERATION).to_dict() | change
    body, headers = json.dumps(saved), {"content-type": "application/json"}
    answer = client.post("/open", content=body, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]


def test_damaged_json(client):
    headers = {"content-type": "application/json"}
    for body in (b"{", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 6000 + b"}"):
        answer = client.post("/open", content=body, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "data", "told"),
    [
        ("/explain", TEXT | {"target": "banana"}, "occurs 0 times"),
        ("/explain", TEXT | {"method": "banana"}, "method must be one of"),
        ("/explain", TEXT | {"generation": " "}, "generation is empty"),
        ("/explain", TEXT | {"fields": []}, "prompt is empty"),
        ("/explain", TEXT | {"target": [400, 401]}, "outside"),
        ("/explain", TEXT | {"ids": [1, 2, 99999999], "prompt_length": 1}, "vocabulary"),
        ("/explain", TEXT | {"generation": "<think> v55"}, "no </think>"),
        ("/write", {"fields": []}, "prompt is empty"),
        ("/write", TEXT | {"new_tokens": 0}, "allowed"),
    ],
)
def test_errors_of_a_job_are_told_and_the_next_one_runs(client, path, data, told):
    assert told in last(client, path, **data)["message"]
    assert last(client, "/explain", **TEXT, method="flashtrace")["event"] == "found"


def test_limits(loaded):
    with client_of(loaded, Limits(tokens=25, new_tokens=4, request=3000, texts=1, cost=5)) as client:
        assert "25 are allowed" in last(client, "/explain", **TEXT)["message"]
        short = {"fields": [{"kind": "text", "text": "v7 84 ; ? v7 think"}]}
        assert len(last(client, "/write", **short)["ids"]) <= 6 + 4
        assert client.post("/open", json={"a": "x" * 4000}).status_code == 413
        whole = short | {"generation": "<think> v7 84 ; </think> 84"}
        assert "forward passes" in last(client, "/explain", **whole, method="heta")["message"]
        assert client.get("/info").json()["limits"] == {"tokens": 25, "new_tokens": 4}


def test_only_the_last_texts_are_kept(loaded):
    engine = engines.Engine(*loaded, Limits(texts=2))
    with TestClient(live_page(*loaded, Address("localhost")), base_url="http://localhost", headers=ORIGIN):
        told = []

        class Listening:
            def tell(self, event, **parts):
                told.append({"event": event, **parts})

            def check(self):
                pass

        texts = [TEXT | {"method": "flashtrace", "generation": GENERATION.replace("12", n)} for n in ("12", "9", "84")]
        for text in (*texts, texts[2], texts[0]):
            engine.explain(Listening(), read_question(text))
    passes = [event["ms"]["passes"] for event in told if event["event"] == "found"]
    assert passes == [1, 1, 1, 0, 1] and len(engine._recordings) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------


def gathered(*works, most=32, leave=None):
    """The events of several jobs that are asked for at once; the listener ``leave`` goes after its first event."""

    async def listen(jobs, i, work):
        told = []
        running = jobs.run(work)
        async for event in running:
            told.append(event)
            if i == leave:
                break
        await running.aclose()
        return told

    async def all_of():
        jobs = Jobs(most)
        try:
            return await asyncio.gather(*(listen(jobs, i, work) for i, work in enumerate(works)))
        finally:
            jobs.stop()

    return asyncio.run(all_of())


def test_one_at_a_time_and_the_others_know_their_place():
    running = []

    def work(job):
        running.append(1)
        assert len(running) == 1
        time.sleep(0.05)
        running.pop()
        job.tell("found")

    first, second, third = gathered(work, work, work)
    assert [event["event"] for event in first] == ["started", "found"]
    assert {"event": "queue", "ahead": 1} in second
    assert third[0] == {"event": "queue", "ahead": 2} and {"event": "queue", "ahead": 1} in third
    assert third[-1] == {"event": "found"}


def test_too_many_are_refused():
    told = gathered(*[lambda job: time.sleep(0.05)] * 5, most=2)
    assert "waiting already" in told[-1][0]["message"]


def test_whoever_leaves_cancels():
    seen = []

    def long(job):
        for _ in range(1000):
            job.tell("written")
            job.check()
            time.sleep(0.01)
        seen.append("to the end")

    told = gathered(long, lambda job: job.tell("found"), leave=0)
    assert not seen and told[1][-1] == {"event": "found"}
    gathered(long, lambda job: seen.append("never"), leave=0)
    gathered(lambda job: time.sleep(0.1), lambda job: seen.append("waited in vain"), leave=1)
    assert seen == ["never"]


def test_errors_do_not_end_the_thread(capsys):
    def out_of_memory(job):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 40 GiB")

    def defect(job):
        raise KeyError("layer")

    def refused(job):
        raise InputError("no")

    told = gathered(out_of_memory, defect, refused, lambda job: job.tell("found"))
    assert "not enough memory for this (CUDA out of memory. Tried to allocate 40 GiB)" in told[0][-1]["message"]
    assert "KeyError: 'layer'. This is a defect" in told[1][-1]["message"]
    assert told[2][-1]["message"] == "no" and told[3][-1] == {"event": "found"}
    assert "in defect" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/write", "/explain"])
def test_a_cancelled_model_really_stops(loaded, monkeypatch, path):
    engine = engines.Engine(*loaded, Limits())
    job, told = threading.Event(), []

    class Leaving:
        cancelled = job

        def tell(self, event, **parts):
            told.append(event)
            if event in ("written", "text"):
                job.set()

        def check(self):
            if job.is_set():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        (engine.write if path == "/write" else engine.explain)(Leaving(), read_question(TEXT | {"new_tokens": 400}))
    assert told.count("written") <= 3 and "wrote" not in told and "found" not in told


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_says_where_and_refuses_a_port_that_is_taken(loaded, monkeypatch):
    shown = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: shown.append(sockets[0].getsockname()))
    answer = CliRunner().invoke(command_line, ["serve", "--port", "0"])
    assert answer.exit_code == 0, answer.output
    assert f"Open http://localhost:{shown[0][1]}/ " in answer.output and shown[0][0] == "127.0.0.1"
    serve(*loaded, host="0.0.0.0", port=0, ready=shown.append)
    assert shown[1].startswith("http://0.0.0.0:") and len(shown[1].split("/")[3]) >= 32
    with pytest.raises(InputError, match="port 99999"):
        serve(*loaded, port=99999)
