"""Writes files as Caltech's are, as the description of the formats has them and not as our readers do."""

import io
import struct

import numpy as np
from PIL import Image
from scipy.io import savemat


def picture(index, width=64, height=48):
    y, x = np.mgrid[:height, :width]
    planes = [100 + 60 * np.sin(x / 7 + index + c) + 40 * np.cos(y / 5 - c * index) for c in range(3)]
    return np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)


def encoded(image, kind):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=kind, **({"quality": 90} if kind == "JPEG" else {}))
    return file.getvalue()


def write_seq(path, images, form=201, padding=8):
    """A .seq video: JPEG (102, 201), PNG (1, 2) or raw (100 grey, 200 colours); gives where each frame begins."""
    raw = form in (100, 200)
    height, width = images[0].shape[:2]
    bits = 8 if form == 100 else 24
    stride = width * height * bits // 8 + 40 if raw else 999
    head = struct.pack("<I", 0xFEED) + "Norpix seq".encode("utf-16-le") + bytes(4) + struct.pack("<iI", 3, 1024)
    head += "a video".encode("utf-16-le").ljust(512, b"\0")
    head += struct.pack("<9I", width, height, bits, bits, width * height * bits // 8, form, len(images), 0, stride)
    content = bytearray((head + struct.pack("<d", 30.0)).ljust(1024, b"\0"))
    starts = []
    for index, image in enumerate(images):
        starts.append(len(content))
        if raw:
            content += (image[..., 0] if form == 100 else image[..., ::-1]).tobytes().ljust(stride, b"\7")
        else:
            frame = encoded(image, "PNG" if form < 100 else "JPEG")
            content += struct.pack("<I", len(frame) + 4) + frame + struct.pack("<IH", 1000 + index, 7)
            content += bytes(padding - 6)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return starts


def write_vbb(path, frames, objects, version=1.4):
    """A .vbb file in Matlab's structure.

    `objects` are (name, first frame, boxes, visible boxes); before version 1.2 without visible boxes, before 1.3 with `trnc`.
    """
    fields = ["id", "pos", "occl", "lock"] + ["posv"] * (version >= 1.2) + ["trnc"] * (version < 1.3)
    lists = np.empty((1, frames), dtype=object)
    for frame in range(frames):
        rows = []
        for number, (_, first, boxes, parts) in enumerate(objects, start=1):
            if first - 1 <= frame < first - 1 + len(boxes):
                at = frame - first + 1
                values = {"id": number, "pos": boxes[at], "posv": parts[at], "occl": 0, "lock": 0, "trnc": 0}
                rows.append(tuple(np.atleast_2d(np.asarray(values[field], dtype=float)) for field in fields))
        found = np.array(rows, dtype=[(field, object) for field in fields]).reshape(1, -1) if rows else np.zeros((0, 0))
        lists[0, frame] = found

    def cells(values):
        array = np.empty((1, len(values)), dtype=object)
        array[0, :] = values
        return array

    numbers = np.array([[float(len(objects))]])
    content = {
        "nFrame": float(frames),
        "objLists": lists,
        "maxObj": numbers,
        "objInit": np.ones((1, len(objects))),
        "objLbl": cells([name for name, *_ in objects]),
        "objStr": np.array([[float(first) for _, first, *_ in objects]]),
        "objEnd": np.array([[float(first + len(boxes) - 1) for _, first, boxes, _ in objects]]),
        "objHide": np.zeros((1, len(objects))),
        "altered": 0.0,
        "log": 0.0,
        "logLen": 0.0,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"A": content, "vers": version}, appendmat=False)


def vbb_text(frames, objects):
    """The text form of the same, by the format strings of the toolbox."""
    text = f"% vbb version=1.400000\nnFrame={frames} n={len(objects)}\nlog=[734000.5 ]\n"
    for name, first, boxes, parts in objects:
        text += "\n-----------------------------------\n"
        text += f"lbl='{name}' str={first} end={first + len(boxes) - 1} hide=0\n"
        for field, rows in (("pos ", boxes), ("posv", parts)):
            text += f"{field}=[" + "".join("{:f} {:f} {:f} {:f}; ".format(*row) for row in rows) + "]\n"
        text += "occl=[" + "".join(f"{int(any(part))} " for part in parts) + "]\n"
        text += "lock=[" + "0 " * len(boxes) + "]\n"
    return text
