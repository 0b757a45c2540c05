"""Losses and validation metrics per task from logits and labels, named as in `config.METRICS`.

`make_job_trainer` adds the mean loss over labels.
"""

import warnings

import numpy as np
from jaxtyping import Float
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import EvalPrediction

QUERIES_AT_ONCE = 1000  # rows of a matrix of logits in memory


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
    """Return the cross-entropy of logits ``(..., classes)`` and labels ``(...)``."""
    flat: Tensor = logits.reshape(-1, logits.shape[-1])
    return cross_entropy(flat, labels.reshape(-1), reduction="sum", ignore_index=-100)


def summed_squares(logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
    """Return the squared error of logits ``(batch, 1)`` or vectors ``(batch, hidden_size)``."""
    return mse_loss(logits.squeeze(-1), labels, reduction="sum")


def summed_binary(logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
    """Return the binary cross-entropy of logits and 0/1 labels, both ``(batch, classes)``."""
    return binary_cross_entropy_with_logits(logits, labels, reduction="sum")


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy, F1 (macro for three or more classes) and Matthews' correlation."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    guesses = logits.argmax(axis=-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    with warnings.catch_warnings():
        # A validation split may have a single class; the correlation is then 0.
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        matthews = float(matthews_corrcoef(labels, guesses))
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "f1": float(f1_score(labels, guesses, average=average, zero_division=0.0)),
        "matthews": matthews,
    }


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, 0 if one side is constant, and the RMSE."""
    guesses = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1)
    labels = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1)
    constant = len(labels) < 2 or np.ptp(guesses) == 0 or np.ptp(labels) == 0
    return {
        "pearson": 0.0 if constant else float(pearsonr(guesses, labels).statistic),
        "spearman": 0.0 if constant else float(spearmanr(guesses, labels).statistic),
        "rmse": float(np.sqrt(np.mean((guesses - labels) ** 2))),
    }


def multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return micro and macro F1, and the share of rows with every class correct."""
    guesses = np.asarray(prediction.predictions) > 0
    labels = np.asarray(prediction.label_ids) > 0.5
    return {
        "micro_f1": float(f1_score(labels, guesses, average="micro", zero_division=0.0)),
        "macro_f1": float(f1_score(labels, guesses, average="macro", zero_division=0.0)),
        "exact_match": float((guesses == labels).all(axis=-1).mean()),
    }


def embedding_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return R², 0 if all true vectors are equal, and the mean cosine similarity."""
    guesses = np.asarray(prediction.predictions, dtype=np.float64)
    labels = np.asarray(prediction.label_ids, dtype=np.float64)
    missed = np.square(guesses - labels).sum()
    variance = np.square(labels - labels.mean(axis=0)).sum()
    norms = np.linalg.norm(guesses, axis=-1) * np.linalg.norm(labels, axis=-1)
    cosines = (guesses * labels).sum(axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return {
        "r2": float(1 - missed / variance) if variance > 0 else 0.0,
        "cosine": float(cosines.mean()),
    }


def retrieval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return recall at 1 and 5 both ways, from the embeddings of `embed_pairs`.

    An image counts if any of its captions is among the best. A tie with a wrong one does not count.
    """
    embedded = np.asarray(prediction.predictions)
    images, captions = embedded[:, 0], embedded[:, 1:]
    rows, places = (captions[..., -1] == 1).nonzero()
    texts, every = captions[rows, places], np.arange(len(images))
    ranks = {
        "text_to_image": _wrong_before(texts, images, rows, every),
        "image_to_text": _wrong_before(images, texts, every, rows),
    }
    return {
        f"{way}_recall_{k}": float((found < k).mean())
        for k in (1, 5)
        for way, found in ranks.items()
    }


def _wrong_before(
    queries: np.ndarray, keys: np.ndarray, owner: np.ndarray, key_owner: np.ndarray
) -> np.ndarray:
    """Return per query the wrong keys whose logit is at least that of its best right key."""
    found = []
    for begin in range(0, len(queries), QUERIES_AT_ONCE):
        part = slice(begin, begin + QUERIES_AT_ONCE)
        logits, right = queries[part] @ keys.T, owner[part, None] == key_owner
        best = np.where(right, logits, -np.inf).max(axis=1, keepdims=True)
        found.append((~right & (logits >= best)).sum(axis=1))
    return np.concatenate(found)


def token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and macro F1 over tokens with a label other than -100."""
    label_ids = np.asarray(prediction.label_ids)
    labelled = label_ids != -100
    labels, guesses = label_ids[labelled], np.asarray(prediction.predictions)[labelled].argmax(-1)
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "macro_f1": float(f1_score(labels, guesses, average="macro", zero_division=0.0)),
    }
