"""METEOR and SPICE of captions by their authors' Java programs, where somebody has put these."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmjax.errors import DataError, UserError
from vlmjax.evals.caption_metrics import Metric

VARIABLE = "VLMJAX_CAPTION_JARS"
METEOR = ("meteor/meteor-1.5.jar", "meteor/data/paraphrase-en.gz")
SPICE = (
    "spice/spice-1.0.jar",
    "spice/lib/stanford-corenlp-3.6.0.jar",
    "spice/lib/stanford-corenlp-3.6.0-models.jar",
)


def find(metric: str, files: Sequence[str], jars: str | os.PathLike | None = None) -> tuple[str, Path]:
    """Java and the folder of a metric's files, in the layout of the package pycocoevalcap.

    Args:
        metric: for the message.
        files: what has to be in the folder.
        jars: the folder; by default the environment variable VLMJAX_CAPTION_JARS names it.

    Raises:
        UserError: something is missing.
    """
    java = shutil.which("java")
    if java is None:
        raise UserError(f"{metric}: there is no java on PATH: install a Java runtime or leave the metric out")
    folder = jars or os.environ.get(VARIABLE)
    if not folder:
        raise UserError(
            f"{metric}: {VARIABLE} is not set: let it name a folder with {files[0]} in it, such as that of the "
            "package pycocoevalcap, or leave the metric out"
        )
    missing = [name for name in files if not (Path(folder) / name).is_file()]
    if missing:
        raise UserError(f"{metric}: {folder} has no {', '.join(missing)}: add it or leave the metric out")
    return java, Path(folder).absolute()


def meteor(
    references: Sequence[Sequence[str]], captions: Sequence[str], jars: str | os.PathLike | None = None
) -> Metric:
    """METEOR 1.5 (Denkowski and Lavie 2014) for English, 0 to 1.

    Args:
        references: tokens separated by spaces, at least one reference per caption.
        captions: the same of what was written.
        jars: see `find`.

    Raises:
        UserError: java or a file is missing.
        DataError: the program gave no number.
    """
    java, folder = find("METEOR", METEOR, jars)
    options = ["-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", METEOR[0].partition("/")[2]]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [java, *options, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=folder / "meteor",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            statistics = []
            for own, caption in zip(references, captions, strict=True):
                statistics.append(_ask(process, "SCORE", *map(_field, [*own, caption])))
            each = [float(_ask(process, "EVAL", *statistics))]
            each += [float(process.stdout.readline()) for _ in captions]
        except (ValueError, OSError) as error:
            process.kill()
            process.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()[-300:]
            raise DataError(f"METEOR: the Java program gave no score: {said or error}") from None
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            _close(process.stdin)
    return Metric(each.pop(), each)


def _ask(process: subprocess.Popen, *fields: str) -> str:
    """Send a line of the program's protocol, read one."""
    process.stdin.write((" ||| ".join(fields) + "\n").encode())
    process.stdin.flush()
    answer = process.stdout.readline().decode().strip()
    if not answer:
        raise ValueError("it ended")
    return answer


def _field(caption: str) -> str:
    """A caption that cannot be taken for several fields or lines of the protocol."""
    return " ".join(caption.replace("|||", " ").split())


def _close(pipe) -> None:
    try:
        pipe.close()
    except OSError:  # what was still to be written: the program has gone
        pass


def spice(
    references: Sequence[Sequence[str]], captions: Sequence[str], jars: str | os.PathLike | None = None
) -> Metric:
    """SPICE 1.0 (Anderson et al. 2016), F over all kinds of tuples, 0 to 1; takes memory of some gigabytes.

    A caption whose score the program does not know is NaN, and so is the whole then, as in COCO's code. Arguments and
    errors are those of `meteor`.
    """
    java, folder = find("SPICE", SPICE, jars)
    rows = [
        {"image_id": number, "test": caption, "refs": list(own)}
        for number, (own, caption) in enumerate(zip(references, captions, strict=True))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch, "in.json"), Path(scratch, "out.json")
        given.write_text(json.dumps(rows))
        (cache := Path(scratch, "cache")).mkdir()
        command = [java, "-Xmx8G", "-jar", SPICE[0].partition("/")[2], str(given), "-cache", str(cache)]
        ran = subprocess.run(
            [*command, "-out", str(out), "-subset", "-silent"],
            cwd=folder / "spice",
            capture_output=True,
            text=True,
        )
        if ran.returncode or not out.is_file():
            said = ran.stderr.strip()[-300:]
            raise DataError(f"SPICE: the Java program ended with exit code {ran.returncode}: {said}")
        found = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(out.read_text())}
    if sorted(found) != list(range(len(rows))):
        raise DataError(f"SPICE: the Java program scored {len(found)} of {len(rows)} captions")
    each = [_number(found[number]) for number in range(len(rows))]
    return Metric(float(np.mean(each)), each)


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
