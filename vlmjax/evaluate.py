"""`python -m vlmjax.evaluate --model=runs/clip --benchmark=zeroshot --data=x.tar`: score a trained model."""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vlmjax.command_line import parse_alone
from vlmjax.config_checks import METRICS
from vlmjax.errors import CheckpointError, DataError, UserError

_MOST_IMAGES = 1  # per question
# Flags of this command alone, so that commands can be imported side by side.
FLAGS = flags.FlagValues()


def _string(name: str, default: str | None, text: str) -> None:
    flags.DEFINE_string(name, default, text, flag_values=FLAGS)


_string("model", None, "Folder of a run (its newest checkpoint), or a Hugging Face folder or hub id.")
flags.DEFINE_enum("benchmark", None, tuple(METRICS), "What to measure.", flag_values=FLAGS)
_string(
    "data",
    None,
    "Shards 'x-{00000..00003}.tar.gz', a table, a folder, or scenes:heldout; commas join several.",
)
_string(
    "classes",
    "",
    "zeroshot, probe, classify: file of classes, 'name' or 'label<TAB>name' per line. Default: distinct captions.",
)
_string(
    "templates", "", "zeroshot: plain, photo, drawing, a file with one template per line, or one template."
)
flags.DEFINE_bool(
    "blind",
    False,
    "vqa: every image in the mean colour: what the questions alone give away.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("max_new_tokens", 16, "vqa, caption: of what is written.", 1, flag_values=FLAGS)
flags.DEFINE_integer("min_new_tokens", 0, "caption: of what is written, at least.", 0, flag_values=FLAGS)
flags.DEFINE_integer("num_beams", 1, "caption: beams; 1 is greedy (BLIP: 3).", 1, flag_values=FLAGS)
_string(
    "template",
    "auto",
    "vqa: words around a turn: v1, chatml, ...; tokenizer: its own. auto: those of the model's training, where its "
    "folder says them, else the tokenizer's own.",
)
_string("train", "", "probe: the records to fit, given like --data.")
flags.DEFINE_integer("train_examples", 0, "probe: the first so many of them; 0 = all.", 0, flag_values=FLAGS)
flags.DEFINE_float(
    "l2",
    0.0,
    "probe: strength of the regularisation, 1 / C of scikit-learn; 0 = the best on a fifth of --train.",
    0.0,
    flag_values=FLAGS,
)
_string("out", "", "Also write the results to this json file.")
_string("report", "", "Also write a report.html with what was found into this folder.")
_string("keep", "", "Only records whose key this regular expression finds.")
_string("exclude", "", "Not the records whose key this regular expression finds.")
_string("prompt", "", "caption: what every caption begins with, such as 'a picture of'.")
flags.DEFINE_integer(
    "rerank",
    0,
    "retrieval, of BLIP: so many nearest candidates of a query are put in order by image-text matching.",
    0,
    flag_values=FLAGS,
)
_string("answers", "", "vqa, of BLIP: file of answers, the likeliest of which is taken; empty: it writes.")
flags.DEFINE_integer(
    "top",
    128,
    "vqa, of BLIP: only so many answers, those that begin likeliest; 0 = all.",
    0,
    flag_values=FLAGS,
)
flags.DEFINE_integer("examples", 0, "Use the first this many records; 0 = all.", 0, flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 256, "Images and texts at a time, over all devices.", 1, flag_values=FLAGS)
flags.DEFINE_enum(
    "clean",
    "auto",
    ("auto", "blip", "none"),
    "How texts are cleaned before the model reads them. auto: as in its training, where its folder says so.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "canonical", False, "Lower-case texts without punctuation, as SigLIP expects.", flag_values=FLAGS
)


def read_model(path: str) -> tuple[Any, Any, Any, Any]:
    """Read a run or a Hugging Face folder: (model, params, tokenizer, eval transform); the last two may be None.

    Raises:
        CheckpointError: a folder that is neither.
        DataError: images of another size than the model's.
        UserError: a BLIP-2, whose prompts no command here writes.
    """
    from vlmjax import hub
    from vlmjax.export import load_workdir

    given, (is_run, path) = path, _kind(path)
    model, params, tokenizer, transform = (
        load_workdir(path) if is_run else (*hub.load(path), *hub.load_processor(path))
    )
    _check_layout(model, given)
    # A dual encoder resamples its positions; the places of a text are counted.
    if transform is not None and hasattr(model.config, "image_tokens"):
        size = model.config.image.image_shape
        if transform.output_size != size:
            raise DataError(
                f"--model={given}: its image processor makes images of {transform.output_size}, the tower takes "
                f"{size}; it is another model's"
            )
    return model, params, tokenizer, transform


def _check_layout(model: Any, given: str) -> None:
    """Raise UserError for a BLIP-2 around OPT or T5: its images stand before a text, its opening token included."""
    from vlmjax.models.t5_layers import T5Config
    from vlmjax.models.vlm import Seeing

    if not isinstance(model, Seeing) or model.config.bridge.qformer is None:
        return
    words = model.config.text
    if isinstance(words, T5Config) or words.family == "opt":
        raise UserError(
            f"--model={given}: is a BLIP-2, which takes images before a text and its opening token; no command here "
            "writes such prompts yet: call vlmjax.decode.generate with them (docs/blip2.md)"
        )


def read_form(path: str) -> Any:
    """How the model of a run or a folder was spoken to in training: a `data.form.Form`, None where nothing says it."""
    from vlmjax import hub
    from vlmjax.export import run_form

    is_run, path = _kind(path)
    return run_form(path) if is_run else hub.load_form(path)


def read_clean(path: str) -> str:
    """How captions were cleaned for the model of a run or a folder (`data.clean`); "" where nothing says it."""
    from vlmjax import hub
    from vlmjax.export import run_clean

    is_run, path = _kind(path)
    return run_clean(path) if is_run else hub.load_clean(path)


def _kind(path: str) -> tuple[bool, str]:
    """Whether a path is that of a run with checkpoints, and what to read."""
    path = path if "://" in path else os.path.expanduser(path)
    folder = Path(path)
    is_run = "://" in path or (folder / "recipe.json").is_file()
    if is_run and not (folder / "checkpoints").is_dir() and (folder / "hf" / "config.json").is_file():
        is_run, path = False, str(folder / "hf")
    if not is_run and folder.is_dir() and not (Path(path) / "config.json").is_file():
        raise CheckpointError(
            f"--model={path}: neither a run (recipe.json) nor a Hugging Face folder (config.json)"
        )
    return is_run, path


def load_model(path: str, mesh: Any, benchmark: str = "zeroshot") -> tuple[Any, Any, Any, Any]:
    """Read a model that a benchmark can score: (model, params on every device, tokenizer, eval transform).

    Raises:
        CheckpointError: a folder that is neither a run nor a Hugging Face folder.
        DataError: a model of another kind than the benchmark scores, or one without its processor.
    """
    import jax

    from vlmjax.sharding.mesh import replicated

    model, params, tokenizer, transform = read_model(path)
    from vlmjax.evals.choose import WITHOUT_TEXT, missing

    silent = tokenizer is None and benchmark not in WITHOUT_TEXT
    if silent or transform is None:
        lacks = "tokenizer" if silent else "preprocessor_config.json"
        raise DataError(f"--model={path}: has no {lacks}; save the model with its processor")
    method, needs = missing(model, benchmark)
    if method:
        raise DataError(
            f"--model={path}: {type(model).__name__} has no {method}; --benchmark={benchmark} needs {needs}"
        )
    return model, jax.device_put(params, replicated(mesh)), tokenizer, transform


def evaluate(options: flags.FlagValues) -> dict[str, Any]:
    """Run the benchmark that the flags describe; returns what is written to `--out`."""
    from vlmjax.evals.benchmark import Benchmark
    from vlmjax.evals.table import print_results
    from vlmjax.sharding.distributed import initialize
    from vlmjax.sharding.mesh import make_mesh

    initialize()
    import jax

    if "://" in options.report:
        raise UserError(f"--report={options.report}: name a folder on a disk")
    if os.path.isfile(options.report):
        raise UserError(f"--report={options.report} is a file: name a folder")
    fields = (
        "benchmark",
        "data",
        "keep",
        "exclude",
        "examples",
        "classes",
        "templates",
        "batch_size",
        "canonical",
        "blind",
        "max_new_tokens",
        "min_new_tokens",
        "num_beams",
        "prompt",
        "rerank",
        "answers",
        "top",
        "train",
        "train_examples",
        "l2",
    )
    named = {"blip": "blip", "none": ""}
    clean = named[options.clean] if options.clean in named else read_clean(options.model)
    given = {name: options[name].value for name in fields}
    benchmark = Benchmark(name=options.benchmark, clean=clean, **given)
    mesh = make_mesh()
    model, params, *processor = load_model(options.model, mesh, options.benchmark)
    evaluator = _evaluator(options, benchmark, model, *processor, mesh)
    result = evaluator.run(params, details=bool(options.report))
    row = {"model": options.model, "data": options.data, **result.to_json()}
    if jax.process_index() == 0:
        print_results([result], title=f"{options.model} on {options.data}")
        if options.out:
            _write(options.out, row)
        if options.report:
            from vlmjax.training import report

            report.save_result(options.report, result)
            print(f"wrote {report.write_report(options.report)}")
    return row


def _evaluator(options: flags.FlagValues, benchmark: Any, *parts: Any) -> Any:
    """What runs a benchmark; `parts` are model, tokenizer, transform and mesh."""
    from vlmjax.data.form import Form
    from vlmjax.evals.choose import Evaluators

    form = (
        read_form(options.model) if options.benchmark == "vqa" else None
    ) or Form()  # None: it has no turns
    if options.template != "auto":
        form = dataclasses.replace(form, template=options.template)
    return Evaluators(*parts, form=form, images_per_row=_MOST_IMAGES).of(benchmark)


def _write(path: str, row: dict[str, Any]) -> None:
    import fsspec

    try:
        system, target = fsspec.core.url_to_fs(path)
        system.makedirs(target.rpartition("/")[0], exist_ok=True)
        with system.open(target, "w", encoding="utf-8") as file:
            json.dump(row, file, indent=2)
            file.write("\n")
    except OSError as error:
        raise UserError(
            f"--out={path}: cannot be written ({error.strerror}); name a file you may write"
        ) from None
    print(f"wrote {path}")


def parse(arguments: Sequence[str]) -> None:
    """Read the flags before anything heavy is imported; `--help` and mistakes end the program here."""
    hint = "quote patterns, --data='x-{00000..00003}.tar'"
    try:
        parse_alone(arguments, FLAGS, __doc__, ("model", "benchmark", "data"), hint)
    except UserError as error:
        _stop(error)
    if FLAGS.benchmark != "vqa" and FLAGS.blind:
        _stop(UserError(f"--blind is for --benchmark=vqa; with {FLAGS.benchmark} leave it out"))
    if bool(FLAGS.train) != (FLAGS.benchmark == "probe"):
        what = (
            "give the records to fit, --train=SHARDS" if FLAGS.benchmark == "probe" else "leave --train out"
        )
        _stop(UserError(f"--train={FLAGS.train} with --benchmark={FLAGS.benchmark}: {what}"))


def _stop(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def main() -> None:
    """Evaluate; user errors end as one line and a documented exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        evaluate(FLAGS)
    except UserError as error:
        logging.debug("stopped by", exc_info=True)
        _stop(error)


if __name__ == "__main__":
    parse(sys.argv)
    main()
