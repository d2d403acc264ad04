"""The environment of what `reprise serve` starts: its server, home and password, and what flows may use."""

import os
import secrets
from pathlib import Path

from prefect.settings import get_current_settings

from flows.orchestration.guard import is_loopback, is_wildcard, url_host

_HOME = Path(".prefect")
_PASSWORD = "password"  # noqa: S105 - the name of its file


def served_environment(host: str, port: int, allowed: list[Path]) -> dict[str, str]:
    """Return the environment of Prefect's server, worker and commands, for a server on `port` of `host`.

    Prefect's home is made if it does not exist, and so is a password if other machines can reach the server. A server
    on the loopback interface has one if the settings PREFECT_SERVER_API_AUTH_STRING or PREFECT_API_AUTH_STRING do.
    """
    home = _home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    reachable = ("::1" if ":" in host else "127.0.0.1") if is_wildcard(host) else host
    server = f"http://{url_host(reachable)}:{port}"
    environment = {
        **os.environ,
        "PWD": str(Path.cwd()),
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{server}/api",
        # Pages call the API on the address that they came from, since it is the only one that may.
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": server,
        # The guard covers more, and programs need no tokens.
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "REPRISE_ALLOW": os.pathsep.join(str(folder.resolve()) for folder in allowed),
        "REPRISE_REPORTS_URL": f"http://127.0.0.1:{port + 1}",
        "REPRISE_REPORTS_FOLDER": str(Path("runs").resolve()),
    }
    password = _configured_password() or (None if is_loopback(host) else _own_password(home))
    if password is not None:
        environment |= {"PREFECT_SERVER_API_AUTH_STRING": password, "PREFECT_API_AUTH_STRING": password}
    return environment


def _home() -> Path:
    """Return the user's choice of Prefect's home, else `.prefect` in the working directory."""
    settings = get_current_settings()
    is_chosen = "home" in settings.model_fields_set or "connection_url" in settings.server.database.model_fields_set
    return (settings.home if is_chosen else _HOME).resolve()


def _configured_password() -> str | None:
    settings = get_current_settings()
    secret = settings.server.api.auth_string or settings.api.auth_string
    return secret.get_secret_value() if secret else None


def _own_password(home: Path) -> str:
    """Return the password in `home`, which is made at the first call: browsers and workers keep it."""
    path = home / _PASSWORD
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"reprise:{secrets.token_urlsafe()}\n")
    return path.read_text().strip()
