"""`python -m vlmjax.data.convert SPEC --out=FOLDER`: any source as tar or ArrayRecord shards, resumable."""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.data import images, plan
from vlmjax.data.formats import tar_writer
from vlmjax.data.record import Record
from vlmjax.data.sources import Source, open_source
from vlmjax.data.storage import making
from vlmjax.errors import BadRecord, DataError, UserError

FORMATS = {"tar": ".tar", "array_record": ".array_record"}
_MANIFEST = "convert.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is converted into what. Shards are independent of each other, so any worker may write any of them.

    Attributes:
        spec: the source, as `open_source` takes it.
        out: a folder, local or remote.
        format: one of FORMATS.
        records: per shard.
        shuffle: seed of a shuffle of all records, None to keep their order.
        shortest: scale images down to this shorter side, None to keep their bytes.
        quality: of the JPEG that scaled images become.
        check: decode every image and leave out those that cannot be.
        exclude: a regular expression of keys to leave out.
    """

    spec: str
    out: str
    format: str = "tar"
    records: int = 5000
    shuffle: int | None = None
    shortest: int | None = None
    quality: int = 90
    check: bool = False
    exclude: str | None = None

    def shards(self) -> int:
        """How many shards there will be."""
        return -(-len(_source(self.spec, self.exclude)) // self.records)

    def indices(self, shard: int) -> np.ndarray:
        """The records of one shard, in their order: int64."""
        total = len(_source(self.spec, self.exclude))
        places = np.arange(shard * self.records, min((shard + 1) * self.records, total))
        return places if self.shuffle is None else plan.permute(places, total, self.shuffle, 0)

    def name(self, shard: int) -> str:
        """Where a shard goes."""
        return f"{self.out.rstrip('/')}/data-{shard:05d}{FORMATS[self.format]}"

    def write(self, shard: int) -> dict[str, int]:
        """Write one shard, unless it is there; what became of its records: 'written' and counts by reason.

        The shard appears under its name when it is whole, and its counts beside it after that.
        """
        counts_at = self.name(shard) + ".json"
        done = making.read(counts_at)
        known = _counts(done)
        if known is not None and making.exists(self.name(shard)):
            return known
        source, counts = _source(self.spec, self.exclude), collections.Counter()
        with making.in_the_making(self.name(shard)) as made, _writer(self.format, made) as out:
            for index in self.indices(shard).tolist():
                try:
                    out.write(self._prepared(source[index]))
                    counts["written"] += 1
                except BadRecord as error:
                    counts[error.reason] += 1
        making.put(counts_at, json.dumps(dict(counts)).encode())
        return dict(counts)

    def _prepared(self, record: Record) -> Record:
        """The record with its image as it will be stored. Raises BadRecord."""
        if not self.check and self.shortest is None and isinstance(record.image, bytes):
            return record
        try:
            pixels = images.decode(record.image, keep_alpha=True)
        except BadRecord as error:
            raise BadRecord(error.reason, record.key, error.detail) from error
        if self.shortest is None and isinstance(record.image, bytes):
            return record
        if self.shortest is not None:
            if isinstance(record.image, bytes) and min(pixels.shape[:2]) <= self.shortest:
                return record
            pixels = images.shrink(pixels, self.shortest)
        return dataclasses.replace(record, image=tar_writer.encoded(pixels, self.quality))


@functools.lru_cache(maxsize=2)  # a worker opens a source once, not once per shard
def _source(spec: str, exclude: str | None) -> Source:
    return open_source(spec, exclude=exclude)


def _writer(format_: str, path: str) -> Any:
    if format_ == "tar":
        return tar_writer.Writer(path)
    from vlmjax.data.formats.arrayrecord import Writer

    return Writer(path)


def _counts(data: bytes | None) -> dict[str, int] | None:
    """The counts beside a shard; None where there are none, or damaged ones: the shard is then written anew."""
    try:
        counts = json.loads(data or b"null")
    except ValueError:
        return None
    whole = isinstance(counts, dict) and all(isinstance(count, int) for count in counts.values())
    return counts if whole else None


def convert(job: Job, workers: int = 0, beam: Sequence[str] | None = None) -> dict[str, int]:
    """Write all shards that are not there yet; what became of all records, as `Job.write` counts it.

    Args:
        job: what to do.
        workers: threads; 0 for one per core. Ignored by Beam.
        beam: options of an Apache Beam pipeline, such as ["--runner=DataflowRunner", ...]; None to work here.

    Raises:
        DataError: the folder holds another conversion, the source cannot be read, the disk is full.
    """
    source = _source(job.spec, job.exclude)
    manifest = dataclasses.asdict(job) | {"out": "", "spec": source.fingerprint}
    there = making.read(f"{job.out.rstrip('/')}/{_MANIFEST}")
    try:
        known = manifest if there is None else json.loads(there)
    except ValueError as error:
        raise DataError(
            f"{job.out}/{_MANIFEST} is damaged ({error}): remove the folder's shards with it, or name another folder"
        ) from error
    if known != manifest:
        raise DataError(
            f"{job.out} holds a conversion of other data or with other options ({_MANIFEST}): name another folder"
        )
    making.put(f"{job.out.rstrip('/')}/{_MANIFEST}", json.dumps(manifest, indent=1).encode())
    making.sweep(job.out, "data-")
    shards = range(job.shards())
    if beam is not None:
        return _on_beam(job, shards, beam)
    total = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        try:
            for done, counts in enumerate(pool.map(job.write, shards), 1):
                total.update(counts)
                _tell(done, len(shards), total["written"])
        except BaseException:
            if sys.stdout.isatty():
                print()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return dict(total)


def _tell(done: int, shards: int, records: int) -> None:
    """How far it is: one line that is written over on a terminal, a line for each tenth elsewhere."""
    shown, last = sys.stdout.isatty(), done == shards
    if shown or last or done * 10 // shards > (done - 1) * 10 // shards:
        text = f"{done} of {shards} shards, {records:,} records"
        print(f"\r{text}" if shown else text, end="" if shown and not last else "\n", flush=True)


def _on_beam(job: Job, shards: Sequence[int], options: Sequence[str]) -> dict[str, int]:
    """The same shards as elements of a pipeline; the counts are read from beside the shards when it has ended."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise DataError("--runner needs Apache Beam: pip install 'vlmjax[beam]'") from error
    with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        numbers = pipeline | apache_beam.Create(list(shards)) | apache_beam.Reshuffle()
        _ = numbers | apache_beam.Map(job.write)
    total = collections.Counter()
    for shard in shards:
        total.update(_counts(making.read(job.name(shard) + ".json")) or {})
    return dict(total)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlmjax.data.convert",
        description="Write any source as shards. Run again after an interruption: finished shards are kept.",
        epilog="With --runner=DirectRunner | DataflowRunner | FlinkRunner an Apache Beam pipeline writes the shards; "
        "Beam's own options may follow.",
    )
    parser.add_argument("spec", help="what to read, as in data.train: shards, a table, a folder, scenes")
    parser.add_argument("--out", required=True, help="folder for the shards, local or gs://, s3://")
    parser.add_argument("--format", choices=FORMATS, default="tar")
    parser.add_argument("--records", type=int, default=5000, help="per shard (default: %(default)s)")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle all records with this seed")
    parser.add_argument("--shortest", type=int, help="scale images down to this shorter side, stored as JPEG")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="decode every image; leave out those that cannot be"
    )
    parser.add_argument("--exclude", help="leave out records whose key this regular expression finds")
    parser.add_argument("--workers", type=int, default=0, help="threads; default one per core")
    parser.add_argument("--runner", help="write with Apache Beam: DirectRunner, DataflowRunner, FlinkRunner")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    given, others = parser.parse_known_args(argv)
    if others and not given.runner:
        parser.error(f"unknown option {others[0]!r}")
    for name in ("records", "quality", "shortest"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name}={getattr(given, name)}: expected at least 1")
    if not given.out.strip():
        parser.error("--out is empty: name a folder")
    if given.workers < 0:
        parser.error(f"--workers={given.workers}: expected at least 0")
    options = {name: value for name, value in vars(given).items() if name not in ("workers", "runner")}
    beam = [f"--runner={given.runner}", *others] if given.runner else None
    try:
        counts = convert(Job(**options), given.workers, beam)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    written = counts.pop("written", 0)
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items())) or "none"
    print(f"{written:,} records in {given.out}; left out: {left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
