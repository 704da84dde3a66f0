"""Resizing: every backend against Pillow, and the C kernel built, shared and refused."""

import os
import shlex
import shutil
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from helpers import picture
from PIL import Image

from vlmjax.data import images
from vlmjax.data.pictures import native, resize
from vlmjax.errors import DataError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
needs_compiler = pytest.mark.skipif(not native._compiler(), reason="no C compiler")


@pytest.fixture(autouse=True)
def _fresh_choice():
    resize._chosen.cache_clear()
    yield
    resize._chosen.cache_clear()


def oracle(pixels, size, box=None, kernel=3):
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling(kernel), box=box))


def draw(rng, n):
    """Sizes, a box and noise: small, thin, enlarged, reduced, whole and fractional ones in turn."""
    height, width = rng.integers(1, 120, 2) if n % 3 else rng.integers(1, 7, 2)
    size = tuple(int(side) for side in rng.integers(1, 100, 2))
    (x0, x1), (y0, y1) = np.sort(rng.uniform(0, width, 2)), np.sort(rng.uniform(0, height, 2))
    if n % 2:
        x0, y0, x1, y1 = int(x0), int(y0), int(x1) + 1, int(y1) + 1
    box = None if n % 7 == 0 else tuple(float(edge) for edge in (x0, y0, x1, y1))
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8), size, box


@needs_compiler
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_c_equals_pillow_to_the_last_bit(kernel, vectors, monkeypatch):
    chosen = resize.choose("c")
    assert chosen.exact
    if not vectors:  # the plain loops that other processors run
        run = chosen.run
        plain = type(run)(run.func, run.args[0], 0, *run.args[2:])
        chosen = resize.Backend("c", True, plain)
        monkeypatch.setattr(resize, "choose", lambda name=None: chosen)
    rng = np.random.default_rng(kernel)
    for n in range(250):
        pixels, size, box = draw(rng, n)
        out = resize.resize(pixels, size, box, kernel, backend="c")
        assert out.dtype == np.uint8 and out.flags.c_contiguous
        np.testing.assert_array_equal(
            out, oracle(pixels, size, box, kernel), str((n, pixels.shape, size, box))
        )


