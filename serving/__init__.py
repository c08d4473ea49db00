"""The service behind deploy/python/web_service.py: Paddle Serving's Pipeline mode on today's Python and Paddle."""

import contextlib
from collections.abc import Iterator

from common.errors import InputError


@contextlib.contextmanager
def installed_packages() -> Iterator[None]:
    """For imports of what `setup.sh --serving` installs: turns an ImportError into an InputError."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"Paddle Serving isn't installed ({error}); run sh scripts/setup.sh --serving") from None
