"""A build behind HTTP: requests of all tasks gathered into batches. Neither torch nor transformers is needed here."""
