"""The report of the images sweep, piece by piece, and records of what can go wrong."""

from experiments.sweeps.images.report import document
from experiments.sweeps.images.report.claims import table
from experiments.sweeps.images.report.sections import read
from tests.experiments.sweeps.images.records import SEEDS, replaced, results_of

F_VI = {"guide": "factorized", "protocol": "fair"}


def section_of(records):
    (section,) = read(records)
    return section


def answered(records):
    return document(records).notes[0]


def texts(records):
    """Title and text of every warning of the only section."""
    return {note.title: note.text for note in document(records).parts[0].notes}


def claim(records, protocol, compared):
    """One line of the table of claims, by column."""
    lines = table(read(records)).values
    (line,) = [line for line in lines if (line["protocol"], line["compared at"]) == (protocol, compared)]
    return line


def with_a_diverged_cell(records):
    """The same, the first seed of A-VI k=64 under the published protocol diverged."""
    how = {"how": {"status": "diverged"}, "seeds": SEEDS[:1]}
    return replaced(records, guide="amortized", width=64, protocol="published", **how)


def unfinished(records):
    """The same, F-VI stopped by the stated most long before it had converged, from both starts."""
    records = replaced(records, **F_VI, how={"steps": 4000, "settle": 1500, "elbo": -200.0})
    for record in results_of(records, guide="amortized", width=256, protocol="fair"):
        record["result"]["continued"] = None
    return records
