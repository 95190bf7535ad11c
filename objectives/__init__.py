"""What a training of a generator minimises: one file for each way, and one row here.

`configs.objectives` holds the same names, with the families that each is for and its settings.
"""
from objectives.base import Objective
from objectives.cca import CCA
from objectives.ddo import DDO
from objectives.likelihood import Likelihood
from objectives.rear import REAR
from objectives.sar import SAR

__all__ = ['OBJECTIVES', 'Objective']

OBJECTIVES: dict[str, type[Objective]] = dict(mle=Likelihood, ddo=DDO, cca=CCA, sar=SAR, rear=REAR)
