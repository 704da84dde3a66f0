"""A contact sheet of the drawn world: what it is made of, scenes with captions, boxes and points, a film."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmjax.data.scenes import draw
from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.scenes.source import Scene, moved, scene
from vlmjax.data.scenes.world import Background, Group, Thing, World

PAPER, TEXT, QUIET, RULE = (252, 252, 250), (38, 40, 52), (118, 122, 134), (226, 226, 222)
TILE, GAP, MARGIN, COLUMNS = 200, 22, 44, 6
WIDTH = 2 * MARGIN + COLUMNS * TILE + (COLUMNS - 1) * GAP
CORNER = 12


class Sheet:
    """A page that grows downwards; drawn at its final size."""

    def __init__(self, height: int):
        """An empty page of at most `height` pixels."""
        self.page = Image.new("RGB", (WIDTH, height), PAPER)
        self.pen = ImageDraw.Draw(self.page)
        self.y = MARGIN

    def text(
        self,
        x: int | float,
        y: int | float,
        text: str,
        size: int,
        colour: tuple[int, int, int],
        anchor: str = "la",
    ) -> None:
        """Write one line."""
        self.pen.text((x, y), text, fill=colour, font=ImageFont.load_default(size), anchor=anchor)

    def title(self, text: str, more: str) -> None:
        """The heading of a section, with a line of explanation."""
        self.text(MARGIN, self.y, text, 25, TEXT)
        self.text(MARGIN, self.y + 35, more, 16, QUIET)
        self.y += 72

    def tile(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Paste an image with rounded corners."""
        height, width = pixels.shape[:2]
        mask = Image.new("L", (4 * width, 4 * height), 0)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * width - 1, 4 * height - 1), 4 * CORNER, fill=255)
        self.page.paste(Image.fromarray(pixels), (x, y), mask.resize((width, height), Image.Resampling.BOX))

    def lines(self, x: int, y: int, paragraphs: list[tuple[str, tuple[int, int, int]]], wide: int) -> int:
        """Wrapped paragraphs; returns where they end."""
        for text, colour in paragraphs:
            for line in textwrap.wrap(text, wide):
                self.text(x, y, line, 14, colour)
                y += 19
            y += 5
        return y

    def row(self, tiles: list[np.ndarray], below: list[list[tuple[str, tuple[int, int, int]]]]) -> None:
        """A row of tiles, each with paragraphs below it."""
        ends = []
        for k, (pixels, paragraphs) in enumerate(zip(tiles, below, strict=True)):
            x = MARGIN + k * (TILE + GAP)
            self.tile(x, self.y, pixels)
            ends.append(self.lines(x + 2, self.y + TILE + 10, paragraphs, 29))
        self.y = max(ends) + 16

    def rule(self) -> None:
        """A line between two sections."""
        self.pen.line((MARGIN, self.y, WIDTH - MARGIN, self.y), RULE, 2)
        self.y += 26

    def finished(self) -> Image.Image:
        """The page, cut to what is on it."""
        return self.page.crop((0, 0, WIDTH, self.y + MARGIN // 2))


def _specimen(
    shape: str, colour: str, tone: str, side: int, texture: str = "solid", diameter: float = 0.7
) -> np.ndarray:
    """One thing in the middle of a small tile."""
    thing = Thing(0, 0.5, 0.5, diameter, 0)
    direction = "right" if shape == "arrow" else ""
    group = Group(shape, colour, texture, "large", direction, v.COLOURS[colour], "still", 0.0, (thing,))
    world = World(0, 0, "train", "single", (group,), None, Background(tone, "glow", 0))
    return draw.render(world, side)


def _strip(sheet: Sheet, specimens: list[tuple[str, np.ndarray]]) -> None:
    """Small tiles side by side over the whole width, each with its name below."""
    side = specimens[0][1].shape[0]
    step = (WIDTH - 2 * MARGIN - side) / (len(specimens) - 1)
    for k, (name, pixels) in enumerate(specimens):
        x = round(MARGIN + k * step)
        sheet.tile(x, sheet.y, pixels)
        sheet.text(x + side / 2, sheet.y + side + 6, name, 14, QUIET, "ma")
    sheet.y += side + 36


def _alphabet(sheet: Sheet) -> None:
    sheet.title(
        "What the world is made of",
        f"{len(v.SHAPES)} shapes, {len(v.COLOURS)} colours, {len(v.TEXTURES)} textures, {len(v.SIZES)} sizes, "
        f"{len(v.TONES)} backgrounds in {len(v.PATTERNS)} patterns, {len(v.WORDS)} printed words",
    )
    side = 96
    bright = ("blue", "orange", "green", "purple", "red", "pink")
    _strip(sheet, [(s, _specimen(s, bright[k % 6], "cream", side)) for k, s in enumerate(v.SHAPES)])
    light = {"white": "sky blue"}
    _strip(sheet, [(c, _specimen("heart", c, light.get(c, "pale blue"), side)) for c in v.COLOURS])
    textures = [(t, _specimen("circle", "purple", "peach", side, texture=t)) for t in v.TEXTURES]
    sizes = [
        (size, _specimen("star", "red", "lavender", side, diameter=levels[1] * v.DIAMETER_UNIT))
        for size, levels in v.SIZES.items()
    ]
    tones = ("sage", "tan", "dark blue", "mauve")
    patterns = ("waves", "dunes", "bands", "clouds")
    backgrounds = [
        (tone, draw.background(Background(tone, pattern, 0), side).transpose(1, 2, 0).astype(np.uint8))
        for tone, pattern in zip(tones, patterns, strict=True)
    ]
    _strip(sheet, textures + sizes + backgrounds)


def _scenes(sheet: Sheet, seed: int, split: str, style: str, rows: int) -> None:
    for row in range(rows):
        shown = [scene(seed, row * COLUMNS + k, split, style=style, image_size=TILE) for k in range(COLUMNS)]
        captions = [[(one.captions[0], TEXT), (one.captions[-1], QUIET)] for one in shown]
        sheet.row([one.image for one in shown], captions)


def _annotated(one: Scene) -> np.ndarray:
    """The drawing with boxes around things and dots in their centres."""
    image = Image.fromarray(one.image)
    pen = ImageDraw.Draw(image)
    boxes = [thing.box for thing in one.objects] + ([one.word_box] if one.word_box else [])
    for left, top, right, bottom in boxes:
        box = (round(left) - 3, round(top) - 3, round(right) + 2, round(bottom) + 2)
        pen.rounded_rectangle(box, 4, outline=(255, 255, 255), width=4)
        pen.rounded_rectangle(
            (box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1), 3, outline=(228, 30, 90), width=2
        )
    for thing in one.objects:
        x, y = thing.centre
        pen.ellipse((x - 5, y - 5, x + 4, y + 4), fill=(228, 30, 90), outline=(255, 255, 255), width=2)
    return np.asarray(image)


def _answers(sheet: Sheet, seed: int) -> None:
    kinds = ("count", "relation", "compare", "word", "where", "texture", "exists", "colour")
    shown = [scene(seed, k, "train", style="full", image_size=TILE) for k in (74, 66, 76, 64, 105, 67)]
    below = []
    for k, one in enumerate(shown):
        by_kind = {question.kind: question for question in one.qa}
        order = kinds[k:] + kinds[:k]
        chosen = [by_kind[kind] for kind in order if kind in by_kind][:3]
        below.append([(f"{question.question}  {question.answer}", TEXT) for question in chosen])
    sheet.row([_annotated(one) for one in shown], below)


def _film(sheet: Sheet, seed: int) -> None:
    start = scene(seed, 5, "val", style="full", image_size=TILE)
    times = [k / (COLUMNS - 1) for k in range(COLUMNS)]
    sheet.row([moved(start, t).image for t in times], [[(f"t = {t:.1f}", QUIET)] for t in times])


def contact_sheet(seed: int = 0) -> Image.Image:
    """The picture in docs/scenes.md: a pure function of `seed`."""
    sheet = Sheet(height=4000)
    _alphabet(sheet)
    sheet.rule()
    sheet.title(
        "scenes", "style simple, split train: one or two things; below each its fullest and its last caption"
    )
    _scenes(sheet, seed, "train", "simple", 1)
    sheet.rule()
    sheet.title(
        "scenes:full", "style full, split train: counts, up to four groups, words, things inside things"
    )
    _scenes(sheet, seed, "train", "full", 2)
    sheet.rule()
    sheet.title(
        "scenes:heldout",
        "the main thing is one of 36 combinations of shape and colour never seen in training",
    )
    _scenes(sheet, seed, "heldout", "simple", 1)
    sheet.rule()
    sheet.title("Boxes, points, questions", "known exactly for every scene")
    _answers(sheet, seed)
    sheet.rule()
    sheet.title(
        "moved(scene, t)", "every group goes its own way: the start of films and of find-the-difference pairs"
    )
    _film(sheet, seed)
    return sheet.finished()
