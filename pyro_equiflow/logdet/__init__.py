# SPDX-License-Identifier: Apache-2.0
"""Log-determinants of ``I + J_f`` for Lipschitz maps, exact and estimated: tensors and callables only."""

from pyro_equiflow.logdet.base import Estimator, LogDet
from pyro_equiflow.logdet.exact import Exact
from pyro_equiflow.logdet.policy import ByMode, default_estimator
from pyro_equiflow.logdet.series import PowerSeries, RussianRoulette

__all__ = ["ByMode", "Estimator", "Exact", "LogDet", "PowerSeries", "RussianRoulette", "default_estimator"]
