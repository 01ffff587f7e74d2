"""The perceptron is checked against NumPy written out by hand; the toolkits' own against theirs, in their tests."""

from __future__ import annotations

import numpy as np
import pytest

from softbridge.methods import MLP_TENSORS, materialise
from softbridge.prompt import Array, Training

P, E, M, LAYERS, K, D = 5, 12, 7, (0, 2), 2, 3


def training(dtype: type = np.float64, non_linearity: str = "tanh", kind: str = "mlp") -> Training:
    generator = np.random.default_rng(3)
    width = len(LAYERS) * 2 * K * D
    sizes = ((P, E), (M, E), (M,), (width, M), (width,))
    tensors = {
        f"self.{name}": generator.normal(0, 0.7, size).astype(dtype)
        for name, size in zip(MLP_TENSORS, sizes, strict=True)
    }
    return Training(kind, {"non_linearity": non_linearity, "dropout": 0.1}, tensors)


def by_hand(given: Training, function: object = np.tanh) -> Array:
    embedding, weight, bias, output, output_bias = (given.tensors[f"self.{name}"] for name in MLP_TENSORS)
    return np.asarray(function(embedding @ weight.T + bias) @ output.T + output_bias)  # type: ignore[operator]


def test_equals_the_perceptron_written_out() -> None:
    given = training()
    prefix = materialise(given, "self", LAYERS, K, D)
    assert tuple(prefix.layers) == LAYERS
    assert prefix.layers[2].keys.shape == (K, P, D)
    np.testing.assert_allclose(prefix.flat(), by_hand(given), atol=1e-14)


def test_another_activation_is_another_prefix() -> None:
    relu = materialise(training(non_linearity="relu"), "self", LAYERS, K, D).flat()
    np.testing.assert_allclose(relu, by_hand(training(), lambda x: np.maximum(x, 0)), atol=1e-14)
    leaky = materialise(training(non_linearity="leakyrelu"), "self", LAYERS, K, D).flat()
    np.testing.assert_allclose(leaky, by_hand(training(), lambda x: np.where(x > 0, x, 0.01 * x)), atol=1e-14)
    assert np.abs(relu - leaky).max() > 1e-3
    assert np.abs(relu - by_hand(training())).max() > 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keeps_the_stored_dtype(dtype: type) -> None:
    assert materialise(training(dtype), "self", LAYERS, K, D).layers[0].values.dtype == dtype


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (training(kind="lstm"), "no parameterisation is called 'lstm'"),
        (training(non_linearity="os.system"), "os.system"),
    ],
)
def test_refuses_what_it_does_not_know(given: Training, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        materialise(given, "self", LAYERS, K, D)
