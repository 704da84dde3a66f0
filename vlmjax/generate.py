"""`python -m vlmjax.generate --model=FOLDER --prompt="..."`: text from a language model, about images where it sees."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from absl import flags

from vlmjax.command_line import parse_alone
from vlmjax.errors import BadRecord, DataError, Stopped, UserError

# Flags of this command alone, so that commands can be imported side by side.
FLAGS = flags.FlagValues()
RAW, AUTO = "none", "auto"


def _string(name: str, default: str | None, text: str) -> None:
    flags.DEFINE_string(name, default, text, flag_values=FLAGS)


_string("model", None, "Folder of a run (its newest checkpoint), or a Hugging Face folder or hub id.")
_string(
    "prompt",
    None,
    "What to continue or to answer; <image> is where an image stands, otherwise they come on a line before it. Of BLIP "
    "a question, or how a caption begins ('' for nothing).",
)
flags.DEFINE_multi_string("image", [], "An image file; give it again for the next one.", flag_values=FLAGS)
flags.DEFINE_bool("chat", False, "Talk: a line is a turn. /image FILE, /clear, /exit.", flag_values=FLAGS)
_string(
    "template",
    AUTO,
    "Words around a turn: v1, chatml, ...; tokenizer: its own; none: the prompt as it is. auto: those of the model's "
    "training where its folder says them, else the tokenizer's own, else none.",
)
_string("system", "", "System message in place of the template's.")
flags.DEFINE_integer("max_new_tokens", 256, "At most this many tokens.", 1, flag_values=FLAGS)
flags.DEFINE_float(
    "temperature", 0.0, "0: the likeliest token; above: draw, the higher the wilder.", 0.0, flag_values=FLAGS
)
flags.DEFINE_integer("top_k", 0, "Draw from so many likeliest tokens; 0 = all.", 0, flag_values=FLAGS)
flags.DEFINE_float(
    "top_p", 1.0, "Draw from the likeliest tokens that hold this probability.", flag_values=FLAGS
)
flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: fewer repetitions.", flag_values=FLAGS)
flags.DEFINE_integer("num_beams", 1, "Above 1: beam search, shown when it is done.", 1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of what is drawn.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "stop", [], "A text that ends the answer; give it again for another.", flag_values=FLAGS
)


def options(**changes: Any) -> SimpleNamespace:
    """What the flags say when nothing is given, but for `changes`: to use this command's parts from elsewhere."""
    return SimpleNamespace(**{name: FLAGS[name].default for name in FLAGS} | changes)


class Speaker(NamedTuple):
    """A model that has been opened, and what stands between it and text.

    Attributes:
      form: how it is spoken to; None for a BLIP, which is given an image and a question, or how a caption begins.
      apart: what it reads is apart from what it writes (T5): it is closed, and takes no room from the answer.
    """

    name: str
    model: Any
    params: Any
    tokenizer: Any
    transform: Any
    pieces: Any
    form: Any
    ends: tuple[int, ...]
    stops: tuple[str, ...]
    longest: int
    apart: bool = False


def open_speaker(options: Any) -> Speaker:
    """Read the model of the parsed flags, or of `options()`. Raises UserError for one that writes no text."""
    import jax

    from vlmjax.data.form import ends_of
    from vlmjax.data.pieces import Pieces
    from vlmjax.decode.language import DecoderLanguage, language_of
    from vlmjax.evaluate import read_model
    from vlmjax.models.blip_config import BlipConfig
    from vlmjax.models.t5_layers import T5Config

    model, params, tokenizer, transform = read_model(options.model)
    try:
        language = language_of(model)
    except UserError as error:
        raise UserError(f"--model={options.model}: {error}") from None
    if tokenizer is None:
        raise DataError(f"--model={options.model}: has no tokenizer; save the model with it")
    if isinstance(model.config, BlipConfig):
        return _blip(options, model, params, tokenizer, transform)
    config = language.config(params) if isinstance(language, DecoderLanguage) else model.config
    pieces = Pieces(tokenizer)
    form = _form(options, pieces)
    tokens, texts = ends_of(form.template, pieces)
    return Speaker(
        name=options.model,
        model=model,
        params=jax.device_put(params),
        tokenizer=tokenizer,
        transform=transform,
        pieces=pieces,
        form=form,
        ends=tuple(dict.fromkeys((*config.eos_token_ids, *tokens))),
        stops=(*options.stop, *texts),
        longest=config.max_length,
        apart=isinstance(config, T5Config),
    )


