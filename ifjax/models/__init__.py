"""Models: rules, reports, Flax."""