@needs_compiler
@pytest.mark.parametrize("shape, size", [((9000, 3), (40, 20)), ((3, 9000), (20, 40)), ((1, 4000), (30, 9))])
def test_c_on_strips(shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    np.testing.assert_array_equal(resize.resize(pixels, size, backend="c"), oracle(pixels, size))


def test_against_the_definition():
    """Pillow's own result is the weighted mean of the antialiased cubic, within rounding."""
    pixels, size, box = picture(3, 50, 70), (20, 30), (4.25, 3.5, 63.0, 47.75)

    def weights(start, end, length, out):
        scale = (end - start) / out
        reach = max(1.0, scale)
        x = np.abs((np.arange(length)[None] + 0.5 - start - (np.arange(out)[:, None] + 0.5) * scale) / reach)
        w = np.where(
            x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
        )
        return w / w.sum(1, keepdims=True)

    down, across = weights(box[1], box[3], 50, 20), weights(box[0], box[2], 70, 30)
    expected = np.clip(np.einsum("ij,jkc,lk->ilc", down, pixels.astype(float), across), 0, 255)
    for backend in ("c", "pillow") if shutil.which("cc") else ("pillow",):
        assert np.abs(resize.resize(pixels, size, box, backend=backend) - expected).max() <= 1.01


@pytest.mark.parametrize("backend", ["c", "pillow", "kornia"])
def test_windows_mirrors_and_views(backend):
    if backend == "kornia":
        pytest.importorskip("kornia_rs")
    elif backend == "c" and not shutil.which("cc"):
        pytest.skip("no C compiler")
    pixels = picture(4, 90, 140)
    whole = resize.resize(pixels, (60, 80), (3, 4, 133, 88), backend=backend)
    kept = pixels.copy()
    for top, left, bottom, right in ((0, 0, 60, 80), (10, 20, 30, 21), (59, 0, 60, 80), (0, 77, 60, 80)):
        for mirror in (False, True):
            expected = (whole[:, ::-1] if mirror else whole)[top:bottom, left:right]
            out = resize.resize(
                pixels,
                (60, 80),
                (3, 4, 133, 88),
                window=(top, left, bottom, right),
                mirror=mirror,
                backend=backend,
            )
            assert out.shape == expected.shape and out.flags.c_contiguous
            worst = np.abs(out.astype(int) - expected).max()
            assert worst <= (8 if backend == "kornia" else 0)  # kornia leaves windows to Pillow
    wide = np.ascontiguousarray(np.broadcast_to(pixels[:, :, None, :], (90, 140, 2, 3)))
    for view in (pixels[5:80, 7:120], pixels[::2], pixels[::-1, ::-1], wide[:, :, 1], pixels[:, :, ::-1]):
        expected = oracle(np.ascontiguousarray(view), (20, 30))
        out = resize.resize(view, (20, 30), backend=backend)
        assert np.abs(out.astype(int) - expected).max() <= (8 if backend == "kornia" else 0)
    np.testing.assert_array_equal(pixels, kept)
    assert resize.resize(pixels, (90, 140), backend=backend) is pixels
    np.testing.assert_array_equal(
        resize.resize(pixels, (90, 140), mirror=True, backend=backend), pixels[:, ::-1]
    )


def test_four_channels_and_other_kernels_are_pillows():
    rgba = picture(5, 40, 50, 4)
    for kernel in (0, 3, 4, 5):
        np.testing.assert_array_equal(
            resize.resize(rgba, (20, 20), None, kernel), oracle(rgba, (20, 20), None, kernel)
        )
        rgb = np.ascontiguousarray(rgba[..., :3])
        np.testing.assert_array_equal(
            resize.resize(rgb, (20, 20), None, kernel), oracle(rgb, (20, 20), None, kernel)
        )
    for box in ((0, 0, 51, 40), (-1.0, 0, 20, 20), (9, 5, 5, 9)):
        with pytest.raises(ValueError, match="[Bb]ox"):
            resize.resize(picture(5, 40, 50), (20, 20), box)


def test_kornia_is_near_and_evaluation_stays_exact(monkeypatch):
    pytest.importorskip("kornia_rs")
    pixels = picture(6, 300, 400)
    monkeypatch.setenv("VLMJAX_RESIZE", "kornia")
    expected = oracle(pixels, (64, 64), (10, 20, 390, 280))
    difference = np.abs(images.resize(pixels, (64, 64), (10, 20, 390, 280)).astype(int) - expected)
    assert difference.mean() < 0.5 and images.backend()["resize"].startswith("kornia_rs ")
    np.testing.assert_array_equal(images.resize(pixels, (64, 64), exact=True), oracle(pixels, (64, 64)))
    np.testing.assert_array_equal(images.EvalTransform(64, None)(pixels), oracle(pixels, (64, 85)))


def test_part_of_a_huge_resize(monkeypatch):
    pixels, size = picture(6, 90, 700), (60, 3000)
    whole = oracle(pixels, size).astype(int)
    monkeypatch.setattr(resize, "_WHOLE", 1000)
    for window in ((0, 0, 60, 100), (10, 1470, 30, 1530), (59, 2900, 60, 3000)):
        for backend in ("pillow", "c") if shutil.which("cc") else ("pillow",):
            part = resize.resize(pixels, size, window=window, backend=backend)
            difference = np.abs(part - whole[window[0] : window[2], window[1] : window[3]])
            assert difference.max() <= (0 if backend == "c" else 2) and difference.mean() < 0.02


def test_memory_does_not_grow_with_what_is_not_wanted():
    strip = np.full((1, 60_000, 3), 9, np.uint8)
    for backend in ("pillow", "c") if shutil.which("cc") else ("pillow",):
        tracemalloc.start()
        out = resize.resize(
            strip, (224, 224 * 60_000), window=(0, 6_000_000, 224, 6_000_224), backend=backend
        )
        assert out.shape == (224, 224, 3) and (out == 9).all()
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()


def test_choices_and_their_errors(monkeypatch):
    assert resize.choose("pillow").name == f"pillow {Image.__version__}"
    with pytest.raises(
        DataError, match="VLMJAX_RESIZE='cuda' is not a way to resize; known: c, kornia, pillow"
    ):
        resize.choose("cuda")
    monkeypatch.setenv("VLMJAX_RESIZE", "pillow")
    assert resize.choose().name.startswith("pillow") and images.backend()["resize"].startswith("pillow")
    monkeypatch.delenv("VLMJAX_RESIZE")
    assert resize.choose().name == "c" or not shutil.which("cc")


def test_without_a_compiler_something_else_resizes(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "/nowhere/cc")
    library, reason = native.load("resize")
    assert library is None and reason == "no C compiler (set CC, or install cc)"
    with pytest.raises(DataError, match="cannot resize by c: no C compiler"):
        resize.choose("c")
    assert resize.choose().name.split()[0] in ("kornia_rs", "pillow") and "no C compiler" in caplog.text
    pixels = picture(1)
    assert np.abs(images.resize(pixels, (9, 9)).astype(int) - oracle(pixels, (9, 9))).max() < 9


def test_a_compiler_that_fails_says_why(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(compiler))
    library, reason = native.load("resize")
    assert library is None and reason == f"{compiler} failed: error: out of order"
    assert not list((tmp_path / "cache" / "native").iterdir()), "nothing half made is left"


@needs_compiler
def test_a_compiler_may_be_a_whole_command(monkeypatch, tmp_path):
    """As `make` has it; so a compiler that is a Python package serves: 'python -m ziglang cc -mcpu=baseline'."""
    compiler, vectors = shlex.join(native._compiler()), native.load("resize")[0].vlmjax_vectors()
    spaced = tmp_path / "my tools" / "cc"
    spaced.parent.mkdir()
    spaced.write_text(f'#!/bin/sh\nexec {compiler} "$@"\n')
    spaced.chmod(0o755)
    python = f"{sys.executable} -c 'import os, sys; os.execv(sys.argv[1], sys.argv[1:])'"
    plain = "-DVLMJAX_PLAIN"
    for command, expected in (
        (f"{compiler} {plain}", 0),
        (f"{python} {compiler} {plain}", 0),
        (f"{spaced}", vectors),
    ):
        monkeypatch.setenv("CC", command)
        library, reason = native.load("resize", tmp_path)
        assert library is not None and library.vlmjax_vectors() == expected, reason
    assert len(list((tmp_path / "native").iterdir())) == 3, "each command makes a library of its own"
    for command in ("  ", "cc 'open", "nowhere-cc -O2"):
        monkeypatch.setenv("CC", command)
        assert native.load("resize", tmp_path) == (None, "no C compiler (set CC, or install cc)")


@needs_compiler
def test_a_damaged_library_is_made_anew(tmp_path):
    assert native.load("resize", tmp_path / "good")[0] is not None
    (built,) = (tmp_path / "good" / "native").iterdir()
    damaged = tmp_path / "bad" / "native" / built.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"")
    assert native.load("resize", tmp_path / "bad")[0] is not None
    assert list(damaged.parent.iterdir()) == [damaged] and damaged.stat().st_size == built.stat().st_size


