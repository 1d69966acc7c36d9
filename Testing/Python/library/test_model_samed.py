from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from goldens import arrays, golden, published_keys
from SAMAdaptLib.cards import find_card
from SAMAdaptLib.errors import CardError, PromptError, VolumeError, WeightsError
from SAMAdaptLib.geometry import Geometry
from SAMAdaptLib.models import build_predictor, samed
from SAMAdaptLib.models.samed import (
    Samed,
    SamedVolumePredictor,
    base_tensors,
    load_into_samed,
    load_samed,
    low_rank_places,
    published_tensors,
)
from SAMAdaptLib.models.vit import VIT_B, VIT_H, ViTShape
from SAMAdaptLib.prompts import Point, Prompts
from SAMAdaptLib.session import Session
from SAMAdaptLib.verify import verify
from SAMAdaptLib.verify.samed import golden_predictor, tiny_samed
from SAMAdaptLib.volume import IntensityWindow, Volume
from SAMAdaptLib.weights import Checkpoint, recognise

CPU = torch.device("cpu")
TINY = ViTShape(embed_dim=12, depth=2, heads=2, global_blocks=(1,), input_size=64, window=3, out_channels=16)
SIZES = {"samed_vit_b": VIT_B, "samed_vit_h": VIT_H, "samed_s_vit_b": VIT_B}
AS_STORED = np.diag([-1.0, -1.0, 1.0, 1.0])
NO_EFFECT = "k_proj.bias"  # the same for all keys, so the softmax takes it out


def full_size(name: str) -> Samed:
    with torch.device("meta"):
        return Samed(replace(SIZES[name], input_size=512), 8, name.startswith("samed_s"))


