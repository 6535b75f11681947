"""Print the oldest admitted versions of the dependencies and test tools, as constraints for pip.

    python tools/oldest_versions.py > constraints.txt

torch is left out: `make test-oldest` installs the version that constraints.txt names.
"""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement


def main() -> None:
    for requirement in map(Requirement, requires("unsc_hf") or ()):
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": "test"})
        oldest = [limit.version for limit in requirement.specifier if limit.operator == ">="]
        if wanted and oldest and requirement.name != "torch":
            print(f"{requirement.name}=={oldest[0]}")


if __name__ == "__main__":
    main()
