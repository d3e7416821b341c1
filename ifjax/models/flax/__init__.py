"""Flax support: linen interceptors and calibration, NNX parameters. Needs the extra `flax`."""