@needs_compiler
def test_another_users_library_is_not_loaded(tmp_path, monkeypatch):
    native.load("resize", tmp_path / "ours")
    (built,) = (tmp_path / "ours" / "native").iterdir()
    theirs = tmp_path / "theirs" / "native" / built.name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"harm")
    if os.getuid() == 0:
        os.chown(theirs, 54321, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert native.load("resize", tmp_path / "theirs")[0] is not None, "a private copy serves"
    assert theirs.read_bytes() == b"harm"


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_matter(tmp_path):
    (tmp_path / "native").write_text("in the way")
    library, reason = native.load("resize", tmp_path)
    assert library is not None and reason == ""


@needs_compiler
def test_many_processes_may_build_at_once(tmp_path):
    code = "from vlmjax.data.pictures import resize; print(resize.choose('c').name, resize.choose('c').exact)"
    variables = {**os.environ, "VLMJAX_CACHE": str(tmp_path), "PYTHONPATH": ROOT}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0].split() for process in running] == [["c", "True"]] * 3
    assert len(list((tmp_path / "native").iterdir())) == 1


@needs_compiler
def test_threads_share_the_kernel():
    jobs = [(picture(n, 60 + n, 90), (20 + n, 30)) for n in range(16)]
    outs = [None] * len(jobs)

    def work(n):
        for _ in range(20):
            outs[n] = resize.resize(*jobs[n], backend="c")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, job in zip(outs, jobs, strict=True):
        np.testing.assert_array_equal(out, oracle(*job))
