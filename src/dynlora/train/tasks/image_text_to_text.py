"""Image-text-to-text: captions, and answers to questions on images, by a vision-language model.

The processor's chat template writes a row; without one, a row is the image's token, the prompt and
the completion. TRL's collator runs the processor on the images and texts of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.data_utils import common_prefix_length
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from dynlora.adapter_files.base_models import Source
from dynlora.errors import ConfigError
from dynlora.train.config import DataConfig
from dynlora.train.data.columns import read_captions, read_prompts, refuse_rows
from dynlora.train.data.splits import RawSplit
from dynlora.train.methods.full_modules import new_modules
from dynlora.train.pretrained import load_model, loading
from dynlora.train.task import Predictor, Split, Task
from dynlora.train.tasks.causal_lm import CAUSAL_LM, generated, longest_prompt
from dynlora.train.tasks.image_classification import (
    PROBES,
    check_images,
    content,
    pillow_processor,
    read_rgb,
    reading_an_image,
)
from dynlora.train.tasks.sft import SftJobTrainer, make_sft_trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Writer:
    """A model's processor, and the keys by which it writes rows."""

    processor: Any
    config: DataConfig

    def save_pretrained(self, folder: Path) -> None:
        """Save the processor beside the model."""
        self.processor.save_pretrained(folder)

    def write(self, prompt: str, text: str) -> tuple[str, str]:
        """Return a row's image with its prompt, which may be empty, and the text with its end."""
        tokenizer, separator = self.processor.tokenizer, self.config.separator
        if self.processor.chat_template is None:
            begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
            request = (tokenizer.bos_token if begins else "") + self.processor.image_token
            request += separator + (prompt + separator if prompt else "")
        else:
            asked = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
            said = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            turn, render = {"role": "user", "content": asked}, self.processor.apply_chat_template
            request, whole = render([turn], add_generation_prompt=True), render([turn, said])
            text = whole[common_prefix_length(request, whole) :]
        end = tokenizer.eos_token
        return request, text if end in text else text + end

    def encode(self, images: Sequence[Image.Image], requests: Sequence[str]) -> Any:
        """Return model inputs from one image per request, padded on the left."""
        how = {"padding": True, "padding_side": "left", "add_special_tokens": False}
        alone = [[image] for image in images]
        return self.processor(images=alone, text=list(requests), return_tensors="pt", **how)


def _load_processor(source: Source, config: DataConfig) -> Writer:
    with loading("processor", source):
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            source.place, **source.options
        )
        processor.image_processor = pillow_processor(source)
    processor.tokenizer = CAUSAL_LM.load_processor(source, config)
    token = vars(processor).get("image_token")
    if token not in processor.tokenizer.get_vocab():
        raise ConfigError(
            "`task: image_text_to_text` needs a model such as LLaVA, whose tokenizer knows the "
            f"image token of its processor, but got {token!r} for the {type(processor).__name__} "
            f"of {source.label}. Use such a model, or add the token to tokenizer and model."
        )
    return Writer(processor=processor, config=config)


def _pairs(
    split: RawSplit, config: DataConfig, writer: Writer, texts: Sequence[Sequence[str]], room: int
) -> list[dict[str, Any]]:
    """Return a row per image and text; image and prompt have at most `room` tokens.

    The row's `images` is a digest of the image, which several rows share.
    """
    check_images(split, config.image)
    prompts = [""] * split.table.num_rows
    if config.prompt is not None:
        prompts = read_prompts(split, config.prompt, config.separator)
    pairs, failed = [], []
    for row, value in enumerate(split.table[config.image]):
        try:
            written = [writer.write(prompts[row], text) for text in texts[row]]
            image = read_rgb(value.as_py(), split.folder)
            begin = writer.encode([image], [written[0][0]])["input_ids"].shape[1]
            if begin > room:
                raise ValueError(f"{begin} tokens of image and prompt, above the limit of {room}")
            completions = [text for _, text in written]
            ends = writer.processor(text=completions, add_special_tokens=False)["input_ids"]
        except (TemplateError, TypeError, ValueError) as error:
            failed.append((row, " ".join(str(error).split())))
            continue
        name = _digest(value)
        pairs += [
            {"images": name, "prompt": before, "completion": text, "length": begin + len(end)}
            for (before, text), end in zip(written, ends, strict=True)
        ]
    refuse_rows(
        split,
        f"every row must fit the model's {type(writer.processor).__name__} and `data.max_length`",
        failed,
        "Raise `data.max_length`, because an image cannot be cut, or shorten the prompts; texts "
        "must leave out the image's token, because the image always comes first.",
        show=str,
    )
    return pairs


