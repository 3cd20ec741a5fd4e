"""Betas to targets.

`REGRESSORS` names the networks that `nsdray.training` fits by gradient descent: each is a class called with
``(n_voxels, n_targets)`` that maps z-scored betas (n_samples, n_voxels) to standardised targets (n_samples, n_targets). Each
is an input layer, named by ``INPUT`` and called by ``read``, below a ``trunk`` that knows no voxels, so that several subjects
can share the latter (`nsdray.regressors.shared`).
Ridge regression is not among them: it is closed form, needs no training loop, and lives in `nsdray.regressors.ridge`.
"""
from nsdray.regressors.conv import ConvRegressor
from nsdray.regressors.gru import GRURegressor
from nsdray.regressors.mlp import MLPRegressor
from nsdray.regressors.transformer import TransformerRegressor

REGRESSORS = {"gru": GRURegressor, "conv": ConvRegressor, "transformer": TransformerRegressor, "mlp": MLPRegressor}
