"""The errors that are expected; every other exception is a bug and keeps its stack trace."""


class UserError(ValueError):
    """A mistake that the user can fix: command lines print only the message and exit with 2.

    The message is one line that says what is wrong, where, and what to do.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
