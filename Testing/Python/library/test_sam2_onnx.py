"""Graphs like the published ones, made of a tiny network, give its tensors back under Meta's names."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from goldens import golden
from SAMAdaptLib import sam2_onnx
from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.models.hiera import Hiera, HieraShape
from SAMAdaptLib.sam2_onnx import Array, Graph, convert, read_onnx, read_ort, unfused_positions
from SAMAdaptLib.verify.sam2 import tiny_sam2


def positions() -> tuple[Array, Array, Array]:
    """Map of 64x64 positions, and the coarse map and window that it is the sum of."""
    trunk = Hiera(HieraShape(3, 1, (1, 1), ()))
    torch.manual_seed(0)
    with torch.no_grad():
        trunk.pos_embed.normal_()
        trunk.pos_embed_window.normal_()
        fused = trunk.positions((64, 64)).permute(0, 3, 1, 2)
    return fused.numpy(), trunk.pos_embed.detach().numpy(), trunk.pos_embed_window.detach().numpy()


def test_positions_are_taken_apart_up_to_a_constant() -> None:
    fused, coarse, window = positions()
    found_coarse, found_window = unfused_positions(fused)
    shift = found_coarse - coarse
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :, :1, :1], shift.shape), atol=1e-5)
    np.testing.assert_allclose(found_window - window, -shift[:, :, :1, :1] + 0 * window, atol=1e-5)


def test_another_map_is_refused() -> None:
    fused, _, _ = positions()
    fused[0, 0, 3, 3] += 1
    with pytest.raises(WeightsError, match="positions"):
        unfused_positions(fused)


def graphs() -> tuple[dict[str, Array], Graph, Graph]:
    """Tensors of the tiny network, and how the published graphs would hold them."""
    tensors = {name: value.numpy() for name, value in tiny_sam2(golden("sam2_tiny")).state_dict().items()}
    encoder: dict[str, Array] = {}
    decoder: dict[str, Array] = {}
    encoder_nodes: list[tuple[str, str, tuple[str, ...]]] = []
    decoder_nodes: list[tuple[str, str, tuple[str, ...]]] = []

    def used(kind: str, node: str, value: Array) -> None:
        name = f"onnx::{kind}_{len(decoder)}"
        decoder[name] = value
        decoder_nodes.append((kind, node, ("x", name) if kind != "Expand" else (name, "x")))

    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        module = rest.rpartition(".")[0].replace(".", "/")
        matrix = name.endswith(".weight") and value.ndim == 2
        if name == "no_mem_embed":
            encoder[name] = value.transpose(0, 2, 1)
        elif part == "image_encoder" and matrix:
            output = f"/image_encoder/{module}/Transpose_output_0"
            encoder[output] = value.T
            encoder_nodes.append(("MatMul", f"/image_encoder/{module}/MatMul", ("x", output)))
        elif (part == "image_encoder" and "pos_embed" not in name) or ".conv_s" in name:
            encoder[f"model.{name}"] = value
        elif ".transformer." in name and matrix:
            used("MatMul", f"/{module}/MatMul", value.T)
        elif "mask_downscaling" in name and value.ndim == 1 and module.endswith(("1", "4")):
            kind = "Mul" if name.endswith("weight") else "Add"
            node = module.replace("/", ".")
            used(kind, f"/mask_downscaling/{node}/{kind}", value[:, None, None])
        elif "output_upscaling.1" in name:
            kind = "Mul" if name.endswith("weight") else "Add"
            used(kind, f"/output_upscaling.1/{kind}", value[:, None, None])
        elif name.endswith("no_mask_embed.weight"):
            used("Mul", "/Mul_15", value[:, :, None, None])
        elif part.startswith("sam_") and "token" not in rest.partition(".")[0]:
            decoder[name.removeprefix("sam_")] = value
    tokens = [
        tensors[f"sam_mask_decoder.{name}.weight"] for name in ("obj_score_token", "iou_token", "mask_tokens")
    ]
    used("Expand", "/Expand_9", np.concatenate(tokens)[None])
    encoder["/image_encoder/trunk/Transpose_output_0"] = positions()[0]
    encoder_nodes.append(
        ("Add", "/image_encoder/trunk/Add_1", ("x", "/image_encoder/trunk/Transpose_output_0"))
    )
    return tensors, Graph(encoder, tuple(encoder_nodes)), Graph(decoder, tuple(decoder_nodes))


def test_every_tensor_gets_its_name_and_shape_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, encoder, decoder = graphs()
    monkeypatch.setattr(sam2_onnx, "read_ort", lambda path: encoder)
    monkeypatch.setattr(sam2_onnx, "read_onnx", lambda path: decoder)
    found = load_file(convert([tmp_path / "a", tmp_path / "b"], tmp_path / "made.safetensors"))
    assert set(found) == set(tensors)
    for name, value in found.items():
        if "pos_embed" not in name:
            np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_both_formats_are_read(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="/a/b/MatMul")],
        "g",
        [info("x", onnx.TensorProto.FLOAT, [1, 2])],
        [info("y", onnx.TensorProto.FLOAT, [1, 3])],
        [onnx.numpy_helper.from_array(matrix, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "g.onnx")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "g.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    runtime.InferenceSession(str(tmp_path / "g.onnx"), options, providers=["CPUExecutionProvider"])
    for read in (read_onnx(tmp_path / "g.onnx"), read_ort(tmp_path / "g.ort")):
        assert list(read.constants) == ["w"]
        np.testing.assert_array_equal(read.constants["w"], matrix)
        assert read.nodes == (("MatMul", "/a/b/MatMul", ("x", "w")),)


def test_damaged_graphs_and_missing_packages_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (tmp_path / "bad").write_bytes(b"\xff" * 40)
    for read in (read_onnx, read_ort):
        with pytest.raises(WeightsError, match="cut short, damaged"):
            read(tmp_path / "bad")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(WeightsError, match=r"pip install samadapt\[sam2\]"):
        sam2_onnx.check_packages()
