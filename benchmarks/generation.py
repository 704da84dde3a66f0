"""Generation beside transformers, in turn in one run: time of the prompt and of every further token, on the CPU.

`python benchmarks/generation.py --out=generation.json` makes a random Llama of each size once, loads it in both, and
times `generate` greedily, `--rounds` times in turn, with 1 and with all new tokens: the first is the time of the
prompt, the difference that of the others. The best of the rounds, which other programs on the machine disturb least,
and ratios theirs / ours: above 1 we are faster. torch has `--threads`
threads, XLA all cores; both compute in float32, and nothing ends a row early. Compiling is not counted:
the first call of each is dropped.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIZES = {"256x4": (256, 4), "512x8": (512, 8)}
VOCAB, PROMPT, NEW = 8192, 128, 64


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--out", default="")
    return parser.parse_args()


def pair(size: str, folder: Path, beams: int) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """The same model twice, each as a function of ids and a number of new tokens."""
    import torch
    import transformers

    from vlmjax import decode, hub

    width, depth = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    model, params = hub.load(folder)

    def their(ids: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(ids.astype(np.int64))
        options = {"max_new_tokens": new, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return out[:, ids.shape[1] :].numpy()

    def our(ids: np.ndarray, new: int) -> np.ndarray:
        return np.asarray(decode.generate(model, params, max_new_tokens=new, num_beams=beams, input_ids=ids))

    return their, our


def measure(
    calls: dict[str, Callable[..., np.ndarray]], batch: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of the prompt and per further token, of each."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT)).astype(np.int32)
    seconds = {(name, new): [] for name in calls for new in (1, NEW)}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            for new in (1, NEW):
                start = time.perf_counter()
                call(ids, new)
                seconds[name, new] += [time.perf_counter() - start] if turn else []
    best = {key: 1e3 * min(values) for key, values in seconds.items()}
    return {
        name: {"prompt_ms": best[name, 1], "token_ms": (best[name, NEW] - best[name, 1]) / (NEW - 1)}
        for name in calls
    }


def main() -> None:
    """Measure, print a line per size and batch, write them all."""
    given = arguments()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import torch

    torch.set_num_threads(given.threads)
    rows = []
    for size in given.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            their, our = pair(size, Path(folder), given.beams)
        for batch in map(int, given.batches.split(",")):
            found = measure({"transformers": their, "vlmjax": our}, batch, given.rounds)
            row = {"size": size, "batch": batch, "beams": given.beams}
            for field in ("prompt_ms", "token_ms"):
                row |= {f"{name}_{field}": round(found[name][field], 3) for name in found}
                ratio = found["transformers"][field] / found["vlmjax"][field]
                row[f"{field.removesuffix('_ms')}_ratio"] = round(ratio, 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if given.out:
        Path(given.out).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
