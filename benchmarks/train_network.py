"""Train one of the published paper's networks on small images, on all classes or without some.

    python benchmarks/train_network.py --network resnet18 --data FOLDER --output_dir OUT --seed 0 [--without NAME ...]

SGD with momentum and one cycle of the learning rate; images are shifted by up to four pixels, and mirrored where they
have colours. On a GPU the steps run in bfloat16 autocast, channels last. A finished model is kept, so a second call
does nothing. `training.json` says how long the training took.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from unsc_hf.comparison.references.images import fitting_processor
from unsc_hf.comparison.references.networks import NETWORKS, SmallNetwork, SmallNetworkConfig
from unsc_hf.data.inputs import open_image

SHIFT, RATE, DECAY = 4, 0.1, 5e-4


def pixels(rows: Dataset, processor: Any) -> Tensor:
    """Images as (rows, channels, side, side), as the processor gives them to the model."""
    parts = [
        processor([open_image(image) for image in rows[i : i + 1000]["image"]], return_tensors="pt")["pixel_values"]
        for i in range(0, len(rows), 1000)
    ]
    return torch.cat(parts)


def varied(images: Tensor, mirror: bool) -> Tensor:
    """Each image shifted by up to `SHIFT` pixels, its border repeated, and every second one mirrored."""
    side, device = images.shape[-1], images.device
    padded = nn.functional.pad(images, (SHIFT,) * 4, mode="replicate")
    corner = torch.randint(0, 2 * SHIFT + 1, (len(images), 2), device=device)
    span = torch.arange(side, device=device)
    rows, columns = corner[:, :1] + span, corner[:, 1:] + span
    if mirror:
        columns = columns.where(torch.rand(len(images), 1, device=device) < 0.5, columns.flip(1))
    number = torch.arange(len(images), device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def train(model: SmallNetwork, images: Tensor, labels: Tensor, epochs: int, batch: int) -> float:
    """Train where the images are; seconds."""
    device, mirror = images.device, images.shape[1] > 1
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.to(device, memory_format=torch.channels_last if on_gpu else torch.preserve_format).train()
    started = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), device=device)
        for i in range(len(images) // batch):
            taken = order[i * batch : (i + 1) * batch]
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = model(varied(images[taken], mirror), labels=labels[taken]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}, loss {float(loss):.3f}", flush=True)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def accuracy(model: SmallNetwork, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = [(model(part.to(model.device)).logits.argmax(1).cpu() == of).sum() for part, of in
             zip(images.split(1000), labels.split(1000), strict=True)]  # fmt: skip
    return float(sum(right)) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", choices=list(NETWORKS), required=True)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rows", type=int, help="train on no more than the first so many")
    parser.add_argument("--without", nargs="*", default=[], help="names of classes to leave out")
    options = parser.parse_args()
    if options.output_dir.is_dir():
        return
    rows, test = (Dataset.from_parquet(str(Path(options.data) / f"{part}.parquet")) for part in ("train", "test"))
    names = rows.features["label"].names
    dropped = [names.index(name) for name in options.without]
    rows, test = (part.select(np.flatnonzero(~np.isin(np.array(part["label"][:]), dropped))) for part in (rows, test))
    rows = rows.select(range(min(len(rows), options.rows or len(rows))))
    processor, channels = fitting_processor(rows, patch_size=1)
    torch.manual_seed(options.seed)
    config = SmallNetworkConfig(
        options.network, channels, processor.size["height"], id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    model, device = SmallNetwork(config), "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = pixels(rows, processor).to(device), torch.tensor(rows["label"][:], device=device)
    seconds = train(model, images, labels, options.epochs, options.batch)
    right = accuracy(model, pixels(test, processor), torch.tensor(test["label"][:]))
    print(f"{options.network}: {right:.2%} of {len(test)} test rows in {seconds:.0f} s")
    unfinished = options.output_dir.with_name(f"{options.output_dir.name}-unfinished")  # renamed when it is whole
    model.to(memory_format=torch.contiguous_format).save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    written = {"seconds": seconds, "rows": len(rows), "test_accuracy": right}
    (unfinished / "training.json").write_text(json.dumps(written), encoding="utf-8")
    os.replace(unfinished, options.output_dir)


if __name__ == "__main__":
    main()
