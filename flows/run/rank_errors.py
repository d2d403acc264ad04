"""What a launch raises when its ranks fail."""


class RanksFailedError(RuntimeError):
    """Ranks ended without finishing their job, through no fault of the user's that they could name."""
