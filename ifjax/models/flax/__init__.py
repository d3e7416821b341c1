"""What ifjax does for Flax: linen interceptors and calibration, NNX parameters. Needs the extra `flax`."""
