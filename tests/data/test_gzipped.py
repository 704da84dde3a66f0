"""Room in the cache for gzipped shards: what they unpack to, not what they are packed to."""

import gzip
import os

import fsspec
import pytest
from helpers import shard

from vlmjax.data.storage import gzipped, remote, shard_cache
from vlmjax.data.storage.shards import Shards


@pytest.fixture(name="packed")
def _packed(tmp_path, monkeypatch):
    """A gzipped shard, a tar of 20,480 bytes, and an empty cache."""
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path / "cache"))
    plain = shard(tmp_path / "x.tar", 0, 5).read_bytes() + b"\0" * 30_000  # packs well
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(plain))
    return tmp_path / "x.tar.gz", len(plain)


def _claims(monkeypatch) -> list[int]:
    seen, real = [], shard_cache.ShardCache._make_room
    monkeypatch.setattr(
        shard_cache.ShardCache,
        "_make_room",
        lambda self, size, *rest: seen.append(size) or real(self, size, *rest),
    )
    return seen


def test_a_copy_claims_what_it_unpacks_to(packed, monkeypatch):
    path, size = packed
    fsspec.filesystem("memory").pipe("/gz/x.tar.gz", path.read_bytes())
    claims = _claims(monkeypatch)
    for place in (str(path), "memory://gz/x.tar.gz"):
        with Shards([place]).held(0) as local:
            assert os.path.getsize(local) == size
        Shards([place]).read(0, 0, 5, "k")  # is there: nothing is asked or claimed again
    assert claims == [size, size]


def test_as_many_at_a_time_as_there_is_room_for(packed, monkeypatch):
    path, size = packed
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", str(3 * size + 1))
    assert Shards([str(path)] * 9).room(16) == 3 and 16 * os.path.getsize(path) < 3 * size * 2
    plain = path.with_suffix("")
    assert Shards([str(plain)] * 9).room(16) == 16  # needs no copies


def test_where_the_end_of_a_file_does_not_tell(packed, tmp_path, monkeypatch):
    path, size = packed
    data, length = path.read_bytes(), os.path.getsize(path)
    joined = tmp_path / "joined.gz"
    joined.write_bytes(data + gzip.compress(b""))  # as bgzip ends its files
    assert gzipped.unpacked_size(str(path), length) == size
    assert gzipped.unpacked_size(str(joined), joined.stat().st_size) == joined.stat().st_size
    (tmp_path / "short.gz").write_bytes(b"ab")
    assert gzipped.unpacked_size(str(tmp_path / "short.gz"), 2) >= 2
    assert remote.end_of("memory://gz/none.gz", 9, 4) == b""
    assert remote.end_of("http://127.0.0.1:9/none.gz", 9, 4) == b""
