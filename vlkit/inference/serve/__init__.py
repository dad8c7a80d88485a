"""Serve an index as a local web page with a JSON API."""
