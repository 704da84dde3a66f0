"""The bounded cache: its limit, who goes first, who must stay, several processes at once, and killed ones."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vlmjax.data.storage import shard_cache
from vlmjax.data.storage.shard_cache import ShardCache
from vlmjax.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def writer(data: bytes, made: list | None = None):
    def fill(out) -> None:
        if made is not None:
            made.append(len(data))
        out.write(data)

    return fill


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def age(folder: Path, *order: str) -> None:
    """Used long ago, in this order."""
    for i, name in enumerate(order):
        os.utime(folder / name, (1000 + i, 1000 + i))


def read(copy) -> bytes:
    return os.pread(copy.number, 1 << 20, 0)


def test_made_once_and_found_again(tmp_path):
    cache, made = ShardCache(tmp_path / "c", 100), []
    assert read(cache.get("a", 10, writer(b"x" * 10, made))) == b"x" * 10
    cache.get("a", 10, writer(b"y", made))
    other = ShardCache(tmp_path / "c", 100)
    assert read(other.get("a", 10, writer(b"y", made))) == b"x" * 10 and made == [10]
    assert names(tmp_path / "c") == ["a"] and cache.has("a") and not cache.has("b")
    assert os.stat(tmp_path / "c" / "a").st_mode & 0o777 == 0o644


def test_the_one_used_longest_ago_goes_first(tmp_path):
    cache = ShardCache(tmp_path, 100)
    for name in "abc":
        cache.get(name, 30, writer(name.encode() * 30))
    age(tmp_path, "b", "c", "a")
    cache.get("d", 30, writer(b"d" * 30))
    assert names(tmp_path) == ["a", "c", "d"]
    cache.get("e", 65, writer(b"e" * 65))
    assert names(tmp_path) == ["d", "e"]
    assert read(cache.get("a", 5, writer(b"again"))) == b"again"


def test_a_copy_that_is_held_stays(tmp_path):
    cache = ShardCache(tmp_path, 100)
    used = cache.hold("a", 60, writer(b"a" * 60))
    cache.get("b", 30, writer(b"b" * 30))
    age(tmp_path, "a", "b")
    cache.get("c", 30, writer(b"c" * 30))
    assert names(tmp_path) == ["a", "c"] and read(used) == b"a" * 60
    del used
    cache.get("d", 50, writer(b"d" * 50))
    assert names(tmp_path) == ["c", "d"]
    held = cache.hold("d", 50, writer(b""))  # one that was there already
    age(tmp_path, "d", "c")
    cache.get("e", 40, writer(b"e" * 40))
    assert names(tmp_path) == ["d", "e"] and held


def test_a_copy_removed_by_another_process_is_read_to_the_end_and_fetched_again(tmp_path):
    cache, other, made = ShardCache(tmp_path, 100), ShardCache(tmp_path, 100), []
    copy = cache.get("a", 60, writer(b"a" * 60, made))
    age(tmp_path, "a")
    other.get("b", 60, writer(b"b" * 60))
    assert names(tmp_path) == ["b"] and read(copy) == b"a" * 60
    assert read(cache.get("a", 60, writer(b"a" * 60, made))) == b"a" * 60 and made == [60, 60]
    assert names(tmp_path) == ["a"]


def test_no_room_is_an_error_not_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "_PATIENCE", 0.3)
    cache = ShardCache(tmp_path, 100)
    with pytest.raises(
        DataError, match=r"101 bytes does not fit .* limited to 100; raise VLMJAX_CACHE_LIMIT"
    ):
        cache.get("a", 101, writer(b""))
    held = cache.hold("a", 60, writer(b"a" * 60))
    begin = time.monotonic()
    with pytest.raises(DataError, match="all else in it is held"):
        cache.get("b", 60, writer(b"b" * 60))
    assert time.monotonic() - begin < 5 and names(tmp_path) == ["a"] and held
    # A download ahead of its time neither waits nor takes the place of what was used lately.
    del held
    with pytest.raises(DataError):
        cache.get("b", 60, writer(b"b" * 60), keep=set())
    assert names(tmp_path) == ["a"]


def test_failures_leave_nothing_behind(tmp_path):
    cache = ShardCache(tmp_path, 100)

    def full(out) -> None:
        out.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="the disk is full; name another folder with VLMJAX_CACHE"):
        cache.get("a", 10, full)
    assert names(tmp_path) == []
    assert read(cache.get("a", 10, writer(b"good"))) == b"good"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot bring b into the cache"):
        ShardCache(tmp_path / "file" / "c", 100).get("b", 1, writer(b"b"))


def test_without_a_limit_part_of_the_disk_stays_free(tmp_path, monkeypatch):
    cache = ShardCache(tmp_path)
    cache.get("a", 50, writer(b"a" * 50))
    age(tmp_path, "a")
    cache._copies.clear()
    usage = type("Usage", (), {"total": 1000, "free": 90})
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda folder: usage)
    cache.get("b", 40, writer(b"b" * 40))
    assert names(tmp_path) == ["a", "b"]
    cache.get("c", 41, writer(b"c" * 41))
    assert "a" not in names(tmp_path)


def test_limit_from_the_environment(monkeypatch):
    for text, expected in (
        ("", None),
        ("200G", 200 << 30),
        ("1.5 TB", int(1.5 * 2**40)),
        ("500MiB", 500 << 20),
        ("7", 7),
    ):
        monkeypatch.setenv("VLMJAX_CACHE_LIMIT", text)
        assert shard_cache.limit_from_environment() == expected
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", "much")
    with pytest.raises(DataError, match="'much' is not a size"):
        shard_cache.limit_from_environment()


def test_threads_that_want_the_same_wait_for_one(tmp_path):
    cache, made = ShardCache(tmp_path, 1000), []

    def slow(out) -> None:
        made.append(1)
        time.sleep(0.2)
        out.write(b"z" * 10)

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(read(cache.get("a", 10, slow)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [b"z" * 10] * 8 and made == [1]


PROCESS = """
import os, random, sys, time
from vlmjax.data.storage import shard_cache
from vlmjax.data.storage.shard_cache import ShardCache
folder, log, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
cache, rng = ShardCache(folder, 4000), random.Random(seed)
def fill(name):
    def write(out):
        with open(log, "a") as told: told.write(name + "\\n")
        for _ in range(10):
            out.write(name.encode() * 100); out.flush(); time.sleep(0.0005)
    return write
