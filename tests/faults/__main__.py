"""python tests/faults [--seed 0] [--only 4,9] [--share 1.0] [--out benchmarks/results/faults.json]

With --only the other classes keep their lines in the file.

Injects the 30 classes of faults, runs the tests of those that a function alone cannot inject, prints a table, and
writes it as JSON. Exit codes: 0 every class passes; 1 a fault was silent, or ended in a traceback.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from faults.injected import CLASSES, Tally, inject  # noqa: E402


def run_tests(names: list[str], folder: Path) -> dict[str, list[tuple[str, str]]]:
    """{test: [(case, "" where it passed, else its message)]} of the tests of all classes, in one process."""
    if not names:  # pytest without a name would run all tests
        return {}
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=-q", f"--junit-xml={report}"]
    subprocess.run([*command, *names], cwd=HERE.parents[1], check=False)
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        message = "" if bad is None else (bad.get("message") or "failed")[:200]
        if any(child.tag == "skipped" for child in case):
            message = "skipped"
        found.setdefault(name, []).append((case.get("name", ""), message))
    return found


def scoreboard(numbers: list[int], seed: int, share: float) -> dict[str, Any]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        tests = run_tests([name for number in numbers for name in CLASSES[number].tests], Path(place))
        lines = []
        for number in numbers:
            tally = inject(number, seed, share, Path(place)) if CLASSES[number].inject else Tally()
            for name in CLASSES[number].tests:
                cases = tests[name] or [(name, "did not run")]
                tally.injected += len(cases)
                tally.caught += sum(not message for _, message in cases)
                tally.tracebacks += [f"{name} {case}: {message}" for case, message in cases if message]
            passed = not tally.silent and not tally.tracebacks and tally.caught == tally.injected > 0
            line = {"class": number, "name": CLASSES[number].name, "passed": passed, "injected": tally.injected}
            line |= {"caught": tally.caught, "silent": tally.silent[:20], "tracebacks": tally.tracebacks[:20]}
            line |= {"not run": CLASSES[number].needs, "tests": list(CLASSES[number].tests)}
            lines.append(line)
            print(
                f"{number:3} {'pass' if passed else 'FAIL'} {tally.injected:5} injected {tally.caught:5} caught "
                f"{len(tally.silent):3} silent {len(tally.tracebacks):3} tracebacks  {CLASSES[number].name}",
                flush=True,
            )
    return summed(lines, seed, share, round(time.monotonic() - began))


def summed(lines: list[dict[str, Any]], seed: int, share: float, seconds: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "share": share,
        "passed": sum(line["passed"] for line in lines),
        "classes": len(lines),
        "injected": sum(line["injected"] for line in lines),
        "silent": sum(len(line["silent"]) for line in lines),
        "tracebacks": sum(len(line["tracebacks"]) for line in lines),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "seconds": seconds,
        "lines": lines,
    }


def with_others(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """The result, with the lines of the classes that this run left out (`--only`), of the same seed and share."""
    old = json.loads(file.read_text()) if file.exists() else {}
    if [old.get("seed"), old.get("share")] != [result["seed"], result["share"]]:
        return result
    lines = {line["class"]: line for line in [*old["lines"], *result["lines"]]}
    more = old["seconds"] if len(result["lines"]) < len(CLASSES) else 0
    return summed([lines[n] for n in sorted(lines)], result["seed"], result["share"], result["seconds"] + more)


def page(result: dict[str, Any]) -> str:
    """docs/faults.md."""
    head = (
        f"# Faults\n\nThe command `make faults` injects faults into jmae, in {result['classes']} classes. It writes "
        "this page and `benchmarks/results/faults.json`.\nIn the last whole run it injected "
        f"{result['injected']} faults (seed {result['seed']}), and {result['passed']} of the {result['classes']} "
        f"classes pass.\nOf these faults {result['silent']} gave a wrong result without a message, and "
        f"{result['tracebacks']} ended in a traceback or failed in another way.\n\nA fault counts as *caught* if jmae "
        "refuses the input in one line, or if the fault changes no result.\nFor some classes tests inject the faults. "
        "Then each case of a test counts as one fault, however many faults the case injects.\n"
    )
    columns = ["class", "what goes wrong", "injected", "caught", "wrong without a message", "tracebacks", "not run"]
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in result["lines"]:
        counts = [line["injected"], line["caught"], len(line["silent"]), len(line["tracebacks"])]
        one = CLASSES[line["class"]]
        name = one.name + ("" if line["passed"] else " **fails**")
        table.append(f"| {line['class']} | {name} | {' | '.join(map(str, counts))} | {one.needs} |")
    absent = [str(n) for n in CLASSES if n not in {line["class"] for line in result["lines"]}]
    rest = f"\nNot run in this table: classes {', '.join(absent)}.\n" if absent else ""
    return "\n".join([head, *table]) + "\n" + rest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    numbers = [int(n) for n in given.only.split(",")] if given.only else list(CLASSES)
    print(f"seed {given.seed}, {given.share:g} of the numbers")
    result = scoreboard(numbers, given.seed, given.share)
    print(
        f"{result['passed']} of {result['classes']} classes pass, {result['injected']} faults injected, "
        f"{result['silent']} silent wrong results, {result['tracebacks']} tracebacks, {result['seconds']} s"
    )
    if given.out:
        whole = with_others(result, Path(given.out))
        Path(given.out).write_text(json.dumps(whole, indent=1) + "\n")
        (HERE.parents[1] / "docs" / "faults.md").write_text(page(whole))
    return int(result["passed"] < result["classes"])


if __name__ == "__main__":
    sys.exit(main())
