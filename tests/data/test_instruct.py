"""Instruction data: prompts, what is accepted of the answers, servers that misbehave, and going on."""

import collections
import email.utils
import http.server
import json
import threading
import time

import pytest
from helpers import Memory, caption, encoded, picture

from vlmjax import instruct as command
from vlmjax.data import instruct
from vlmjax.data.instruct_answers import Rejected, conversation, read
from vlmjax.data.instruct_models import Answer, Endpoint, Recorded, Unanswered
from vlmjax.data.instruct_prompts import (
    DETAIL_QUESTIONS,
    KINDS,
    context_of,
    detail_question,
    kind_of,
    messages,
)
from vlmjax.data.record import Record
from vlmjax.data.scenes import open_scenes
from vlmjax.data.sources import open_source
from vlmjax.errors import BadRecord, DataError

TALK = "Question:\nWhat is it?\n===\nAnswer:\nA star.\n===\nQuestion:\nBig?\n===\nAnswer:\nNo, small.\n===\n"
LONG = " ".join(["a red star stands left of a blue square"] * 4) + "."
GOOD = {"conversation": TALK, "detail": LONG, "reasoning": f"Question:\nWhy?\n===\nAnswer:\n{LONG}\n==="}


def boxed(count: int) -> Memory:
    box = {"category": "dog", "box": [0.1, 0.25, 0.5, 0.98765]}
    return Memory(
        [Record(f"p/{i}.png", encoded(picture(i)), (caption(i),), {"boxes": [box]}) for i in range(count)]
    )


def test_kinds_follow_the_weights_and_the_key_alone():
    keys = [f"k{i}" for i in range(6000)]
    found = collections.Counter(kind_of(key, KINDS) for key in keys)
    for kind, weight in KINDS.items():
        assert abs(found[kind] / 6000 - weight / 158) < 0.02
    assert [kind_of(key, KINDS) for key in keys[:50]] != [kind_of(key, KINDS, 1) for key in keys[:50]]
    assert {detail_question(key) for key in keys[:200]} == set(DETAIL_QUESTIONS)
    assert kind_of("k", {"conversation": 0, "detail": 3}) == "detail"
    assert instruct.parse_kinds("detail:1,conversation:0") == {"detail": 1, "conversation": 0}
    for bad in ("detail", "detail:x", "poem:3", "detail:0", ""):
        with pytest.raises(DataError, match="--kinds"):
            instruct.parse_kinds(bad)


def test_prompts_hold_what_is_known():
    context = context_of(boxed(1)[0])
    for kind in KINDS:
        asked = messages(context, kind)
        assert [one["role"] for one in asked] == ["system", "user", "assistant", "user"]
        assert asked[-1]["content"].startswith(caption(0))
        assert ("dog: [0.100, 0.250, 0.500, 0.988]" in asked[-1]["content"]) == (kind != "conversation")
        assert read(kind, asked[2]["content"], "q")  # the worked example is what would be accepted
    drawn = context_of(open_scenes("scenes", image_size=32)[3])
    assert drawn.boxes and all(0 <= edge <= 1 for _, box in drawn.boxes for edge in box) and drawn.captions
    for record in (
        Record("k", b"", ()),
        Record("k", b"", ("c",), {"boxes": [{"category": "x", "box": [3, 1]}]}),
    ):
        with pytest.raises(BadRecord):
            context_of(record)


def test_answers_are_read():
    assert read("conversation", TALK) == [("What is it?", "A star."), ("Big?", "No, small.")]
    assert read(
        "conversation", TALK.replace("\n===\n", "\n\n=====\n\n").replace("Question:", "question :")
    ) == read("conversation", TALK)
    for question in DETAIL_QUESTIONS:
        assert read("detail", f" {LONG}\n", question) == [(question, LONG)]
    said = conversation([("q", "a"), ("q2", "a2")], True)
    assert [turn["value"] for turn in said] == ["<image>\nq", "a", "q2", "a2"]
    assert conversation([("q", "a")], False)[0] == {"from": "human", "value": "q\n<image>"}


@pytest.mark.parametrize(
    ("kind", "response", "reason"),
    [
        ("conversation", " \n", "empty"),
        ("conversation", "A star, I think.", "form"),
        ("conversation", "Answer:\nA star.\n===", "form"),
        ("conversation", "Question:\nWhat?\n===\nQuestion:\nBig?\n===\nAnswer:\nNo.\n===", "unequal"),
        ("conversation", TALK + "Question:\nAnd?\n===", "unequal"),
        ("conversation", TALK.replace("A star.", ""), "empty_turn"),
        ("conversation", TALK.replace("A star.", "The caption says a star."), "leak"),
        ("conversation", TALK.replace("A star.", "At [0.1, 0.2, 0.3, 0.4]."), "leak"),
        ("conversation", TALK.replace("A star.", "The provided descriptions name a star."), "leak"),
        ("conversation", TALK.replace("A star.", "I'm sorry, I cannot see it."), "refusal"),
        ("conversation", TALK.replace("A star.", "<image>"), "mark"),
        ("conversation", TALK.replace("Big?", "What is it?"), "repeated"),
        ("detail", "A red star.", "short"),
        ("detail", LONG + " As an AI language model I stop.", "refusal"),
        ("reasoning", TALK, "rounds"),
        ("reasoning", "Question:\nWhy?\n===\nAnswer:\nBecause.\n===", "short"),
    ],
)
def test_answers_are_refused(kind, response, reason):
    with pytest.raises(Rejected) as caught:
        read(kind, response, "Describe.")
    assert caught.value.reason == reason