def randomised(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def network() -> Samed:
    found = golden("samed")
    return load_into_samed(tiny_samed(found), found.base_tensors(), found.tensors(None))


@pytest.fixture(scope="module")
def volume() -> Volume:
    voxels = arrays("samed")["hu_volume_xyz"].transpose(2, 1, 0)
    return Volume(voxels, Geometry(voxels.shape, AS_STORED), "CT")


def test_slices_and_volume_are_those_of_the_official_code() -> None:
    rows = verify(golden("samed").path)
    assert {row.output for row in rows} == set(arrays("samed")) - {"input_b1hw", "hu_volume_xyz"}
    for row in rows:
        assert row.passed, row


def test_samed_s_is_that_of_the_official_code(shared_data: Path) -> None:
    folder = shared_data.parent / "goldens" / "samed_s"
    if not folder.is_dir():
        pytest.skip(f"the recorded set {folder.name} is not beside the shared data")
    rows = verify(folder)
    assert len(rows) == 11
    for row in rows:
        assert row.passed, row


@pytest.mark.parametrize("name", SIZES)
def test_files_of_the_published_sizes_have_exactly_the_official_keys_and_shapes(name: str) -> None:
    named = published_tensors(full_size(name), rank=4)
    assert {key: list(tensor.shape) for key, tensor in named.items()} == published_keys(name)


@pytest.mark.parametrize("name", SIZES)
def test_what_is_taken_from_sam_has_its_official_keys(name: str) -> None:
    taken = base_tensors(full_size(name))
    sam = published_keys(name[-5:].join(("sam_", "")))
    kept = ("image_encoder.", "mask_decoder.transformer.") if "_s_" in name else ("image_encoder.",)
    assert set(taken) == {key for key in sam if key.startswith(kept)}
    resized = {key for key, tensor in taken.items() if list(tensor.shape) != sam[key]}
    positions = {
        f"image_encoder.blocks.{i}.attn.rel_pos_{a}" for i in SIZES[name].global_blocks for a in "hw"
    }
    assert resized == {"image_encoder.pos_embed", *positions}


@pytest.mark.parametrize("name", SIZES)
def test_every_norm_has_the_epsilon_of_the_paper_code(name: str) -> None:
    network = full_size(name)
    encoder = [m.eps for m in network.image_encoder.modules() if isinstance(m, nn.LayerNorm)]
    decoder = [m.eps for m in network.mask_decoder.modules() if isinstance(m, nn.LayerNorm)]
    assert set(encoder) == {1e-6}
    assert set(decoder) == {1e-5}


@pytest.mark.parametrize("name", ["samed_vit_b.synapse", "samed_vit_h.synapse", "samed_s_vit_b.synapse"])
def test_every_card_builds_its_network_from_published_files(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    card = find_card(name)
    key, _, _ = name.partition(".")
    files = {"own": published_keys(key), "base": published_keys(f"sam_{key[-5:]}")}

    def read(path: Path) -> Checkpoint:
        tensors = {name: torch.empty(shape, device="meta") for name, shape in files[path.name].items()}
        return Checkpoint(tensors, path.name * 2, path.name)

    monkeypatch.setattr(samed, "read_checkpoint", read)
    with torch.device("meta"):
        predictor = build_predictor(card, Path("own"), Path("base"), torch.device("meta"))
    assert isinstance(predictor, SamedVolumePredictor)
    assert predictor.checkpoint_sha256 == "ownown"
    assert [item.value for item in card.classes] == list(range(1, 9))
    assert card.is_automatic


def outputs_of(network: Samed) -> Tensor:
    with torch.inference_mode():
        parts = network(torch.from_numpy(arrays("samed")["input_b1hw"])[:1, 0])
        return torch.cat([part.flatten() for part in parts])


def test_every_tensor_counts() -> None:
    base, adapter = golden("samed").base_tensors(), golden("samed").tensors(None)
    network = load_into_samed(tiny_samed(golden("samed")), base, adapter)
    whole = outputs_of(network)
    unseen = set()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        before = tensor.clone()
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        if (outputs_of(network) - whole).abs().max() < 1e-4:
            unseen.add(name)
        tensor.copy_(before)
    idle = set(golden("samed").facts["tensors_with_no_effect"]["in_checkpoint"])
    assert unseen == idle | {name for name in adapter if name.endswith(NO_EFFECT)}
    assert set(base) | set(adapter) == set(network.state_dict()) | {n for n in adapter if n[:2] == "w_"}


@pytest.mark.parametrize("name", [f"w_{letter}_{index:03}" for letter in "ab" for index in range(12)])
def test_no_increment_can_be_changed_or_left_out(name: str) -> None:
    base, adapter = golden("samed").base_tensors(), golden("samed").tensors(None)
    recorded = torch.from_numpy(arrays("samed")["low_res_logits"])[:1].flatten()
    without = {**adapter, name: torch.zeros_like(adapter[name])}
    outputs = outputs_of(load_into_samed(tiny_samed(golden("samed")), base, without))
    assert (outputs[: len(recorded)] - recorded).abs().max() > 1e-3


def up_of(down: str) -> str:
    return down.replace("_a_", "_b_") if "_a_" in down else f"{down[:-1]}b"


def test_increments_stand_where_the_official_code_puts_them() -> None:
    """SAMed_s with increments folded in equals SAM's layers with hooks that add B A y to what they give."""
    attentions = {"sa": "self_attn", "cti": "cross_attn_token_to_image", "cit": "cross_attn_image_to_token"}
    decoder = {
        f"{letters}_a_{2 * layer + n:03}": f"mask_decoder.transformer.layers.{layer}.{attention}.{name}_proj"
        for letters, attention in attentions.items()
        for layer in (0, 1)
        for n, name in enumerate("qv")
    } | {f"fati_{n}a": f"mask_decoder.transformer.final_attn_token_to_image.{n}_proj" for n in "qv"}
    encoder = {
        f"w_a_{2 * block + n:03}": (f"image_encoder.blocks.{block}.attn.qkv", part)
        for block in (0, 1)
        for n, part in enumerate((slice(0, 12), slice(24, 36)))
    }
    torch.manual_seed(0)
    plain = Samed(TINY, 3, keeps_transformer=True).eval()
    state = randomised(plain)
    adapter = {name: torch.randn_like(room) for name, room in published_tensors(plain, 2).items()}
    adapter = {name: state.get(name, tensor) for name, tensor in adapter.items()}
    folded = load_into_samed(Samed(TINY, 3, keeps_transformer=True), state, adapter)
    assert set(adapter) - set(state) == {key for name in (*decoder, *encoder) for key in (name, up_of(name))}

    def add(down: str, columns: slice) -> None:
        place = decoder[down] if down in decoder else encoder[down][0]

        def hook(_module: nn.Module, given: tuple[Tensor], result: Tensor) -> Tensor:
            increased = result.clone()
            increased[..., columns] += given[0] @ adapter[down].T @ adapter[up_of(down)].T
            return increased

        plain.get_submodule(place).register_forward_hook(hook)

    for down in decoder:
        add(down, slice(None))
    for down, (_, columns) in encoder.items():
        add(down, columns)
    slices = torch.rand(1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(folded(slices), plain(slices), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "RPI"])
@pytest.mark.parametrize("axes", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, 1)])
def test_the_network_sees_a_patient_the_way_it_was_trained(
    network: Samed, codes: str, axes: tuple[int, int, int]
) -> None:
    """However a volume is stored, its picture is that of an array whose axes run as the card says."""
    as_trained = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)  # K, J, I along the card's axes
    runs = [1 if code in "RAS" else -1 for code in codes]  # of I, J, K in RAS
    flips = tuple(slice(None, None, -1) if runs[n] != axes[n] else slice(None) for n in (2, 1, 0))
    stored = as_trained[flips]
    card = replace(golden_predictor(network, golden("samed")).card, options={"file_axes": codes})
    predictor = SamedVolumePredictor(network, card, "", CPU)
    seen: dict[int, np.ndarray] = {}

    def segment(picture: np.ndarray) -> tuple[np.ndarray, float]:
        seen[len(seen)] = picture
        return picture.astype(np.uint8), 1.0

    predictor.segment = segment  # type: ignore[method-assign,assignment]
    grid = Geometry(stored.shape, np.diag([*map(float, axes), 1.0]))
    predictor.set_volume(Volume(stored, grid), "K", IntensityWindow(0, 60))
    labels = np.zeros(stored.shape, np.uint8)
    for result in predictor.predict(Prompts()):
        grid.plane("K", result.index).insert(labels, result.labels)
    np.testing.assert_array_equal(labels, stored)
    for k, picture in seen.items():
        np.testing.assert_array_equal(picture, as_trained[:: -1 if runs[2] != axes[2] else 1][k])


