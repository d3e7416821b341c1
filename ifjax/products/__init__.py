"""Products with packed operands."""
