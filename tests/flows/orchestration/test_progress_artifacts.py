"""Progress in Prefect: an artifact a task, whose last state is sent even if the next task begins before that."""

from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

from flows.orchestration.flow_progress import _ProgressArtifact


class Client:
    """A server's artifacts: their keys and data."""

    def __init__(self) -> None:
        self.shown: dict[UUID, tuple[str, float]] = {}

    def create_artifact(self, artifact: Any) -> Any:
        created = SimpleNamespace(id=uuid4())
        self.shown[created.id] = (artifact.key, artifact.data)
        return created

    def update_artifact(self, artifact_id: UUID, artifact: Any) -> None:
        self.shown[artifact_id] = (self.shown[artifact_id][0], artifact.data)


def test_the_last_progress_of_a_task_is_sent_though_the_next_has_begun() -> None:
    progress, client, run = _ProgressArtifact(), Client(), uuid4()
    train, score = uuid4(), uuid4()
    progress.note("train", train, "training (steps)", 392, 1000)
    progress.send(client, run)  # type: ignore[arg-type]
    assert [*client.shown.values()] == [("train", 39.2)]
    progress.note("train", train, "training (steps)", 1000, 1000)
    progress.note("score", score, "scoring (samples)", 1, 10)
    progress.send(client, run)  # type: ignore[arg-type]
    progress.send(client, run)  # type: ignore[arg-type]
    assert sorted(client.shown.values()) == [("score", 10.0), ("train", 100.0)]
