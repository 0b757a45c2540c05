"""The mean of a text's hidden states, and the metrics of vectors, by hand."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from dynlora.train.tasks.embedding import mean_of_tokens
from dynlora.train.tasks.metrics import embedding_metrics


def test_padding_has_no_part_in_the_mean() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, -100.0]]])
    assert mean_of_tokens(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]
    assert mean_of_tokens(hidden[:, :1], torch.tensor([[1]])).tolist() == [[1.0, 2.0]]


def test_r2_is_the_explained_part_of_the_variance_and_cosine_the_mean_over_rows() -> None:
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, -2.0]])
    half = EvalPrediction(predictions=vectors / 2, label_ids=vectors)
    assert embedding_metrics(half) == pytest.approx({"r2": 0.75, "cosine": 1.0})
    turned = EvalPrediction(predictions=vectors[:, ::-1], label_ids=vectors)
    assert embedding_metrics(turned) == pytest.approx({"r2": 1 - 20 / 10, "cosine": 0.0})


def test_vectors_without_variance_and_guesses_of_zero_have_numbers_too() -> None:
    same = EvalPrediction(predictions=np.zeros((3, 2)), label_ids=np.ones((3, 2)))
    assert embedding_metrics(same) == {"r2": 0.0, "cosine": 0.0}
