"""Arithmetic of the benchmark; nothing here is timed."""

import pytest

from bench import stats
from bench.stats import Spread


def test_the_overhead_is_what_the_span_took_beyond_its_steps_at_plain_speed():
    # Three steps that take 1 s when nothing runs beside them, one outlier among the plain ones.
    assert stats.overhead_s([1.0, 1.0, 9.0, 1.0, 1.0], 4.5, 3) == pytest.approx(1.5)


def test_a_spread_holds_the_middle_of_the_samples():
    found = stats.spread([5.0, 1.0, 4.0, 2.0, 3.0, 11.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert found == pytest.approx(Spread(6.0, 2.0, 10.0, 11))


def test_a_spread_of_the_whole_is_from_least_to_most():
    assert stats.spread([3.0, 1.0, 2.0], 1.0) == Spread(2.0, 1.0, 3.0, 3)
    assert stats.spread([], 1.0) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500M", 500_000_000),
        ("1.5G", 1_500_000_000),
        ("64MiB", 64 << 20),
        ("2gb", 2_000_000_000),
        ("7", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert stats.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "0", "-5M", "inf", "nan", "5X"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"no size|could not convert|NaN"):
        stats.parse_size(text)


def test_one_sample_is_written_without_an_interval():
    assert stats.with_range(Spread(0.25, 0.25, 0.25, 1)) == "250 ms"
    assert stats.with_range(Spread(0.25, 0.2, 1.25, 3)) == "250 ms (200..1.25 s)"


def test_a_ratio_of_what_drowned_in_noise_is_no_number():
    assert stats.ratio(3.0, 2.0) == "1.50x"
    assert stats.ratio(1.0, None) == "-"
    assert stats.ratio(-0.1, 2.0) == stats.ratio(2.0, -0.1) == stats.ratio(1.0, 0.0) == "noise"
