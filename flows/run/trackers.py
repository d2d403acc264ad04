"""The experiment trackers that a run can be sent to: one row each, and the section of the configuration.

To add a tracker, write a subclass of `flows.tracking.tracker.Tracker` in a new file, add a row here, and an extra of
the same name to pyproject.toml.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from data_scoring.base.field_types import Name, PathText
from data_scoring.base.names import OneOf
from data_scoring.base.user_paths import USER_PATH
from data_scoring.config import Config


@dataclass(frozen=True)
class TrackerKind:
    """A kind of tracker.

    tracker: its class, as module:class; it is imported at first use.
    package: the module that it needs.
    """

    tracker: str
    package: str


TRACKER_KINDS = {
    "tensorboard": TrackerKind("flows.tracking.tensorboard_tracker:TensorBoardTracker", "tensorboard"),
    "wandb": TrackerKind("flows.tracking.wandb_tracker:WandbTracker", "wandb"),
    "mlflow": TrackerKind("flows.tracking.mlflow_tracker:MlflowTracker", "mlflow"),
    "trackio": TrackerKind("flows.tracking.trackio_tracker:TrackioTracker", "trackio"),
}


_CREDENTIALS = re.compile(r"://[^\s/?#]*@")
_PASSWORD = re.compile(r"://[^\s/?#]*:[^\s/?#]*@")


def _or_name(schema: dict[str, Any]) -> None:
    section = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string", "enum": [*TRACKER_KINDS]}, section]


class TrackerConfig(Config):
    """A tracker that the run is sent to; its name alone stands for the name with default settings."""

    model_config = ConfigDict(json_schema_extra=_or_name)

    name: Annotated[str, OneOf(lambda: TRACKER_KINDS)] = Field(description="Tracker; needs the extra of this name.")
    project: Name = Field(default="reprise", description="Project, or experiment, in which the tracker lists the run.")
    uri: Annotated[PathText | None, USER_PATH] = Field(
        default=None,
        description="Folder or server that receives the run: a folder for tensorboard and trackio, a tracking URI for "
        "mlflow, a server for wandb; null: what the tracker's environment variable says, or else the run folder's "
        "tracking/.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, values: Any) -> Any:
        return {"name": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _check_uri(self) -> Self:
        # The configuration is written to the run folder, and sent to every tracker.
        if self.uri is not None and _PASSWORD.search(self.uri):
            raise ValueError(
                "uri: holds a password, which would be stored with the run; omit it, and set the tracker's environment "
                "variable"
            )
        return self


def without_password(text: str) -> str:
    """Return `text` without user names and passwords in its URLs."""
    return _CREDENTIALS.sub("://***@", text)


def check_trackers(trackers: Sequence[TrackerConfig]) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    for tracker in trackers:
        if find_spec(TRACKER_KINDS[tracker.name].package) is None:
            raise ValueError(
                f"track: {tracker.name} is not installed; install it with `pip install 'reprise-lm[{tracker.name}]'`, "
                "or leave it out"
            )
