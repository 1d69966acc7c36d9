"""The training on pictures of discs and blocks, with a network small enough to train in seconds."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from SAMAdaptLib.errors import JobError
from SAMAdaptLib.models.mobile_sam import MobileSam
from SAMAdaptLib.models.tiny_vit import TinyViT, TinyViTConfig
from SAMAdaptLib.training.augment import frame_augmented, frame_plain
from SAMAdaptLib.training.cache import TRAIN, VALIDATION, FeatureCache, build_cache, list_records
from SAMAdaptLib.training.config import TrainingConfig, read_config
from SAMAdaptLib.training.engine import Trainer, rate_factor, trained_parameters
from SAMAdaptLib.training.export import write_weights
from SAMAdaptLib.training.losses import (
    ambiguous_loss,
    best_of,
    distillation_loss,
    intersection_over_union,
    mask_loss,
)
from SAMAdaptLib.training.pictures import (
    Item,
    LabelledPicture,
    choose_sources,
    clean_labels,
    read_index,
    split_by_patient,
    structures,
)
from SAMAdaptLib.training.simulate import dice

SIZE = 64
SMALL = TinyViTConfig((8, 8, 16, 16), (1, 1, 1, 1), (1, 2, 2, 2), (7, 4, 4, 4), out_channels=32)


def disc(shape: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An index of two sets, discs and blocks, eight patients with one picture each."""
    rng = np.random.default_rng(0)
    rows = []
    for dataset in ("discs", "blocks"):
        for patient in range(8):
            labels = np.zeros((40, 48), np.uint8)
            x, y = rng.uniform(14, 34), rng.uniform(14, 26)
            labels[disc(labels.shape, x, y, rng.uniform(7, 11))] = 1
            if dataset == "blocks":
                labels[2:9, 2:12] = 2
            grey = np.where(labels == 1, 200, 60) + rng.normal(0, 5, labels.shape)
            stem = f"{dataset}_{patient}.png"
            Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(tmp_path / stem)
            Image.fromarray(labels).save(tmp_path / f"label_{stem}")
            rows.append([dataset, "MR", f"p{patient}", stem, f"label_{stem}"])
    with (tmp_path / "index.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["dataset", "modality", "group", "image", "label"], *rows])
    return tmp_path / "index.csv"


@pytest.fixture
def config(data: Path, tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(
        base=tmp_path / "none",
        data=data,
        cache=tmp_path / "cache",
        output=tmp_path / "out",
        seed=5,
        threads=1,
        input_size=SIZE,
        pictures_per_set=8,
        records_per_set=8,
        cycles=[6],
        warmup=2,
        rate=1e-3,
        encoder_rate=1e-3,
        pictures_per_step=2,
        prompts_per_picture=1,
        later_clicks=3,
        validate_every=2,
        averaging=0.5,
        bfloat16=False,
    )


def small_model() -> MobileSam:
    torch.manual_seed(1)
    return MobileSam(SIZE, SMALL).eval()


def quiet(_: str) -> None:
    pass


def test_unknown_names_in_the_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: a\ndata: b\ncache: c\noutput: d\nstep: 3\n")
    with pytest.raises(JobError, match=r"do not exist \(step\)"):
        read_config(file)
    file.write_text("base: a\ndata: b\n")
    with pytest.raises(JobError, match="must say cache, output"):
        read_config(file)
    with pytest.raises(JobError, match=r"default_model\.yaml"):
        read_config(tmp_path / "none.yaml")


def test_paths_start_at_the_file_and_variables_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMEWHERE", str(tmp_path / "far"))
    file = tmp_path / "run.yaml"
    file.write_text(
        "base: a.pt\ndata: $SOMEWHERE/index.csv\ncache: c\noutput: d\nvalidation: [v]\ncycles: [3]\n"
    )
    config = read_config(file)
    assert config.base == tmp_path / "a.pt"
    assert config.data == tmp_path / "far" / "index.csv"
    assert config.validation == [tmp_path / "v"]
    assert config.steps == 3


def test_the_shipped_training_file_is_read() -> None:
    config = read_config(Path(__file__).parents[3] / "Resources" / "Training" / "default_model.yaml")
    assert config.input_size == 512


def test_missing_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="index of training data"):
        read_index(tmp_path / "index.csv")


def items(groups: list[str], dataset: str = "a") -> list[Item]:
    return [Item(dataset, "CT", g, Path(f"{g}_{n}.png"), Path("l.png")) for n, g in enumerate(groups)]


def test_no_patient_is_on_both_sides() -> None:
    groups = [f"g{n % 10}" for n in range(50)]
    train, held = split_by_patient([*items(groups), *items(["x", "y"], "b")], 0.2, 3)
    assert not {i.group for i in train["a"]} & {i.group for i in held["a"]}
    assert len({i.group for i in held["a"]}) == 2
    assert len(train["a"]) + len(held["a"]) == 50
    assert held["b"] == []
    assert len(train["b"]) == 2


def test_few_pictures_of_many_patients_come_from_different_ones() -> None:
    train, _ = split_by_patient(items(["g1"] * 20 + ["g2", "g3"] + ["g4"] * 5), 0.01, 0)
    assert len({s.item.group for s in choose_sources(train["a"], 3)}) == 3


def test_volumes_are_drawn_from_until_there_are_enough() -> None:
    volume = Item("v", "MR", "g", Path("v.nii.gz"), Path("l.nii.gz"))
    assert [s.draw for s in choose_sources([volume], 4)] == [0, 1, 2, 3]
    assert len(choose_sources(items(["g1", "g2"]), 4)) == 2


def test_wrong_rims_between_classes_are_removed_and_classes_stay() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[5:20, 5:35] = 4
    labels[4, 5:35] = 1  # what interpolation between 0 and 4 leaves
    labels[25:30, 5:10] = 1
    labels[25:30, 15:20] = 2
    labels[25:30, 25:30] = 3
    cleaned = clean_labels(labels)
    assert np.unique(cleaned[:20]).tolist() == [0, 4]
    assert Counter(cleaned[25:30].ravel().tolist())[2] >= 21
    one_class = (labels == 4).astype(np.uint8)
    assert clean_labels(one_class) is one_class


def test_structures_are_classes_and_their_larger_parts() -> None:
    labels = np.zeros((30, 30), np.uint8)
    labels[2:8, 2:8] = 1
    labels[20:25, 20:25] = 1
    labels[15, 15] = 1
    labels[2:4, 20:23] = 2  # too small
    sizes = [int(mask.sum()) for mask in structures(labels)]
    assert sizes == [36 + 25 + 1, 36, 25]


def test_plain_frame_puts_edges_where_the_network_sees_them() -> None:
    picture = np.zeros((32, 16), np.uint8)
    picture[8:] = 200
    framed = frame_plain(LabelledPicture(picture, (picture > 0).astype(np.uint8)), SIZE)
    assert framed.picture.shape == (64, 32)
    # The edge lies between rows 7 and 8 of 32, that is between 15 and 16 of 64 and 7 and 8 of the labels.
    assert framed.picture[15, 3] < 100 < framed.picture[16, 3]
    assert framed.labels[:, 3].tolist() == [0] * 8 + [1] * 24
    assert framed.labels[:, 16:].sum() == 0


def test_augmentation_moves_picture_and_labels_together() -> None:
    truth = disc((60, 80), 40, 30, 18)
    source = LabelledPicture(np.where(truth, 210, 40).astype(np.uint8), truth.astype(np.uint8))
    places = []
    agreement = []
    for seed in range(20):
        framed = frame_augmented(source, 128, np.random.default_rng(seed))
        rows, columns = framed.picture.shape
        assert max(rows, columns) == 128
        labels = framed.labels[: rows // 2, : columns // 2] > 0
        grey = framed.picture[: rows // 2 * 2, : columns // 2 * 2]
        coarse = grey.reshape(rows // 2, 2, columns // 2, 2).mean((1, 3))
        bright = coarse > (coarse.min() + coarse.max()) / 2
        agreement.append(max(dice(labels, bright), dice(labels, ~bright)))
        places.append((*np.argwhere(labels).mean(0), labels.mean()))
    # A picture turned to its negative is filled with the disc's grey: a few disagree.
    assert np.percentile(agreement, 20) > 0.9
    assert np.std(places, axis=0).min() > 0.02


def test_same_seed_gives_the_same_picture() -> None:
    source = LabelledPicture(np.arange(64, dtype=np.uint8).reshape(8, 8), np.ones((8, 8), np.uint8))
    a, b = (frame_augmented(source, SIZE, np.random.default_rng(9)) for _ in range(2))
    assert np.array_equal(a.picture, b.picture)


def test_mask_loss_is_dice_plus_focal() -> None:
    truth = torch.zeros(1, 1, 2, 2)
    truth[..., 0, 0] = 1
    logits = torch.zeros(1, 1, 2, 2)
    focal = 0.25 * np.log(2)
    overlap = 1 - (2 * 0.5 + 1) / (2 + 1 + 1)
    assert mask_loss(logits, truth).item() == pytest.approx(8 * focal + overlap, abs=1e-5)
    assert mask_loss(40 * truth - 20, truth).item() == pytest.approx(0, abs=1e-5)


def test_only_the_best_of_several_masks_is_trained_but_every_score() -> None:
    truth = torch.zeros(1, 1, 8, 8)
    truth[..., :4] = 1
    logits = torch.cat([40 * truth - 20, 20 - 40 * truth], dim=1).requires_grad_()
    scores = torch.tensor([[1.0, 0.5]], requires_grad=True)
    loss = ambiguous_loss(logits, scores, truth)
    assert loss.item() == pytest.approx(0.5**2 / 2, abs=1e-4)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].abs().max() == 0
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.0, 0.5]]


def test_overlap_and_choice_of_masks() -> None:
    truth = torch.zeros(1, 1, 4, 4)
    truth[..., :2] = 1
    logits = torch.stack([torch.ones(4, 4), truth[0, 0] - 0.5])[None]
    assert intersection_over_union(logits, truth).tolist() == [[0.5, 1.0]]
    assert torch.equal(best_of(logits, torch.tensor([[0.1, 0.9]])), logits[:, 1:])


def test_distillation_is_zero_at_the_teacher_and_follows_the_weights() -> None:
    teacher = torch.randn(2, 1, 8, 8)
    weights = torch.tensor([1.0, 0.0])
    assert distillation_loss(teacher, teacher, weights).item() == pytest.approx(0, abs=1e-6)
    moved = teacher.clone()
    moved[1] += 5
    assert distillation_loss(moved, teacher, weights).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(moved, teacher, 1 - weights).item() > 0.1


def test_rate_rises_and_falls(config: TrainingConfig) -> None:
    plan = replace(config, warmup=10, cycles=[100])
    factors = [rate_factor(step, plan) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9] == 1.0
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.02 + 0.98 * 0.5)
    assert factors[99] < 0.03
    twice = [rate_factor(step, replace(plan, cycles=[100, 50])) for step in range(150)]
    assert twice[:100] == factors
    assert twice[100] == 0.1
    assert twice[130] == pytest.approx(0.02 + 0.98 * 0.5)
    assert replace(plan, cycles=[100, 50]).steps == 150


