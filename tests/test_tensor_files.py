"""Files of tensors: what is read is what was written, or is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyro_avi.tensor_files import read_tensors, write_tensors

TENSORS = {
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "none": torch.zeros(0, 2),
    "scalar": torch.tensor(2.0, dtype=torch.double),
    "signs": torch.tensor([True, False]),
    "table": torch.tensor([[1.0, float("nan")]]),
}
HEADER = {"format": 1, "kind": "a table", "size": 1.5}


def read(path):
    return read_tensors(path, key="own", writer="this test")


def is_whole(found):
    header, tensors = found
    return (
        header == HEADER
        and tensors.keys() == TENSORS.keys()
        and all(
            tensors[name].dtype == tensor.dtype and torch.equal(bits(tensors[name]), bits(tensor))
            for name, tensor in TENSORS.items()
        )
    )


def bits(tensor):
    return torch.tensor(list(tensor.shape) + tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "file", TENSORS, HEADER, key="own")
    return tmp_path / "file"


def test_what_is_read_is_what_was_written(path):
    assert is_whole(read(path))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("size", [1, 3])
def test_a_tensor_without_strides_is_written_as_its_values(tmp_path, size):
    write_tensors(tmp_path / "file", {"same": torch.tensor(2.0).expand(size)}, HEADER, key="own")
    assert torch.equal(read(tmp_path / "file")[1]["same"], torch.full((size,), 2.0))


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flipped_bit_and_no_cut_passes(path, every):
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), every):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refuses(path)
    for length in range(0, len(content), every):
        path.write_bytes(content[:length])
        refuses(path)
    path.write_bytes(content + b"\0")
    refuses(path)


def refuses(path):
    # Under another key the header is that of another writer, and none here.
    try:
        assert read(path)[0] is None
    except ValueError as error:
        assert "Expected a whole file written by this test at" in str(error)


def test_tensors_of_one_file_under_the_header_of_another_are_refused(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "table": torch.zeros(1, 2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="its checksum is another"):
        read(path)


def test_files_of_versions_before_checksums_are_read(path):
    save_file(TENSORS, path, metadata={"own": '{"format": 1, "kind": "a table", "size": 1.5}'})
    assert is_whole(read(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "its header is no dictionary but a list"), ("[" * 10**5, "recursion"), ("{", "Expecting")],
)
def test_a_header_that_is_none_is_refused(text, message, path):
    save_file(TENSORS, path, metadata={"own": text})
    with pytest.raises(ValueError, match=f"(?s)Expected a whole file written by this test at .*{message}"):
        read(path)
