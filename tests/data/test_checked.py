"""Downloads that come damaged, slowly or not at all; S3's ETags as checksums."""

import hashlib
import socket
import threading
import time

import fsspec
import pytest

from vlmjax.data.storage import checked, remote
from vlmjax.errors import DataError

DATA = bytes(range(256)) * 100


def etag_of(data: bytes, part: int | None = None) -> str:
    """As S3 makes it."""
    if part is None:
        return hashlib.md5(data).hexdigest()
    parts = [hashlib.md5(data[at : at + part]).digest() for at in range(0, len(data), part)]
    return f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"


@pytest.fixture(name="bucket")
def _bucket(monkeypatch):
    """A bucket of its own with one file; the first of the downloads that `broken` counts come with a byte changed."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(remote, "_OTHER_ETAGS", set())
    monkeypatch.setattr(checked, "_PARTS", (1000, 5000, 7000))
    files, real = fsspec.filesystem("memory"), remote.open_stream
    state = {"broken": 0, "opened": 0}

    def opened(url: str):
        state["opened"] += 1
        place = state["opened"] if state["opened"] <= state["broken"] else -1
        files.pipe("/etags/now", DATA[:place] + b"?" + DATA[place + 1 :] if place >= 0 else DATA)
        return real("memory://etags/now")

    monkeypatch.setattr(remote, "open_stream", opened)
    return state


def got(etag: str, url: str = "s3://etags/x") -> bytes:
    """The bytes of a download."""
    data = []
    remote.download(url, checked.Info(len(DATA), "v", "", etag), lambda stream: data.append(stream.read()))
    return data[-1]


@pytest.mark.parametrize("part", [None, 1000, 5000, 7000, 25_600])
def test_a_damaged_download_from_s3_is_tried_again(bucket, part, monkeypatch):
    if part == 25_600:  # one part, shorter than the usual ones
        monkeypatch.setattr(checked, "_PARTS", (30_000, 50_000))
    assert got(etag_of(DATA, part)) == DATA and bucket["opened"] == 1
    bucket |= {"broken": 2, "opened": 0}  # differently each time
    assert got(etag_of(DATA, part)) == DATA and bucket["opened"] == 3
    bucket |= {"broken": 99, "opened": 0}
    with pytest.raises(DataError, match="do not give its ETag"):
        got(etag_of(DATA, part))


def test_an_etag_that_is_no_checksum_costs_one_download(bucket, caplog):
    for _ in range(2):
        assert got("0" * 32) == DATA
    assert bucket["opened"] == 3 and caplog.text.count("are no checksums") == 1
    assert got("0" * 32, "s3://another/x") == DATA and bucket["opened"] == 5
    bucket["opened"] = 0
    assert (
        got("0" * 32 + "-3", "s3://third/x") == DATA and bucket["opened"] == 1
    )  # parts of a size nobody knows


def test_which_etags_are_s3s():
    good = "9b2cf535f27731c974343645a3985328"
    assert checked.s3_etag(f'"{good}"') == checked.s3_etag(good) == good
    assert checked.s3_etag(f'"{good}-12"') == f"{good}-12"
    for other in (None, "", "0x8DA4B", 'W/"x"', '"5e1b-61a2b3c4"', 7):
        assert checked.s3_etag(other) == ""
    listed = remote._info({"size": 3, "ETag": f'"{good}"', "LastModified": "then"})
    assert listed.etag == good and listed.md5 == "" and good in listed.version


class Trickle(threading.Thread):
    """A web server of one file, which sends it in `pieces` with pauses, and says nothing more when it is done."""

    def __init__(self, pieces: list[bytes], pause: float):
        super().__init__(daemon=True)
        self._pieces, self._pause, self._socket = pieces, pause, socket.create_server(("127.0.0.1", 0))
        self._open = []
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/x"
        self.start()

    def run(self) -> None:
        """Answer until closed."""
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._open.append(connection)  # and never closed, as by a server that waits for more questions
            connection.recv(4096)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {sum(map(len, self._pieces))}\r\n\r\n"
            try:
                connection.sendall(head.encode())
                for piece in self._pieces:
                    connection.sendall(piece)
                    time.sleep(self._pause)
            except OSError:
                continue

    def close(self) -> None:
        """Let go."""
        self._socket.close()
        for connection in self._open:
            connection.close()


def test_a_trickling_server_is_given_up(monkeypatch):
    monkeypatch.setattr(checked, "WINDOW", 0.2)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    server = Trickle([b"x"] * 1000, 0.01)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"only \d+ bytes in"):
        remote.download(server.url, checked.Info(1000, "v", ""), lambda stream: stream.read())
    assert time.monotonic() - begin < 3
    server.close()


def test_pieces_become_what_was_asked_for_and_nothing_is_read_behind_the_end(monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 2.0)
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    server, seen = Trickle([b"abc", b"def", b"g"], 0.02), []

    def write(stream) -> None:
        seen.extend([stream.read(2), stream.read(3), stream.read(), stream.read(1)])

    begin = time.monotonic()
    remote.download(server.url, checked.Info(7, "v", ""), write)
    assert seen == [b"ab", b"cde", b"fg", b""] and time.monotonic() - begin < 1.5
    server.close()
