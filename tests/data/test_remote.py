"""Shards that are elsewhere: a bucket in memory, and a web server that misbehaves."""

import gzip
import hashlib
import http.server
import os
import pathlib
import pickle
import sys
import threading
import time

import numpy as np
import pytest
from helpers import caption, encoded, picture, shard, write_tar

from vlmjax.data import index
from vlmjax.data.record import Record
from vlmjax.data.sources import open_source
from vlmjax.data.storage import remote, shard_cache, shards
from vlmjax.errors import BadRecord, DataError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VLMJAX_CACHE", str(folder))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    fsspec.filesystem("memory").store.clear()
    return folder


def bucket(tmp_path, count: int = 4, each: int = 3, indexed: bool = True) -> str:
    """Shards in memory://bucket; returns the pattern."""
    memory = fsspec.filesystem("memory")
    for i in range(count):
        local = shard(tmp_path / f"x-{i}.tar", i * each, each)
        memory.pipe(f"/bucket/x-{i}.tar", local.read_bytes())
        if indexed:
            index.main([str(local)])
            memory.pipe(f"/bucket/x-{i}.tar.index", (tmp_path / f"x-{i}.tar.index").read_bytes())
    return f"memory://bucket/x-{{0..{count - 1}}}.tar"


def opened(monkeypatch) -> list[str]:
    """Names of the remote files that are read from now on."""
    seen, real = [], remote.open_stream
    monkeypatch.setattr(remote, "open_stream", lambda url: seen.append(url.rpartition("/")[2]) or real(url))
    return seen


def copies(cache) -> set[str]:
    return (
        {path.name.partition("-")[2] for path in (cache / "shards").iterdir()}
        if (cache / "shards").is_dir()
        else set()
    )


def used(cache) -> int:
    """Bytes in the cache, while nobody makes room in it."""
    with shard_cache._locked_folder(cache / "shards") as entries:
        return sum(size for _, _, size in shard_cache._stamped(entries))


def test_an_index_beside_saves_the_download(tmp_path, cache, monkeypatch):
    spec, seen = bucket(tmp_path), opened(monkeypatch)
    source = open_source(spec)
    assert len(source) == 12 and source.key(11) == "000011" and source.column("width").tolist() == [48] * 12
    assert sorted(seen) == [f"x-{i}.tar.index" for i in range(4)] and copies(cache) == set()
    assert source.blocks.tolist() == [3, 6, 9, 12] and source.blocks.dtype == np.int64
    seen.clear()
    again = pickle.loads(pickle.dumps(open_source(spec)))
    assert (
        again[7].captions == (caption(7),) and seen == ["x-2.tar"] and again.fingerprint == source.fingerprint
    )
    local = open_source(f"{tmp_path}/x-{{0..3}}.tar")
    assert local.fingerprint == source.fingerprint and local.blocks is None


def test_without_an_index_shards_are_downloaded_once(tmp_path, cache, monkeypatch):
    spec, seen = bucket(tmp_path, indexed=False), opened(monkeypatch)
    assert len(open_source(spec)) == 12 and sorted(seen) == [f"x-{i}.tar" for i in range(4)]
    seen.clear()
    for path in (cache / "shards").iterdir():
        path.unlink()
    assert open_source(spec).key(4) == "000004" and seen == []


def test_an_index_of_another_shard_beside(tmp_path, caplog):
    spec = bucket(tmp_path, count=1)
    memory = fsspec.filesystem("memory")
    other = shard(tmp_path / "other.tar", 50, 3).read_bytes()
    memory.pipe("/bucket/x-0.tar", other + b"\0" * 512)
    source = open_source(spec)
    assert source.key(0) == "000050" and "does not belong to its shard" in caplog.text


