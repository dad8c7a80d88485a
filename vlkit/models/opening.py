"""The former home of `open_trained`, which model cards of older versions import; gone in the next release."""

from vlkit.models.loading import load_model as open_trained  # noqa: F401
