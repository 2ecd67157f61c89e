"""Try an installed gpustore as a newcomer would: the README's tour, then the commands on its files.

python .ci/smoke.py README.md        # in an empty folder; nothing of the checkout is imported
"""

import importlib.metadata
import importlib.resources
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

readme = Path(sys.argv[1]).read_text(encoding="utf-8")
sys.path = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
(tour,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=r"gpu\(\): the model stays on the CPU")
    exec(compile(tour, "README.md", "exec"), {})

import gpustore  # noqa: E402

installed = Path(gpustore.__file__).parent
assert installed.parent.name == "site-packages", f"not the installed package: {installed}"
assert importlib.metadata.version("gpustore") == gpustore.__version__
for name in ("py.typed", "cuda/blake3.cu", "cuda/pack.cu"):
    assert importlib.resources.files("gpustore").joinpath(name).is_file(), name
(commands,) = re.findall(r"```console\n(.*?)```", readme, re.DOTALL)
for line in commands.splitlines():
    subprocess.run(shlex.split(line.removeprefix("$ "), comments=True), check=True)
