"""Measurements against a yardstick in the same run; they print ratios."""

import os

# Before TensorFlow is imported: its start-up notes are not results.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
