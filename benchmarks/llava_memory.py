"""What LLaVA-1.5 needs of each chip, and what the loss in chunks and the frozen halves save, compiled without chips.

`python benchmarks/llava_memory.py --topology=v5e:8x8 --fsdp=64`, with `pip install -e '.[plan]'`. Each line is the step
of a recipe as training compiles it; "at once" has the scores of all tokens, "all trained" freezes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
AT_ONCE = "token_cross_entropy.CHUNK_BYTES = 1 << 62"
# The vocabulary of Qwen2, and one long row a chip: 8,192 tokens, whose scores would be 4.6 GiB in float32.
LARGE = (
    "--config.model.language.vocab_size=152064",
    "--config.data.max_length=8192",
    "--config.data.lengths=()",
    "--config.batch_size=64",
)
VARIANTS = (
    ("stage 1", "llava15_7b_stage1", "", ()),
    ("stage 1, all trained", "llava15_7b_stage1", "", ("--config.frozen=()",)),
    ("stage 2", "llava15_7b_stage2", "", ()),
    ("stage 2, scores at once", "llava15_7b_stage2", AT_ONCE, ()),
    ("stage 2, 152,064 words x 8,192 tokens", "llava15_7b_stage2", "", LARGE),
    ("the same, scores at once", "llava15_7b_stage2", AT_ONCE, LARGE),
    ("stage 2, adapters", "llava15_7b_lora", "", ()),
)


def plan(config: str, patch: str, options: list[str]) -> dict:
    """The json of `vlmjax.plan`, made in a process of its own with one line of Python before it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "plan.json")
        arguments = ["plan", f"--config=configs/{config}.py", f"--json={out}", *options]
        code = (
            "from vlmjax.losses import token_cross_entropy\nfrom vlmjax import plan\n"
            f"{patch}\nimport sys\nsys.argv = {arguments!r}\nplan.parse(sys.argv)\nplan.main()\n"
        )
        env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
        env["HF_HUB_OFFLINE"] = "1"  # sizes stand in the recipes
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        if not out.exists():
            return {"error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]}
        return json.loads(out.read_text())


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:8x8")
    parser.add_argument("--only", default="", help="lines that have these words in their titles")
    parser.add_argument("--fsdp", type=int, default=64, help="parts of the parameters (64)")
    options = parser.parse_args()
    given = [f"--topology={options.topology}", f"--config.mesh.fsdp={options.fsdp}"]
    print("| step | trained | frozen | GiB per chip | fits | step s | MFU | compile s |")
    print("|---|---|---|---|---|---|---|---|")
    for title, config, patch, more in (one for one in VARIANTS if options.only in one[0]):
        made = plan(config, patch, [*given, *more])
        if "error" in made:
            print(f"| {title} | {made['error']} |", flush=True)
            continue
        trained, whole = made["trainable_parameters"], made["parameters"]
        memory = f"{made['needed_bytes'] / GIB:.2f} of {made['hbm_bytes'] / GIB:.2f}"
        speed = made["predicted_step_seconds"], made["predicted_mfu"]
        seconds, mfu = ("–", "–") if None in speed else (f"{speed[0]:.2f}", f"{speed[1]:.1%}")
        print(
            f"| {title} | {trained / 1e9:.2f} B | {(whole - trained) / 1e9:.2f} B | {memory} "
            f"| {'yes' if made['fits'] else 'no'} | {seconds} | {mfu} | {made['compile_seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
