"""Shards in, shards out: what every step of CapFilt runs on, so that it can be killed and started again at any time."""

import collections
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from vlmjax.data.convert import FORMATS
from vlmjax.data.formats import tar_writer
from vlmjax.data.record import Record
from vlmjax.data.sources import Source
from vlmjax.data.storage import making
from vlmjax.errors import BadRecord, DataError

MANIFEST = "capfilt.json"


class Outcome(NamedTuple):
    """What became of a record; work gives one for each that it is given, in their order.

    Attributes:
        record: as it is written, None for one that is left out.
        note: what the report and later steps may want to know of it, a line of json; None for nothing.
        reason: why it was left out.
    """

    record: Record | None
    note: dict[str, Any] | None = None
    reason: str = ""


Work = Callable[[list[Record]], Iterable[Outcome]]


@dataclasses.dataclass(frozen=True)
class Shards:
    """A source cut into shards of so many records, each of which one process makes, by itself and exactly once.

    A shard is data-NNNNN.tar with data-NNNNN.notes.jsonl, and data-NNNNN.tar.json with its counts, which is written
    last: only a shard that has one is done.

    Attributes:
        source: what is read.
        out: a folder, local or remote.
        records: per shard.
        options: all that decides what is written, model included; another run into the folder has to have the same.
        limit: of so many records, the first ones; 0 = all.
    """

    source: Source
    out: str
    records: int
    options: dict[str, Any]
    limit: int = 0

    @property
    def size(self) -> int:
        """How many records are read."""
        return min(self.limit, len(self.source)) if self.limit else len(self.source)

    @property
    def count(self) -> int:
        """How many shards there are."""
        return -(-self.size // self.records)

    def name(self, shard: int, ending: str = FORMATS["tar"]) -> str:
        """Where a shard goes."""
        return f"{self.out.rstrip('/')}/data-{shard:05d}{ending}"

    def begin(self) -> None:
        """Write down what is done here. Raises DataError where the folder holds something else."""
        said = {
            "source": self.source.fingerprint,
            "records": self.records,
            "limit": self.limit,
            **self.options,
        }
        path = f"{self.out.rstrip('/')}/{MANIFEST}"
        there = making.read(path)
        try:
            known = said if there is None else dict(json.loads(there))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}): name another folder") from error
        changed = sorted(name for name in {*known, *said} if known.get(name) != said.get(name))
        if changed:
            told = ", ".join(f"{name} was {known.get(name)!r} and is {said.get(name)!r}" for name in changed)
            raise DataError(
                f"--out={self.out} holds another run: {told}; undo the change or name another folder"
            )
        if there is None:
            making.put(path, json.dumps(said, indent=1, sort_keys=True).encode())
        making.sweep(self.out, "data-")

    def done(self, shard: int) -> dict[str, int] | None:
        """The counts of a shard that is done, None for one that is not."""
        found = making.read(self.name(shard, ".tar.json"))
        try:
            return None if found is None else json.loads(found)
        except ValueError:
            return None  # cut off by a kill: the shard is made again

    def make(self, shard: int, work: Work) -> dict[str, int]:
        """Make a shard, whatever an earlier process left of it; its counts: `written` and those left out by reason."""
        counts: collections.Counter[str] = collections.Counter()
        read, places, notes = [], [], []
        for index in range(shard * self.records, min((shard + 1) * self.records, self.size)):
            try:
                read.append(self.source[index])
                places.append(index)
            except BadRecord as error:
                counts[error.reason] += 1
        with making.in_the_making(self.name(shard)) as made, tar_writer.Writer(made) as out:
            for index, outcome in zip(places, work(read), strict=True):
                if outcome.note is not None:
                    notes.append(json.dumps({**outcome.note, "index": index}, sort_keys=True))
                if outcome.record is None:
                    counts[outcome.reason] += 1
                    continue
                try:
                    out.write(outcome.record)
                    counts["written"] += 1
                except BadRecord as error:
                    counts[error.reason] += 1
        making.put(self.name(shard, ".notes.jsonl"), "".join(f"{note}\n" for note in notes).encode())
        making.put(self.name(shard, ".tar.json"), json.dumps(dict(sorted(counts.items()))).encode())
        return dict(counts)

    def run(self, work: Work, process: int = 0, processes: int = 1) -> dict[str, int]:
        """Make every shard of this process that is not done; the counts of all that are done by now.

        Shards number process, process + processes, ... are this process's own.
        """
        self.begin()
        mine = range(process, self.count, processes)
        for number, shard in enumerate(mine, 1):
            if self.done(shard) is None:
                self.make(shard, work)
            print(f"{number} of {len(mine)} shards", flush=True, file=sys.stderr)
        total: collections.Counter[str] = collections.Counter()
        for shard in range(self.count):
            total.update(self.done(shard) or {})
        return dict(total)

    def complete(self) -> bool:
        """Whether every shard is done, by whichever process."""
        return all(self.done(shard) is not None for shard in range(self.count))


@dataclasses.dataclass(frozen=True)
class Notes:
    """All notes of a folder, in the order of its records, one shard in memory at a time; they may be read again.

    Attributes:
        out: the folder. Raises DataError, when read, for notes that are damaged.
    """

    out: str

    def __post_init__(self) -> None:
        """Raise DataError where it is no folder of CapFilt's."""
        if making.read(f"{self.out.rstrip('/')}/{MANIFEST}") is None:
            raise DataError(f"{self.out}: holds no run of capfilt ({MANIFEST} is missing)")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One note after another."""
        for shard in itertools.count():
            name = f"data-{shard:05d}"
            part = making.read(f"{self.out.rstrip('/')}/{name}.notes.jsonl")
            if part is None:
                return
            try:
                found = [json.loads(line) for line in part.splitlines()]
            except ValueError as error:
                raise DataError(
                    f"{self.out}/{name}.notes.jsonl is damaged ({error}): remove {name}.tar.json, run the step again"
                ) from error
            yield from found
