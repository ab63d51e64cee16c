"""The one exception whose message is written for the person at the keyboard."""


class UserError(ValueError):
    """Bad input: the message names what was given, what was expected and what to do.

    Commands print it as one line and leave with status 2; every other exception is a bug and keeps its traceback.
    """
