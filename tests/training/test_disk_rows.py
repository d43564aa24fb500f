"""Tables on disk: the same trainings as with tables in memory, in files that refuse what would end in wrong rows."""

import copy
import errno
import gc
import mmap
import os
import pickle
import warnings

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_avi as avi
from pyro_avi.rows import disk_table, mapped_file
from pyro_avi.rows.disk_table import DiskTable
from pyro_avi.rows.mapped_file import MappedFile
from tests.marks import needs_compiler
from tests.training.test_host_rows import OPTIONS, B, Drawn, Given, N, X, train, twice

pytestmark = pytest.mark.skipif(os.name != "posix", reason="maps files")
KIND = {"plates": ["data"], "latents": ["z"], "family": "DiagonalNormal"}


def on_disk(model, path, **options):
    return avi.FactorizedGuide(model, rows_on="disk", rows_path=path, **options)


def steps(model, guide, num_steps=6, **options):
    batches = avi.minibatches(X, batch_size=B)
    return avi.fit(model, guide, batches=batches, num_steps=num_steps, lr=0.02, progress=False, **options)


@pytest.mark.parametrize("model_class", [Given, Drawn])
@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"dense"}))
def test_eager_steps_are_bit_equal_to_those_of_a_table_in_memory(name, model_class, tmp_path):
    options = {"compile": False, **OPTIONS[name]}
    disk, memory = train(model_class, "disk", rows_path=tmp_path, **options), train(model_class, "cpu", **options)

    assert torch.equal(disk[0], memory[0]) and torch.equal(disk[1], memory[1])


