"""Macro F1 as an `evaluate` metric that loads from the installed package, so that it works without a network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np


class F1(evaluate.Metric):  # type: ignore[misc]
    """Mean over the labels of their F1, 0 to 1; every label that is predicted or right anywhere counts alike."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Mean over the labels of the harmonic mean of precision and recall.",
            citation="",
            inputs_description="predictions: int64 [n]; references: int64 [n]",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        predicted, right = np.asarray(predictions), np.asarray(references)
        scores = []
        for label in np.union1d(predicted, right):
            hits = np.sum((predicted == label) & (right == label))
            # Never 0/0: a label of the union is predicted or right somewhere.
            scores.append(2 * hits / (np.sum(predicted == label) + np.sum(right == label)))
        return {"f1": float(np.mean(scores))}
