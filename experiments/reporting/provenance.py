"""What every report says of its records: by what they were made, what forbids to compare them, and all their numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from operator import itemgetter

import pandas

from experiments.reporting.document import Document, Note
from experiments.reporting.records import pick
from experiments.reporting.tables import Column, Table


def made_by(records: Mapping[str, Mapping]) -> Document:
    """The commits, machines and commands of the records, and the file of all cells.

    Raises:
        ReportError: if a record does not say it.
    """
    told = (Column("commit", _commit, "page"), Column("machine", _machine, "page"))
    told += (Column("torch", "provenance.versions.torch", "page"), Column("command", "provenance.command", "page"))
    groups = Counter(tuple(str(column.of(record)) for column in told) for record in records.values())
    columns = [Column("cells", lambda group: groups[group], "page")]
    columns += [Column(column.name, itemgetter(place), "page") for place, column in enumerate(told)]
    note = "Cells of a machine that ran at once shared it: seconds do not repeat, steps do."
    return Document("Made by", tables=[Table("", columns, sorted(groups), note), cells(records)])


def cells(records: Mapping[str, Mapping]) -> Table:
    """A line a record and a column a number or word, by its path; curves and other lists are left to the records.

    >>> cells({"k": {"key": "k", "result": {"elbo": 1.5, "curve": [1, 2]}}}).numbers()
    [{'key': 'k', 'result.elbo': 1.5}]
    """
    frame = pandas.json_normalize([dict(record) for record in records.values()]).astype(object)
    columns = [Column(name, itemgetter(name), "csv") for name in frame if not frame[name].map(type).eq(list).any()]
    return Table("Cells", columns, frame.to_dict("records"), file="cells")


def warnings(records: Mapping[str, Mapping]) -> Iterator[Note]:
    """What forbids to compare these records with one another or with others: mixed origins, numbers evaluated eagerly."""
    commits, machines = ({told(record) for record in records.values()} for told in (_commit, _machine))
    if len(commits) > 1 or len(machines) > 1:
        text = f"Commits: {len(commits)}, kinds of machine: {len(machines)}. The seconds of their cells do not compare."
        yield Note("warning", text, "Mixed")
    reasons = [record["provenance"].get("fallbacks") or [] for record in records.values()]
    if count := sum(map(bool, reasons)):
        text = (
            f"{count} of {len(records)} cells were evaluated eagerly in part: their last digits may differ elsewhere."
        )
        yield Note("warning", " ".join([text, *sorted({each for told in reasons for each in told})]), "Not compiled")


def _commit(record: Mapping) -> str:
    return str(pick(record, "provenance", "commit"))[:7] + (" and changes" if record["provenance"].get("dirty") else "")


def _machine(record: Mapping) -> str:
    machine = pick(record, "provenance", "machine")
    return f"{machine['processor']}, {machine['cores']} cores"
