"""Cache features of frozen encoder stages on disk."""
