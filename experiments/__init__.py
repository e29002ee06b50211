"""One binary a question; `common` has what they share."""

import os

# Before TensorFlow is imported: its start-up notes are not results.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
