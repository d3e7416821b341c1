"""Files of packed arrays."""
