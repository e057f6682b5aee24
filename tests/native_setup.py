"""Shared by the tests of the native kernels; importing it skips a module without them."""

import ml_dtypes
import pytest

from moejax.kernels import build

if build.library() is None:
    pytest.skip(build.status(), allow_module_level=True)

LIBRARY = build.library()
NAMES = [name.encode() for isas in build.ISAS.values() for name in isas]
DEFAULT = LIBRARY.moejax_isa()
ISAS = [name for name in NAMES if LIBRARY.moejax_set_isa(name)]
LIBRARY.moejax_set_isa(DEFAULT)


@pytest.fixture(autouse=True)
def restore():
    """Every test ends with the best instruction set and all threads."""
    yield
    LIBRARY.moejax_set_isa(DEFAULT)
    LIBRARY.moejax_set_workers(0)


def each_isa(compute):
    """Results per instruction set of this machine."""
    for name in ISAS:
        assert LIBRARY.moejax_set_isa(name)
        yield compute()


def bf16(x):
    """x rounded to bfloat16."""
    return x.astype(ml_dtypes.bfloat16)
