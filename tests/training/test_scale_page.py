"""The code of docs/scale.md runs as it stands there, on a few rows and for a few steps."""

import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import torch

import pyro_avi as avi

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
OF_TABLES = [block for block in BLOCKS if "pyarrow" in block]
N = 20


def test_tables_become_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns = np.random.default_rng(0).normal(size=(4, N)).round(3)
    columns[1] = np.arange(N)
    columns[2, 7] = np.nan
    arrays = [pyarrow.array(column, from_pandas=True) for column in columns]
    arrays[1] = arrays[1].cast(pyarrow.int32())
    table, expected = pyarrow.table(arrays, names=list("abcd")), columns.T.astype(np.float32)
    from_parquet, from_text = OF_TABLES
    # Of several groups, the last one smaller.
    pyarrow.parquet.write_table(table, "x.parquet", row_group_size=8)

    exec(from_parquet, {"np": np})

    np.testing.assert_array_equal(np.load("x.npy"), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "x.parquet"}
    for path in tmp_path.iterdir():
        path.unlink()
    pyarrow.csv.write_csv(table, "x.csv")
    exec(from_text, {})
    exec(from_parquet, {"np": np})
    np.testing.assert_array_equal(np.load("x.npy"), expected)


def test_the_other_code_runs_in_its_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).random((N, 1, 4, 4), np.float32))
    model = avi.models.VAE(avi.models.DenseDecoder(2, (8,), (1, 4, 4)), size=N)
    names = {"np": np, "torch": torch, "avi": avi, "model": model, "guide": avi.AmortizedGuide(model)}
    few = {"100_000": "3", "batch_size=256": "batch_size=20", "=100": "=25", "num_workers=2": "num_workers=0"}
    code = "\n".join(block for block in BLOCKS if block not in OF_TABLES)
    for long, short in few.items():
        assert long in code
        code = code.replace(long, short)

    exec(code.replace("num_steps=3", "num_steps=3, progress=False"), names)

    assert len(names["found"]["mean"]) == N and np.isfinite(names["found"]["amortization"]).all()
