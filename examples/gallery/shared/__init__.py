"""What the scripts of the gallery share: their command line, intervals, tables and pictures."""
