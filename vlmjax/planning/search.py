"""The largest batch that fits, found by compiling."""

from collections.abc import Callable

from vlmjax.errors import DoesNotFit, PlanError
from vlmjax.planning.chips import GIB
from vlmjax.planning.names import Name
from vlmjax.planning.plan import Plan, make_plan
from vlmjax.planning.subject import Subject

# Pairs per device at most: far beyond what any device holds, so that a search ends.
_LARGEST = 2**20


def search_subject(name: Name, subject_of: Callable[[int], Subject], start: int, utilisation: float) -> Plan:
    """The plan of the largest batch that fits, one compilation per try, each told in a line.

    Args:
      subject_of: the program at a batch size.
      start: where to begin; one that nearly fits saves tries.

    Raises:
      PlanError: devices whose memory nobody knows.
      DoesNotFit: where no batch fits.
    """
    if name.platform == "cpu":
        raise PlanError("--search needs devices with a memory of their own: name a --topology")
    made: dict[int, Plan] = {}

    def fits(batch: int) -> bool:
        made[batch] = plan = make_plan(name, subject_of(batch), utilisation)
        compiled = plan.compiled
        said = "fits" if compiled.fits else "does not fit"
        print(
            f"batch {batch:,}: {said}, {compiled.needed_bytes / GIB:.2f} of {compiled.hbm_bytes / GIB:.2f} GiB, "
            f"compiled in {compiled.seconds:.0f} s",
            flush=True,
        )
        return bool(compiled.fits)

    unit = subject_of(start).unit
    found = largest(fits, start, unit, _LARGEST * name.devices)
    if found is None:
        raise DoesNotFit(
            f"no batch fits {name.text}: already {unit}, the smallest, needs "
            f"{made[unit].compiled.needed_bytes / GIB:.2f} GiB per device"
        )
    return made[found]


def largest(fits: Callable[[int], bool], start: int, unit: int, limit: int) -> int | None:
    """The largest multiple of `unit` up to `limit` that fits, or None where not even one unit does.

    Doubles or halves from `start` to a pair of which one fits, and halves what is between them. What does not fit is
    taken not to fit at any larger size; every size is tried once.
    """
    start, limit = max(start // unit, 1), limit // unit
    good, bad = 0, limit + 1
    tried = min(start, limit)
    while good + 1 < bad:
        if fits(tried * unit):
            good = tried
            tried = min(2 * tried, limit) if bad > limit else (good + bad) // 2
        else:
            bad = tried
            tried = (good + bad) // 2
    return good * unit or None
