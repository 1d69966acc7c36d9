"""SAM 2's image part out of two published graphs, under the names of Meta's checkpoints.

The graphs were made from Meta's weights to run elsewhere: the encoder (`.ort`) and the decoder (`.onnx`).
Only their constants and the names of their nodes are read; neither graph is run. What the export changed is
undone: matrices are turned back, the normalisations and tokens get their names from the nodes that use them,
and the map of positions, which was computed for one size, is taken apart into its coarse map and its window.
A constant may move between these two without any effect; the pair of least norm is taken.

Not in the graphs, as they have no effect on single pictures: memory, object pointers, and the head that
says whether there is an object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import save_file

from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.files import atomic_path

Array = NDArray[Any]

_SIDE_COARSE = 7
_SIDE_WINDOW = 8
"""Of the positions of Hiera-tiny."""
_ORT_SCHEMA = "onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession"
_FLOAT = 1
"""Code of 32-bit floats, the same in both formats."""
_NAMED = (
    ("model.", ""),
    ("prompt_encoder.", "sam_prompt_encoder."),
    ("mask_decoder.", "sam_mask_decoder."),
    ("no_mem_embed", "no_mem_embed"),
)
"""How the names of constants that kept theirs begin -> how Meta's begin."""
_WEIGHT_OR_BIAS = {"Mul": "weight", "Add": "bias"}


@dataclass(frozen=True)
class Graph:
    """What is read of a graph.

    Args:
        constants: Its 32-bit floats by name.
        nodes: Kind, name and inputs of each node.
    """

    constants: dict[str, Array]
    nodes: tuple[tuple[str, str, tuple[str, ...]], ...]


def check_packages() -> None:
    """Make sure, before anything large is fetched, that what comes can be read.

    Raises:
        WeightsError: A package that reads the graphs is missing.
    """
    _package("onnx")
    _package(_ORT_SCHEMA)


def convert(parts: Sequence[Path], target: Path) -> Path:
    """Write the tensors of both graphs as one safetensors file with Meta's names.

    Args:
        parts: The encoder's `.ort` file and the decoder's `.onnx` file.
        target: Where the file goes.

    Raises:
        WeightsError: A package that reads the graphs is missing, or they are not these graphs.
    """
    encoder, decoder = parts
    tensors = dict(_encoder_tensors(read_ort(encoder))) | dict(_decoder_tensors(read_onnx(decoder)))
    with atomic_path(target) as temporary:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, temporary)
    return target


def read_onnx(path: Path) -> Graph:
    """Read a graph in ONNX's own format.

    Raises:
        WeightsError: The package `onnx` is missing, or the file is damaged.
    """
    onnx = _package("onnx")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's error class differs between its implementations
        raise _damaged(path) from error
    constants = {
        item.name: np.asarray(onnx.numpy_helper.to_array(item))
        for item in graph.initializer
        if item.data_type == _FLOAT
    }
    return Graph(constants, tuple((node.op_type, node.name, tuple(node.input)) for node in graph.node))


def read_ort(path: Path) -> Graph:
    """Read a graph in the format of ONNX Runtime.

    Raises:
        WeightsError: The package `onnxruntime` is missing, or the file is damaged.
    """
    schema = _package(_ORT_SCHEMA)
    content = path.read_bytes()
    if content[4:8] != b"ORTM":
        raise _damaged(path)
    try:
        graph = schema.InferenceSession.GetRootAs(content, 0).Model().Graph()
        constants = [graph.Initializers(index) for index in range(graph.InitializersLength())]
        nodes = [graph.Nodes(index) for index in range(graph.NodesLength())]
        return Graph(
            {item.Name().decode(): _ort_array(item) for item in constants if item.DataType() == _FLOAT},
            tuple(
                (
                    node.OpType().decode(),
                    node.Name().decode(),
                    tuple(node.Inputs(index).decode() for index in range(node.InputsLength())),
                )
                for node in nodes
            ),
        )
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise _damaged(path) from error


