"""The report of the images sweep, piece by piece, and records of what can go wrong."""

from experiments.sweeps.images.report import document
from experiments.sweeps.images.report.answer import answer
from experiments.sweeps.images.report.records import read
from experiments.sweeps.images.report.sections import sections
from experiments.sweeps.images.report.tables import claims
from tests.experiments.sweeps.images.records import SEEDS, replaced, results_of

F_VI = {"guide": "factorized", "protocol": "fair"}


def section_of(records):
    (section,) = sections(read(records))
    return section


def answered(records):
    return answer(section_of(records))


def texts(records):
    """Title and text of every finding of the only section."""
    (found,) = document(records).sections
    return {finding.title: finding.text for finding in found.findings}


def claim(records, protocol, compared):
    """One line of the table of claims, by column."""
    table = claims(sections(read(records)))
    (line,) = [row for row in table.rows if row[1:3] == [protocol, compared]]
    return dict(zip(table.header, line, strict=True))


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
