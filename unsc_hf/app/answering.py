"""What the models of a run say about one input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import PreTrainedModel

from ..data.dialogues import IGNORED, AnswerCollator, DialogueTransform, PromptFormat
from ..errors import UNSCError
from ..evaluation.language.answering import generate
from ..evaluation.language.knowledge import probability
from ..evaluation.language.readings import read_rows
from ..models.hooks import evaluation_mode
from ..models.loading import model_label_names
from .opening import OpenedRun

Answers = dict[str, dict[str, float]]  # confidence by answer, by model
NEW_TOKENS = 60


def is_drawable(run: OpenedRun) -> bool:
    """Whether the models read images of one channel, which one can draw."""
    return run.task == "image-classification" and getattr(run.models["unlearned"].config, "num_channels", 3) == 1


def drawing_to_image(drawing: Image.Image, processor: Any) -> Image.Image | None:
    """Dark strokes as the models know them: cut out, centred, and bright where the training images are mostly dark.

    None where nothing was drawn.
    """
    paper = Image.new("RGBA", drawing.size, "white")
    paper.alpha_composite(drawing.convert("RGBA"))
    ink = ImageOps.invert(paper.convert("L"))
    box = ink.getbbox()
    if box is None:
        return None
    cut = ink.crop(box)
    square = Image.new("L", (max(cut.size),) * 2)
    square.paste(cut, ((square.width - cut.width) // 2, (square.height - cut.height) // 2))
    return square if np.mean(processor.image_mean) < 0.5 else ImageOps.invert(square)


def _fitted(image: Image.Image, model: PreTrainedModel, processor: Any) -> Image.Image:
    """An image of the mode and size that the model reads, where its processor does not see to that."""
    image = image.convert("L" if getattr(model.config, "num_channels", 3) == 1 else "RGB")
    size = processor.size
    if getattr(processor, "do_resize", False) or "height" not in size:
        return image
    return image.resize((size["width"], size["height"]), Image.Resampling.BOX)


def classify(run: OpenedRun, given: Image.Image | str) -> Answers:
    """Each model's confidence in each class; `given` is an image or a text."""
    answers: Answers = {}
    for title, model in run.models.items():
        processor = run.processors[title]
        if isinstance(given, str):
            inputs = processor(given, truncation=True, return_tensors="pt")
        else:
            inputs = processor([_fitted(given, model, processor)], return_tensors="pt")
        with evaluation_mode(model):
            logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits[0]
        shares = torch.softmax(logits.float(), -1).tolist()
        answers[title] = dict(zip(model_label_names(model), shares, strict=True))
    return answers


def reply(run: OpenedRun, question: str) -> Answers:
    """Each language model's greedy answer, and the geometric mean of its tokens' probabilities."""
    answers: Answers = {}
    for title, model in run.models.items():
        tokenizer = run.processors[title]
        row = PromptFormat.of(run.prompt_template, tokenizer).row(question, "-")
        prompt, _ = DialogueTransform(tokenizer).encode(row)
        pad, end = AnswerCollator.of(tokenizer).pad_token_id, tokenizer.eos_token_id
        ids = generate(model, [prompt], pad, end, NEW_TOKENS, 1)[0]
        labelled = ids or [end]
        rows = [{"input_ids": prompt + labelled, "labels": [IGNORED] * len(prompt) + labelled}]
        sure = probability(read_rows(model, rows, pad, 1)[0].log_probs)
        answers[title] = {tokenizer.decode(ids, skip_special_tokens=True).strip() or "(no answer)": sure}
    return answers


def ask(run: OpenedRun, given: Image.Image | str | None) -> Answers:
    """What every model says; UNSCError where there is nothing to say it about."""
    if given is None or (isinstance(given, str) and not given.strip()):
        raise UNSCError("input: empty; draw or type something first.")
    if run.task == "text-generation":
        return reply(run, str(given))
    return classify(run, given)


def top(answers: Mapping[str, float]) -> str:
    """The answer that a model gives."""
    return max(answers, key=lambda name: answers[name])


def what_changed(run: OpenedRun, answers: Answers) -> str:
    """One sentence on the difference between the models."""
    said = {title: top(shares) for title, shares in answers.items()}
    sure = {title: f"{100 * answers[title][name]:.0f} %" for title, name in said.items()}
    now = said["unlearned"]
    if "original" not in said:
        return f"The unlearned model says {now} ({sure['unlearned']}). There is no original to compare it with."
    before, retrained = said["original"], ""
    if run.task == "text-generation":  # answers are long, and stand beside each other
        return "Nothing changed." if before == now else "The answer changed."
    if "retrained" in said:
        retrained = f" A model that never saw what was forgotten says {said['retrained']} ({sure['retrained']})."
    if before == now:
        return f"Nothing changed: {now}, {sure['original']} before and {sure['unlearned']} now.{retrained}"
    forgotten = [run.names[i] for i in run.forgotten]
    kind = f"{before} was forgotten" if before in forgotten else "The answer changed"
    return f"{kind}: {before} ({sure['original']}) before, {now} ({sure['unlearned']}) now.{retrained}"
