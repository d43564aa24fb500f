"""What every report says of its records: by what they were made, what forbids to compare them, and all their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from experiments.reporting.document import Document, Note, counted, pick
from experiments.reporting.tables import Column, Table


def made_by(records: Mapping[str, Mapping]) -> Document:
    """The commits, machines and commands of the records.

    Raises:
        ReportError: if a record does not say it.
    """
    groups: dict[tuple, list[Mapping]] = {}
    for record in records.values():
        groups.setdefault((_commit(record), _machine(record), pick(record, "provenance", "command")), []).append(record)
    columns = [
        Column("commit", lambda group: _commit(group[0]), "page"),
        Column("machine", lambda group: _machine(group[0]), "page"),
        Column("torch", lambda group: pick(group[0], "provenance", "versions", "torch"), "page"),
        Column("cells", len, "page"),
        Column("command", lambda group: pick(group[0], "provenance", "command"), "page"),
    ]
    note = "Cells of a machine that ran at once shared it: seconds do not repeat, steps do."
    return Document("Made by", tables=[Table("", columns, [groups[key] for key in sorted(groups)], note)])


def warnings(records: Mapping[str, Mapping]) -> list[Note]:
    """What forbids to compare these records with one another or with others."""
    return [*_mixed(records), *_not_compiled(records)]


def _commit(record: Mapping) -> str:
    return str(pick(record, "provenance", "commit"))[:7] + (" and changes" if record["provenance"].get("dirty") else "")


def _machine(record: Mapping) -> str:
    machine = pick(record, "provenance", "machine")
    return f"{machine['processor']}, {machine['cores']} cores"


def _mixed(records: Mapping[str, Mapping]) -> Iterator[Note]:
    """Of records made by different code or machines."""
    commits, machines = ({told(record) for record in records.values()} for told in (_commit, _machine))
    if len(commits) > 1 or len(machines) > 1:
        text = (
            f"The cells were made by {counted(len(commits), 'commit')} on {counted(len(machines), 'kind')} of machine: their "
            "seconds, and numbers that later code computes in another way, do not compare."
        )
        yield Note("warning", text, "Mixed")


def _not_compiled(records: Mapping[str, Mapping]) -> Iterator[Note]:
    """Of records with numbers that were evaluated eagerly though they were to be compiled."""
    reasons = [record["provenance"].get("fallbacks") or [] for record in records.values()]
    if count := sum(map(bool, reasons)):
        text = (
            f"{count} of {len(records)} cells hold numbers that were to be compiled and were evaluated eagerly, which rounds "
            "sums differently: the last digits, and what a choice makes of them, may be those of no other machine. "
        )
        told = sorted({reason for told in reasons for reason in told})
        yield Note("warning", text + " ".join(told), "Not compiled")


def cells_csv(records: Mapping[str, Mapping]) -> str:
    """A line a record and a column a number or word, by its path; curves and other lists are left to the records.

    >>> print(cells_csv({"k": {"key": "k", "result": {"elbo": 1.5, "curve": [1, 2]}}}), end="")
    key,result.elbo
    k,1.5
    """
    # Seconds to import.
    import pandas

    frame = pandas.json_normalize([dict(record) for record in records.values()])
    return frame.drop(columns=[name for name in frame if frame[name].map(type).eq(list).any()]).to_csv(index=False)
