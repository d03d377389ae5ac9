"""Helpers of the examples: a toy task, its vocabulary, files, tables, pictures.

The scripts contain the training itself.
"""
