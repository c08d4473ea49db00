"""The error for everything that the user can fix."""


class InputError(ValueError):
    """An option, file or text from the user can't be used; the message names it and, if possible, says what to do."""
