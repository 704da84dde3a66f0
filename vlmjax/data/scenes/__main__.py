"""Look at the drawn world: a contact sheet, one scene as a picture with everything known about it, or its classes."""

import argparse
import json
from pathlib import Path

from PIL import Image

from vlmjax.data.scenes import scene
from vlmjax.data.scenes.sheet import contact_sheet
from vlmjax.data.scenes.vocabulary import PAIRS, SPLITS, STYLES
from vlmjax.data.scenes.words import class_name


def main(arguments: list[str] | None = None) -> None:
    """Write the picture that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m vlmjax.data.scenes", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sheet", metavar="PNG", help="write a contact sheet of the whole world")
    what.add_argument(
        "--show", metavar="PNG", help="write one scene and print what is known about it as JSON"
    )
    what.add_argument(
        "--classes", metavar="TXT", help="write all combinations of colour and shape, one a line"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, default=0, help="number of the scene to show")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--style", choices=STYLES, default="full")
    parser.add_argument("--image_size", type=int, default=256)
    options = parser.parse_args(arguments)
    if options.sheet:
        contact_sheet(options.seed).save(options.sheet, optimize=True)
        return
    if options.classes:
        names = "\n".join(class_name(*pair) for pair in PAIRS)
        Path(options.classes).write_text(f"{names}\n", encoding="utf-8")
        return
    one = scene(
        options.seed, options.index, options.split, style=options.style, image_size=options.image_size
    )
    Image.fromarray(one.image).save(options.show)
    known = {
        "captions": one.captions,
        "objects": [thing._asdict() for thing in one.objects],
        "qa": [question._asdict() for question in one.qa],
        "points": [point._asdict() for point in one.points],
        "world": one.description(),
    }
    print(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