def _digest(image: Any) -> str:
    return sha256(repr(content(image.as_py())).encode()).hexdigest()


def _right_answers(split: RawSplit, config: DataConfig) -> list[list[str]]:
    key = "data.text" if config.completion is None else "data.completion"
    return read_captions(split, key, config.completion or config.text)


def _read_split(
    split: RawSplit, config: DataConfig, writer: Writer, _num_labels: int | None
) -> Split:
    rows = _pairs(split, config, writer, _right_answers(split, config), config.max_length - 1)
    images = {_digest(value): value for value in split.table[config.image]}

    def decode(rows: dict[str, Any]) -> dict[str, Any]:
        if "images" not in rows:
            return rows
        values = [images[name].as_py() for name in rows["images"]]
        return rows | {"images": [[read_rgb(value, split.folder)] for value in values]}

    inputs = datasets.Dataset.from_list(rows)
    inputs.set_transform(decode)
    cut = sum(row["length"] > config.max_length for row in rows)
    return Split(inputs=inputs, cut=cut, num_labels=None)


def _load_model(source: Source, _num_labels: int | None, writer: Writer) -> Any:
    """Load the model, and run it on an image, whose tokens it may count in another way."""
    model = load_model(AutoModelForImageTextToText, source)
    inputs = writer.encode([Image.new("RGB", PROBES[0])], [writer.write("a", "b")[0]])
    with reading_an_image(model, source, "Correct the processor's files, or use another model."):
        inputs = inputs.to(model.device)
        states = model.eval().base_model(**inputs, use_cache=False).last_hidden_state
        model.get_output_embeddings()(states)  # as in TRL's loss
    return model


def _make_trainer(values: dict[str, Any], writer: Writer, **parts: Any) -> SftJobTrainer:
    length, only = writer.config.max_length, writer.config.completion_only
    collator = DataCollatorForVisionLanguageModeling(
        writer.processor, max_length=length, completion_only_loss=only
    )
    return make_sft_trainer(values, writer.processor, data_collator=collator, **parts)


def _predict(predictor: Predictor, split: RawSplit, config: DataConfig) -> Iterator[dict[str, Any]]:
    writer, room = predictor.processor, longest_prompt(predictor.model, config)
    rows = _pairs(split, config, writer, [[""]] * split.table.num_rows, room)
    for start in range(0, len(rows), predictor.batch_size):
        part = slice(start, start + predictor.batch_size)
        values = split.table[config.image][part].to_pylist()
        images = [read_rgb(value, split.folder) for value in values]
        inputs = writer.encode(images, [row["prompt"] for row in rows[part]])
        tokenizer, count = writer.processor.tokenizer, config.max_new_tokens
        for text in generated(predictor.model, tokenizer, inputs, count):
            yield {"prediction": text}


IMAGE_TEXT_TO_TEXT = Task(
    peft_type=None,
    head=new_modules,
    load_processor=_load_processor,
    read_split=_read_split,
    load_model=_load_model,
    check_model=CAUSAL_LM.check_model,
    make_trainer=_make_trainer,
    predict=_predict,
    answers=_right_answers,
)
