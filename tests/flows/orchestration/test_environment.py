"""Where `reprise serve` keeps Prefect's home, and when it needs a password."""

from pathlib import Path

import pytest
from prefect.settings import Settings

from flows.orchestration import environment
from flows.orchestration.environment import served_environment

CHOICES = (
    "PREFECT_HOME",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_API_AUTH_STRING",
    "PREFECT_API_AUTH_STRING",
)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory and home, and settings read from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "get_current_settings", Settings)


def test_a_served_folder_has_a_home_of_its_own(tmp_path: Path) -> None:
    assert served_environment("127.0.0.1", 4200, [])["PREFECT_HOME"] == str(tmp_path / ".prefect")
    assert (tmp_path / ".prefect").stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "user" / ".prefect").exists()


@pytest.mark.parametrize("name", CHOICES[:3])
def test_a_home_or_database_that_the_user_chose_is_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tmp_path / "chosen"
    monkeypatch.setenv(name, str(chosen) if name == "PREFECT_HOME" else f"sqlite+aiosqlite:///{chosen}.db")
    found = served_environment("127.0.0.1", 4200, [])
    assert found["PREFECT_HOME"] == str(chosen if name == "PREFECT_HOME" else tmp_path / "user" / ".prefect")
    assert not (tmp_path / ".prefect").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_no_password(host: str) -> None:
    assert "PREFECT_SERVER_API_AUTH_STRING" not in served_environment(host, 4200, [])
    assert not Path(".prefect/password").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7", "here.example", "0", "127.1"])
def test_a_network_needs_one_that_stays(host: str) -> None:
    first = served_environment(host, 4200, [])
    password = first["PREFECT_SERVER_API_AUTH_STRING"]
    user, _, secret = password.partition(":")
    assert user == "reprise"
    assert len(secret) >= 32
    assert first["PREFECT_API_AUTH_STRING"] == password
    assert served_environment(host, 4200, [])["PREFECT_API_AUTH_STRING"] == password
    assert Path(".prefect/password").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", CHOICES[3:])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_password_that_the_user_set_is_used(name: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "me:secret")
    found = served_environment(host, 4200, [])
    assert found["PREFECT_SERVER_API_AUTH_STRING"] == found["PREFECT_API_AUTH_STRING"] == "me:secret"
    assert not Path(".prefect/password").exists()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:4300"),
        ("0.0.0.0", "http://127.0.0.1:4300"),
        ("::", "http://[::1]:4300"),
        ("::1", "http://[::1]:4300"),
        ("192.0.2.7", "http://192.0.2.7:4300"),
    ],
)
def test_addresses(host: str, url: str) -> None:
    found = served_environment(host, 4300, [])
    assert found["PREFECT_API_URL"] == f"{url}/api"
    assert found["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == url
    assert found["PREFECT_SERVER_UI_API_URL"] == "/api"
    assert found["REPRISE_REPORTS_URL"] == "http://127.0.0.1:4301"