def _blip(options: Any, model: Any, params: Any, tokenizer: Any, transform: Any) -> Speaker:
    """A BLIP that writes captions or answers questions."""
    import jax

    from vlmjax.data.pieces import Pieces
    from vlmjax.models.blip_tasks import BlipVqa

    name = type(model).__name__
    if options.chat or options.system or options.template != AUTO:
        raise UserError(
            f"--model={options.model}: a {name} holds no conversation; leave out --chat, --system and --template, and "
            "give --image and --prompt"
        )
    if transform is None:
        raise DataError(
            f"--model={options.model}: has no preprocessor_config.json; save the model with its processor"
        )
    config = model.config
    return Speaker(
        name=options.model,
        model=model,
        params=jax.device_put(params),
        tokenizer=tokenizer,
        transform=transform,
        pieces=Pieces(tokenizer),
        form=None,
        ends=(config.sep_token_id,),
        stops=tuple(options.stop),
        longest=config.text.max_length,
        apart=isinstance(model, BlipVqa),
    )


def _form(options: Any, pieces: Any) -> Any:
    """How the model is spoken to: as the flags say, else as its folder does."""
    from vlmjax.data.conversation_templates import OWN, Template
    from vlmjax.data.form import Form
    from vlmjax.evaluate import read_form

    name, found = options.template, read_form(options.model)
    form = Form() if found is None else found
    form = dataclasses.replace(form, system=options.system or form.system)
    if name == AUTO and found is not None:
        return form
    if name == AUTO:
        name = OWN if pieces.chat is not None else RAW
    if name == RAW and options.chat:
        raise UserError(
            f"--template={options.template}: a conversation needs a template and the tokenizer of {options.model} "
            "has none; give the one it was trained with, e.g. --template=v1"
        )
    return dataclasses.replace(form, template=Template("", "", "", "", "") if name == RAW else name)


# ---- prompts


def read_image(path: str) -> Any:
    """Pixels of a file. Raises UserError naming it."""
    from vlmjax.data.images import decode

    try:
        return decode(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"image {path}: cannot be read ({error.strerror}); name an image file") from None
    except BadRecord as error:
        raise UserError(f"image {path}: {error.reason}; give a whole JPEG, PNG or WebP") from None


def message(text: str, images: int) -> Any:
    """What the user says, with `images` images: where `<image>` stands in the text, otherwise on a line before it."""
    from vlmjax.data.conversation import MARK, count, from_messages

    said = from_messages([{"role": "user", "content": text}])[0]
    marks = count([said])
    if marks and marks != images:
        raise UserError(f"the prompt has {marks} <image> and {images} images were given; give one for each")
    if marks or not images:
        return said
    return from_messages([{"role": "user", "content": f"{MARK * images}\n{text.lstrip()}"}])[0]


def inputs_of(speaker: Speaker, conversation: Sequence[Any], images: Sequence[Any]) -> dict[str, Any]:
    """What the model takes: ids of the conversation up to the answer, and normalised pixels of its images."""
    import numpy as np

    if speaker.form is None:
        return _blip_inputs(speaker, conversation[-1], images)
    tokens, image_id, out = 0, 0, {}
    if images:
        if speaker.transform is None or not hasattr(speaker.model.config, "image_tokens"):
            raise UserError(
                f"--model={speaker.name}: {type(speaker.model).__name__} reads text alone; leave out the images, or "
                "give a vision-language model with its processor"
            )
        pixels = [speaker.transform.normalize(speaker.transform(one)) for one in images]
        out["pixel_values"] = np.stack(pixels)[None]
        tokens, image_id = speaker.model.config.image_tokens, speaker.model.config.image_token_id
    try:
        ids = speaker.form.prompt(
            tuple(conversation), speaker.pieces, image_tokens=tokens, image_token_id=image_id
        )
    except BadRecord as error:
        raise UserError(f"the prompt cannot be used: {error}") from None
    if speaker.apart and len(ids):
        ids = np.append(ids, np.int32(speaker.ends[0]))
    if len(ids) == 0:
        raise UserError(
            "the prompt is empty and the tokenizer begins with no token of its own; give --prompt"
        )
    if len(ids) >= speaker.longest:
        raise UserError(
            f"the prompt has {len(ids)} tokens, the model takes {speaker.longest}; shorten it, or /clear in a chat"
        )
    return out | {"input_ids": ids[None]}


def _blip_inputs(speaker: Speaker, said: Any, images: Sequence[Any]) -> dict[str, Any]:
    """An image, and a question or how its caption begins."""
    import numpy as np

    if len(images) != 1:
        raise UserError(f"--model={speaker.name}: {len(images)} images; BLIP looks at one, give --image once")
    text = "".join(part.text for part in said.parts if part.kind == "text").strip()
    if speaker.apart and not text:
        raise UserError(f"--model={speaker.name}: answers questions; give one as --prompt")
    ids = speaker.tokenizer.encode(text) if text else [speaker.model.config.bos_token_id]
    if len(ids) >= speaker.longest:
        raise UserError(f"the prompt has {len(ids)} tokens, the model takes {speaker.longest}; shorten it")
    pixels = speaker.transform.normalize(speaker.transform(images[0]))
    return {"pixel_values": pixels[None], "input_ids": np.array([ids], np.int32)}


# ---- answers


