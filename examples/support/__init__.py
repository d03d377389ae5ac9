"""What the examples need besides the library: a toy task, its vocabulary, files, tables, pictures.

Training itself is in the scripts.
"""
