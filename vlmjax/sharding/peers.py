"""When a process of a run is lost: the others leave at once with exit code 75, so that all can start again."""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax._src import distributed

from vlmjax.errors import PEER_LOST, UserError

# What jax's runtime reports about the program itself; everything else it reports is about devices and peers.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "OUT_OF_RANGE")
_BARRIERS = itertools.count()  # every process comes to the same ones in the same order


def several() -> bool:
    """Whether this process has joined others. Unlike jax's own count it may be asked before any device is used."""
    return jax.distributed.is_initialized()


def leave(code: int) -> NoReturn:
    """End this process now. At exit jax waits for its peers, who wait for us in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(error: BaseException) -> int:
    """75 where an error says that a peer or its connection is gone, else 1."""
    runtime = isinstance(error, jax.errors.JaxRuntimeError)
    return PEER_LOST if runtime and not str(error).startswith(_OWN_FAULTS) else 1


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Among several processes an unexpected error ends this one here, before any clean-up that waits for the others.

    What a user can act on (`UserError`), and everything in a process that is alone, passes.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not several():
            raise
        traceback.print_exc()
        code = exit_code(error)
        if code == PEER_LOST:
            print(f"error: process {jax.process_index()} lost a peer; leaving", file=sys.stderr)
        leave(code)


def barrier(name: str, seconds: int = 3600) -> None:
    """Wait on the host until every process has come here.

    Unlike a collective on the devices it has a time limit of our own (gloo's is 30 s, others' have none), and its error
    names who is missing.
    """
    if several():
        client = distributed.global_state.client
        client.wait_at_barrier(f"vlmjax/{name}/{next(_BARRIERS)}", seconds * 1000)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    # On a thread of Python's own it is some library's abort, which takes its course.
    if threading.get_ident() not in {thread.ident for thread in threading.enumerate()}:
        os.write(2, b"error: jax's runtime gave up, because a peer was lost; leaving\n")
        os._exit(PEER_LOST)


def exit_when_the_runtime_aborts() -> None:
    """Turn the abort (134) with which jax's own threads end a process whose peer is silent into exit code 75.

    jaxlib has a callback for this, but cannot pass it its argument: calling it aborts as well.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(ctypes.c_int(signal.SIGABRT), _aborted)
