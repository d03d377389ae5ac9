"""One module for each system, which trains on the `Problem` it is given and reports every step."""