def test_other_axes_are_a_mirrored_patient_to_the_network(network: Samed, volume: Volume) -> None:
    card = golden_predictor(network, golden("samed")).card
    other = replace(card, options={**card.options, "file_axes": "RPS"})
    results = []
    for each in (card, other):
        predictor = SamedVolumePredictor(network, each, "", CPU)
        predictor.set_volume(volume, "K", IntensityWindow(0, 1))
        results.append(next(iter(predictor.predict(Prompts(), range(2, 3)))))
    assert results[0].index == results[1].index == 2
    assert (results[0].labels != results[1].labels).any()


def test_a_session_segments_the_whole_volume_by_itself(network: Samed, volume: Volume) -> None:
    session = Session(volume, golden_predictor(network, golden("samed")), axis="K")
    expected = arrays("samed")["prediction_zyx"]
    session.propagate(range(1, 3))
    np.testing.assert_array_equal(session.labels[1:3], expected[1:3])
    assert not session.labels[0].any()
    assert list(session.predictor.predict(Prompts(), range(2, 2))) == []
    session.propagate()
    np.testing.assert_array_equal(session.labels, expected)
    assert set(session.confidence) == set(range(5))
    assert all(0.25 < value <= 1 for value in session.confidence.values())
    again = Session.replay(session.record(), volume, golden_predictor(network, golden("samed")))
    np.testing.assert_array_equal(again.labels, expected)


