"""python -m jmae.report DIR [DIR ...] --out FILE.html [--draws 2000] [--debug]

Puts the evaluations of several runs on one page: figures side by side, paired differences, what differs in recipes and
environments. DIR is a run folder, or an evaluation's own. Exit codes: 0 done; 2 a folder has no whole evaluation, or
the runs share no case.
"""

import sys
from pathlib import Path

from jmae import recipe
from jmae.errors import InputError, exit_code
from jmae.report.compare import MOST, write_comparison


def main(argv: list[str]) -> int:
    folders, flags = recipe.split(argv)
    given = recipe.arguments(flags, __doc__ or "", ["out", "draws"])
    out = Path(given.get("out", ""))
    if not 1 <= len(folders) <= MOST or out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"name 1 to {MOST} run folders and the page: python -m jmae.report DIR DIR --out=FILE.html")
    if not (draws := given.get("draws", "2000")).isdecimal() or not int(draws):
        raise InputError(f"--draws={draws}: a whole number above 0")
    print(write_comparison(out, [Path(folder) for folder in folders], draws=int(draws)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
