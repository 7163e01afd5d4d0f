"""python -m jmae.report DIR [DIR ...] --out FILE.html [--draws 2000] [--debug]

Writes one page about the evaluations of several runs: their figures side by side, paired differences with intervals,
and what differs in recipes and environments. DIR is a run folder or the folder of an evaluation. --draws is the number
of bootstrap draws for the intervals.

Exit codes: 0 the page is written; 2 a folder has no complete evaluation, or the runs have no case in common.
"""

import sys
from pathlib import Path

from jinja2 import UndefinedError

from jmae import recipe
from jmae.errors import InputError, exit_code
from jmae.report.compare import MOST, write_comparison


def main(argv: list[str]) -> int:
    folders, flags = recipe.split(argv)
    options = recipe.arguments(flags, __doc__ or "", ["out", "draws"])
    out = Path(options.get("out", ""))
    if not 1 <= len(folders) <= MOST or out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"name 1 to {MOST} run folders and the page: jmae report DIR DIR --out FILE.html")
    if not (draws := options.get("draws", "2000")).isdecimal() or not int(draws):
        raise InputError(f"--draws={draws}: give a whole number above 0")
    try:
        print(write_comparison(out, [Path(folder) for folder in folders], draws=int(draws)), file=sys.stderr)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, UndefinedError) as error:  # of a changed file
        where = ", ".join(folders)
        raise InputError(f"{where}: an evaluation is damaged ({error!r}): run jmae evaluate again") from error
    print(f"next: open {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
