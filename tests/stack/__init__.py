"""Tests with real programs: collector, Prometheus, Alertmanager, Jaeger and Loki.

`.ci/programs` provides them. How a real Sereno is started comes from tests/process.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "process"))
