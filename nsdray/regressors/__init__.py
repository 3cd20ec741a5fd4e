"""Betas to targets.

`REGRESSORS` names the networks that `nsdray.training` fits by gradient descent: each is a class called with
``(n_voxels, n_targets)`` that maps z-scored betas (n_samples, n_voxels) to standardised targets (n_samples, n_targets).
Ridge regression is not among them: it is closed form, needs no training loop, and lives in `nsdray.regressors.ridge`.
"""
from nsdray.regressors.gru import GRURegressor

REGRESSORS = {"gru": GRURegressor}
