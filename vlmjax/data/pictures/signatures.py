"""What kind of image a file is, by its first bytes."""

# Name, usual extension, and what stands at which offset.
_TABLE = (
    ("jpeg", "jpg", 0, b"\xff\xd8\xff"),
    ("png", "png", 0, b"\x89PNG\r\n\x1a\n"),
    ("gif", "gif", 0, b"GIF8"),
    ("webp", "webp", 8, b"WEBP"),
    ("bmp", "bmp", 0, b"BM"),
    ("tiff", "tif", 0, b"II*\0"),
    ("tiff", "tif", 0, b"MM\0*"),
    ("avif", "avif", 4, b"ftypavi"),
    ("jpeg 2000", "jp2", 4, b"jP  "),
    ("jpeg 2000", "jp2", 0, b"\xff\x4f\xff\x51"),
    ("ico", "", 0, b"\0\0\1\0"),
)
EXTENSIONS = {name: extension for name, extension, _, _ in _TABLE if extension}


def format_of(data: bytes) -> str:
    """The name of an image file's format; "other" for all that is not known."""
    return next((name for name, _, at, mark in _TABLE if data[at : at + len(mark)] == mark), "other")
