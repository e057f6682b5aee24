"""Sizes that people give and that commands print."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.errors import InputError
from moejax.units import format_bytes, parse_bytes, parse_slots

sizes = st.one_of(
    st.integers(1, 2**62),
    st.builds(
        lambda tenths, power, off: max(tenths * 1024**power // 10 + off, 1),
        st.integers(1, 10241),
        st.integers(0, 4),
        st.integers(-2, 2),
    ),
)


@given(sizes)
def test_a_printed_size_is_near_and_one_to_give_is_enough(size):
    near, enough = format_bytes(size), format_bytes(size, up=True)
    for text in (near, enough):
        number, unit = text.split()
        assert unit == "B" or (unit in ("KiB", "MiB", "GiB", "TiB") and Fraction(number) >= 1)
        assert unit == "TiB" or Fraction(number) < 1024
    step = Fraction(parse_unit(enough), 10)
    assert size <= Fraction(enough.split()[0]) * parse_unit(enough) < size + step
    assert abs(size - Fraction(near.split()[0]) * parse_unit(near)) <= Fraction(101, 200) * step
    assert parse_bytes(enough) >= size


def parse_unit(text):
    return 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(text.split()[1])


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("1GiB", 2**30), ("1g", 10**9), ("0.1 GB", 10**8), ("2.3tib", 2.3 * 2**40)],
)
def test_both_families_are_taken(text, size):
    assert parse_bytes(text) == math.floor(size)


@pytest.mark.parametrize("text", ["9" * 400, "9000000TiB", 2**63, "0.4B"])
def test_sizes_out_of_range_are_refused_in_one_line(text):
    with pytest.raises(InputError, match="must be positive, and below 8 EiB") as refused:
        parse_bytes(text)
    assert len(str(refused.value)) < 160


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(["%", " %"]))
def test_a_share_of_the_experts_is_rounded_down(parts, experts, sign):
    percent = f"{parts // 10**4}.{parts % 10**4:04}"
    assert parse_slots(percent + sign, experts) == math.floor(Fraction(parts, 10**6) * experts)
    assert parse_slots(f"{parts}", experts) == parse_slots(parts, experts) == parts


def test_shares_are_those_of_the_experiments():
    common = pytest.importorskip("experiments.smoe_common")
    for percent in (12.5, 25, 40, 50, 75, 100):
        assert parse_slots(f"{percent}%", 192) == common.slots_of(percent / 100, 192)


@pytest.mark.parametrize(
    "text", ["0%", "0.0%", "100.1%", "-1", "-5%", "0.4", "%", "", "many", "1e3", "4 0%", "9" * 400]
)
def test_what_is_no_number_of_slots_is_refused_in_one_line(text):
    with pytest.raises(
        InputError, match="such as 76, or a share of all experts, such as 40%"
    ) as no:
        parse_slots(text, 192)
    assert len(str(no.value)) < 160
