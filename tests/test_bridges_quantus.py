"""`explain_func` against the explainer's methods, and within Quantus."""

import numpy as np
import pytest

import sp_fx
from bridged import TARGET, Net, X
from helpers import fill
from sp_fx.bridges import explain_func


@pytest.fixture(scope="module")
def model():
    return fill(Net())


def test_explain_func_returns_arrays(model):
    x = X.numpy()
    found = explain_func(model=model, inputs=x, targets=TARGET.numpy(), device="cpu")
    assert isinstance(found, np.ndarray) and found.dtype == x.dtype and found.shape == x.shape
    assert np.array_equal(found, sp_fx.transform(model).pullback(X, TARGET).numpy())
    climbed = explain_func(model, x, TARGET.numpy(), method="ascend", steps=2, step_size=1.0, rules=sp_fx.Rules.paper())
    expected = sp_fx.transform(model, rules=sp_fx.Rules.paper()).ascend(X, TARGET, steps=2, step_size=1.0)
    assert np.array_equal(climbed, expected.numpy())
    assert np.array_equal(explain_func(sp_fx.transform(model), x, 2), sp_fx.transform(model).pullback(X, 2).numpy())
    with pytest.raises(ValueError, match="one of pullback, double_pullback, ascend"):
        explain_func(model, x, TARGET.numpy(), method="gradient")
    with pytest.raises(TypeError, match="takes no stepz; it takes"):
        explain_func(model, x, TARGET.numpy(), method="ascend", stepz=2)
    with pytest.raises(ValueError, match="move one of them"):
        explain_func(model, x, TARGET.numpy(), device="cuda")


def test_quantus_evaluates_it(model):
    quantus = pytest.importorskip("quantus")
    metric = quantus.MaxSensitivity(nr_samples=3, lower_bound=0.05, disable_warnings=True, return_aggregate=False)
    scores = metric(model=model, x_batch=X.numpy(), y_batch=TARGET.numpy(), explain_func=explain_func, device="cpu",
                    explain_func_kwargs={"method": "pullback"})  # fmt: skip
    assert len(scores) == 3 and all(0 < s < 10 for s in scores)
    given = explain_func(model, X.numpy(), TARGET.numpy())
    fidelity = quantus.FaithfulnessCorrelation(nr_runs=5, subset_size=40, disable_warnings=True, return_aggregate=False)
    scores = fidelity(model=model, x_batch=X.numpy(), y_batch=TARGET.numpy(), a_batch=given, device="cpu")
    assert len(scores) == 3 and np.isfinite(scores).all()
