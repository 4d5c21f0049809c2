"""What the file of a run of Weights & Biases holds, read without an account or a server."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when imported

_HEADER, _BLOCK = 7, 32768


def records(content: bytes) -> Iterator[Record]:
    """The messages in a transaction log ``run-<id>.wandb``: those that are complete, if the run was killed.

    The log has blocks of 32 KiB, and a message comes in parts where it does not fit into one.

    Raises:
        ValueError: If it is no such log.
    """
    if not content.startswith(b":W&B"):
        raise ValueError("Not the file of a run of Weights & Biases: it does not begin with `:W&B`.")
    position, parts = _HEADER, b""
    while position + _HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:  # padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)  # checksum; kinds: whole, first, middle, last
        position += _HEADER + length
        if position > len(content):
            return
        parts += content[position - length : position]
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def logged(record: Record) -> dict[str, Any]:
    """Key to value of what one call has logged; a picture's or a table's is a dict that names its file."""
    row: dict[str, Any] = {}
    for item in record.history.item:
        key, *inner = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        if inner:
            row.setdefault(key, {})[inner[0]] = value
        else:
            row[key] = value
    return row
