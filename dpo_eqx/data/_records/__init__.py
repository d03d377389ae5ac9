"""Records of preferences: reading files and recognising their columns.

Nothing here knows a tokenizer.
"""
