"""What a person reads in the terminal: progress, tokens, texts, answers.

Nothing here changes a run.
"""