def test_prepare_downloads_ahead_without_waiting(tmp_path, cache, monkeypatch):
    source, release, real = open_source(bucket(tmp_path)), threading.Event(), remote.open_stream

    def slow(url: str):
        release.wait(10)
        return real(url)

    monkeypatch.setattr(remote, "open_stream", slow)
    begin = time.monotonic()
    source.prepare(np.array([7, 8, 1]))
    source.prepare([7])
    assert time.monotonic() - begin < 1 and "x-2.tar" not in copies(cache)
    release.set()
    for _ in range(200):
        if {"x-2.tar", "x-0.tar"} <= copies(cache):
            break
        time.sleep(0.05)
    assert copies(cache) == {"x-0.tar", "x-2.tar"}
    seen = opened(monkeypatch)
    assert source[8].key == "000008" and seen == []


def test_the_cache_stays_bounded(tmp_path, cache, monkeypatch):
    """Room for two of six shards; every sample is right in a random order, and ahead of it."""
    spec = bucket(tmp_path, count=6)
    size = os.path.getsize(tmp_path / "x-0.tar")
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", str(int(size * 2.5)))
    source = open_source(spec)
    for i in np.random.default_rng(0).permutation(18).tolist():
        source.prepare([(i + 5) % 18])
        assert source[i].captions == (caption(i),) and source[i].image == encoded(picture(i))
        assert used(cache) <= size * 2.5
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", str(size // 2))
    small = open_source(spec)
    with pytest.raises(BadRecord) as caught:
        small[0] if not copies(cache) else [small[i] for i in range(18)]
    assert caught.value.reason == "unreadable_shard" and "VLMJAX_CACHE_LIMIT" in caught.value.detail


def test_a_shard_that_disappears(tmp_path, monkeypatch):
    spec = bucket(tmp_path)
    source = open_source(spec)
    fsspec.filesystem("memory").rm("/bucket/x-1.tar")
    with pytest.raises(BadRecord) as caught:
        source[3]
    assert caught.value.reason == "unreadable_shard" and "no longer there" in caught.value.detail
    assert source[0].key == "000000"
    with pytest.raises(DataError, match=r"cannot reach memory://bucket/x-1.tar"):
        open_source(spec)


def test_checksum(monkeypatch):
    data = b"some bytes"
    good = remote.Info(len(data), "v", hashlib.md5(data).hexdigest())
    fsspec.filesystem("memory").pipe("/bucket/x", data)
    got = []
    remote.download("memory://bucket/x", good, lambda stream: got.append(stream.read()))
    assert got == [data]
    for bad in (good._replace(md5="0" * 32), good._replace(size=11), good._replace(size=9)):
        with pytest.raises(DataError, match="cannot download memory://bucket/x"):
            remote.download("memory://bucket/x", bad, lambda stream: stream.read())
    assert remote._md5("X03MO1qnZdYdgyfeuILPmQ==") == remote._md5("5f4dcc3b5aa765d61d8327deb882cf99")
    assert remote._md5('"abc-3"') == remote._md5(None) == remote._md5("CZgB") == ""


