"""What the drawn world is made of: shapes, colours, textures, backgrounds, words, and what is held out."""

SPLITS = ("train", "heldout", "val")
STYLES = ("single", "simple", "full")

# The order of SHAPES and COLOURS decides which combinations are held out: append, never reorder.
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "hexagon",
    "cross",
    "ring",
    "crescent",
    "arrow",
    "diamond",
    "flower",
)
PLURALS = {"cross": "crosses"}  # every other plural takes an s

COLOURS = {
    "red": (220, 38, 46),
    "orange": (246, 136, 24),
    "yellow": (250, 214, 36),
    "green": (44, 156, 70),
    "cyan": (40, 196, 212),
    "blue": (40, 92, 214),
    "purple": (132, 60, 178),
    "pink": (246, 124, 178),
    "brown": (126, 76, 38),
    "black": (30, 30, 36),
    "grey": (130, 134, 142),
    "white": (252, 252, 252),
}

TEXTURES = ("solid", "striped", "dotted", "checkered", "outlined")
CREAM, INK = (255, 250, 240), (44, 46, 60)
SECOND_COLOUR = {"white": INK, "yellow": INK}  # of stripes, dots and checks; every other colour takes CREAM

# Diameters as a share of the image's side: three levels per size word, in 1/256.
SIZES = {"small": (49, 51, 53), "medium": (69, 72, 75), "large": (103, 107, 112)}
DIAMETER_UNIT = 1 / 256
DIRECTIONS = ("right", "left", "up", "down")  # of arrows
TILTS = (-16, -8, 0, 8, 16)  # degrees, clockwise

TONES = {  # the two ends of each background
    "cream": ((250, 242, 222), (238, 222, 192)),
    "pale blue": ((214, 230, 248), (172, 200, 234)),
    "pale green": ((216, 238, 212), (176, 214, 178)),
    "pale pink": ((252, 224, 228), (240, 192, 204)),
    "lavender": ((226, 218, 246), (196, 182, 230)),
    "peach": ((255, 226, 198), (244, 196, 160)),
    "light grey": ((228, 230, 234), (196, 200, 208)),
    "sky blue": ((156, 200, 240), (112, 166, 220)),
    "sage": ((170, 196, 160), (134, 168, 128)),
    "tan": ((218, 190, 150), (190, 156, 114)),
    "mauve": ((198, 168, 192), (168, 134, 164)),
    "dark blue": ((42, 58, 104), (20, 28, 60)),
    "dark green": ((38, 82, 68), (18, 46, 40)),
    "dark red": ((98, 36, 50), (60, 18, 34)),
    "dark grey": ((82, 84, 94), (48, 50, 58)),
}
PATTERNS = ("linear", "glow", "waves", "bands", "clouds", "mist", "dunes")  # how the two ends blend

WORDS = tuple(
    "sun cat dog tea map sky sea bus car hat key jam pie owl fox bee ant cup pen box bed egg ice oak "
    "bird fish tree moon rain wind snow leaf rock sand wave boat door lamp book milk cake corn rice "
    "lion bear frog duck goat wolf song drum bell ship road farm park home shop kite train apple "
    "bread house river cloud grass stone tiger zebra piano chair table clock music happy hello".split()
)
WORD_COLOURS = ("black", "red", "blue", "green", "purple", "brown")  # of the letters, on a white card

COUNTS = ("no", "one", "two", "three", "four", "five", "six")
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # of moving groups
MOTIONS = ("still", *STEPS)

# A pair is held out when (colour number - shape number) mod 12 is one of these. Three of twelve diagonals:
# each shape lacks three colours in training and each colour three shapes; no two shapes lack the same three.
HELD_OUT_DIAGONALS = (1, 4, 9)


def is_held_out(shape: str, colour: str) -> bool:
    """Whether `(shape, colour)` never occurs in the splits `train` and `val`."""
    number = list(COLOURS).index(colour) - SHAPES.index(shape)
    return number % len(COLOURS) in HELD_OUT_DIAGONALS


PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
HELD_OUT_PAIRS = tuple(pair for pair in PAIRS if is_held_out(*pair))
SEEN_PAIRS = tuple(pair for pair in PAIRS if not is_held_out(*pair))


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return PLURALS.get(shape, shape + "s")


def article(phrase: str) -> str:
    """`phrase` behind "a" or "an": "an orange star"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """How far apart two RGB colours look (weighted Euclidean; 0 is equal, about 765 is black to white)."""
    mean = (a[0] + b[0]) / 2
    red, green, blue = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    return ((2 + mean / 256) * red**2 + 4 * green**2 + (2 + (255 - mean) / 256) * blue**2) ** 0.5


def _stands_out(colour: str, tone: str) -> bool:
    low, high = TONES[tone]
    middle = tuple((a + b) // 2 for a, b in zip(low, high, strict=True))
    return min(distance(COLOURS[colour], end) for end in (low, middle, high)) >= 112


CONTRASTING_TONES = {c: frozenset(t for t in TONES if _stands_out(c, t)) for c in COLOURS}
CONTRASTING_COLOURS = {
    c: frozenset(d for d in COLOURS if distance(COLOURS[c], COLOURS[d]) >= 160) for c in COLOURS
}
