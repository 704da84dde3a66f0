"""Results against chance, as a table in the terminal."""

from collections.abc import Sequence
from typing import Any

from vlmjax.evals.benchmark import EvalResult

TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "exact_match": "exact match",
    "accuracy": "matches told from others",
    "own": "own captions recognised",
    "other": "others refused",
    "right": "statements judged right",
    "exact": "exact captions",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr-D",
    **{f"text_to_image_r{k}": f"text → image R@{k}" for k in (1, 5, 10)},
    **{f"image_to_text_r{k}": f"image → text R@{k}" for k in (1, 5, 10)},
}


def print_results(results: Sequence[EvalResult], *, console: Any = None, title: str = "Evaluation") -> None:
    """Print one line per metric: benchmark, metric, result, chance, how many times chance, records used."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name, side in (("benchmark", "left"), ("metric", "left"), ("result", "right"), ("chance", "right")):
        table.add_column(name, justify=side)
    table.add_column("× chance", justify="right")
    table.add_column("records", justify="right")
    for result in results:
        for number, (metric, value) in enumerate(result.metrics.items()):
            chance = result.chance[metric]
            used = f"{result.counts['used']:,}"
            used += f" ({result.counts['skipped']:,} skipped)" if result.counts["skipped"] else ""
            table.add_row(
                result.name if number == 0 else "",
                TITLES.get(metric, metric),
                f"{value:.1%}",
                f"{chance:.2%}",
                f"{value / chance:.1f}" if chance else "",
                used if number == 0 else "",
                end_section=number == len(result.metrics) - 1,
            )
    (console or Console()).print(table)
