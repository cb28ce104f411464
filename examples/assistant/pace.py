"""How fast the example goes: 1 is a pace that can be watched, 0 does not wait at all."""

import os

PACE = float(os.environ.get("EXAMPLES_PACE", "1"))
