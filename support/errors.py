"""The errors that are expected; every other exception is a bug and keeps its stack trace."""


class UserError(ValueError):
    """A mistake that the user can fix: command lines print only the message and exit with 2.

    The message is one line that says what is wrong, where, and what to do.
    """


class LoadingFailed(UserError):
    """A batch that could not be loaded; raised in all processes alike, between two steps."""


class NotFinite(ArithmeticError):
    """A training step whose loss or gradient is not finite; raised in all processes alike.

    Args:
        problem: what is not finite, and why if that is known; None where another process met it.
    """

    def __init__(self, problem: str | None):
        super().__init__(problem)
        self.problem = problem


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
