"""Noise: which bits it has, that it belongs to the element, and what a statistician would ask of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal

from ifjax.codec.rounding import noise_of, seeds, uniform_noise

N = 1 << 20
drawn = jax.jit(uniform_noise, static_argnums=(1, 2))


@pytest.fixture(scope="module", params=[1, 2])
def noise(request):
    """float64 [2 or 4, N]: one or two candidates' noise from each of two keys, in an array of 1024 columns."""
    arrays = [drawn(jax.random.key(seed), (N // 1024, 1024), request.param) for seed in (0, 1)]
    return np.array([a for each in arrays for a in each], np.float64).reshape(-1, N)


def mixed(word, *rounds):
    for shift, factor in rounds:
        word = ((word ^ word >> shift) * factor) % 2**32
    return word


def last(word):
    return word ^ word >> 14


def seeds_of(words, part=0):
    """The two numbers of a part of a key of these words, with Python's integers."""
    rounds = (17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)
    k0, k1 = part, 0
    for a, b in zip(words[::2], words[1::2], strict=True):
        k0 ^= a
        k1 ^= b ^ last(mixed((k0 + 0x9E3779B9) % 2**32, *rounds))
        k0 ^= last(mixed((k1 + 0x9E3779B9) % 2**32, *rounds))
    return k0, k1


def hashed(index, k0, k1, candidate, count):
    """The definition, one element at a time, with Python's integers."""
    word = (index ^ k0) % 2**32
    word = (word ^ word >> 17) // 32 * 32 + index % 32
    word = (word * 0xED5AD4BB + k1 + candidate // 2 * 0x9E3779B9) % 2**32
    word = mixed(word, (11, 0xAC4C1B51), (15, 0x31848BAB))
    if candidate + 1 == count and count % 2:
        return ((word >> 10) + 0.5) / 2**22 - 0.5
    half = last(word) >> 16 if candidate % 2 else last(word) & 0xFFFF
    return (half + 0.5) / 2**16 - 0.5


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_noise_is_a_hash_of_key_candidate_and_index(impl):
    key = jax.random.key(3, impl=impl)
    k0, k1 = seeds_of([int(word) for word in jax.random.key_data(key)])
    for i, got in enumerate(seeds(key, jnp.arange(4))):
        assert [int(k) % 2**32 for k in got] == list(seeds_of([int(word) for word in jax.random.key_data(key)], i))
    got = np.array(uniform_noise(key, (5, 7, 11), 3)).reshape(3, -1)
    assert_array_equal(got, [[hashed(i, k0, k1, c, 3) for i in range(5 * 7 * 11)] for c in range(3)])


def test_indices_beyond_31_bits_go_on_counting():
    words = [np.uint32(w).view(np.int32) for w in (2**31 + 16, 17, 2**32 - 9)]
    for low in (0, 11, jnp.arange(3)):
        got = np.array(noise_of(*(jnp.asarray(w) for w in words), 4, low))
        want = [[hashed(2**31 + 16 + int(i), 17, 2**32 - 9, c, 4) for i in np.ravel(low)] for c in range(4)]
        assert_array_equal(got.reshape(4, -1), want)


def test_noise_belongs_to_the_element_however_it_is_computed():
    keys, shape = jax.random.split(jax.random.key(4), 3), (8, 6, 16)
    alone = [uniform_noise(key, shape, 2) for key in keys]
    together = jax.vmap(lambda key: uniform_noise(key, shape, 2))(keys)
    for i, arrays in enumerate(alone):
        for a, b in zip(arrays, together, strict=True):
            assert_array_equal(a, b[i])
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    for spec in (PartitionSpec("a", None, "b"), PartitionSpec(None, "b", "a")):
        run = jax.jit(lambda key: uniform_noise(key, shape, 2), out_shardings=NamedSharding(mesh, spec))
        for a, b in zip(alone[0], run(keys[0]), strict=True):
            assert_array_equal(a, b)


def test_a_key_of_either_kind_gives_the_same_noise():
    key = jax.random.key(5)
    assert_array_equal(uniform_noise(key, (4,), 1), uniform_noise(jax.random.key_data(key), (4,), 1))
    assert_array_equal(uniform_noise(key, (4,), 1), uniform_noise(seeds(key), (4,), 1))
    other = uniform_noise(jax.random.key(5, impl="rbg"), (4,), 1)[0]
    assert (np.asarray(other) != np.asarray(uniform_noise(key, (4,), 1)[0])).all()


def test_noise_is_uniform_on_points_that_are_symmetric_about_zero(noise):
    bits = 16 if len(noise) == 4 else 22
    points = (noise + 0.5) * 2**bits - 0.5
    assert_array_equal(points, np.round(points))
    points = points.astype(int) >> bits - 16
    assert (points.min(), points.max()) == (0, 2**16 - 1)
    # Points of one noise: their mean is 0 exactly, and each second moment that of 2^16 points.
    deviations = noise.mean(-1) * (12 * N) ** 0.5, ((noise**2).mean(-1) - 1 / 12) * (180 * N) ** 0.5
    assert np.abs(deviations).max() < 4
    for row in points:
        counts = np.bincount(row, minlength=2**16)
        chi_squared = ((counts - N / 2**16) ** 2).sum() / (N / 2**16)
        assert abs(chi_squared - 2**16) < 4 * (2 * 2**16) ** 0.5


def test_no_two_elements_share_noise_at_any_distance(noise):
    """Correlations at all lags at once. The largest of 2^20 normal numbers is 5.0 on average, and 6.2 once in 500."""
    spectra = np.fft.rfft(noise)
    for i in range(len(noise)):
        for j in range(i + 1):
            correlation = np.fft.irfft(spectra[i] * spectra[j].conj()) * 12 / N**0.5
            assert np.abs(correlation[1 if i == j else 0 :]).max() < 6.2, (i, j)


@pytest.mark.parametrize("lag", [1, 2, 8, 16, 64, 1024, 16 * 1024])
def test_neighbours_fill_the_square_evenly(noise, lag):
    """Not only uncorrelated: 64 x 64 boxes of pairs, by a chi-squared test."""
    for row in ((noise + 0.5) * 64).astype(int):
        counts = np.bincount(row * 64 + np.roll(row, lag), minlength=4096)
        chi_squared = ((counts - N / 4096) ** 2).sum() / (N / 4096)
        assert abs(chi_squared - 4095) < 4.5 * (2 * 4095) ** 0.5


@pytest.mark.by_default("folded")
@pytest.mark.parametrize("keys", ["split", "counted", "folded", "parts"])
def test_no_two_keys_share_noise(keys):
    """Of many keys of each kind, however alike: the correlations of 16 elements over keys."""
    many = 1 << 14
    made = {
        "split": lambda: jax.random.split(jax.random.key(6), many),
        "counted": lambda: jax.vmap(jax.random.key)(jnp.arange(many)),
        "parts": lambda: seeds(jax.random.key(8), jnp.arange(many)),
        "folded": lambda: jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(many)),
    }[keys]()
    draws = np.asarray(jax.jit(jax.vmap(lambda key: jnp.stack(uniform_noise(key, (8,), 2))))(made), np.float64)
    draws = draws.reshape(many, 16)
    assert np.abs(draws.mean(0)).max() * (12 * many) ** 0.5 < 4.5
    correlation = draws.T @ draws * 12 / many - np.eye(16)
    assert np.abs(correlation - np.diag(np.diag(correlation))).max() * many**0.5 < 4.5
    following = draws[1:] * draws[:-1]
    assert np.abs(following.mean(0)).max() * 12 * many**0.5 < 4.5
