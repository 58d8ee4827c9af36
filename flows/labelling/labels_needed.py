"""The end of a command whose round waits for people.

Imports no Prefect, because the command line catches it.
"""


class LabelsNeeded(Exception):
    """Pairs of a round wait for labels: the same command goes on once they are in."""

    status = 3  # of the command
