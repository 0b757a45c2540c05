"""Tasks with one label a text: which rows they can read."""

from pathlib import Path

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from dynlora.errors import ConfigError, DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.splits import RawSplit
from dynlora.train.pretrained import check_length
from dynlora.train.tasks.sequence import encode
from tests.language import save_language_model
from tests.models import bare_llama


def test_a_text_without_any_token_is_refused_by_its_row(tmp_path: Path) -> None:
    # This tokenizer puts nothing around a text.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_language_model(tmp_path / "model"))
    table = pa.table({"text": ["red", "", "red cat", ""]})
    rows = RawSplit(name="training", source="here", table=table, rows=range(4))
    with pytest.raises(DataError, match=r"makes tokens, but 2 of 4 .* '' in row 1, '' in row 3"):
        encode(rows, DataConfig(name="d", text="text", max_length=8), tokenizer)


def test_rows_longer_than_a_model_has_positions_for_are_refused() -> None:
    model = bare_llama()
    limit = model.config.max_position_embeddings
    check_length(model, DataConfig(name="d", max_length=limit))
    with pytest.raises(ConfigError, match=f"at most {limit}, the longest input of a Llama"):
        check_length(model, DataConfig(name="d", max_length=limit + 1))
