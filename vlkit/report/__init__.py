"""What a run did, for people: one page, its plots, and the list of runs."""
