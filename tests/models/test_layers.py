import mlx.core as mx
import numpy as np

from mlx_server.models.layers import RMSNorm
from mlx_server.models.quantize import QuantizationPlan
from mlx_server.models.weights import Weights


def test_what_is_added_to_a_zero_centred_norm_is_not_rounded_off():
    stored = mx.array([0.001, -0.001, 0.002, 1.5], mx.bfloat16)
    norm = RMSNorm(Weights("", {"weight": stored}, QuantizationPlan(), mx.bfloat16), 4, 1e-6, zero_centred=True)
    y = np.array(norm(mx.ones((1, 4))))
    np.testing.assert_allclose(y[0], 1 + np.array(stored.astype(mx.float32)), 1e-5)
