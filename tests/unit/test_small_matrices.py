"""One call for all layers of equal shapes finds what a call for each would."""

import pytest
import torch

from dynlora.small_matrices import batched, smaller_gram

SIZES = [4, 3, 4, 1, 3, 4]


def symmetric(size):
    matrix = torch.randn(size, size, dtype=torch.float64)
    return matrix + matrix.T


def test_each_matrix_gets_all_parts_of_what_is_found_for_it_alone():
    matrices = [symmetric(size) for size in SIZES]
    expected = [tuple(torch.linalg.svd(matrix)) for matrix in matrices]
    torch.testing.assert_close(batched(torch.linalg.svd, matrices), expected)
    assert batched(torch.linalg.svd, []) == []


def test_layers_of_equal_shapes_are_given_in_one_call():
    asked = []

    def added(left, right):
        asked.append((tuple(left.shape), tuple(right.shape)))
        return (left + right[:, None],)

    lefts = [torch.full((2, size), float(place)) for place, size in enumerate(SIZES)]
    rights = [torch.ones(1) if size == 4 else torch.ones(size) for size in SIZES]
    rights[5] = torch.ones(4)
    found = batched(added, lefts, rights)
    assert sorted(asked) == [
        ((1, 2, 1), (1, 1)), ((1, 2, 4), (1, 4)), ((2, 2, 3), (2, 3)), ((2, 2, 4), (2, 1)),
    ]  # fmt: skip
    torch.testing.assert_close([one for (one,) in found], [left + 1 for left in lefts])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_smaller_gram_matrix_has_the_squares_of_the_singular_values(shape):
    vectors = torch.randn(shape, dtype=torch.float64)
    gram = smaller_gram(vectors)
    assert gram.shape == (min(shape), min(shape))
    expected = torch.linalg.svdvals(vectors).square().flip(0)
    torch.testing.assert_close(torch.linalg.eigvalsh(gram), expected)
