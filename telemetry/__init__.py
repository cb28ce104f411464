"""What the runtime tells of itself: spans, metrics and log records."""

import os

from telemetry.environment import take_out

__all__ = ["IGNORED"]

#: Variables that nobody can read. Taken out here: some of OpenTelemetry reads at its import.
IGNORED = tuple(take_out(os.environ))
