"""Which components are multiplied by 0, for each layout in which layers see a batch."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora.adapters.layers import find_lora_layers
from dynlora.errors import LayerError
from dynlora.input_adaptive.complexity import ComponentMask


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.conv = nn.Conv2d(3, 3, 1)


def layer_on(name):
    return find_lora_layers(get_peft_model(Net(), LoraConfig(r=4, target_modules=[name])), None)[0]


EXAMPLES = torch.tensor([0, 3])
TOKENS = torch.tensor([[0, 1, 2], [3, 0, 3]])


@pytest.mark.parametrize(
    ("name", "quarter", "shape"),
    [
        ("linear", EXAMPLES, (2, 4)),
        ("linear", EXAMPLES, (2, 3, 4)),
        ("linear", EXAMPLES, (2, 5, 6, 4)),
        ("linear", EXAMPLES, (6, 4)),
        ("conv", EXAMPLES, (2, 4, 5, 6)),
        ("linear", TOKENS, (2, 3, 4)),
        ("linear", TOKENS, (6, 4)),
    ],
)
def test_each_row_keeps_the_first_components_of_its_own_quarter(name, quarter, shape):
    mask = ComponentMask(quarter=quarter, rows=(2, 3))
    output = torch.ones(shape)
    kept = output * mask.of(layer_on(name), output)
    rows = kept.movedim(1, -1) if name == "conv" else kept
    per_row = quarter if quarter.dim() == 2 else quarter[:, None].expand(2, 3)
    for row, values in enumerate(rows.reshape(6 if shape[0] == 6 else 2, -1, 4)):
        for column, components in enumerate(values):
            if shape[0] == 6:
                own = per_row.flatten()[row]
            else:
                own = quarter[row] if quarter.dim() == 1 else quarter[row, column]
            used = int(own) + 1  # of 4 components, a quarter is one
            assert components.tolist() == [1.0] * used + [0.0] * (4 - used)


@pytest.mark.parametrize(
    ("name", "quarter", "shape"),
    [
        ("linear", TOKENS, (2, 4)),
        ("linear", TOKENS, (2, 1, 4)),
        ("linear", TOKENS, (5, 4)),
        ("linear", TOKENS, (2, 3, 7, 4)),
        ("linear", EXAMPLES, (1, 3, 4)),
        ("conv", TOKENS, (2, 4, 3, 3)),
        ("conv", EXAMPLES, (4, 5, 6)),
    ],
)
def test_rows_that_are_not_the_batch_are_refused_with_both_shapes(name, quarter, shape):
    mask = ComponentMask(quarter=quarter, rows=(2, 3))
    expected = rf"'{name}' must see the tokens of the batch, \(2, 3\), got rows of shape"
    with pytest.raises(LayerError, match=expected):
        mask.of(layer_on(name), torch.ones(shape))