def test_rows_twice_in_a_batch_move_as_in_memory(tmp_path):
    disk, memory = (
        train(Given, rows_on, rows_path=path, batches=twice(), compile=False)
        for rows_on, path in (("disk", tmp_path), ("cpu", None))
    )
    assert torch.equal(disk[0], memory[0]) and torch.equal(disk[1], memory[1])


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("model_class", [Given, Drawn])
def test_compiled_steps_are_bit_equal_to_those_of_a_table_in_memory(model_class, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk, memory = (
            train(model_class, rows_on, rows_path=path, compile=True, clip_norm=0.7)
            for rows_on, path in (("disk", tmp_path), ("cpu", None))
        )
    assert torch.equal(disk[0], memory[0]) and torch.equal(disk[1], memory[1])


def test_a_second_training_begins_with_new_moments(tmp_path):
    tables = []
    for rows_on, path in (("disk", tmp_path), ("cpu", None)):
        torch.manual_seed(1)
        model = Given()
        guide = avi.FactorizedGuide(model, rows_on=rows_on, rows_path=path)
        # The second visits other rows first than the first has ended with.
        for seed in (0, 1):
            batches = avi.minibatches(X, batch_size=B, seed=seed)
            avi.fit(model, guide, batches=batches, num_steps=4, lr=0.02, progress=False)
        tables.append(guide.table)
    assert torch.equal(*tables)


def test_a_batch_touches_its_rows_and_no_others(tmp_path):
    table = DiskTable(torch.arange(6.0).view(2, 3), (8,), tmp_path / "table", KIND)
    index = torch.tensor([5, 1, 5])
    first, second, visits = table.moments()

    with torch.no_grad():
        assert torch.equal(table.read(index), torch.tensor([[3.0, 4, 5], [3, 4, 5], [3, 4, 5]]))
    # Reading writes nothing.
    assert not table.table.any() and table.version == 0
    table.read_to_move(index)
    assert table.table.any(1).nonzero().flatten().tolist() == [1, 5]
    first[5], visits[5] = 7.0, 1.0
    table.read_to_move(index)
    assert first[5].eq(7).all() and visits[5] == 1 and not first[1].any()
    # Of a new training the moments of before are zeros once a row is in a batch.
    assert table.moments()[0][5].eq(7).all()
    table.read_to_move(index)
    assert not first[5].any() and not visits[5].any() and not second.any()
    # All rows, where they are asked for.
    assert torch.equal(table.whole(), torch.arange(6.0).view(2, 3).repeat(4, 1))
    assert torch.equal(table.read(None), table.read(torch.arange(8)))


def test_a_new_table_is_reserved_and_not_written(tmp_path):
    size = 10**6
    DiskTable(torch.ones(5, 16), (size,), tmp_path / "table", KIND)

    found, row_bytes = (tmp_path / "table.rows").stat(), (3 * 16 + 2) * 4
    # The disk cannot become too full for it later.
    assert found.st_blocks * 512 >= size * row_bytes
    assert found.st_size == MappedFile._HEAD + size * row_bytes


def test_the_system_is_asked_for_the_pages_of_the_rows(tmp_path, monkeypatch):
    # As of a file that memory is too small for.
    monkeypatch.setattr(mapped_file, "_SHARE", 0.0)
    file, page = MappedFile(tmp_path / "file", 5000, 3, torch.float32, create=True), mmap.PAGESIZE
    asked = []

    class Memory:
        def madvise(self, what, start, length):
            assert what == mmap.MADV_WILLNEED and length == page
            asked.append(start)

    file._memory = Memory()
    file.will_need(torch.tensor([4999, 0, 340, 341, 0]))

    # The first page holds the head. Of pages of 4 KiB, row 341 begins in the first with rows and ends in the second.
    assert asked == sorted({(page + 12 * row + byte) // page * page for row in (4999, 0, 340, 341) for byte in (0, 11)})


def test_another_guide_goes_on_with_a_table(tmp_path):
    model = Given()
    guide = on_disk(model, tmp_path)
    steps(model, guide)
    rows = guide.variational_parameters(X).detach().clone()

    with pytest.raises(ValueError, match="Expected a table of no other guide, got .*rows, which a guide of this"):
        on_disk(model, tmp_path).setup(X)
    del guide
    gc.collect()

    assert torch.equal(on_disk(model, tmp_path).setup(X).variational_parameters(X), rows)


def test_tables_of_another_kind_are_refused(tmp_path):
    on_disk(Given(), tmp_path).setup(X)
    gc.collect()
    with pytest.raises(
        ValueError, match=r"a table with family = MultivariateNormal at .*safetensors, got DiagonalNormal"
    ):
        on_disk(Given(), tmp_path, family=avi.MultivariateNormal()).setup(X)
    with pytest.raises(ValueError, match=r"Expected a table with sizes = \[13\] at .*, got \[12\]"):
        on_disk(Given(N + 1), tmp_path).setup(torch.cat([X, X[:1]]))


def test_tables_of_another_format_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_table, "_FORMAT", 1)
    on_disk(Given(), tmp_path).setup(X)
    gc.collect()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Expected a table with format = 2 at .*safetensors, got 1"):
        on_disk(Given(), tmp_path).setup(X)


def test_the_rows_of_a_batch_are_beside_their_moments(tmp_path):
    table = DiskTable(torch.ones(5, 16), (1000,), tmp_path / "table", KIND)
    places = [tensor[700].data_ptr() for tensor in (table.table, *table.moments())]
    assert [place - places[0] for place in places] == [0, 64, 128, 192]


def test_svi_trains_the_rows_in_the_file(tmp_path):
    tables = []
    for rows_on, path in (("disk", tmp_path), ("cpu", None)):
        torch.manual_seed(1)
        pyro.clear_param_store()
        model = Given()
        guide = avi.FactorizedGuide(model, rows_on=rows_on, rows_path=path)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for index in (torch.tensor([3, 1]), torch.tensor([1, 7]), None):
            svi.step(*((X,) if index is None else (X[index], index)))
        tables.append(guide.table.detach().clone())
    pyro.clear_param_store()
    assert torch.equal(*tables)


@pytest.mark.parametrize("change", [-8, 8])
def test_files_of_another_length_are_refused(change, tmp_path):
    on_disk(Given(), tmp_path).setup(X)
    gc.collect()
    file = tmp_path / "table0.rows"
    os.truncate(file, file.stat().st_size + change)

    with pytest.raises(
        ValueError, match=r"Expected [\d,]+ bytes for 12 rows in .*table0.rows, got [\d,]+: the file was cut"
    ):
        on_disk(Given(), tmp_path).setup(X)


def test_a_table_that_was_never_finished_is_begun_anew(tmp_path):
    guide = on_disk(Given(), tmp_path).setup(X)
    rows = guide.variational_parameters(X).detach().clone()
    del guide
    gc.collect()
    # As after an interruption: what is written last is not there.
    (tmp_path / "table0.safetensors").unlink()
    os.truncate(tmp_path / "table0.rows", 7)

    assert torch.equal(on_disk(Given(), tmp_path).setup(X).variational_parameters(X), rows)


def no_space(fd, offset, length):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_before_any_work(tmp_path, monkeypatch):
    model = Given()
    guide = on_disk(model, tmp_path / "one")
    steps(model, guide)
    before = guide.table.detach().clone()
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(
        ValueError, match="Expected .* GB free for the rows of a table at .*, got: No space left on device"
    ):
        on_disk(Given(), tmp_path / "other").setup(X)
    model.size = N + 3

    with pytest.raises(ValueError, match="No space left on device"):
        guide.append_rows(3)

    # Nothing has changed.
    model.size = N
    assert torch.equal(guide.table, before)
    steps(model, guide)


def test_the_file_is_as_before_where_rows_to_append_find_no_space(tmp_path, monkeypatch):
    table = DiskTable(torch.ones(5, 16), (5,), tmp_path / "table", KIND)
    sizes = {file: file.stat().st_size for file in tmp_path.iterdir()}
    monkeypatch.setattr(os, "posix_fallocate", no_space)

    with pytest.raises(ValueError, match="No space left"):
        table.append(torch.ones(3, 16))

    assert {file: file.stat().st_size for file in tmp_path.iterdir()} == sizes
    assert table.sizes == (5,) and table.read(None).shape == (5, 16)


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Expected to write the rows of a table at .*, got: "):
        on_disk(Given(), tmp_path / "file" / "folder").setup(X)


@pytest.mark.parametrize(("rows_on", "path"), [("disk", None), ("cpu", "folder"), (None, "folder")])
def test_the_folder_goes_with_the_disk(rows_on, path):
    with pytest.raises(ValueError, match="Expected rows_path=, a folder, with rows_on='disk' and nothing else"):
        avi.FactorizedGuide(Given(), rows_on=rows_on, rows_path=path)


def test_saved_guides_find_their_rows(tmp_path):
    model = Given()
    guide = on_disk(model, tmp_path / "rows")
    steps(model, guide)
    rows = guide.variational_parameters(X).detach().clone()
    avi.save(guide, tmp_path / "guide")
    assert (tmp_path / "guide").stat().st_size < 3000
    steps(model, guide)
    avi.save(guide, tmp_path / "later")
    later = guide.variational_parameters(X).detach().clone()
    del guide
    gc.collect()
    # The rows have moved since.
    with (
        pytest.warns(UserWarning, match="parameters of the model"),
        pytest.raises(ValueError, match="as the guide was saved"),
    ):
        avi.load(tmp_path / "guide", model, X, rows_path=tmp_path / "rows")
    # The path in a file is only named, never gone to.
    with (
        pytest.warns(UserWarning, match="parameters of the model"),
        pytest.raises(ValueError, match="Expected rows_path= .*, got none.\nIt was saved with them in .*rows"),
    ):
        avi.load(tmp_path / "guide", model, X)
    gc.collect()
    (tmp_path / "rows").rename(tmp_path / "elsewhere")

    again = avi.load(tmp_path / "later", model, X, rows_path=tmp_path / "elsewhere")

    assert torch.equal(again.variational_parameters(X), later) and not torch.equal(rows, later)
    assert again.rows_path == tmp_path / "elsewhere"


def test_a_table_in_memory_can_be_put_on_disk(tmp_path):
    model = Given()
    memory = avi.FactorizedGuide(model)
    steps(model, memory)

    guide = on_disk(model, tmp_path).setup(X)
    guide.load_state_dict(memory.state_dict())

    assert torch.equal(guide.table, memory.table) and guide.state_dict() == {}


def test_rows_are_appended_and_moved(tmp_path):
    tables = []
    for rows_on, path in (("disk", tmp_path), ("cpu", None)):
        torch.manual_seed(1)
        model = Given()
        guide = avi.FactorizedGuide(model, rows_on=rows_on, rows_path=path)
        steps(model, guide)
        model.size = N + 2
        guide.append_rows(2)
        more = torch.cat([X, X[:2]])
        avi.fit(model, guide, more, num_steps=3, lr={"local": 0.1}, progress=False)
        tables.append(guide.table.detach().clone())
        refined = avi.refine(model, guide, more, num_steps=2, progress=False)
        by_row = guide.posterior_by_row(avi.minibatches(more, batch_size=4), num_samples=2, progress=False)
        tables += [refined.table.detach(), by_row["z"]]
    assert all(torch.equal(one, other) for one, other in zip(tables[:3], tables[3:], strict=True))
    del guide
    gc.collect()
    # The files know of them.
    assert torch.equal(on_disk(Given(N + 2), tmp_path).setup(more).table, tables[0])


def test_a_row_is_never_moved_by_what_is_not_finite(tmp_path):
    model = Given()
    guide = on_disk(model, tmp_path)
    steps(model, guide)
    before = guide.table.detach().clone()
    bad = X.clone()
    bad[3] = torch.nan
    with pytest.raises(avi.DivergedError, match="not finite"):
        avi.fit(model, guide, batches=avi.minibatches(bad, batch_size=B), num_steps=20, lr=0.02, progress=False)
    assert guide.table.isfinite().all() and guide.table.shape == before.shape


def test_what_would_copy_a_table_is_refused(tmp_path):
    model = Given()
    guide = on_disk(model, tmp_path / "rows")
    result = steps(model, guide)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="two guides cannot have one table"):
            copied(guide)
    with pytest.raises(ValueError, match="a table on disk is not copied"):
        result.save(tmp_path / "training")
    with pytest.raises(ValueError, match="Expected torch.float64, in which the table at .* is kept, got torch.float32"):
        guide.float()
    with pytest.raises(ValueError, match="Expected optimizer=None"):
        steps(model, guide, optimizer=torch.optim.Adam)
    in_memory = avi.FactorizedGuide(model)
    steps(model, in_memory).save(tmp_path / "training")
    before = guide.table.detach().clone()
    for option in ("resume", "checkpoint"):
        with pytest.raises(ValueError, match="a table on disk is not copied"):
            steps(model, guide, num_steps=9, **{option: tmp_path / "training"})
    assert torch.equal(guide.table, before)


def test_the_table_stays_when_the_guide_is_moved(tmp_path):
    guide = on_disk(Given(), tmp_path).setup(X)
    values = guide.table.detach().clone()

    guide.to("meta")

    assert guide.table.device.type == "cpu" and torch.equal(guide.table, values)
    assert guide.gather_rows(X, torch.tensor([3, 1])).rows["data"].device.type == "meta"
