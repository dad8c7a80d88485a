"""Raw folder -> pairs table -> batches."""
