"""Train the guides on all models or on those named, and print the table of the documentation."""

import argparse
import sys

from gallery import zoo


def main() -> None:
    """Read the arguments, train, print."""
    parser = argparse.ArgumentParser(prog="python -m gallery.zoo", description=zoo.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(zoo.names())}; all by default")
    names = parser.parse_args().names or zoo.names()
    unknown = sorted(set(names) - set(zoo.names()))
    if unknown:
        parser.error(f"Expected names among {', '.join(zoo.names())}, got {', '.join(unknown)}.")
    outcomes = {}
    for name in names:
        outcomes[name] = zoo.solve(zoo.problem(name))
        print(name, outcomes[name], sep=": ", file=sys.stderr)
    print(zoo.table(outcomes))


if __name__ == "__main__":
    main()
