"""Converts a model over and over, killed at each call that changes the disk, and checks the rest.

Arguments: a directory to work in, and "int8" or "int4" to quantise.

Prints how many kills there were and after how many the next run had not everything to read.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from ckpt_models import Model, assert_equal

from moejax.checkpoints import resumable
from moejax.checkpoints.bank import open_bank, write_bank
from moejax.checkpoints.convert import convert_directory, load_converted
from moejax.checkpoints.hf import load, plan_directory
from moejax.formats import quant_format

BASE, QUANT = Path(sys.argv[1]), (*sys.argv, None)[2]
SOURCE, TARGET, OLD = BASE / "source", BASE / "target", BASE / "target.old"
UNFINISHED, EXPERT_TENSORS = BASE / "target.partial", 2 * 2 * 3
CALLS = ("pwrite", "fsync", "replace", "rename", "truncate", "unlink", "rmdir", "mkdir")
MODEL, PREVIOUS = Model(moe=(True, True), experts=2), Model(moe=(True, True), experts=2, seed=1)
WEIGHTS = MODEL.weights.quantised(quant_format(QUANT))

# A kill, unlike a power cut, does not lose what is not synchronised; it takes most of the time.
os.fsync = lambda descriptor: None


def kill_at(number: int) -> None:
    """Make this process die at its number-th call of CALLS; a write gets half done before."""
    left = [number]

    def wrap(name, call):
        def killing(*args, **options):
            left[0] -= 1
            if not left[0]:
                if name == "pwrite":
                    call(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return killing

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def convert(progress=None) -> None:
    convert_directory(SOURCE, TARGET, MODEL.weights, quant=QUANT, force=True, progress=progress)


def count(chunks: list[int], done: int, total: int) -> None:
    """A progress callback that counts its calls."""
    chunks[0] += 1


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def run_and_die(action: Callable[[], None], number: int) -> bool:
    """Run it in a child that dies at the number-th call; whether it came that far."""
    child = os.fork()
    if not child:
        kill_at(number)
        action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), status
    return status != 0


def check_directory() -> tuple[int, int]:
    """Kills, and how many of them left something that the next run did not read again."""
    all_chunks = [0]
    convert(partial(count, all_chunks))
    new = content(TARGET)
    shutil.rmtree(TARGET)
    PREVIOUS.write(BASE / "previous")
    convert_directory(BASE / "previous", BASE / "kept", PREVIOUS.weights, quant=QUANT)
    old = content(BASE / "kept")
    expected = load(SOURCE, WEIGHTS) if QUANT else MODEL.expected()
    kills = resumed = 0
    while True:
        shutil.copytree(BASE / "kept", TARGET)
        if not run_and_die(convert, kills + 1):
            return kills, resumed
        kills += 1
        # Between two renames the previous model has its other name and the new one is complete.
        between = not TARGET.exists()
        found = content(OLD if between else TARGET)
        assert found in (old, new), f"kill {kills}: {set(found)}"
        assert not between or (found == old and content(UNFINISHED) == new), kills
        dense_done, chunks = (UNFINISHED / "dense.safetensors").exists(), [0]
        convert(partial(count, chunks))
        assert content(TARGET) == new, kills
        assert not dense_done or chunks[0] <= EXPERT_TENSORS, (kills, chunks)
        resumed += chunks[0] < all_chunks[0]
        params, records = load_converted(TARGET, MODEL.weights)
        assert_equal((params, np.asarray(records)), expected)
        open_bank(TARGET / "experts.bank").verify()
        left = {"kept", "previous", "source", "target"}
        assert set(os.listdir(BASE)) == left, (kills, os.listdir(BASE))
        shutil.rmtree(TARGET)


def check_bank() -> int:
    """Kills of a bank file written where another one lies."""
    where = BASE / "banks"
    where.mkdir()
    path, placements = where / "b", plan_directory(SOURCE, WEIGHTS)

    def write():
        write_bank(path, placements, WEIGHTS, {})

    write()
    new, kills = path.read_bytes(), 0
    while True:
        path.write_bytes(b"old")
        if not run_and_die(write, kills + 1):
            return kills
        kills += 1
        assert path.read_bytes() in (b"old", new), kills
        write()
        assert content(where) == {"b": new}, kills


resumable.JOURNAL_BYTES = 200
MODEL.write(SOURCE, shards=2)
kills, resumed = check_directory()
print(json.dumps({"kills": kills, "resumed": resumed, "bank_kills": check_bank()}))