def unfused_positions(
    fused: Array, coarse: int = _SIDE_COARSE, window: int = _SIDE_WINDOW
) -> tuple[Array, Array]:
    """Take a map of positions apart.

    Args:
        fused: (1, C, h, w): a coarse map, resized bicubically, plus a window repeated over it.
        coarse: Side of the coarse map.
        window: Side of the window.

    Returns:
        Coarse map (1, C, coarse, coarse) and window (1, C, window, window), float32, that give the map.

    Raises:
        WeightsError: The map is not such a sum.
    """
    channels, h, w = fused.shape[1:]
    maps = torch.eye(coarse**2, dtype=torch.float64).reshape(-1, 1, coarse, coarse)
    resized = F.interpolate(maps, (h, w), mode="bicubic")
    cells = torch.eye(window**2, dtype=torch.float64).reshape(-1, 1, window, window)
    repeated = cells.tile(1, 1, h // window, w // window)
    basis = torch.cat([resized, repeated]).flatten(1).numpy()  # unknowns, cells of the map
    wanted = fused.astype(np.float64).reshape(channels, -1)
    # The normal equations are small; they have one free direction, which `pinv` leaves at zero.
    solved = wanted @ basis.T @ np.linalg.pinv(basis @ basis.T, rcond=1e-10, hermitian=True)
    if float(np.abs(solved @ basis - wanted).max()) > 1e-4 * max(1.0, float(np.abs(wanted).max())):
        raise WeightsError(
            "The positions of SAM 2's encoder should be a coarse map and a repeated window, but the graph "
            "holds something else. Use the graph that the model's card names."
        )
    parts = solved.astype(np.float32)
    return (
        parts[:, : coarse**2].reshape(1, channels, coarse, coarse),
        parts[:, coarse**2 :].reshape(1, channels, window, window),
    )


def _encoder_tensors(graph: Graph) -> Iterator[tuple[str, Array]]:
    for name, value in _kept_names(graph):
        yield name, value.transpose(0, 2, 1) if name == "no_mem_embed" else value
    for kind, node, inputs in graph.nodes:
        values = [graph.constants[name] for name in inputs if name in graph.constants]
        if kind == "MatMul" and values:
            yield f"{_module(node)}.weight", values[0].T
        elif kind == "Add" and values and values[0].ndim == 4:
            coarse, window = unfused_positions(values[0])
            yield "image_encoder.trunk.pos_embed", coarse
            yield "image_encoder.trunk.pos_embed_window", window


def _decoder_tensors(graph: Graph) -> Iterator[tuple[str, Array]]:
    yield from _kept_names(graph)
    for kind, node, inputs in graph.nodes:
        for name in inputs:
            if name.startswith("onnx::") and name in graph.constants:
                yield from _renamed(kind, node, graph.constants[name])


def _renamed(kind: str, node: str, value: Array) -> Iterator[tuple[str, Array]]:
    """Name a constant of the decoder by the node that uses it."""
    module = _module(node)
    if kind == "MatMul":
        yield f"sam_mask_decoder.{module}.weight", value.T
    elif kind == "Expand":
        for name, rows in zip(("obj_score_token", "iou_token"), value[0], strict=False):
            yield f"sam_mask_decoder.{name}.weight", rows[None]
        yield "sam_mask_decoder.mask_tokens.weight", value[0, 2:]
    elif kind == "Mul" and value.ndim == 4:
        yield "sam_prompt_encoder.no_mask_embed.weight", value.reshape(1, -1)
    elif kind in _WEIGHT_OR_BIAS:
        layer = ".".join(module.split(".")[-2:])
        part = "sam_prompt_encoder" if layer.startswith("mask_downscaling") else "sam_mask_decoder"
        yield f"{part}.{layer}.{_WEIGHT_OR_BIAS[kind]}", value.reshape(-1)


def _kept_names(graph: Graph) -> Iterator[tuple[str, Array]]:
    for name, value in graph.constants.items():
        for begin, official in _NAMED:
            if name.startswith(begin):
                yield official + name.removeprefix(begin), value
                break


def _module(node: str) -> str:
    """Name of the module a node stems from: its path without the operation."""
    return node.rsplit("/", 1)[0].strip("/").replace("/", ".")


def _ort_array(item: Any) -> Array:
    shape = [int(item.Dims(axis)) for axis in range(item.DimsLength())]
    return np.frombuffer(item.RawDataAsNumpy().tobytes(), dtype="<f4").reshape(shape)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise WeightsError(
            f"Reading SAM 2's graphs needs the package {name.split('.')[0]}, which is not installed. Install "
            "it with `pip install samadapt[sam2]`."
        ) from error


def _damaged(path: Path) -> WeightsError:
    return WeightsError(
        f"{path.name} should be one of the graphs of SAM 2, but is cut short, damaged or something else. "
        "Fetch it again."
    )
