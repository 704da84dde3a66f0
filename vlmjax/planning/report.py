"""A plan in words: one page for one set of devices, a table for several."""

from collections.abc import Sequence

from vlmjax.planning.chips import GIB, GPU_SHARE, gpu_share
from vlmjax.planning.plan import CYCLES, Plan


def page(plan: Plan) -> str:
    """All that is known about one plan, a line or two per question."""
    name, subject, compiled = plan.name, plan.subject, plan.compiled
    axes = " x ".join(f"{axis} {size}" for axis, size in subject.mesh.shape.items())
    device = plan.chip.name if plan.chip else "simulated CPU device"
    lines = [
        ("program", f"{subject.title}; batch {subject.batch_size:,}"),
        ("devices", f"{name.devices} x {device} ({name.text}); mesh {axes}"),
    ]
    if subject.parameters:
        frozen = subject.parameters - subject.trainable
        lines.append(
            ("parameters", f"{subject.parameters:,} ({subject.trainable:,} trained, {frozen:,} frozen)")
        )
    lines += [("memory", line) for line in _memory(plan)]
    each = subject.flops / name.devices
    lines.append(("model FLOPs", f"{_si(each, 'FLOP')} per device and step ({subject.formula})"))
    lines += [("time", line) for line in _time(plan)]
    if plan.walk:
        for kind, row in plan.walk.collectives().items():
            counted = f"{row['sync']} synchronous, {row['async']} asynchronous, {_si(row['bytes'], 'B')}"
            lines.append(("collectives", f"{kind}: {counted}"))
    if compiled.text and subject.parameters:
        lines.append(("run", _run(plan)))
    lines.append(("compile", f"{compiled.seconds:.0f} s"))
    lines += [("warning", warning) for warning in plan.warnings()]
    lines += [("change", line) for line in advice(plan)]
    shown, before = [], ""
    for title, line in lines:
        shown.append(f"{title if title != before else '':<12}{line}")
        before = title
    return "\n".join(shown)


def _memory(plan: Plan) -> list[str]:
    compiled = plan.compiled
    if compiled.fits is False:
        lines = [
            f"does not fit: {_gib(compiled.needed_bytes)} GiB per device needed, {_gib(compiled.hbm_bytes)} there, "
            f"{_gib(compiled.missing_bytes)} GiB too much"
        ]
    elif compiled.fits:
        share = 100 * compiled.needed_bytes / compiled.hbm_bytes
        lines = [
            f"fits: {_gib(compiled.peak_bytes)} of {_gib(compiled.hbm_bytes)} GiB per device ({share:.0f} %)"
        ]
    else:
        lines = [f"{_gib(compiled.peak_bytes)} GiB per device; nothing to compare with"]
    if compiled.argument_bytes is not None:
        place = " (in the place of the old state)" if plan.subject.parameters else ""
        lines.append(
            f"arguments {_gib(compiled.argument_bytes)}, temporaries {_gib(compiled.temp_bytes)}, output "
            f"{_gib(compiled.output_bytes)} GiB{place}"
        )
    if plan.name.platform == "cuda":
        lines.append(f"of a GPU's memory jax takes {gpu_share():.0%}: {GPU_SHARE} sets another share")
    return lines


def _time(plan: Plan) -> list[str]:
    if plan.seconds is None:
        return [f"left out: {plan.method}"]
    lines = [
        f"{_seconds(plan.seconds)} per step: compute {_seconds(plan.walk.compute_seconds)}, waiting for transfers "
        f"{_seconds(plan.walk.exposed_seconds)} ({plan.method}; nothing was run)"
    ]
    lines.append(f"MFU {plan.mfu:.1%}, {plan.subject.batch_size / plan.seconds:,.0f} examples/s")
    if plan.method == CYCLES and "tpu_custom_call" in plan.compiled.text:
        lines.append(f"Pallas kernels are counted as their FLOPs at {plan.utilisation:.0%} of the peak")
    return lines


def _run(plan: Plan) -> str:
    if plan.subject.steps is None:
        return f"left out: {plan.subject.why_no_steps}"
    days = plan.days()
    if days is None:
        return f"{plan.subject.steps:,} steps"
    hours = days * 24 * plan.name.devices
    unit = "GPU" if plan.name.platform == "cuda" else "chip"
    return f"{plan.subject.steps:,} steps: {days:.2f} days, {hours:,.0f} {unit}-hours"


def advice(plan: Plan) -> list[str]:
    """What to change in a program that does not fit."""
    if plan.compiled.fits is not False:
        return []
    if not plan.subject.parameters:
        return ["a smaller --batch, or more devices"]
    parts = "--config.micro_batches=2 or more: activations of a part of the batch at a time, the result is the same"
    return [
        *([parts] if plan.subject.splits else []),
        "--config.model.remat=full: activations are computed again instead of kept",
        "--config.mesh.fsdp=8 or more: parameters and optimizer state are cut up instead of copied",
        "--config.batch_size, or --search for the largest that fits",
    ]


COLUMNS = (
    "devices", "batch", "fits", "peak GiB", "of GiB", "step", "MFU", "examples/s", "days", "by", "compile s",
)  # fmt: skip


def rows(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """A row per plan under COLUMNS; an en dash for what is not known."""
    return [_row(plan) for plan in plans]


def _row(plan: Plan) -> tuple[str, ...]:
    compiled, days = plan.compiled, plan.days()
    known = plan.seconds is not None
    return (
        plan.name.text,
        f"{plan.subject.batch_size:,}",
        {True: "yes", False: "no", None: "–"}[compiled.fits],
        _gib(compiled.needed_bytes),
        _gib(compiled.hbm_bytes) if compiled.hbm_bytes else "–",
        _seconds(plan.seconds) if known else "–",
        f"{plan.mfu:.1%}" if known else "–",
        f"{plan.subject.batch_size / plan.seconds:,.0f}" if known else "–",
        f"{days:.2f}" if days else "–",
        plan.method.partition(":")[0] if known else "–",
        f"{compiled.seconds:.0f}",
    )


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns padded so that it reads in a terminal too."""
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= 0.1 * GIB else f"{size / GIB:.4f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3f} ms"


def _si(value: float | int, unit: str) -> str:
    """`1.2 TFLOP`."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000 or prefix == "P":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"
