"""For tiny_pipelines, the toy pipelines of the tests of diffusion."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # with importlib mode no folder of tests is on the path