def test_parquet_and_array_record_in_a_bucket(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    pytest.importorskip("array_record")
    import pyarrow as pa
    from pyarrow import parquet

    from vlmjax.data.formats import arrayrecord

    memory = fsspec.filesystem("memory")
    for i in range(2):
        table = pa.table(
            {
                "image": [encoded(picture(3 * i + j)) for j in range(3)],
                "caption": [f"{3 * i + j}" for j in range(3)],
            }
        )
        parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
        memory.pipe(f"/bucket/x-{i}.parquet", (tmp_path / "x.parquet").read_bytes())
        path = tmp_path / "x.array_record"
        arrayrecord.write(
            str(path), [Record(str(3 * i + j), encoded(picture(3 * i + j)), ("c",)) for j in range(3)]
        )
        memory.pipe(f"/bucket/x-{i}.array_record", path.read_bytes())
    source = open_source("memory://bucket/x-{0..1}.parquet")
    assert source.blocks.tolist() == [2, 3, 5, 6] and [source[i].captions for i in (5, 0)] == [("5",), ("0",)]
    source.prepare([4])
    records = open_source("memory://bucket/x-{0..1}.array_record")
    assert [records[i].key for i in (4, 1)] == ["4", "1"] and records.blocks.tolist() == [3, 6]


def test_a_remote_table_with_images_beside(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe(
        "/bucket/t/meta.jsonl",
        b'{"image": "i/0.png", "caption": "a"}\n{"image": "i/9.png", "caption": "b"}\n',
    )
    memory.pipe("/bucket/t/i/0.png", encoded(picture(0)))
    source = open_source("memory://bucket/t/meta.jsonl")
    assert source[0].image == encoded(picture(0)) and source[0].captions == ("a",)
    with pytest.raises(BadRecord):
        source[1]


class Server(http.server.ThreadingHTTPServer):
    """A folder over HTTP, of whose files the end can be had alone, that can fail in several ways."""

    daemon_threads = True

    def __init__(self, folder):
        self.folder, self.trouble, self.asked = folder, [], []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/").partition("?")[0]
        if "Range" in self.headers:
            self.end_of(path)
            return
        self.server.asked.append((self.command, path.name))
        trouble = self.server.trouble.pop(0) if body and self.server.trouble else None
        if trouble in (503, 403):
            self.send_error(trouble)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if trouble == "cut" else data)

    def end_of(self, path) -> None:
        self.server.asked.append(("END", path.name))
        data = path.read_bytes()[-int(self.headers["Range"].removeprefix("bytes=-")) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(name="server")
def _server(tmp_path):
    (tmp_path / "www").mkdir()
    server = Server(tmp_path / "www")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_web_server(server):
    for i in range(2):
        shard(server.folder / f"x-{i}.tar", 2 * i, 2)
    (server.folder / "z.tar.gz").write_bytes(gzip.compress((server.folder / "x-1.tar").read_bytes()))
    index.main([str(server.folder / "x-0.tar")])
    source = open_source(f"{server.url}/x-{{0..1}}.tar")
    assert ("GET", "x-0.tar") not in server.asked and ("GET", "x-1.tar") in server.asked
    assert [source[i].captions for i in range(4)] == [(caption(i),) for i in range(4)]
    assert open_source(f"{server.url}/z.tar.gz")[1].key == "000003"
    assert open_source(f"{server.url}/x-1.tar?token=1")[0].key == "000002"
    with pytest.raises(DataError, match=r"cannot reach .*y\.tar"):
        open_source(f"{server.url}/y.tar")
    with pytest.raises(DataError, match="write the names out"):
        open_source(f"{server.url}/x-*.tar")


def test_web_server_in_trouble(server, caplog, cache):
    shard(server.folder / "x.tar", 0, 2)
    (server.folder / "z.tar.gz").write_bytes(gzip.compress((server.folder / "x.tar").read_bytes()))
    server.trouble = [503, "cut", 503]
    assert open_source(f"{server.url}/x.tar")[1].captions == (caption(1),)
    assert "attempt 2 of 5" in caplog.text and "attempt 4 of 5" in caplog.text
    server.trouble = ["cut"]
    assert open_source(f"{server.url}/z.tar.gz")[1].captions == (caption(1),)
    shard(server.folder / "w.tar", 0, 2)
    server.trouble, before = ["cut"] * 9, len(server.asked)
    with pytest.raises(DataError, match="cannot download .*w.tar"):
        open_source(f"{server.url}/w.tar")
    assert len(server.asked) - before <= 8 and "w.tar" not in copies(cache)
    server.trouble, before = [403], len(server.asked)
    with pytest.raises(DataError, match="the server refuses"):
        open_source(f"{server.url}/w.tar")
    assert [method for method, name in server.asked[before:] if name == "w.tar"].count("GET") == 1
    (server.folder / "d.tar.gz").write_bytes(b"\x1f\x8b" + b"no gzip" * 30)
    before = len(server.asked)
    with pytest.raises(DataError, match=r"d\.tar\.gz"):
        open_source(f"{server.url}/d.tar.gz")
    assert [method for method, name in server.asked[before:] if name == "d.tar.gz"].count("GET") == 1


def test_a_silent_server_does_not_hold_it(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with socket.create_server(("127.0.0.1", 0)) as quiet:
        begin = time.monotonic()
        with pytest.raises(DataError, match="cannot reach"):
            open_source(f"http://127.0.0.1:{quiet.getsockname()[1]}/x.tar")
        assert time.monotonic() - begin < 5


def test_localize_keeps_local_files_where_they_are(tmp_path):
    path = shard(tmp_path / "x.tar", 0, 1)
    with shards.localize(str(path)) as local:
        assert local == str(path)


def test_reads_by_many_threads_while_copies_go(monkeypatch):
    """Room for three of eight files: no thread reads from another file that got the number of a closed one."""
    memory = fsspec.filesystem("memory")
    for k in range(8):
        memory.pipe(f"/bucket/{k}.bin", bytes([65 + k]) * 50_000)
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", "150K")
    many = shards.Shards([f"memory://bucket/{k}.bin" for k in range(8)])
    wrong, real = [], os.pread

    def slow(number: int, size: int, offset: int) -> bytes:
        time.sleep(0.001)
        return real(number, size, offset)

    monkeypatch.setattr(shards.os, "pread", slow)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def go(seed: int) -> None:
        for k in np.random.default_rng(seed).integers(0, 8, 60).tolist():
            try:
                data = many.read(k, 49_000, 16, "key")
            except BadRecord as error:
                data = str(error)
            if data != bytes([65 + k]) * 16:
                wrong.append(data)

    threads = [threading.Thread(target=go, args=(seed,)) for seed in range(12)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


def twins(folder) -> list[bytes]:
    """Two tars of the same length with other keys and the members the other way round."""
    first = {f"{k}.{e}": d for k in "abc" for e, d in (("png", encoded(picture(0))), ("txt", b"old"))}
    second = {f"{k}.{e}": d for k in "xyz" for e, d in (("txt", b"new"), ("png", encoded(picture(1))))}
    made = [write_tar(folder / "twin.tar", members).read_bytes() for members in (first, second)]
    assert len(made[0]) == len(made[1])
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_a_remote_shard_that_changed_gets_another_index(server, tmp_path, packed):
    path, old_new = server.folder / ("x.tar.gz" if packed else "x.tar"), twins(tmp_path)
    for when, data, keys in ((1e9, old_new[0], "abc"), (1.1e9, old_new[1], "xyz")):
        path.write_bytes(gzip.compress(data) if packed else data)
        os.utime(path, (when, when))
        source = open_source(f"{server.url}/{path.name}")
        assert [source[i].key for i in range(3)] == list(keys) and source[0].image.startswith(b"\x89PNG")


def test_an_index_of_another_shard_of_the_same_size(server, tmp_path, cache):
    """Seen only when the shard is there: an error that names it, then the remedy; never bytes at wrong places."""
    old, new = twins(tmp_path)
    (server.folder / "x.tar").write_bytes(old)
    index.main([str(server.folder / "x.tar")])
    (server.folder / "x.tar").write_bytes(new)
    url = f"{server.url}/x.tar"
    source = open_source(url)
    other = pickle.loads(pickle.dumps(source))
    with pytest.raises(BadRecord, match=r"x\.tar: its index .* --force http"):
        source[0]
    assert copies(cache) == set()
    shards.Shards([url]).file(0)  # somebody else brings the shard
    with pytest.raises(BadRecord, match=r"x\.tar: its index"):
        other[0]
    assert index.main(["--force", url]) == 0
    for path in (cache / "shards").iterdir():
        path.unlink()
    assert [open_source(url)[i].key for i in range(3)] == ["x", "y", "z"]


def test_shards_are_not_evicted_before_they_are_indexed(tmp_path, cache, monkeypatch):
    """Twelve shards, room for two: each stays until its index is made."""
    from vlmjax.data.formats import tar

    spec, real = bucket(tmp_path, count=12, each=1, indexed=False), tar.index
    size = max(os.path.getsize(tmp_path / f"x-{i}.tar") for i in range(12))
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", str(int(size * 2.5)))
    monkeypatch.setattr(tar, "index", lambda path: time.sleep(0.02) or real(path))
    source = open_source(spec)
    assert [source.key(i) for i in range(12)] == [f"{i:06d}" for i in range(12)]


def test_localize_holds_the_copy(monkeypatch):
    memory = fsspec.filesystem("memory")
    for name in "ab":
        memory.pipe(f"/bucket/{name}.jsonl", name.encode() * 700)
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", "1K")
    monkeypatch.setattr(shard_cache, "_PATIENCE", 0.2)
    with shards.localize("memory://bucket/a.jsonl") as local:
        with (
            pytest.raises(DataError, match="all else in it is held"),
            shards.localize("memory://bucket/b.jsonl"),
        ):
            pass
        assert pathlib.Path(local).read_bytes() == b"a" * 700
    with shards.localize("memory://bucket/b.jsonl") as local:
        assert os.path.getsize(local) == 700


def test_a_dead_shard_is_asked_for_once(server, cache, monkeypatch):
    shard(server.folder / "x.tar", 0, 5)
    source = open_source(f"{server.url}/x.tar")
    for path in (cache / "shards").iterdir():
        path.unlink()
    server.trouble, before = [503] * remote.ATTEMPTS, len(server.asked)
    for i in range(5):
        with pytest.raises(BadRecord, match="cannot download"):
            source[i]
    assert len(server.asked) - before == remote.ATTEMPTS
    monkeypatch.setattr(shards, "_GIVEN_UP", 0.0)
    assert source[4].captions == (caption(4),)


def test_remote_arrow_files_that_do_not_fit(tmp_path, cache, monkeypatch):
    """Mapped files stay in the cache; too small a cache is told of at once."""
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [encoded(picture(0))], "caption": ["a"]})
    for i in range(3):
        with pa.OSFile(str(tmp_path / "x"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
        fsspec.filesystem("memory").pipe(f"/bucket/{i}.arrow", (tmp_path / "x").read_bytes())
    size = os.path.getsize(tmp_path / "x")
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", str(2 * size))
    with pytest.raises(DataError, match=r"0\.arrow: its 3 file\(s\).*raise VLMJAX_CACHE_LIMIT"):
        open_source("memory://bucket/{0..2}.arrow")
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", str(3 * size))
    source = open_source("memory://bucket/{0..2}.arrow")
    monkeypatch.setattr(shard_cache, "_PATIENCE", 0.2)
    fsspec.filesystem("memory").pipe("/bucket/y", b"y")
    with pytest.raises(DataError, match="held"), shards.localize("memory://bucket/y"):
        pass
    assert pickle.loads(pickle.dumps(source))[2].captions == source[2].captions == ("a",)


def test_array_record_in_a_cache_for_two_of_six(tmp_path, cache, monkeypatch):
    """Open readers hold their copies, so there must not be more of them than there is room for."""
    pytest.importorskip("array_record")
    from vlmjax.data.formats import arrayrecord

    for i in range(6):
        path = tmp_path / f"x-{i}.array_record"
        arrayrecord.write(str(path), [Record(str(i), encoded(picture(0)), ("c",))])
        fsspec.filesystem("memory").pipe(f"/bucket/{path.name}", path.read_bytes())
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", str(int(os.path.getsize(path) * 2.5)))
    monkeypatch.setattr(shard_cache, "_PATIENCE", 0.5)
    source = open_source("memory://bucket/x-{0..5}.array_record")
    assert [source[i].key for i in (0, 1, 2, 3, 4, 5, 0)] == list("0123450")
