"""Scores -> ranks -> metrics -> intervals."""
