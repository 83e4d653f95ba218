"""`medpsp doctor`: what this machine has, and what to do where that is not enough.

Every check runs in a child process (`steps`), so that one that crashes or hangs costs its own row.
"""
