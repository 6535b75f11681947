"""What the trainer refuses or says of rows that cannot show what is claimed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers.models import learned, make_vit
from helpers.rows import tensor_dataset
from helpers.training import Data, make_trainer, quiet_config

from unsc_hf import ActivationStatistics, UNSCError, UNSCTrainer, serve_request, split_dataset
from unsc_hf.trainer.certify import TRAINING_ROWS

NAMES = ["cat", "dog", "frog"]


def test_rows_on_both_sides_are_refused_or_dropped(low_rank_data: Data, tmp_path: Path) -> None:
    forget, retain = low_rank_data
    also_kept = tensor_dataset(forget[:3]["pixel_values"], [0, 1, 1], NAMES).cast(retain.features)
    data = forget, concatenate_datasets([retain, also_kept])
    with pytest.raises(UNSCError, match="3 of 27 rows to keep are also among the 40 rows to forget.*drop_overlap"):
        make_trainer(make_vit(), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trainer = make_trainer(make_vit(), data, tmp_path, drop_overlap=True)
    rows = trainer.rows
    assert len(rows.retain) + len(rows.retain_held_out) + len(rows.certificate) == 24


def test_a_request_in_sequence_reads_no_row_that_it_forgets(low_rank_data: Data, tmp_path: Path) -> None:
    forget, retain = low_rank_data
    also_kept = tensor_dataset(forget[:3]["pixel_values"], [0, 1, 1], NAMES).cast(retain.features)
    both, folder = concatenate_datasets([retain, also_kept]), tmp_path / "statistics"
    args = quiet_config(tmp_path, max_steps=2, max_leak=None, rows_per_direction=None)
    with pytest.raises(UNSCError, match="3 of 27 rows to keep are also among the 40"):
        serve_request(make_vit(), folder, args, forget, both)
    assert not folder.exists()
    args.drop_overlap, model = True, make_vit()
    serve_request(model, folder, args, forget, both)
    stored = ActivationStatistics.from_pretrained(folder, model)
    assert sum(moments["classifier"].rows for moments in stored.moments.values()) == 24


def test_copies_of_training_rows_do_not_count_as_held_out(
    separable_data: Callable[[int], Dataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = separable_data(20)
    plain = make_trainer(make_vit(), split_dataset(rows, forget_classes=[2]), tmp_path)
    assert plain.rows.caveats == ()
    assert plain.rows.holds_out
    some = concatenate_datasets([rows, rows.select([*range(10), *range(20, 30), *range(40, 50)])])
    trainer = make_trainer(make_vit(), split_dataset(some, forget_classes=[2]), tmp_path, learning_rate=1e-3)
    read = trainer.rows
    assert len(read.caveats) == 3
    for trained, held_out in (
        (read.forget, read.forget_validation), (read.retain, read.retain_held_out), (read.retain, read.certificate),
    ):  # fmt: skip
        seen = {tuple(row["pixel_values"].flatten().tolist()) for row in trained}
        assert len(held_out) > 0
        assert not any(tuple(row["pixel_values"].flatten().tolist()) in seen for row in held_out)
    trainer.train()
    assert trainer.certify().held_out
    assert trainer.certify().rows == len(read.certificate)
    assert all(caveat in caplog.text for caveat in read.caveats)
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert all(caveat in card for caveat in read.caveats)


def test_where_all_held_out_rows_are_copies_nothing_was_held_out(low_rank_data: Data, tmp_path: Path) -> None:
    trainer = make_trainer(make_vit(), low_rank_data, tmp_path, learning_rate=1e-3)  # retained rows repeat four images
    parts = {"held-out rows to keep": trainer.rows.retain_held_out, "rows of the certificate": trainer.rows.certificate}
    assert trainer.rows.caveats == tuple(
        f"{len(part)} of {len(part)} {name} are copies of training rows, so they do not count; no other was held out."
        for name, part in parts.items()
    )
    trainer.train()
    assert trainer.certify().held_out is False


def test_rows_to_keep_that_hardly_differ_are_refused(separable_data: Callable[[int], Dataset], tmp_path: Path) -> None:
    train = separable_data(20)
    forget = split_dataset(train, forget_classes=["frog"]).forget
    model, image = learned(train), torch.zeros(3, 8, 8)
    for noise, refused in ((0.0, True), (1e-6, True), (1.0, False)):
        retain = tensor_dataset(
            torch.stack([image + noise * torch.randn(3, 8, 8) for _ in range(40)]), [0, 1] * 20, NAMES
        )
        trainer = make_trainer(model, (forget, retain.cast(forget.features)), tmp_path)
        if refused:
            with pytest.raises(UNSCError, match="retain_dataset: the model's outputs on 32 of its rows differ by"):
                trainer.train()
        else:
            trainer.prepare_unlearning()


def test_evaluation_rows_called_forget_are_of_the_forgotten_classes(
    separable_data: Callable[[int], Dataset], tmp_path: Path
) -> None:
    train, test = separable_data(20), separable_data(5)
    data, right = split_dataset(train, forget_classes=["frog"]), split_dataset(test, forget_classes=["frog"])
    for wrong, count in ((right.retain, "10 of 10"), (test, "10 of 15")):
        with pytest.raises(UNSCError, match=f"eval_dataset: {count} rows of 'forget' are of other classes.*'cat'"):
            make_trainer(make_vit(), data, tmp_path / "out", eval_dataset={"forget": wrong, "retain": right.retain})
    trainer = make_trainer(make_vit(), data, tmp_path, eval_dataset={"forget": right.forget, "other": test})
    assert {"eval_forget_accuracy", "eval_other_accuracy"} <= set(trainer.evaluate())


def test_a_class_that_was_never_recognised_is_nothing_to_forget(
    separable_data: Callable[[int], Dataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = separable_data(20)
    taught = tensor_dataset(train[:]["pixel_values"], [label % 2 for label in train["label"][:].tolist()], NAMES[:2])
    sentence = (
        "Before the first step the forget accuracy was 0 already, and the target is 0: there was nothing to forget."
    )
    for model, known in ((learned(train), True), (learned(taught), False)):
        trainer = make_trainer(model, split_dataset(train, forget_classes=["frog"]), tmp_path)
        assert trainer.caveats() == [TRAINING_ROWS]  # nothing was measured yet
        trainer.train()
        assert trainer.caveats() == [TRAINING_ROWS, *([] if known else [sentence])]
        assert (sentence in caplog.text) is not known


def test_an_output_folder_below_a_file_is_one_line(low_rank_data: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UNSCError, match=r"output_dir: .*file/out cannot be made, .*/file is a file; choose another"):
        make_trainer(make_vit(), low_rank_data, tmp_path / "file" / "out")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3.7e37, -1e7])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_damaged_heads_are_named(part: str, value: float, low_rank_data: Data, tmp_path: Path) -> None:
    model = make_vit()
    with torch.no_grad():
        getattr(model.classifier, part).view(-1)[-1] = value
    with pytest.raises(UNSCError, match=f"model: classifier.{part} holds the value .*weights are damaged"):
        UNSCTrainer(model, quiet_config(tmp_path), *low_rank_data)
