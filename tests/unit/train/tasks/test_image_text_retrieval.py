"""Captions are drawn by epoch, and metrics do not reward embeddings that are all alike."""

from collections import Counter

import numpy as np
import pytest
from transformers import EvalPrediction

from dynlora.train.tasks.image_text_retrieval import OneCaptionEach
from dynlora.train.tasks.metrics import retrieval_metrics
from dynlora.train.trainer import EpochSampler


def test_each_epoch_draws_one_caption_per_image_and_all_of_them_equally_often():
    sampler = EpochSampler([1] * 3, batch_size=None, seed=0)
    rows = [{"captions": [[n, place] for place in range(n + 1)]} for n in range(3)]
    drawn = OneCaptionEach(rows, sampler)
    seen = Counter()
    for epoch in range(6):
        sampler.set_epoch(epoch)
        for place in range(3):
            captions = drawn[place]["captions"]
            assert len(captions) == 1
            assert drawn[place]["captions"] == captions
            seen[tuple(captions[0])] += 1
    assert seen == {(n, place): 6 // (n + 1) for n in range(3) for place in range(n + 1)}


def told(images, captions):
    """Return the metrics of vectors per image, and per caption of each image."""
    most = max(map(len, captions))
    filled = [[[*c, 1] for c in own] + [[-100] * 3] * (most - len(own)) for own in captions]
    vectors = [[[*image, 0], *own] for image, own in zip(images, filled, strict=True)]
    labels = np.arange(len(images))
    return retrieval_metrics(EvalPrediction(np.array(vectors, dtype=np.float32), labels))


def test_recall_counts_any_caption_of_an_image_and_each_caption():
    images = [[1, 0], [0, 1]]
    found = told(images, [[[1, 0], [0, 2]], [[0, 1]]])
    # The second image is nearer to [0, 2] than to its own caption; so is that caption to it.
    assert found["image_to_text_recall_1"] == pytest.approx(1 / 2)
    assert found["text_to_image_recall_1"] == pytest.approx(2 / 3)
    assert found["image_to_text_recall_5"] == found["text_to_image_recall_5"] == 1


def test_embeddings_that_are_all_alike_find_nothing_first():
    found = told([[1, 0]] * 8, [[[1, 0]]] * 8)
    assert set(found.values()) == {0}
