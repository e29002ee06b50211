"""One binary a question; `common` has what they share."""