class Server(http.server.ThreadingHTTPServer):
    """Speaks OpenAI's protocol and does what `script` says, request by request: a status, or a word for a mischief."""

    daemon_threads = True

    def __init__(self, script=(), answer=lambda body: GOOD["conversation"]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.answer, self.seen, self.lock = list(script), answer, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Silent."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, body, dict(self.headers)))
            what = self.server.script.pop(0) if self.server.script else 200
        if what == "slow":
            time.sleep(0.6)
            return
        if what == "hangup":
            self.close_connection = True
            return
        status, extra, data = what if isinstance(what, tuple) else (what, {}, None)
        if data is None:
            choice = {
                "message": {"role": "assistant", "content": self.server.answer(body)},
                "finish_reason": "stop",
            }
            data = json.dumps({"choices": [choice]}).encode() if status == 200 else b'{"error": "no"}'
        self.send_response(status)
        for name, value in extra.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(name="serve")
def _serve():
    servers = []

    def serve(*script, **options):
        servers.append(Server(script, **options))
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(server: Server, waits: list | None = None, **options) -> Endpoint:
    return Endpoint(
        server.url, "m", timeout=0.3, sleep=(waits if waits is not None else []).append, **options
    )


MANY = (
    "slow", "hangup", 429, 500, 503, (200, {}, b"<html>"), (200, {}, b'{"choices": []}'),
    (200, {}, b'{"choices": [{"message": {"content": 3}}]}'), (200, {}, b"[" * 9999),
)  # fmt: skip


def test_an_endpoint_is_asked_again(serve):
    server, waits = serve(*MANY), []
    ask = endpoint(server, waits, attempts=len(MANY) + 1, wait=0.5, api_key="secret")
    assert ask([{"role": "user", "content": "hi"}], "k", "detail") == Answer(TALK)
    assert len(server.seen) == len(MANY) + 1 and len(waits) == len(MANY)
    assert all(0.3 * 2**n < wait < 0.7 * 2**n for n, wait in enumerate(waits[:6])) and max(waits) <= 75
    path, body, headers = server.seen[-1]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "m" and body["messages"] == [{"role": "user", "content": "hi"}]
    assert "secret" not in repr(ask)


def test_a_server_says_how_long_to_wait(serve):
    later, waits = email.utils.formatdate(time.time() + 30, usegmt=True), []
    server = serve(*((429, {"Retry-After": value}, None) for value in ("7", later, "99999", "soon", "-3")))
    endpoint(server, waits)([], "k", "detail")
    assert waits[0] == 7 and 20 < waits[1] <= 30 and waits[2] == 600 and waits[3] < 20 and waits[4] == 0


def test_an_endpoint_that_does_not_answer(serve):
    with pytest.raises(Unanswered, match="3 tries: HTTP 500"):
        endpoint(serve(500, 500, 500), attempts=3)([], "k", "detail")
    with pytest.raises(DataError, match=r"refuses model 'm': HTTP 401.*check --endpoint"):
        endpoint(serve((401, {}, b"no such key")))([], "k", "detail")
    cut = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}).encode()
    assert endpoint(serve((200, {}, cut)))([], "k", "detail") == Answer("", True)


