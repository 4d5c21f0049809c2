"""Write a network for deployment, as ONNX or as a program of torch.export, and compare what was written with the network."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lit_compress import rng
from lit_compress.graph import evaluating

Format = Literal["onnx", "torch-export"]
Runner = Callable[..., list[Tensor]]
_TOLERANCE = 1e-4  # of the largest value of an output, float32


def export(model: nn.Module, example_inputs: Any, path: str | Path, *, form: Format = "onnx", verify: bool = True) -> Runner:
    """Write a network in evaluation mode, for any batch size.

    Args:
        model: The network, on the CPU.
        example_inputs: A batch of inputs; a tuple or list holds positional arguments, each a tensor with the batch first.
        path: The file to write.
        form: ``"onnx"`` (needs the packages of ``pip install lit-compress[export]``) or ``"torch-export"``, which
            ``torch.export.load`` reads.
        verify: Run what was written, ONNX by ONNX Runtime, with batches of 1, of as many samples as given and of one more, and
            compare it with the network.

    Returns:
        What runs the file: from input tensors to a list of output tensors.

    Raises:
        ValueError: If the network cannot be exported, or what was written differs by more than 1e-4 of an output's largest value.
        ImportError: If the packages for ONNX are missing.

    Example:
        >>> from tempfile import mkdtemp
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> run = export(net, torch.rand(2, 4), Path(mkdtemp()) / "net.pt2", form="torch-export")
        >>> run(torch.rand(5, 4))[0].shape
        torch.Size([5, 2])
    """
    if form not in ("onnx", "torch-export"):
        raise ValueError(f"Argument `form` must be 'onnx' or 'torch-export' but got {form!r}.")
    inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if not all(isinstance(one, Tensor) and one.ndim and len(one) == len(inputs[0]) for one in inputs) or not len(inputs[0]):
        raise ValueError(
            "Expected a batch of input tensors, all with the same number of samples; wrap a network that takes others."
        )
    inputs = tuple(torch.cat([one, one]) if len(one) == 1 else one for one in inputs)  # an extent of 1 would be taken for fixed
    path = Path(path)
    with evaluating(model), torch.no_grad(), rng.isolated():
        program = _program(model, inputs)
        if form == "onnx":
            _save_onnx(program, path)
            run = onnx_runner(path)
        else:
            torch.export.save(program, path)
            loaded = torch.export.load(path).module()
            run = lambda *tensors: _as_list(loaded(*tensors))  # noqa: E731
        if verify:
            _compare(model, run, inputs)
    return run


def _program(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    batch = Dim("batch", max=2**31 - 1)  # torch 2.6 takes no slice with an open end of a batch without bound
    shapes = tuple({0: batch} for _ in inputs)
    try:
        return torch.export.export(model, inputs, dynamic_shapes=shapes)
    except Exception as error:  # whatever torch.export does not take
        raise ValueError(f"torch.export cannot trace {type(model).__name__} for any batch size: {error}") from error


def _save_onnx(program: ExportedProgram, path: Path) -> None:
    try:
        import onnxruntime  # noqa: F401  # before the work
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Writing ONNX needs more packages ({error}): pip install 'lit-compress[export]'.") from error
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")  # of the exporter's own making
        onnx: Any = torch.onnx.export(program, dynamo=True)
    onnx.save(str(path))


def onnx_runner(path: Path) -> Runner:
    """What runs an ONNX file, by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*tensors: Tensor) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run


def _compare(model: nn.Module, run: Runner, inputs: tuple[Tensor, ...]) -> None:
    for size in (1, len(inputs[0]), len(inputs[0]) + 1):
        batch = tuple(torch.cat([one, one])[:size] for one in inputs)
        expected, found = _as_list(model(*batch)), run(*batch)
        for number, (right, given) in enumerate(zip(expected, found, strict=True)):
            if right.shape != given.shape:
                raise ValueError(f"Output {number} of the file has shape {tuple(given.shape)} instead of {tuple(right.shape)}.")
            error, scale = (given - right).abs().max().item(), right.abs().max().item()
            if not error <= _TOLERANCE * max(scale, 1e-12):
                raise ValueError(f"Output {number} of the file differs by {error:.1e}, of a largest value of {scale:.1e}.")


def _as_list(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
