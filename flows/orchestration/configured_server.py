"""The Prefect server that the settings name."""

import httpx
from prefect.settings import get_current_settings


def answers(url: str) -> bool:
    """Return whether a server answers at the API address `url`, and accepts the password of the settings."""
    password = get_current_settings().api.auth_string
    user, _, rest = (password.get_secret_value() if password else "").partition(":")
    try:
        # Unlike `health`, this address needs the password.
        return httpx.get(f"{url}/version", auth=(user, rest) if password else None, timeout=10).is_success
    except httpx.HTTPError:
        return False
