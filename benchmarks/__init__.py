"""Measurements against a yardstick in the same run; they print ratios."""