def test_records_hold_back_patients_and_repeat_small_sets(config: TrainingConfig) -> None:
    records = list_records(replace(config, records_per_set=20))
    held = {r.name.split("/")[0] for r in records if r.split == VALIDATION}
    train = [r.name for r in records if r.split == TRAIN]
    assert len(held) == 2
    assert not held & {name.split("/")[0] for name in train}
    assert len(train) == len(set(train)) == 40
    first = next(r for r in records if r.name == train[-1]).make()
    again = next(r for r in list_records(replace(config, records_per_set=20)) if r.name == train[-1]).make()
    assert np.array_equal(first.picture, again.picture)


def test_cache_goes_on_after_a_kill(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    lower = TinyViT.lower

    def counted(self: TinyViT, x: torch.Tensor) -> torch.Tensor:
        if len(calls) == 5:
            calls.append(0)
            raise KeyboardInterrupt
        calls.append(1)
        return lower(self, x)

    monkeypatch.setattr(TinyViT, "lower", counted)
    with pytest.raises(KeyboardInterrupt):
        build_cache(config, small_model(), "base", quiet)
    cache = build_cache(config, small_model(), "base", quiet)
    assert sum(calls) == len(cache.records)
    with torch.inference_mode():
        model = small_model()
        expected = model.image_encoder.upper(cache.features([3]))
    torch.testing.assert_close(cache.base_embeddings([3]), expected, atol=0.02, rtol=0.02)
    build_cache(config, small_model(), "base", quiet)
    assert sum(calls) == len(cache.records)
    build_cache(config, small_model(), "another base", quiet)
    assert sum(calls) == 2 * len(cache.records)


@pytest.fixture
def cache(config: TrainingConfig) -> FeatureCache:
    return build_cache(config, small_model(), "base", quiet)


def test_frozen_and_trained_parts(config: TrainingConfig) -> None:
    model = small_model()
    names = trained_parameters(model, config)
    assert "mask_decoder.iou_token.weight" in names
    assert "image_encoder.layers.3.blocks.0.attn.qkv.weight" in names
    assert not any(name.startswith("image_encoder.layers.2") for name in names)
    assert all(p.requires_grad == (name in names) for name, p in model.named_parameters())
    frozen = trained_parameters(model, replace(config, encoder_rate=0.0))
    assert not any(name.startswith("image_encoder") for name in frozen)


def test_killed_run_goes_on_to_the_same_weights(config: TrainingConfig, cache: FeatureCache) -> None:
    whole = Trainer(config, small_model(), cache, quiet)
    whole.train()

    def kill(text: str) -> None:
        if text.startswith("step 4:"):
            raise KeyboardInterrupt

    split = replace(config, output=config.output.with_name("split"))
    with pytest.raises(KeyboardInterrupt):
        Trainer(split, small_model(), cache, kill).train()
    resumed = Trainer(split, small_model(), cache, quiet)
    resumed.train()
    assert resumed.progress.step == 6
    assert [row["step"] for row in resumed.progress.log] == [2, 4, 6]
    assert resumed.progress.log == whole.progress.log
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name]), name
    assert (split.output / "curves.png").stat().st_size > 1000
    assert (split.output / "log.csv").read_text().count("\n") == 4


def test_blends_lie_between_base_and_average(
    config: TrainingConfig, cache: FeatureCache, tmp_path: Path
) -> None:
    trainer = Trainer(replace(config, cycles=[2]), small_model(), cache, quiet)
    trainer.train()
    base, none, half, full = (small_model(), *(trainer.blended(share) for share in (0.0, 0.5, 1.0)))
    name = "mask_decoder.iou_token.weight"
    values = [model.state_dict()[name] for model in (base, none, half, full)]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[3], trainer.average[name])
    torch.testing.assert_close(values[2], (values[0] + values[3]) / 2)
    assert not torch.equal(values[0], values[3])

    path = tmp_path / "net.safetensors"
    write_weights(full, {"seed": "5"}, path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "seed": "5"}
        assert set(file.keys()) == set(base.state_dict())
        assert file.get_tensor("image_encoder.neck.0.weight").dtype == torch.float16
        assert file.get_tensor("image_encoder.neck.1.weight").dtype == torch.float32
