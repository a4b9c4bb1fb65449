"""Exit codes, and the one exception whose text is for the user."""

DONE = 0
USAGE = 64  # a flag is unknown, illegal, or conflicts with another
DATA = 65  # the data set is absent, incomplete or damaged; or what a run claims does not hold
BUG = 70  # an error of the program: the only case with a traceback
NOT_WRITTEN = 74  # a result or checkpoint could not be written
LOST_RANK = 75  # hung, or another rank or storage is gone or does not answer: worth a retry
CONFIGURATION = 78  # installation, run directory or ranks do not fit together
STOPPED = 80  # on request, with a checkpoint where anything was trained
NOT_FINITE = 81  # a loss or gradient is NaN or Inf


class Failure(Exception):
    """A reason to end the run that its user can act on.

    `code` is the process's exit code. `collective` says that every rank raises the same failure at the same point: rank 0
    alone reports it, and all leave in order. Otherwise the rank that failed reports it and ends all the others.
    """

    def __init__(self, code: int, message: str, collective: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.collective = collective
