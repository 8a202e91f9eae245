"""The sandbox for programs that nobody trusts: `programs` judges them by tests, `interpreter` keeps one's state.

`forge` holds the processes that are ready for a job, `jail` is what runs inside.
"""
