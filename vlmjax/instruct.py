"""`python -m vlmjax.instruct SPEC --out=FILE --endpoint=URL --model=NAME`: conversations written from captions.

A language model that sees no picture gets captions (and boxes, where the data has them) and writes one of three kinds
of response: a conversation, a full description, or a question that takes reasoning (LLaVA, Liu et al. 2023, section 3).
It is asked through OpenAI's protocol, or runs here (--local=FOLDER). Started again, the command goes on where it was.
"""

import argparse
import os
import re
import threading
from collections.abc import Sequence

from vlmjax import generate
from vlmjax.command_line import ended
from vlmjax.data.instruct import Job, parse_kinds, write, write_prompts
from vlmjax.data.instruct_models import Answer, Endpoint, Model, Recorded, Unanswered
from vlmjax.data.instruct_prompts import draw
from vlmjax.data.sources import open_source
from vlmjax.errors import DataError, UserError


class Local:
    """A language model of this machine: any folder or run that `vlmjax.generate` opens. One answer at a time.

    What is drawn for an image depends on its key and the seed alone, so a run that goes on writes what it would have.
    """

    def __init__(
        self, folder: str, *, template: str = generate.AUTO, temperature: float, max_tokens: int, seed: int
    ):
        """Read the model. Raises UserError for none, or one whose turns nothing says how to write."""
        self._seed, self._lock = seed, threading.Lock()
        self._asked = {"temperature": temperature, "max_new_tokens": max_tokens}
        self._speaker = generate.open_speaker(generate.options(model=folder, template=template, chat=True))

    def __call__(self, messages: Sequence[dict[str, str]], key: str, kind: str) -> Answer:
        """See `instruct_models.Model`. Raises Unanswered where the request leaves the model no room."""
        from vlmjax.data.conversation import from_messages
        from vlmjax.decode.streaming import TextStream

        try:
            inputs = generate.inputs_of(self._speaker, from_messages(list(messages)), ())
        except UserError as error:
            raise Unanswered(str(error)) from None
        options = generate.options(seed=draw(key, kind, self._seed), **self._asked)
        out = TextStream(self._speaker.tokenizer.decode, self._speaker.stops)
        left = generate.room(self._speaker, inputs, options)
        with self._lock:
            for token in generate.tokens(self._speaker, inputs, options):
                out.push(token)
                left -= 1
                if out.stopped:
                    break
        out.end()
        return Answer(out.text.strip(), cut=not out.stopped and left == 0)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    about, _, more = __doc__.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m vlmjax.instruct", None, about, more, formatter_class=form, allow_abbrev=False
    )
    add = parser.add_argument
    add("data", metavar="SPEC", help="images with captions, as data.train of a recipe names them")
    add("--out", metavar="FILE", help="jsonl of conversations")
    add("--endpoint", metavar="URL", help="of OpenAI's protocol, such as http://localhost:8000/v1")
    add("--model", metavar="NAME", default="", help="its name at the endpoint")
    add(
        "--key_env",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="variable that holds the key, if there is one",
    )
    add("--local", metavar="FOLDER", help="instead of an endpoint: a language model's folder or hub id")
    add("--template", metavar="NAME", default=generate.AUTO, help="words around its turns (%(default)s)")
    add("--recorded", metavar="FILE", help="instead of an endpoint: jsonl of id, kind, response")
    add(
        "--record",
        metavar="FILE",
        default="",
        help="keep every response as it came, to be read by --recorded",
    )
    add("--prompts", metavar="FILE", help="write the requests and ask nobody")
    add("--images", metavar="DIR", default="", help="write the images of accepted rows there")
    add("--kinds", default="conversation:58,detail:23,reasoning:77", help="how often each (%(default)s)")
    add("--seed", type=int, default=0, help="of the choices that keys make (0)")
    add("--limit", type=int, default=0, metavar="N", help="the first N records (all)")
    add("--workers", type=int, default=8, metavar="N", help="requests at a time (8)")
    add("--timeout", type=float, default=120.0, metavar="S", help="seconds for one try (120)")
    add("--attempts", type=int, default=6, metavar="N", help="tries for one request (6)")
    add("--max_tokens", type=int, default=1024, metavar="N", help="of a response (1024)")
    add("--temperature", type=float, default=0.7, metavar="T", help="of sampling (0.7)")
    add("--retry_rejects", action="store_true", help="ask again where the answer was rejected before")
    return parser


def _model(options: argparse.Namespace) -> Model:
    asked = {name: getattr(options, name) for name in ("endpoint", "local", "recorded")}
    given = [f"--{name}" for name, value in asked.items() if value]
    if len(given) != 1:
        told = f"{' and '.join(given)} exclude each other" if given else "nobody to ask"
        raise DataError(f"{told}: give one of --endpoint (with --model), --local, --recorded")
    if options.max_tokens < 1 or not 0 <= options.temperature < 100:
        raise DataError(
            f"--max_tokens={options.max_tokens}, --temperature={options.temperature}: expected at least 1, and 0 to 100"
        )
    if options.recorded:
        return Recorded(options.recorded)
    sampling = {name: getattr(options, name) for name in ("temperature", "max_tokens", "seed")}
    if options.local:
        return Local(options.local, template=options.template, **sampling)
    if not options.model:
        raise DataError(f"--endpoint={options.endpoint}: give --model, its name there")
    if not re.match(r"https?://[\w.\-\[]", options.endpoint):
        raise DataError(
            f"--endpoint={options.endpoint}: expected an address such as http://localhost:8000/v1"
        )
    for name in ("timeout", "attempts", "workers"):
        if not getattr(options, name) > 0:
            raise DataError(f"--{name}={getattr(options, name)}: expected a number above 0")
    key = os.environ.get(options.key_env, "")
    more = {"timeout": options.timeout, "attempts": options.attempts, **sampling}
    return Endpoint(options.endpoint, options.model, key, **more)


def run(options: argparse.Namespace) -> dict[str, int]:
    """Do what the command line says; the counts. Raises DataError."""
    job = Job(
        options.out or "",
        parse_kinds(options.kinds),
        options.seed,
        options.images,
        options.record,
        max(1, options.workers),
        options.retry_rejects,
    )
    source = open_source(options.data)
    indices = range(min(options.limit, len(source)) if options.limit > 0 else len(source))
    if options.prompts:
        counts = {"prompts": write_prompts(source, job, indices, options.prompts)}
    elif not job.out:
        raise DataError("--out is not given: name the jsonl file that conversations go to")
    else:
        counts = write(source, _model(options), job, indices)
    for name, number in sorted(counts.items()):
        print(f"{number:>8}  {name}")
    return counts


def main(arguments: list[str] | None = None) -> None:
    """Run; user errors end as one line and a documented exit code."""
    ended(lambda: run(make_parser().parse_args(arguments)))


if __name__ == "__main__":
    main()
