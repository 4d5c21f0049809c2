"""Int8 on top of a cut: an exported network quantised by ONNX Runtime's own quantiser."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_compress.export import Runner, onnx_runner


def quantize_onnx(path: str | Path, out: str | Path, batches: Iterable[Tensor]) -> Runner:
    """Quantise weights and activations of an ONNX file to int8, by ranges that are measured on data.

    Weights get a scale for each output channel, activations one for each tensor, from the smallest to the largest value seen
    (ONNX Runtime's ``quantize_static``, QDQ format). What adds up in int32, as biases, stays exact.

    Args:
        path: A file that :func:`~lit_compress.export.export` wrote, with one input.
        out: The file to write.
        batches: Batches of the input, to measure ranges on; a hundred samples are usually enough.

    Returns:
        What runs the new file: from an input tensor to a list of output tensors.

    Raises:
        ValueError: If there are no batches, or the file has several inputs.
        ImportError: If ONNX Runtime is missing.

    Source: Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*, 2018.
    """
    try:
        from onnxruntime import InferenceSession
        from onnxruntime.quantization import CalibrationDataReader, quantize_static
    except ImportError as error:
        raise ImportError(f"Quantising needs more packages ({error}): pip install 'lit-compress[export]'.") from error
    inputs = InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()
    if len(inputs) != 1:
        raise ValueError(f"Expected a file with one input but {path} has {len(inputs)}.")
    samples = [{inputs[0].name: batch.numpy()} for batch in batches]
    if not samples:
        raise ValueError("There are no batches to measure the ranges of activations on.")
    remaining = iter(samples)

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def get_next(self) -> Any:
            return next(remaining, None)

    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it asks for batch norms to be folded, which torch's exporter has done
    try:
        quantize_static(str(path), str(out), Reader(), per_channel=True)
    finally:
        logging.getLogger().setLevel(level)
    return onnx_runner(Path(out))
