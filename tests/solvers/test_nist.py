"""Hard regressions that NIST has certified, from its far and its near start."""

import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from benchmarks.nist import RESIDUALS, load

DATASETS = load()
HARD = ["BoxBOD", "Eckerle4", "Lanczos2", "MGH10", "MGH17", "Thurber"]


@pytest.mark.thin
@pytest.mark.parametrize("name", HARD)
def test_certified_regressions(name):
    data = DATASETS[name]
    for start in data.starts:
        fit = curvature.least_squares(RESIDUALS[data.model], jnp.asarray(start), (data.x, data.y))
        assert fit.success
        np.testing.assert_allclose(fit.x, data.parameters, rtol=1e-6)
        np.testing.assert_allclose(fit.standard_errors(), data.deviations, rtol=1e-6)
        np.testing.assert_allclose(2 * fit.value, data.sum_of_squares, rtol=1e-9)
