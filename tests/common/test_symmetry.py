from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from adversa.common.symmetry import COUNT, matrices, symmetry, turn

X = np.arange(12).reshape(1, 3, 4)
MIRRORED, UPSET = X[:, :, ::-1], X[:, ::-1]
# Bit 0 mirrors, bit 1 turns upside down, bit 2 transposes, last.
EXPECTED = [X, MIRRORED, UPSET, UPSET[:, :, ::-1]]
EXPECTED += [x.transpose(0, 2, 1) for x in EXPECTED]


@pytest.mark.parametrize("k", range(COUNT))
def test_each_bit_does_what_it_says(k: int) -> None:
    np.testing.assert_array_equal(symmetry(X, k), EXPECTED[k])
    np.testing.assert_array_equal(symmetry(torch.from_numpy(X), k).numpy(), EXPECTED[k])


def test_they_are_the_quarter_turns_and_their_mirror_images() -> None:
    for turns, k in enumerate((0, 5, 3, 6)):
        np.testing.assert_array_equal(symmetry(X, k), np.rot90(X, turns, (1, 2)))
    for turns, k in enumerate((1, 4, 2, 7)):
        np.testing.assert_array_equal(symmetry(X, k), np.rot90(MIRRORED, turns, (1, 2)))
    assert len({symmetry(X, k).tobytes() + bytes(symmetry(X, k).shape) for k in range(COUNT)}) == 8


def test_axes_say_where_the_picture_is() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)  # as stored
    planes = colour.transpose(0, 3, 1, 2)
    for k in range(COUNT):
        found = symmetry(colour, k, 1, 2)
        np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), symmetry(planes, k))


def test_each_image_has_its_own() -> None:
    x = torch.arange(2 * 3 * 16.0).view(2, 3, 4, 4).repeat(20, 1, 1, 1)
    which = torch.arange(40) // 2 % 8
    for image, k, found in zip(x, which.tolist(), turn(x, which), strict=True):
        assert torch.equal(found, symmetry(image, k))
    with pytest.raises(AssertionError, match="4, 5"):
        turn(torch.zeros(1, 1, 4, 5), torch.zeros(1, dtype=torch.long))


def test_matrices_say_where_each_reads() -> None:
    at = np.arange(5.0) - 2
    y, x = np.meshgrid(at, at, indexing="ij")
    places = np.stack([x, y])  # [2, 5, 5]: the picture whose pixels say where they lie
    for k, matrix in enumerate(matrices()):
        np.testing.assert_array_equal(symmetry(places, k), np.einsum("ij,jyx->iyx", matrix, places))


def test_arrays_do_not_load_torch() -> None:
    code = (
        "import sys, numpy, adversa.data.near; from adversa.common.symmetry import symmetry; "
        "symmetry(numpy.zeros((2, 2)), 7); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
