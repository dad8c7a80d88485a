"""Show what a run did: one page with its plots, and the list of runs."""
