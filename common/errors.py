"""The error for everything that the user can put right."""


class InputError(ValueError):
    """Something that the user gave can't be used; the message says where it is and what to do about it."""
