"""Which errors mean that a peer is gone, and that only those among several processes end one at once."""

import subprocess
import sys

import jax
import pytest

from vlmjax.errors import UserError
from vlmjax.sharding import peers


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer"), 75),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service is gone"), 75),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), 1),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_exit_codes(error, code):
    assert peers.exit_code(error) == code


def test_among_several_an_unexpected_error_ends_the_process(monkeypatch, capsys):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(peers, "leave", leave)
    with pytest.raises(ZeroDivisionError), peers.leaving_at_once():
        raise ZeroDivisionError
    monkeypatch.setattr(peers, "several", lambda: True)
    with pytest.raises(Left, match="1"), peers.leaving_at_once():
        raise ZeroDivisionError
    with pytest.raises(Left, match="75"), peers.leaving_at_once():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo: Connection closed by peer")
    assert "Traceback" in (error := capsys.readouterr().err) and "lost a peer" in error
    with pytest.raises(UserError), peers.leaving_at_once():
        raise UserError("one that all can read")


ABORT = """
import ctypes, sys, threading
from vlmjax.sharding.peers import exit_when_the_runtime_aborts
exit_when_the_runtime_aborts()
libc = ctypes.CDLL(None)
if sys.argv[1] == "own":
    libc.abort()
thread = ctypes.c_ulong()
libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.abort, ctypes.c_void_p), None)
threading.Event().wait(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("whose", "code"), [("the runtime's", 75), ("own", -6)])
def test_an_abort_of_the_runtime_becomes_75_and_any_other_stays_one(whose, code):
    done = subprocess.run([sys.executable, "-c", ABORT, whose], capture_output=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert (b"a peer was lost" in done.stderr) == (code == 75)