def test_a_session_refuses_prompts_and_says_which_models_take_them(network: Samed, volume: Volume) -> None:
    session = Session(volume, golden_predictor(network, golden("samed")), axis="K")
    with pytest.raises(PromptError, match=r"no prompts, but a point was placed.*sam_med2d_vit_b\."):
        session.add(Point(tuple(volume.geometry.centre_ras)))
    assert not session.mask.any()


def test_the_window_is_the_cards_else_the_sessions(network: Samed, volume: Volume) -> None:
    card = golden_predictor(network, golden("samed")).card
    free = replace(card, options={name: value for name, value in card.options.items() if name != "window"})
    labels = []
    for each, window in ((card, (0, 1)), (free, (-125, 275)), (free, (0, 1))):
        predictor = SamedVolumePredictor(network, each, "", CPU)
        predictor.set_volume(volume, "K", IntensityWindow(*window))
        labels.append(np.stack([result.labels for result in predictor.predict(Prompts())]))
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()


def test_colour_and_a_missing_volume_are_refused(network: Samed) -> None:
    predictor = golden_predictor(network, golden("samed"))
    with pytest.raises(VolumeError, match="must be set"):
        next(iter(predictor.predict(Prompts())))
    colour = Volume(np.zeros((1, 4, 4, 3), np.uint8), Geometry((1, 4, 4), np.eye(4)))
    with pytest.raises(VolumeError, match="takes grey volumes"):
        predictor.set_volume(colour, "K", IntensityWindow(0, 255))


def test_files_of_other_networks_are_refused() -> None:
    base, adapter = golden("samed").base_tensors(), golden("samed").tensors(None)
    bare = tiny_samed(golden("samed"))
    with pytest.raises(WeightsError, match=r"A SAMed file was wanted, but the file lacks w_a_000"):
        load_into_samed(bare, base, base)
    with pytest.raises(
        WeightsError, match=r"SAM \(the base of SAMed\) was wanted.*like a SAMed adapter file"
    ):
        load_into_samed(bare, adapter, adapter)
    with pytest.raises(WeightsError, match="holds an encoder of 32 channels"):
        load_samed(base, adapter)
    small = {**adapter, "fati_qa": torch.zeros(4, 64)}
    with pytest.raises(WeightsError, match=r"also holds fati_qa; it looks like a SAMed_s adapter file"):
        load_into_samed(bare, base, small)
    fewer = {name: tensor for name, tensor in adapter.items() if name != "w_b_011"}
    with pytest.raises(WeightsError, match=r"lacks w_b_011;"):
        load_into_samed(bare, base, fewer)


def test_published_files_are_recognised() -> None:
    for name, title in {
        "samed_vit_b": "a SAMed adapter file, ViT-B",
        "samed_vit_h": "a SAMed adapter file, ViT-H",
        "samed_s_vit_b": "a SAMed_s adapter file, ViT-B",
        "sam_vit_h": "SAM or MedSAM, ViT-H",
        "ma_sam_vit_h_nc12": "a MA-SAM adapter file, ViT-H",
    }.items():
        tensors = {key: torch.empty(shape, device="meta") for key, shape in published_keys(name).items()}
        assert recognise(tensors) == title


def test_a_card_without_a_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="must name the SAM model"):
        build_predictor(find_card("samed_vit_b.synapse"), tmp_path / "x.pth", None, CPU)


def test_there_are_two_places_per_block_and_fourteen_in_the_decoder() -> None:
    with torch.device("meta"):
        assert len(list(low_rank_places(Samed(TINY, 3)))) == 4
        assert len(list(low_rank_places(Samed(TINY, 3, keeps_transformer=True)))) == 4 + 14
