# SPDX-License-Identifier: Apache-2.0
"""Variational inference with symmetries: the guide, the check of models, how good a guide is, alignment of draws."""

from pyro_equiflow.infer.alignment import align
from pyro_equiflow.infer.auto_orbit_mixture import AutoOrbitMixture
from pyro_equiflow.infer.autoguide import AutoEquivariantFlow
from pyro_equiflow.infer.diagnostics import GuideReport, diagnose
from pyro_equiflow.infer.evidence import (
    EvidenceEstimate,
    WeightedDraws,
    evidence_estimate,
    importance_weighted_bound,
    weighted_draws,
)
from pyro_equiflow.infer.importance import importance_weights
from pyro_equiflow.infer.invariance import InvarianceReport, SiteChange, check_model_invariance
from pyro_equiflow.infer.metropolis import MetropolisChain, metropolis
from pyro_equiflow.infer.path_gradient import TracePathGradient_ELBO

__all__ = [
    "AutoEquivariantFlow",
    "AutoOrbitMixture",
    "EvidenceEstimate",
    "GuideReport",
    "InvarianceReport",
    "MetropolisChain",
    "SiteChange",
    "TracePathGradient_ELBO",
    "WeightedDraws",
    "align",
    "check_model_invariance",
    "diagnose",
    "evidence_estimate",
    "importance_weighted_bound",
    "importance_weights",
    "metropolis",
    "weighted_draws",
]
