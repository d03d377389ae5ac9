"""One module for each system, which trains on the given `Problem` and reports every step."""
