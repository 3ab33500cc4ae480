"""The one exception that users are meant to see."""


class UserError(ValueError):
    """Something that is the user's to mend: command lines print the message alone, without a trace, and exit with 2.

    The message is one line that says what was wrong, where, and what to do.
    """

    def __str__(self) -> str:
        # A DataLoader re-raises a worker's error with the worker's whole trace as the message: ours comes last in it.
        return super().__str__().rsplit("UserError: ", 1)[-1].strip()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
