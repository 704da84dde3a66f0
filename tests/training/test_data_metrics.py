"""What a run reports of its data."""

from vlmjax.data.loader import Failure, SkipCounter
from vlmjax.data.mixture import Part
from vlmjax.training import data_metrics


class Data:
    """What `data_row` reads of TrainData."""

    def __init__(self, sources: int, batches: int = 5):
        """So many sources, of which the second has bad records."""
        parts = tuple(Part(f"s{i}", f"f{i}", 10, 1 / sources, i) for i in range(sources))
        self.mixture = type("Mixture", (), {"parts": parts})
        self.skips = SkipCounter("s", 1.0)
        bad = [Failure(reason, "k", "", "s1") for reason in ("truncated", "truncated", "empty")]
        self.skips.add(8, bad)
        self._batches = batches

    def work(self) -> dict:
        """Totals of some batches."""
        totals = {"seconds": 0.4, "bytes": 6_000_000, "truncated": 10, "queue": 1.5}
        return {"batches": self._batches, "records": 8 * self._batches, **totals}


def test_rates_are_of_the_interval(monkeypatch, caplog):
    monkeypatch.setattr(data_metrics, "TrainData", Data)
    row = data_metrics.data_row.__wrapped__(Data(1), 3.0)
    assert caplog.messages[-1] == "skipped more: truncated 1; 3 of 8 records so far"  # the same record again
    assert row == {
        "skipped": 3, "skipped/truncated": 2, "skipped/empty": 1, "data/decode_ms": 10.0,
        "data/megabytes_per_second": 2.0, "data/truncated_share": 0.25, "data/queue": 1.5,
    }  # fmt: skip
    assert "data/decode_ms" not in data_metrics.data_row.__wrapped__(Data(1, batches=0), 3.0)


def test_several_sources_and_hosts(monkeypatch):
    monkeypatch.setattr(data_metrics, "_every_host", lambda value: [value, 0, 7])
    row = data_metrics.data_row.__wrapped__(Data(2), 1.0)
    assert row["skipped"] == 10 and row["skipped/from/s1"] == 3
    assert {name: value for name, value in row.items() if "host" in name} == {
        "skipped/host/0": 3,
        "skipped/host/2": 7,
    }
