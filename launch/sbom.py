"""python launch/sbom.py [LOCKFILE] > sbom.json: the packages of a lock file as a CycloneDX 1.5 bill of materials."""

import json
import re
import sys
from pathlib import Path


def packages(text: str) -> list[tuple[str, str, list[str]]]:
    """(name, version, SHA-256 of its files) of each package of a lock file."""
    entries = re.split(r"\n(?=\S)", text.strip())
    found = [
        (re.match(r"([\w.-]+)==([^\s;\\]+)", entry), re.findall(r"sha256:([0-9a-f]{64})", entry)) for entry in entries
    ]
    return [(match[1], match[2], hashes) for match, hashes in found if match]


def bill(text: str) -> dict:
    """The bill of materials. A file's hash is that of one of the files that the index has for the version."""
    components = [
        {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
            "hashes": [{"alg": "SHA-256", "content": digest} for digest in hashes],
        }
        for name, version, hashes in packages(text)
    ]
    return {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}


if __name__ == "__main__":
    lock = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "requirements.lock"
    print(json.dumps(bill(lock.read_text()), indent=1))