for _ in range(60):
    name = rng.choice("abcdefgh")
    copy = cache.get(name, 1000, fill(name))
    assert os.pread(copy.number, 2000, 0) == name.encode() * 1000, name
    with shard_cache._locked_folder(cache.folder) as entries:
        assert sum(size for _, _, size in shard_cache._stamped(entries)) <= 4000
print("done")
"""


def test_several_processes(tmp_path):
    """Eight shards, room for four, three processes that read them at random: every byte right, never over the limit."""
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "c"), str(tmp_path / "log")]
    (tmp_path / "c").mkdir()
    runs = [
        subprocess.Popen(
            [*command, str(i)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    told = [run.communicate(timeout=90) for run in runs]
    assert [out for out, _ in told] == ["done\n"] * 3, told
    assert len(names(tmp_path / "c")) == 4


KILLED = """
import sys, time
from vlmjax.data.storage.shard_cache import ShardCache
def fill(out):
    out.write(b"half"); out.flush(); print("writing", flush=True); time.sleep(100)
ShardCache(sys.argv[1], 100).get("a", 80, fill)
"""


def test_a_process_killed_while_it_writes(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "writing\n"
    cache = ShardCache(tmp_path, 100)
    waiting = threading.Thread(target=lambda: cache.get("a", 80, writer(b"whole")), daemon=True)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive() and names(tmp_path) == ["a.part"]
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    waiting.join(10)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"whole"
    # What another killed process left is waste that makes room.
    (tmp_path / "b.part").write_bytes(b"x" * 90)
    age(tmp_path, "b.part")
    cache.get("c", 50, writer(b"c" * 50))
    assert names(tmp_path) == ["a", "c"]


def test_pickled_it_is_the_same_cache(tmp_path):
    cache = shard_cache.shared_cache(str(tmp_path), 100)
    assert pickle.loads(pickle.dumps(cache)) is cache


def test_a_part_that_is_finished_while_room_is_made(tmp_path, monkeypatch):
    """Renamed between the look and the lock: neither an error, nor counted as removed."""
    (tmp_path / "a.part").write_bytes(b"x" * 10)
    real = shard_cache.fcntl.flock

    def lock(number: int, how: int) -> None:
        if (tmp_path / "a.part").exists():
            os.replace(tmp_path / "a.part", tmp_path / "a")
        real(number, how)

    monkeypatch.setattr(shard_cache.fcntl, "flock", lock)
    assert shard_cache._remove_unused(str(tmp_path / "a.part")) is False and names(tmp_path) == ["a"]
    assert shard_cache._remove_unused(str(tmp_path / "a.part")) is False
    assert shard_cache._remove_unused(str(tmp_path / "a")) is True and names(tmp_path) == []
