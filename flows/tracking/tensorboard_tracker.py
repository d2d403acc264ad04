"""TensorBoard: event files, written without TensorFlow or torch."""

import itertools
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from flows.run.trackers import TrackerConfig
from flows.tracking.tracker import Point, Tracker


class TensorBoardTracker(Tracker):
    """Writes event files to `uri`/<run>, or to the run folder.

    If another run of the same name has files there, the folder is <run>-2, and so on.

    What was written but not recorded as sent is cut off the last file, so that no point is there twice.
    """

    variable = "TENSORBOARD_LOGDIR"

    def __init__(self, settings: TrackerConfig, run_name: str, folder: Path, memory: dict[str, Any]) -> None:
        """Start a new file: TensorBoard may have the last one open."""
        super().__init__(settings, run_name, folder, memory)
        logs = folder if settings.uri is None else Path(settings.uri) / memory.get("folder", run_name)
        if settings.uri is not None and "file" not in memory:
            logs = next(place for place in _numbered(logs) if not any(place.glob("events.out.tfevents.*")))
            memory["folder"] = logs.name
        logs.mkdir(parents=True, exist_ok=True)
        last = logs / memory.get("file", "")
        if last.is_file() and last.stat().st_size > memory["bytes"]:
            os.truncate(last, memory["bytes"])
        number = memory.get("number", 0) + 1
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{number:06d}.{platform.node()}"
        self._file = (logs / name).open("wb")
        self._writer = RecordWriter(self._file)
        memory.update(file=name, number=number, bytes=0)
        self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])

    def configure(self, fields: dict[str, Any], text: str) -> None:
        """Write the configuration as a text."""
        code = "\n".join(f"    {line}" for line in text.splitlines())
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[code.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = create_summary_metadata("configuration", "run.yaml")
        value = Summary.Value(tag="configuration", metadata=metadata, tensor=tensor)
        self._write([Event(wall_time=time.time(), step=0, summary=Summary(value=[value]))])

    def send(self, points: Sequence[Point]) -> None:
        """Write scalars, which have single precision."""
        self._write(
            [
                Event(
                    wall_time=point.time,
                    step=point.step,
                    summary=Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in point.values.items()]),
                )
                for point in points
            ]
        )

    def show_report(self, page: Path, pictures: Sequence[Path]) -> None:
        """Write the report's pictures; TensorBoard shows no pages."""
        for path in pictures:
            content = path.read_bytes()
            # PNG's header has the size: 4 bytes each, after 16.
            width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
            image = Summary.Image(encoded_image_string=content, width=width, height=height)
            value = Summary.Value(tag=f"report/{path.stem}", image=image)
            self._write([Event(wall_time=time.time(), step=0, summary=Summary(value=[value]))])

    def close(self, is_done: bool) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, events: Sequence[Event]) -> None:
        for event in events:
            self._writer.write(event.SerializeToString())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.memory["bytes"] = self._file.tell()


def _numbered(folder: Path) -> Iterator[Path]:
    """Yield a folder, and those with its name and a number from 2."""
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
