"""One call for all matrices of a shape finds what a call for each would."""

import pytest
import torch

from dynlora.small_matrices import batched, smaller_gram

SHAPES = [(4, 4), (3, 3), (4, 4), (1, 1), (3, 3), (4, 4)]


def symmetric(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    return matrix + matrix.T


@pytest.mark.parametrize("function", [torch.linalg.eigvalsh, torch.linalg.pinv])
def test_each_matrix_gets_what_is_found_for_it_alone(function):
    matrices = [symmetric(shape) for shape in SHAPES]
    torch.testing.assert_close(batched(function, matrices), [function(m) for m in matrices])


@pytest.mark.parametrize("function", [torch.linalg.eigh, torch.linalg.svd, torch.linalg.qr])
def test_each_matrix_gets_all_parts_of_what_is_found_for_it_alone(function):
    matrices = [symmetric(shape) for shape in SHAPES]
    expected = [tuple(function(matrix)) for matrix in matrices]
    torch.testing.assert_close(batched(function, matrices), expected)


def test_matrices_of_one_shape_are_given_in_one_call():
    asked = []

    def count(stack):
        asked.append(tuple(stack.shape))
        return stack

    batched(count, [symmetric(shape) for shape in SHAPES])
    assert sorted(asked) == [(1, 1, 1), (2, 3, 3), (3, 4, 4)]


def test_nothing_is_asked_of_no_matrices():
    assert batched(torch.linalg.eigvalsh, []) == []


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_the_smaller_gram_matrix_has_the_squares_of_the_singular_values(shape):
    vectors = torch.randn(shape, dtype=torch.float64)
    gram = smaller_gram(vectors)
    assert gram.shape == (min(shape), min(shape))
    expected = torch.linalg.svdvals(vectors).square().flip(0)
    torch.testing.assert_close(torch.linalg.eigvalsh(gram), expected)