class Scripted:
    """A model that answers by kind; keys in `bad` get nonsense, in `silent` nothing."""

    def __init__(self, bad=(), silent=()):
        self.bad, self.silent, self.asked, self.lock = set(bad), set(silent), [], threading.Lock()

    def __call__(self, asked, key, kind):
        with self.lock:
            self.asked.append(key)
        if key in self.silent:
            raise Unanswered("away")
        return Answer("nonsense" if key in self.bad else GOOD[kind])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_written_and_read_back(tmp_path):
    source, out = boxed(12), tmp_path / "talk.jsonl"
    source.entries[5] = BadRecord("bad_row", "p/5.png")
    source.entries[6] = Record("p/6.png", b"no image", (caption(6),))
    job = instruct.Job(str(out), image_folder=str(tmp_path / "images"), workers=3)
    model = Scripted(bad={"p/2.png"}, silent={"p/3.png"})
    counts = instruct.write(source, model, job, range(12))
    rows, rejects = lines(out), lines(tmp_path / "talk.jsonl.rejects")
    assert [row["id"] for row in rows] == [f"p/{i}.png" for i in (0, 1, 4, *range(7, 12))]
    assert {row["id"] for row in rejects} == {"p/2.png", "p/6.png"} and rejects[0]["response"] == "nonsense"
    assert counts["written"] == 8 and counts["unanswered"] == 1 and counts["bad record/bad_row"] == 1
    assert sum(n for name, n in counts.items() if name.startswith("rejected/")) == 2
    assert json.loads((tmp_path / "talk.jsonl.counts").read_text()) == counts
    for row in rows:
        assert row["kind"] == kind_of(row["id"], KINDS)
        assert sum(turn["value"].count("<image>") for turn in row["conversations"]) == 1
    back = open_source(str(out))
    assert [back[i].image for i in range(8)] == [source[int(r["id"][2:-4])].image for r in rows]
    assert back[0].extra["conversations"] == rows[0]["conversations"]


def test_going_on_asks_only_what_is_left(tmp_path):
    source, out = boxed(30), tmp_path / "talk.jsonl"
    whole, parts = Scripted(bad={"p/2.png"}), Scripted(bad={"p/2.png"}, silent={"p/4.png"})
    instruct.write(source, whole, instruct.Job(str(tmp_path / "whole.jsonl")), range(30))
    job = instruct.Job(str(out), workers=2)
    instruct.write(source, parts, job, range(9))
    kept = out.read_text()
    out.write_text(kept + '{"id": "p/9.png", "image"')  # killed in the middle of a line
    parts.silent.clear()
    parts.asked.clear()
    counts = instruct.write(source, parts, job, range(30))
    assert sorted(parts.asked) == sorted(["p/4.png", *(f"p/{i}.png" for i in range(9, 30))])
    assert counts["done before"] == 8
    assert sorted(out.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())
    parts.bad.clear()
    parts.asked.clear()
    instruct.write(source, parts, instruct.Job(str(out), retry_rejects=True), range(30))
    assert parts.asked == ["p/2.png"] and len(lines(out)) == 30
    with pytest.raises(DataError, match="not a file of this command"):
        (tmp_path / "other.jsonl").write_text("3\n")
        instruct.write(source, parts, instruct.Job(str(tmp_path / "other.jsonl")), range(3))


def test_a_model_that_is_not_there_stops_the_run(tmp_path):
    model = Scripted(silent={f"p/{i}.png" for i in range(30)})
    with pytest.raises(DataError, match="no answer to 20 requests in a row, the last: away"):
        instruct.write(boxed(30), model, instruct.Job(str(tmp_path / "x.jsonl")), range(30))


def test_the_command(tmp_path, serve, capsys):
    def answer(body):
        asked = body["messages"][0]["content"]
        kind = next(
            k
            for k, word in (
                ("detail", "as fully"),
                ("reasoning", "takes thinking"),
                ("conversation", "rounds"),
            )
            if word in asked
        )
        return GOOD[kind]

    server, out, kept = serve(500, answer=answer), tmp_path / "a.jsonl", tmp_path / "kept.jsonl"
    common = ["scenes", "--limit=12", "--workers=2"]
    asked = [f"--endpoint={server.url}", "--model=m", f"--record={kept}", f"--images={tmp_path / 'i'}"]
    command.main([*common, f"--out={out}", *asked])
    assert "12  written" in capsys.readouterr().out and len(lines(out)) == 12
    assert len(server.seen) == 13 and "Authorization" not in server.seen[0][2]
    command.main(
        [*common, f"--out={tmp_path / 'b.jsonl'}", f"--recorded={kept}", f"--images={tmp_path / 'i'}"]
    )
    assert (tmp_path / "b.jsonl").read_text() == out.read_text()
    command.main([*common, f"--prompts={tmp_path / 'p.jsonl'}"])
    assert lines(tmp_path / "p.jsonl")[3]["messages"] in [body["messages"] for _, body, _ in server.seen]
    assert len(open_source(str(out))) == 12
    for wrong, message in ((common, "--out is not given"), ([*common, "--out=x"], "nobody to ask")):
        with pytest.raises(SystemExit) as caught:
            command.main(wrong)
        assert caught.value.code == 1 and message in capsys.readouterr().err


def test_recorded_files(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": 7, "kind": "detail", "response": "x", "cut": true}\n')
    assert Recorded(str(path))([], "7", "detail") == Answer("x", True)
    with pytest.raises(Unanswered, match="no response of kind reasoning"):
        Recorded(str(path))([], "7", "reasoning")
    for words, message in (("{", "no jsonl"), ("3", "row 1 lacks")):
        path.write_text(words)
        with pytest.raises(DataError, match=message):
            Recorded(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        Recorded(str(tmp_path / "none"))
