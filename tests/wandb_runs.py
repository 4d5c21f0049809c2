"""Runs of Weights & Biases that never leave the machine, and what their files hold."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from lit_compress.reporting.wandb_file import logged, records


class Artifact(NamedTuple):
    name: str
    type: str
    metadata: dict[str, Any]
    files: dict[str, bytes]


class OfflineRun:
    """The files of an offline run, read when nothing writes them any more.

    Attributes:
        rows: What each call logged: key to value; a picture's or a table's is a dict that names its file.
        summary: The last value of each key.
        artifacts: In the order in which they were logged; those that W&B makes for tables are left out.
        alerts: Texts of the messages that W&B is to send.
        media: The folder of pictures and tables.
    """

    def __init__(self, folder: Path) -> None:
        (run,) = (folder / "wandb").glob("offline-run-*")
        (log,) = run.glob("*.wandb")
        self.media = run / "files"
        self.rows: list[dict[str, Any]] = []
        self.artifacts: list[Artifact] = []
        self.alerts: list[str] = []
        kinds = []
        for record in records(log.read_bytes()):
            kinds.append(record.WhichOneof("record_type"))
            if kinds[-1] == "history":
                self.rows.append(logged(record))
            elif kinds[-1] == "artifact" and record.artifact.type != "run_table":
                self.artifacts.append(_artifact(record.artifact))
            elif kinds[-1] == "alert":
                self.alerts.append(record.alert.text)
        assert "exit" in kinds, "the file is not complete"
        self.summary = {key: value for row in self.rows for key, value in row.items()}

    def scalars(self) -> list[tuple[str, int, float]]:
        """Key, step and value of each number logged, in the order of logging."""
        own = ("_", "trainer/global_step")
        return [
            (key, row["trainer/global_step"], value)
            for row in self.rows
            for key, value in row.items()
            if not key.startswith(own) and not isinstance(value, dict)
        ]

    def logged(self, key: str) -> list[dict[str, Any]]:
        """Every value of a key."""
        return [row[key] for row in self.rows if key in row]

    def table(self, value: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of a logged table."""
        content = json.loads((self.media / value["path"]).read_text(encoding="utf-8"))
        return content["columns"], content["data"]


def _artifact(record: Any) -> Artifact:
    files = {entry.path: Path(entry.local_path).read_bytes() for entry in record.manifest.contents}
    return Artifact(record.name, record.type, json.loads(record.metadata), files)
