"""The error of a launch whose ranks failed."""


class RanksFailedError(RuntimeError):
    """Ranks ended without finishing their job, and reported no user error."""