def answer(speaker: Speaker, inputs: dict[str, Any], options: Any) -> Iterator[str]:
    """The answer piece by piece; with beams in one piece."""
    from vlmjax.decode.streaming import words

    return words(tokens(speaker, inputs, options), speaker.tokenizer.decode, speaker.stops)


def room(speaker: Speaker, inputs: dict[str, Any], options: Any) -> int:
    """How many tokens an answer may have."""
    if speaker.apart:  # BLIP's answer begins with a token of its own
        return min(options.max_new_tokens, speaker.longest - (speaker.form is None))
    return min(options.max_new_tokens, speaker.longest - inputs["input_ids"].shape[1])


def tokens(speaker: Speaker, inputs: dict[str, Any], options: Any) -> Iterator[int]:
    """The tokens of the answer, without the one that ends it."""
    from vlmjax import decode

    given = {
        "max_new_tokens": room(speaker, inputs, options),
        "seed": options.seed,
        "eos_token_id": speaker.ends,
        "pad_token_id": speaker.pieces.pad_token_id,
        "repetition_penalty": options.repetition_penalty,
    }
    if options.temperature > 0:
        given |= {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
        given |= {"do_sample": True}
    if options.num_beams > 1:
        found = decode.generate(speaker.model, speaker.params, num_beams=options.num_beams, **given, **inputs)
        return _until(iter(found[0].tolist()), speaker.ends)
    rows = decode.stream(speaker.model, speaker.params, **given, **inputs)
    return _until((int(row[0]) for row in rows), speaker.ends)


def _until(tokens: Iterator[int], ends: tuple[int, ...]) -> Iterator[int]:
    for token in tokens:
        if token in ends:
            return
        yield token


def generate(options: flags.FlagValues) -> None:
    """Answer the prompt that the flags give."""
    images = [read_image(path) for path in options.image]
    said = message(options.prompt, len(images))
    speaker = open_speaker(options)
    inputs = inputs_of(speaker, [said], images)
    try:
        for piece in answer(speaker, inputs, options):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print()
        raise Stopped("interrupted", 2) from None


# ---- conversations


def chat(options: flags.FlagValues, ask: Callable[[str], str] = input) -> None:
    """Talk until the input ends, /exit, or Ctrl-C while nothing is being written."""
    speaker = open_speaker(options)
    talk, images, fresh = [], [], [read_image(path) for path in options.image]
    print("A line is a turn. /image FILE shows an image with the next one, /clear begins anew, /exit leaves.")
    while True:
        try:
            line = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return
        try:
            if command == "/clear":
                talk, images, fresh = [], [], []
            elif command == "/image":
                fresh = [*fresh, read_image(argument.strip())]
            elif command.startswith("/"):
                raise UserError(f"{command} is no command; there are /image FILE, /clear, /exit")
            elif line:
                talk, images = _turn(speaker, options, (talk, images), line, fresh)
                fresh = []
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def _turn(
    speaker: Speaker, options: flags.FlagValues, before: tuple[list, list], line: str, fresh: list
) -> tuple[list, list]:
    """The conversation and its images after one more turn; an interrupted answer stays as far as it came."""
    from vlmjax.data.conversation import Message, Part

    talk, images = [*before[0], message(line, len(fresh))], [*before[1], *fresh]
    inputs, written = inputs_of(speaker, talk, images), ""
    try:
        for piece in answer(speaker, inputs, options):
            print(piece, end="", flush=True)
            written += piece
    except KeyboardInterrupt:
        print(" (interrupted)", end="")
    print(flush=True)
    return [*talk, Message("assistant", (Part("text", written.strip()),))], images


# ---- command


def parse(arguments: Sequence[str]) -> None:
    """Read the flags before anything heavy is imported; raises UserError for mistakes."""
    parse_alone(arguments, FLAGS, __doc__, ("model",), "quote the prompt, --prompt='What is this?'")
    if FLAGS.prompt is None and not FLAGS.chat:
        raise UserError("--prompt is not given: what to continue or to answer; or --chat for a conversation")
    if FLAGS.prompt is not None and FLAGS.chat:
        raise UserError("--prompt and --chat exclude each other: type the first turn, or leave out --chat")
    if not 0 <= FLAGS.temperature < 100:
        raise UserError(
            f"--temperature={FLAGS.temperature}: give a number from 0 (the likeliest token) to below 100"
        )
    if not 0 <= FLAGS.seed < 2**63:
        raise UserError(f"--seed={FLAGS.seed}: give a number from 0 to below 2**63")
    if "" in FLAGS.stop or "" in FLAGS.image:
        raise UserError("--stop and --image need a value: leave out what is empty")
    if not FLAGS.temperature and (FLAGS.top_k or FLAGS.top_p < 1):
        raise UserError(
            "--top_k and --top_p say what to draw from: give a --temperature above 0, such as 0.7"
        )


def main(arguments: Sequence[str]) -> None:
    """Write as the flags say; user errors end as one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        parse(arguments)
        (chat if FLAGS.chat else generate)(FLAGS)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv)
