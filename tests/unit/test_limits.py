"""Sizes of programs."""

from itertools import pairwise

import pytest

from duetjax.policy.limits import decode_buckets, prefill_buckets


@pytest.mark.parametrize("fewest", [1, 2, 8])
def test_decode_buckets_double_up_to_all_rows_or_just_beyond(fewest):
    for rows in range(1, 600):
        sizes = decode_buckets(rows, fewest)
        assert sizes[0] == fewest
        assert all(b == 2 * a for a, b in pairwise(sizes))
        assert sizes[-1] >= rows
        assert len(sizes) == 1 or sizes[-2] < rows
    assert decode_buckets(64) == (2, 4, 8, 16, 32, 64)
    assert decode_buckets(65)[-1] == 128


@pytest.mark.parametrize("ratio", [2, 4])
def test_prefill_buckets_are_the_largest_and_fractions_of_it(ratio):
    for largest in range(2, 5000, 7):
        sizes = prefill_buckets(largest, ratio)
        assert sizes[-1] == largest
        assert all(a == b // ratio for a, b in pairwise(sizes))
        assert sizes[0] <= 256
        assert len(sizes) == 1 or sizes[1] > 256
    assert prefill_buckets(8192) == (256, 512, 1024, 2048, 4096, 8192)
    assert prefill_buckets(8192, 4) == (128, 512, 2048, 8192)
    assert prefill_buckets(100) == (100,)
