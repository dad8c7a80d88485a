"""Sample data drawn offline, in every raw layout."""
