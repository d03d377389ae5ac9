"""Tools for policies of other people: adapts them, checks them, and selects what is trained.

Running a policy on a batch is in `_scoring`.
"""
