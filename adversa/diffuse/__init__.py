"""The diffusion core: one signature `denoiser(x, sigma, label) -> x0_hat`; guidance wraps it,
solvers and pipeline call it.
"""
