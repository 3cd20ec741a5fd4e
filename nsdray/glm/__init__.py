"""BOLD time series to single-trial betas: the paper's algorithm 1, after GLMsingle.

`fit_glm` does it all in one process. Its steps are plain functions over chunks of voxels, so that a cluster can run
them anywhere: see `nsdray.glm.fit`. The method is that of Prince et al. 2022, "Improving the accuracy of single-trial
fMRI response estimates using GLMsingle"; where this code departs from the authors' package, the place says so.
"""
from nsdray.glm.design import Design, Events, make_design
from nsdray.glm.fit import GLMResult, fit_glm

__all__ = ["Design", "Events", "GLMResult", "fit_glm", "make_design"]
