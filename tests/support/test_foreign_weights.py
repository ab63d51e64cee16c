"""Files of weights that others wrote: read where they are whole, and one line where they are not."""

import pytest
import torch
from safetensors.torch import save_file

from stablevm.support.errors import UserError
from stablevm.support.foreign_weights import read_weights
from tests.helpers.data_sets import one_line

STATE = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(2)}


def test_both_kinds_of_file_give_their_tensors(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    torch.save(STATE, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        torch.testing.assert_close(read_weights(tmp_path / name, "--weights"), STATE)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_wrong_bytes_are_one_line(damaged_torch_files):
    refused = 0
    for path in damaged_torch_files:
        try:
            read_weights(path, "--weights")  # where a wrong byte is in a number or in a name, the file is still one
        except UserError as error:
            assert str(error).startswith(f"--weights {path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > len(damaged_torch_files) / 2


def test_nothing_is_executed(tmp_path):
    torch.save(Harmful(tmp_path / "executed"), tmp_path / "w.pth")
    with pytest.raises(UserError, match="not safetensors nor a torch file of only tensors") as error:
        read_weights(tmp_path / "w.pth", "--weights")
    one_line(error)
    assert not (tmp_path / "executed").exists()


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)
