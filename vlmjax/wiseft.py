"""`python -m vlmjax.wiseft --workdir=runs/finetune --alphas=0,0.5,1`: averages of zero-shot and fine-tuned weights.

The weights that a run of stage "classification" began with, a CLIP with a head of prompts, and those it has come to are
averaged, (1 - alpha) x the first + alpha x the second, and every average is scored (Wortsman et al. 2021, WiSE-FT,
arXiv 2109.01903, section 3).
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from vlmjax.command_line import parse_alone
from vlmjax.errors import CheckpointError, UserError

# Flags of this command alone, so that commands can be imported side by side.
FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "Folder of a run that began with model.head_from.", flag_values=FLAGS)
flags.DEFINE_list("alphas", "0,0.25,0.5,0.75,1", "Shares of the fine-tuned weights.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "data",
    [],
    "What to score on, given like data.train; once for each set. By default the `classify` entries of the recipe's "
    "evals.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("examples", 0, "The first so many records of each; 0 = all.", 0, flag_values=FLAGS)
flags.DEFINE_string(
    "out", "", "Write the average at the only one of --alphas, as a Hugging Face folder.", flag_values=FLAGS
)
flags.DEFINE_integer("step", None, "Checkpoint to take; the newest one by default.", flag_values=FLAGS)


def interpolated(first: Any, second: Any, alpha: float) -> Any:
    """(1 - alpha) first + alpha second, leaf by leaf, as float32 numpy arrays; the two trees have the same leaves."""
    import jax
    import numpy as np

    share = np.float32(alpha)
    return jax.tree.map(lambda a, b: (1 - share) * np.asarray(a) + share * np.asarray(b), first, second)


def ends(workdir: str, step: int | None = None) -> tuple[Any, Any, Any, Any]:
    """What lies at the two ends of a run: (recipe, model, parameters at its beginning, parameters it has come to).

    The first are read anew from the folder it began with.

    Raises:
      CheckpointError: a run of another stage, or one whose head began at random.
    """
    import jax
    import numpy as np

    from vlmjax.export import load_workdir
    from vlmjax.sharding.mesh import make_mesh, replicated
    from vlmjax.training import build
    from vlmjax.training.compile import init_params
    from vlmjax.training.workdir import Workdir

    recipe, model = build.read_run(Workdir(workdir, writer=False))
    if recipe.stage != "classification" or not recipe.model.head_from:
        raise CheckpointError(
            f"--workdir={workdir}: stage {recipe.stage!r} with model.head_from={recipe.model.head_from!r} did not "
            "begin with a zero-shot classifier; train with stage 'classification' and model.head_from='photo'"
        )
    _, last, _, _ = load_workdir(workdir, step=step)

    def fresh() -> Any:
        return init_params(model, recipe.seed)

    mesh = make_mesh()
    places = jax.tree.map(lambda _: replicated(mesh), jax.eval_shape(fresh))
    first = build.import_params(recipe, model, places, fresh)
    return recipe, model, *(jax.tree.map(np.asarray, tree) for tree in (first, last))


def curve(
    recipe: Any, model: Any, first: Any, last: Any, benchmarks: Sequence[Any], alphas: Sequence[float]
) -> Any:
    """Yield (alpha, results of the benchmarks in their order)."""
    import jax

    from vlmjax.evals.choose import Evaluators
    from vlmjax.sharding.mesh import make_mesh, replicated
    from vlmjax.training import build

    mesh = make_mesh()
    transform = build.eval_transform(recipe, model.config.image.image_shape)
    makers = Evaluators(model, None, transform, mesh)
    evaluators = [makers.of(benchmark) for benchmark in benchmarks]
    for alpha in alphas:
        params = jax.device_put(interpolated(first, last, alpha), replicated(mesh))
        yield alpha, [evaluator.run(params, details=False) for evaluator in evaluators]


def run(options: flags.FlagValues) -> None:
    """Score every average, print a row for each, and write the one that is asked for."""
    from vlmjax import hub
    from vlmjax.evals.benchmark import Benchmark, benchmark_of
    from vlmjax.training import build

    alphas = [float(alpha) for alpha in options.alphas]
    recipe, model, first, last = ends(options.workdir, options.step)
    benchmarks = [
        Benchmark(name, "classify", name, examples=options.examples, batch_size=recipe.batch_size)
        for name in options.data
    ] or [
        benchmark_of(name, {**entry.to_dict(), "examples": options.examples or entry.examples})
        for name, entry in recipe.evals.items()
        if entry.benchmark == "classify" and entry.data
    ]
    if benchmarks:
        print("  ".join(["alpha", *(benchmark.name for benchmark in benchmarks)]))
    for alpha, results in curve(recipe, model, first, last, benchmarks, alphas) if benchmarks else ():
        tops = zip(benchmarks, results, strict=True)
        row = (f"{result.metrics['top1']:.1%}".rjust(len(benchmark.name)) for benchmark, result in tops)
        print("  ".join([f"{alpha:5.2f}", *row]), flush=True)
    if options.out:
        transform = build.eval_transform(recipe, model.config.image.image_shape)
        out = os.path.expanduser(options.out)
        hub.save(model, interpolated(first, last, alphas[0]), out, image_processor=transform)
        print(f"wrote {out}")


def parse(arguments: Sequence[str]) -> None:
    """Read the flags before anything heavy is imported; raises UserError for mistakes."""
    parse_alone(arguments, FLAGS, __doc__, ("workdir",), "values are given as --alphas=0,0.5,1")
    for alpha in FLAGS.alphas:
        try:
            inside = 0 <= float(alpha) <= 1
        except ValueError:
            inside = False
        if not inside:
            raise UserError(f"--alphas={','.join(FLAGS.alphas)}: {alpha!r} is no number from 0 to 1")
    if FLAGS.out and len(FLAGS.alphas) != 1:
        raise UserError(f"--out={FLAGS.out}: give one of --alphas to write, such as --alphas=0.5")
    if "://" in FLAGS.out or os.path.isfile(FLAGS.out):
        raise UserError(f"--out={FLAGS.out}: name a folder on a disk")


def main(arguments: Sequence[str]) -> None:
    """Average and score as the flags say; user errors end as one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        parse(arguments)
        run(FLAGS)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv)
