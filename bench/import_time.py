"""How much longer does `import gpustore` take than `import numpy`? Fresh processes, alternating."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 15
RESULTS = Path(__file__).parent / "results" / "import_time.json"


def machine() -> dict[str, object]:
    """Return what the figures were measured on."""
    import numpy

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
    }


def milliseconds(statement: str) -> float:
    """Time a fresh interpreter that runs the statement, from outside."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], env=environment, check=True)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Measure, print and write the result."""
    for statement in ("import numpy", "import gpustore"):
        milliseconds(statement)
    pairs = [(milliseconds("import numpy"), milliseconds("import gpustore")) for _ in range(RUNS)]
    over = statistics.median(ours - numpys for numpys, ours in pairs)
    result = {
        "machine": machine(),
        "runs": RUNS,
        "import_numpy_ms": round(statistics.median(numpys for numpys, _ in pairs), 1),
        "import_gpustore_ms": round(statistics.median(ours for _, ours in pairs), 1),
        "over_numpy_ms": round(over, 1),
        "goal_ms": 40,
    }
    print(json.dumps(result, indent=2))
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
