"""Measure a model beside the untouched one: scores, ranks, metrics, intervals, results.json, model card."""
